"""What is looked at: one module and one line in COLLECTORS each.

A collector reads (the I/O, once per scrape) and turns what it has seen into metrics (pure). It knows neither the scrape,
which says what a collector is, nor its neighbours; it keeps nothing for the next scrape but counters that must not run
backwards, and it never acts.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from exporter.collectors.directory import DirectoryCollector
from exporter.collectors.events import EventsCollector
from exporter.collectors.filesystem import FilesystemCollector
from exporter.collectors.host import HostCollector
from exporter.collectors.http import HttpCollector
from exporter.collectors.mongodb import MongodbCollector
from exporter.collectors.pm2 import PM2Collector, PM2Options, home, source
from exporter.collectors.process import ProcessCollector
from exporter.pm2.client import Source


class Watched(NamedTuple):
    """The one PM2 that all collectors of an exporter watch."""

    options: PM2Options
    home: Path
    source: Source

    @classmethod
    def of(cls, options: PM2Options) -> "Watched":
        """Return the PM2 that `options` name."""
        return cls(options, home(options, os.environ), source(options, os.environ))


COLLECTORS: dict[str, Callable[[Any, Watched], Any]] = {
    "pm2": lambda options, pm2: PM2Collector(options, pm2.source),
    "process": lambda options, pm2: ProcessCollector(options, pm2.source),
    "events": lambda options, pm2: EventsCollector(options, pm2.home, pm2.source),
    "host": lambda options, _: HostCollector(options),
    "filesystem": lambda options, _: FilesystemCollector(options),
    "directory": lambda options, _: DirectoryCollector(options),
    "mongodb": lambda options, _: MongodbCollector(options),
    "http": lambda options, _: HttpCollector(options),
}
FED_BY_PM2 = frozenset({"pm2", "process", "events"})
"""The collectors that watch PM2, and so are made anew when another PM2 is to be watched."""
