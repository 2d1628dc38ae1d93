"""`exporter.yml`: one section a collector, each declared beside the collector that it configures."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec

from exporter.collectors import COLLECTORS, FED_BY_PM2, Watched
from exporter.collectors.directory import DirectoryOptions
from exporter.collectors.events import EventsOptions
from exporter.collectors.filesystem import FilesystemOptions
from exporter.collectors.host import HostOptions
from exporter.collectors.http import HttpOptions
from exporter.collectors.mongodb import MongodbOptions
from exporter.collectors.pm2 import PM2Options
from exporter.collectors.process import ProcessOptions
from exporter.grammar import Strict, default
from exporter.scrape import Collector

_KNOWN = msgspec.Meta(extra_json_schema={"propertyNames": {"enum": list(COLLECTORS)}})


class Config(Strict, frozen=True, kw_only=True):
    """The whole file; every section may be left out."""

    collectors: Annotated[dict[str, bool], _KNOWN] = default({})
    """Which collectors are on, by name; one that is not named here is on. A `--[no-]collector.NAME` flag wins."""
    pm2: PM2Options = default(PM2Options())
    """PM2's process list."""
    process: ProcessOptions = default(ProcessOptions())
    """What the apps' process trees use."""
    events: EventsOptions = default(EventsOptions())
    """PM2's event bus."""
    host: HostOptions = default(HostOptions())
    """This machine."""
    filesystem: FilesystemOptions = default(FilesystemOptions())
    """Mounted filesystems."""
    directory: DirectoryOptions = default(DirectoryOptions())
    """Directories whose size matters."""
    mongodb: MongodbOptions = default(MongodbOptions())
    """One MongoDB."""
    http: HttpOptions = default(HttpOptions())
    """HTTP probes, those made at every scrape and those asked for on /probe."""

    def __post_init__(self) -> None:
        """Know every collector named."""
        for name in self.collectors:
            if name not in COLLECTORS:
                raise ValueError(f"collectors: there is no collector {name!r}; there are: {', '.join(COLLECTORS)}")


def build(
    config: Config, flags: Mapping[str, bool], *, default: bool = True
) -> dict[str, tuple[object, Callable[[], Collector]]]:
    """Return how to make each collector that is on, with the key of all that it is made from.

    A flag wins over the file, the file over `default`. Two equal keys mean: the same collector.
    """
    watched = Watched.of(config.pm2)
    return {
        name: _recipe(name, getattr(config, name), watched)
        for name in COLLECTORS
        if flags.get(name, config.collectors.get(name, default))
    }


def _recipe(name: str, options: Any, watched: Watched) -> tuple[object, Callable[[], Collector]]:  # noqa: ANN401 -- any section
    return (options, watched.options if name in FED_BY_PM2 else None), lambda: COLLECTORS[name](options, watched)
