"""The counters against real PM2 daemons: each ending once, with its cause, through crashes and new daemons."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from exporter.collectors.events import EventsCollector, EventsOptions
from exporter.pm2.client import Reader, Shared
from exporter.pm2.events import Cause

if TYPE_CHECKING:
    from tests.integration.conftest import PM2

IDLE = "setInterval(() => {}, 1000)"
THROW = "setTimeout(() => { throw new Error('boom') }, 50)"
SERVE = "require('http').createServer((q, s) => s.end('ok')).listen(0, '127.0.0.1')"


@asynccontextmanager
async def listening(pm2: "PM2") -> AsyncIterator[EventsCollector]:
    """Give a collector that is subscribed to this PM2."""
    collector = EventsCollector(EventsOptions(), pm2.home, Shared(Reader(pm2.home)))
    task = asyncio.create_task(collector.run(), name="events")
    try:
        await pm2.eventually(lambda: is_connected(collector))
        yield collector
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def is_connected(collector: EventsCollector) -> bool:
    """Tell whether the collector is subscribed."""
    return (await collector.read(2)).down is None


async def counted(collector: EventsCollector, name: str) -> Counter[str]:
    """Return what was counted of an app, less what is 0."""
    seen = await collector.read(5)
    found = {
        cause.value: count for who, counts in seen.exits if who == name for cause, count in zip(Cause, counts, strict=True)
    }
    for who, exceptions, overlimit in seen.others:
        if who == name:
            found |= {"exceptions": exceptions, "overlimit": overlimit}
    return +Counter(found)


async def expect(pm2: "PM2", collector: EventsCollector, name: str, **counts: int) -> None:
    """Wait until exactly this was counted of an app."""

    async def as_expected() -> bool:
        return await counted(collector, name) == Counter(counts)

    await pm2.eventually(as_expected)


async def command(pm2: "PM2", *words: str) -> str:
    """Run a pm2 command beside the event loop."""
    return await asyncio.to_thread(pm2.run, *words)


async def start(pm2: "PM2", **app: object) -> None:
    """Start an app."""
    await asyncio.to_thread(pm2.start, app)


async def pids(pm2: "PM2", name: str) -> list[int]:
    """Return the process ids of an app."""
    listing = await Reader(pm2.home).listing(5)
    return [process.pid for process in listing.processes if process.name == name and process.pid]


@pytest.mark.parametrize("pm2_daemon", [7, 6, 5, 4], indirect=True)
async def test_each_ending_is_counted_once_with_its_cause(pm2_daemon: "PM2") -> None:
    """A crash, a kill, a stop, a restart and a clean end, as they happen on a real PM2 of each major version."""
    async with listening(pm2_daemon) as collector:
        await start(pm2_daemon, name="thrower", source=THROW, max_restarts=3)
        await expect(pm2_daemon, collector, "thrower", crash=3, exceptions=3, overlimit=1)
        await start(pm2_daemon, name="worker", source=f"{SERVE}; {THROW}", exec_mode="cluster", max_restarts=3)
        await expect(pm2_daemon, collector, "worker", crash=3, exceptions=3, overlimit=1)
        await start(pm2_daemon, name="job", source="setTimeout(() => process.exit(0), 50)", autorestart=False)
        await expect(pm2_daemon, collector, "job", exit=1)
        await start(pm2_daemon, name="web", source=SERVE, exec_mode="cluster", instances=2)
        for pid in await pids(pm2_daemon, "web"):
            os.kill(pid, signal.SIGKILL)
        await expect(pm2_daemon, collector, "web", signal=2)
        await command(pm2_daemon, "restart", "web")
        await expect(pm2_daemon, collector, "web", signal=2, manual=2)
        await command(pm2_daemon, "reload", "web")
        await expect(pm2_daemon, collector, "web", signal=2, manual=4)
        await command(pm2_daemon, "scale", "web", "1")
        await expect(pm2_daemon, collector, "web", signal=2, manual=5)
        await command(pm2_daemon, "delete", "web")
        await expect(pm2_daemon, collector, "web", signal=2, manual=6)
        seen = await collector.read(5)
        assert seen.dropped["malformed"] == seen.dropped["size"] == 0


async def test_a_stop_of_an_app_that_must_be_killed_is_manual(pm2_daemon: "PM2") -> None:
    """The SIGKILL that PM2 sends at the end of its patience is no outside kill."""
    async with listening(pm2_daemon) as collector:
        source = "process.on('SIGINT', () => {}); setInterval(() => {}, 1000)"
        await start(pm2_daemon, name="deaf", source=source, kill_timeout=300)
        await command(pm2_daemon, "stop", "deaf")
        await expect(pm2_daemon, collector, "deaf", manual=1)


async def test_a_restart_for_memory_is_told_from_one_by_hand(pm2_factory: Callable[[], "PM2"]) -> None:
    """PM2's own restart above max_memory_restart has its own cause, in fork mode and in cluster mode."""
    pm2 = pm2_factory()
    pm2.environ["PM2_WORKER_INTERVAL"] = "300"
    pm2.boot()
    hoard = (
        "const fs = require('fs'), kept = [], mark = `${__dirname}/hoarded-${process.env.name}`;"
        "if (!fs.existsSync(mark)) { fs.writeFileSync(mark, ''); setInterval(() => {"
        " if (kept.length < 9) kept.push(Buffer.alloc(2e7, 1)) }, 20) }"
    )
    async with listening(pm2) as collector:
        await start(pm2, name="fork", source=f"{hoard}; {IDLE}", max_memory_restart="120M")
        await expect(pm2, collector, "fork", memory_limit=1)
        await start(pm2, name="cluster", source=f"{hoard}; {SERVE}", exec_mode="cluster", max_memory_restart="120M")
        await expect(pm2, collector, "cluster", memory_limit=1)
        await command(pm2, "restart", "all")
        await expect(pm2, collector, "fork", memory_limit=1, manual=1)
        await expect(pm2, collector, "cluster", memory_limit=1, manual=1)


async def test_a_daemon_that_keeps_its_log_to_itself_is_counted_too(pm2_factory: Callable[[], "PM2"]) -> None:
    """With an empty PM2_LOG_DATE_FORMAT no log line comes over the bus; every ending is counted all the same."""
    pm2 = pm2_factory()
    pm2.environ["PM2_LOG_DATE_FORMAT"] = ""
    pm2.boot()
    async with listening(pm2) as collector:
        await start(pm2, name="crasher", source="setTimeout(() => process.exit(3), 50)", max_restarts=3)
        await expect(pm2, collector, "crasher", crash=3, overlimit=1)
        await start(pm2, name="idle", source=IDLE)
        os.kill((await pids(pm2, "idle"))[0], signal.SIGKILL)
        await expect(pm2, collector, "idle", exit=1)
        await command(pm2, "restart", "idle")
        await expect(pm2, collector, "idle", exit=1, manual=1)


async def test_a_new_daemon_is_found_after_a_crash_and_after_a_clean_kill(pm2_daemon: "PM2") -> None:
    """The subscription comes back by itself, the counters stay, and nothing of it starts a daemon."""
    async with listening(pm2_daemon) as collector:
        await start(pm2_daemon, name="idle", source=IDLE)
        os.kill((await pids(pm2_daemon, "idle"))[0], signal.SIGKILL)
        await expect(pm2_daemon, collector, "idle", signal=1)
        await asyncio.to_thread(pm2_daemon.kill)

        async def is_down() -> bool:
            return not await is_connected(collector)

        await pm2_daemon.eventually(is_down)
        assert (await collector.read(2)).down in {"closed", "refused"}
        await asyncio.to_thread(pm2_daemon.boot)
        await pm2_daemon.eventually(lambda: is_connected(collector))
        await command(pm2_daemon, "kill")
        await pm2_daemon.eventually(is_down)
        await asyncio.to_thread(pm2_daemon.boot)
        await pm2_daemon.eventually(lambda: is_connected(collector))
        await start(pm2_daemon, name="idle", source=IDLE)
        os.kill((await pids(pm2_daemon, "idle"))[0], signal.SIGKILL)
        await expect(pm2_daemon, collector, "idle", signal=2)
        seen = await collector.read(5)
        assert seen.connections == 3


async def test_a_frozen_daemon_is_waited_for(pm2_daemon: "PM2") -> None:
    """A daemon that stands still is no reason to hang up: its events come when it goes on."""
    async with listening(pm2_daemon) as collector:
        await start(pm2_daemon, name="idle", source=IDLE)
        (pid,) = await pids(pm2_daemon, "idle")
        os.kill(pm2_daemon.pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        assert (await collector.read(0.2)).down is None
        os.kill(pm2_daemon.pid, signal.SIGCONT)
        await expect(pm2_daemon, collector, "idle", signal=1)
