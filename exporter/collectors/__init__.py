"""What is looked at: one module and one line in COLLECTORS each.

A collector reads (the I/O, once per scrape) and turns what it has seen into metrics (pure). It knows neither the scrape nor
its neighbours, keeps nothing for the next scrape but counters that must not run backwards, and never acts.
"""

from collections.abc import Iterable
from typing import Protocol, TypeVar

from exporter.exposition import Desc, Metric

Seen = TypeVar("Seen")


class Collector(Protocol[Seen]):
    """One source of metrics.

    A collector may also have `async def run(self) -> None`: background work for its whole life, cancelled at the end. Two
    scrapes may overlap, so `read` may be entered again before it has returned.
    """

    descs: tuple[Desc, ...]
    """Every metric this collector can emit."""

    async def read(self, within: float) -> Seen:
        """Look, for at most `within` seconds; a source that does not answer by then is seen as failed.

        What the source's failure means to a metric (`mongodb_up 0`) is part of what was seen. Raises only when nothing
        useful can be said; that costs this collector's samples of this scrape and nothing else.
        """
        ...

    def metrics(self, seen: Seen) -> Iterable[Metric]:
        """Turn what was seen into metrics; nothing is emitted for what was not seen. Pure."""
        ...
