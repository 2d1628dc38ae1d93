"""The counters: at 0 before the first ending, bounded in number, never backwards, and silent about what was not seen."""

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.collectors.events import DESCS, EventsCollector, EventsOptions, Tally
from exporter.exposition import Format, render
from exporter.grammar import Duration
from exporter.pm2.client import PM2Error, Reason
from exporter.pm2.events import Cause, Exit, Heard, OverLimit, Uncaught
from exporter.pm2.process import Listing, Process

if TYPE_CHECKING:
    from tests.unit.events.conftest import Bus

QUICK = EventsOptions(min_backoff=Duration(0.01), max_backoff=Duration(0.05))


def open_files() -> int:
    """Return how many descriptors are open."""
    return len(list(Path("/proc/self/fd").iterdir()))


class Estate:
    """A source that lists these names, or fails."""

    def __init__(self, *names: str) -> None:
        self.names: tuple[str, ...] | None = names

    async def listing(self, within: float) -> Listing:  # noqa: ARG002 -- the source's shape
        """Return the list, or fail."""
        if self.names is None:
            raise PM2Error(Reason.REFUSED, "down")
        return Listing(processes=tuple([Process(name=name, pm_id=number) for number, name in enumerate(self.names)]))


def ended(name: str, cause: Cause = Cause.CRASH) -> Exit:
    """Make the record of an ending."""
    return Exit(name=name, pm_id="0", cause=cause, code=1, signal="", began_at=1, at=2)


async def page(collector: EventsCollector) -> dict[str, float]:
    """Return the samples of a scrape."""
    lines = render(collector.metrics(await collector.read(1)), Format.TEXT, account=None).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line and line[0] != "#")}


async def test_an_app_is_at_zero_before_its_first_ending(home: Path) -> None:
    """Every listed app has every series from the first scrape on, so that its first crash is an increase."""
    samples = await page(EventsCollector(QUICK, home, Estate("web")))
    assert {name: value for name, value in samples.items() if name.startswith("pm2_process")} == {
        **{f'pm2_process_exits_total{{name="web",cause="{cause}"}}': 0 for cause in Cause},
        'pm2_process_exceptions_total{name="web"}': 0,
        'pm2_process_restart_overlimit_total{name="web"}': 0,
    }


async def test_without_a_bus_it_says_so(home: Path, running: Callable, eventually: Callable) -> None:
    """PM2 that is reached only by a command has no bus: not connected, for the reason that there is no socket."""
    collector = EventsCollector(QUICK, home, Estate())
    assert (await page(collector))['pm2_exporter_events_down_reason{reason="not_started"}'] == 1
    async with running(collector):
        await eventually(lambda: collector._subscriber.down == "no_socket")  # noqa: SLF001 -- to wait for it
        samples = await page(collector)
    assert samples["pm2_exporter_events_connected"] == 0
    assert samples['pm2_exporter_events_down_reason{reason="no_socket"}'] == 1


async def test_endings_are_counted_while_pm2_cannot_be_asked(bus: "Bus", running: Callable, eventually: Callable) -> None:
    """A failing source costs nothing of what the bus said."""
    estate = Estate()
    estate.names = None
    collector = EventsCollector(QUICK, bus.path.parent, estate)
    async with running(collector):
        await eventually(lambda: bus.writers)
        bus.exit(1, name="web")
        bus.exit(1, name="web")
        bus.exit(2, name="web", code=0)
        bus.send("process:event", [])
        bus.send("log:out", {})
        await eventually(lambda: collector._subscriber.sieve.received == 5)  # noqa: SLF001 -- to wait for it
        samples = await page(collector)
    assert samples['pm2_process_exits_total{name="web",cause="crash"}'] == 1
    assert samples['pm2_process_exits_total{name="web",cause="exit"}'] == 1
    assert samples["pm2_exporter_events_connected"] == 1
    assert samples["pm2_exporter_events_received_total"] == 5
    assert samples['pm2_exporter_events_dropped_total{reason="topic"}'] == 1
    assert samples['pm2_exporter_events_dropped_total{reason="malformed"}'] == 1


async def test_a_message_without_a_time_is_not_taken_for_an_old_one(home: Path) -> None:
    """What cannot be read, such as data nested too deeply by an app, is no sign that this process has fallen behind."""
    hear = EventsCollector(QUICK, home, Estate())._subscriber.hear  # noqa: SLF001 -- as the subscriber calls it
    assert hear("process:event", b'{"at": 5000}') == 5
    assert hear("process:exception", b'{"at": 6000, "data": ' + b"[" * 200_000 + b"]" * 200_000 + b"}") == 0
    assert hear("pm2:kill", b'{"status": "killed"}') == 0
    assert hear("log:PM2", b'{"at": 7000}') == 7


async def test_only_described_metrics_are_emitted(home: Path) -> None:
    """DESCS is the whole of what can be seen."""
    collector = EventsCollector(QUICK, home, Estate("web"))
    assert {metric.desc for metric in collector.metrics(await collector.read(1))} == set(DESCS)


def test_an_app_renamed_for_ever_costs_a_bounded_number_of_series() -> None:
    """Names that PM2 no longer lists make room; the apps that it lists keep their counts."""
    tally = Tally(10)
    tally.learn(["web", "api"])
    tally.add(ended("web"))
    for number in range(1000):
        tally.add(ended(f"hostile-{number}"))
    assert len(tally.counts) == 10
    assert tally.counts["web"].exits[Cause.CRASH] == 1
    assert "api" in tally.counts


def test_more_listed_apps_than_names_are_refused_and_counted() -> None:
    """An app beyond the limit is not counted, and that is told."""
    tally = Tally(2)
    tally.learn(["a", "b"])
    tally.add(ended("c"))
    assert sorted(tally.counts) == ["a", "b"]
    assert tally.refused == 1


def test_names_are_bounded_in_length() -> None:
    """A name of megabytes is kept as far as it is shown."""
    tally = Tally(2)
    tally.add(ended("x" * 100_000))
    assert [len(name) for name in tally.counts] == [1024]


NAMES = st.sampled_from(["a", "b", "c", "d"])
RECORDS = st.one_of(
    st.builds(ended, NAMES, st.sampled_from(Cause)),
    st.builds(lambda name: Heard(name, "0", 1.0), NAMES),
    st.builds(lambda name: Uncaught(name, "0", 1.0), NAMES),
    st.builds(lambda name: OverLimit(name, "0", 1.0), NAMES),
)


@given(st.lists(RECORDS | st.lists(NAMES, max_size=3), max_size=60))
def test_counts_only_grow(steps: list[object]) -> None:
    """Whatever happens, in whatever order, no counter of a name that is kept runs backwards."""
    tally = Tally(100)
    before: dict[str, list[int]] = {}
    for step in steps:
        if isinstance(step, list):
            tally.learn(step)
        else:
            tally.add(step)
        now = {name: [*count.exits.values(), count.exceptions, count.overlimit] for name, count in tally.counts.items()}
        for name, counts in before.items():
            assert all(new >= old for new, old in zip(now[name], counts, strict=True))
        before = now


@pytest.mark.parametrize(
    "wrong",
    [{"min_backoff": "10s", "max_backoff": "1s"}, {"min_backoff": 0}, {"max_lag": "10ms"}, {"max_names": 0}, {"x": 1}],
)
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    """Values that contradict each other, or make no sense, are errors."""
    hook = {Duration: Duration.parse}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, EventsOptions, dec_hook=lambda kind, value: hook[kind](value))


def test_the_defaults_are_these() -> None:
    """The defaults are part of the interface."""
    assert msgspec.structs.asdict(EventsOptions()) == {
        "max_names": 1000,
        "max_frame": 4 * 1024 * 1024,
        "max_lag": 5,
        "min_backoff": 0.1,
        "max_backoff": 5,
    }


async def test_an_hours_worth_of_endings_leaves_memory_and_descriptors_flat(
    bus: "Bus", running: Callable, eventually: Callable
) -> None:
    """20 000 endings of 100 apps, with lost connections in between, are all counted and leave nothing behind."""
    names = [f"app-{number}" for number in range(100)]
    collector = EventsCollector(QUICK, bus.path.parent, Estate(*names))
    sieve = collector._subscriber.sieve  # noqa: SLF001 -- to wait for it

    async def some(begin: int, count: int) -> None:
        seen = sieve.received
        for number in range(count):
            bus.send("log:out", {"data": "x" * 200})
            bus.exit(begin + number, name=names[number % 100])
            if number % 500 == 499:
                await eventually(lambda so_far=seen + 2 * (number + 1): sieve.received == so_far)
        bus.hang_up()
        await eventually(lambda: bus.writers)

    async with running(collector):
        await eventually(lambda: bus.writers)
        # More endings than are remembered: from here on, what is kept does not grow.
        await some(1, 5000)
        gc.collect()
        descriptors = open_files()
        tracemalloc.start()
        try:
            await some(10_001, 1000)
            gc.collect()
            base, _ = tracemalloc.get_traced_memory()
            for part in range(7):
                await some(100_000 * (part + 1), 2000)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        samples = await page(collector)
        assert open_files() == descriptors
    assert sum(value for name, value in samples.items() if name.startswith("pm2_process_exits_total")) == 20_000
    assert samples["pm2_exporter_events_reconnects_total"] == 9
    # Each remembered ending was replaced by a newly allocated one; tracing saw the new ones only.
    assert after - base < 1_500_000
