"""What a scrape shows of a MongoDB."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from exporter.collectors.mongodb import MongodbCollector, MongodbOptions
from exporter.exposition import Format, render
from exporter.grammar import Duration, Secret


class Look:
    """A collector, and what a scrape shows of it."""

    def __init__(self, uri: str, timeout: float) -> None:
        """Look at this URI."""
        self.collector = MongodbCollector(MongodbOptions(uri=Secret(uri), timeout=Duration(timeout)))

    async def page(self, within: float = 10) -> dict[str, float]:
        """Return the samples of a scrape."""
        metrics = self.collector.metrics(await self.collector.read(within))
        lines = render(metrics, Format.TEXT, account=None).decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line and line[0] != "#")}

    async def why(self, within: float = 10) -> str:
        """Return the reason that holds; "" where MongoDB is up."""
        samples = await self.page(within)
        reasons = [name.split('"')[1] for name, value in samples.items() if "down_reason" in name and value]
        assert bool(reasons) is not bool(samples["mongodb_up"])
        return "".join(reasons)

    async def until(self, why: str) -> None:
        """Wait until this reason holds."""
        async with asyncio.timeout(60):
            while await self.why() != why:  # noqa: ASYNC110 -- what is polled is another process
                await asyncio.sleep(0.05)

    async def until_sample(self, name: str, value: float) -> None:
        """Wait until this sample has this value."""
        async with asyncio.timeout(60):
            while (await self.page()).get(name) != value:  # noqa: ASYNC110 -- the same
                await asyncio.sleep(0.05)


@pytest.fixture
async def look() -> AsyncIterator[Callable[..., Look]]:
    """Return a function that makes a collector for a URI; it is closed after the test, as at the exporter's end."""
    made: list[Look] = []

    def make(uri: str, timeout: float = 2) -> Look:
        made.append(Look(uri, timeout))
        return made[-1]

    yield make
    for one in made:
        await one.collector.close()
