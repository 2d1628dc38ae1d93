"""One scrape: the collectors side by side, within the deadline; timing and failure written once, for all of them.

A collector that fails or is late costs its own samples and nothing else, and says so in `pm2_exporter_collector_success`.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from exporter.exposition import Desc, Metric, gauge

OFFSET = 0.5
"""Seconds taken off Prometheus's own timeout, for rendering and the way back."""


class Collector(Protocol):
    """One source of metrics; what it reads is its own affair.

    A collector may also have `async def run(self) -> None`, background work for its whole life, cancelled at the end, and
    `async def close(self) -> None`, called after that. Two scrapes may overlap, so `read` may be entered again before it
    has returned.
    """

    descs: tuple[Desc, ...]
    """Every metric this collector can emit."""

    async def read(self, within: float) -> Any:  # noqa: ANN401 -- only `metrics` knows what was seen
        """Look, for at most `within` seconds; a source that does not answer by then is seen as failed.

        What a source's failure means (`mongodb_up 0`) is part of what was seen. Raises only when nothing useful can be
        said; that costs this collector's samples of this scrape and nothing else.
        """
        ...

    def metrics(self, seen: Any, /) -> Iterable[Metric]:  # noqa: ANN401 -- the same
        """Turn what was seen into metrics; nothing is emitted for what was not seen. Pure."""
        ...


SUCCESS = gauge(
    "pm2_exporter_collector_success",
    "Whether the collector could say what it saw, by the deadline (1) or not (0).",
    ("collector",),
    source="the exporter itself",
)
DURATION = gauge(
    "pm2_exporter_collector_duration_seconds",
    "How long the collector took in this scrape.",
    ("collector",),
    source="the exporter itself",
)


class Outcome(NamedTuple):
    """What came of one collector in one scrape; `error` is empty on success."""

    collector: str
    seconds: float
    metrics: tuple[Metric, ...]
    error: str


async def scrape(collectors: Mapping[str, Collector], within: float) -> tuple[Outcome, ...]:
    """Run `collectors` side by side; every one of them has an outcome after at most `within` seconds.

    A collector is told to finish a little earlier than it is cut off, so that it can report its source's silence itself.
    """
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_collect(name, collector, within), name=f"collect {name}")
            for name, collector in collectors.items()
        ]
    return tuple([task.result() for task in tasks])


async def _collect(name: str, collector: Collector, within: float) -> Outcome:
    begin = time.perf_counter()
    metrics: tuple[Metric, ...] = ()
    error = ""
    try:
        async with asyncio.timeout(within):
            seen = await collector.read(within * 0.9)
            metrics = tuple(collector.metrics(seen))
    except TimeoutError:
        error = f"not done within {within:g}s"
    except Exception as failure:  # noqa: BLE001 -- whatever a collector raises, it costs its own samples only
        error = f"{type(failure).__name__}: {failure}"
    return Outcome(name, time.perf_counter() - begin, metrics, error)


def account(outcomes: Iterable[Outcome]) -> tuple[Metric, Metric]:
    """Return the success and the duration of every collector."""
    outcomes = tuple(outcomes)
    return (
        Metric(SUCCESS, [((outcome.collector,), int(not outcome.error)) for outcome in outcomes]),
        Metric(DURATION, [((outcome.collector,), outcome.seconds) for outcome in outcomes]),
    )


def budget(timeout_header: str | None, *, otherwise: float = 10.0, offset: float = OFFSET) -> float:
    """Return the seconds a scrape may take, from X-Prometheus-Scrape-Timeout-Seconds less `offset`.

    A header that is missing or no positive number counts as `otherwise`; a timeout shorter than twice the offset is halved
    instead, and nothing is done in less than a hundredth of a second.
    """
    try:
        timeout = float(timeout_header or "")
    except ValueError:
        timeout = otherwise
    if not 0 < timeout < float("inf"):
        timeout = otherwise
    return max(timeout - offset, timeout / 2, 0.01)
