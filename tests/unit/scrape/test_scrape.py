"""One scrape: side by side, in its deadline, and a failure costs its own samples only."""

import asyncio
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.exposition import Desc, Metric, gauge, single
from exporter.scrape import account, budget, scrape

WELL = gauge("well", "Well.")


class Fake:
    """A collector that does in `read` what it is told."""

    descs: tuple[Desc, ...] = (WELL,)

    def __init__(self, does: object = None) -> None:
        """Take what to do: an exception to raise, an event to wait for, or None to be well."""
        self.does = does
        self.within = 0.0

    async def read(self, within: float) -> object:
        """Do it."""
        self.within = within
        if isinstance(self.does, asyncio.Barrier | asyncio.Event):
            await self.does.wait()
        elif isinstance(self.does, BaseException):
            raise self.does
        return self.does

    def metrics(self, seen: object) -> Iterable[Metric]:
        """Say that all is well, or fail when told to."""
        if seen == "broken":
            raise KeyError(seen)
        yield single(WELL, 1)


async def test_failure_costs_only_its_own_samples() -> None:
    """One collector raises, one cannot make metrics, one never ends: the fourth is complete, and each says why."""
    collectors = {
        "raises": Fake(ValueError("no")),
        "breaks": Fake("broken"),
        "hangs": Fake(asyncio.Event()),
        "works": Fake(),
    }
    outcomes = {outcome.collector: outcome for outcome in await scrape(collectors, 0.05)}
    assert {name: outcome.error for name, outcome in outcomes.items()} == {
        "raises": "ValueError: no",
        "breaks": "KeyError: 'broken'",
        "hangs": "not done within 0.05s",
        "works": "",
    }
    assert {name: len(outcome.metrics) for name, outcome in outcomes.items()} == {
        "raises": 0,
        "breaks": 0,
        "hangs": 0,
        "works": 1,
    }
    success, duration = account(outcomes.values())
    assert dict(success.rows) == {("raises",): 0, ("breaks",): 0, ("hangs",): 0, ("works",): 1}
    assert all(seconds >= 0 for _, seconds in duration.rows)


async def test_collectors_run_side_by_side() -> None:
    """Collectors that wait for each other all end: none has to end before another begins."""
    together = asyncio.Barrier(3)
    outcomes = await scrape({name: Fake(together) for name in "abc"}, 5)
    assert [outcome.error for outcome in outcomes] == ["", "", ""]


async def test_collector_is_told_to_end_before_it_is_cut_off() -> None:
    """A collector has the time to report its source's silence itself."""
    fake = Fake()
    await scrape({"x": fake}, 10)
    assert 0 < fake.within < 10


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("10", 9.5),
        ("1", 0.5),
        ("0.5", 0.25),
        ("3E-324", 0.01),
        (None, 9.5),
        ("x", 9.5),
        ("-1", 9.5),
        ("nan", 9.5),
        ("inf", 9.5),
    ],
)
def test_budget(header: str | None, seconds: float) -> None:
    """The deadline is Prometheus's own less the offset; nonsense counts as no header."""
    assert budget(header) == seconds


@given(st.text() | st.floats().map(str) | st.none())
def test_budget_is_always_positive_and_finite(header: str | None) -> None:
    """No header makes a scrape endless or impossible."""
    assert 0 < budget(header) < float("inf")
