"""The collector on a real PM2: forks, cluster workers, wrappers and restarts, against what psutil says."""

import os
import signal
from typing import TYPE_CHECKING

import psutil
import pytest

from exporter.collectors.process import ProcessCollector, ProcessOptions, Tree
from exporter.pm2.client import PM2Error, Reader
from exporter.proc import TICKS_PER_SECOND

if TYPE_CHECKING:
    from tests.integration.conftest import PM2

IDLE = "setInterval(() => {}, 1000);"
BURN = "while (process.cpuUsage().user < 300_000);"
"""Node uses 0.3 s of CPU time in user mode, its start included."""
SERVE = "require('http').createServer((_, answer) => answer.end()).listen(0, '127.0.0.1');"
WRAPPER = """#!/bin/sh
node burn.js    # one that ends
node stay.js &  # one that stays
wait
"""


class Watch:
    """A collector on a real daemon; every look checks that nothing ran backwards."""

    def __init__(self, pm2: "PM2") -> None:
        """Watch the daemon's apps."""
        self.pm2 = pm2
        self.collector = ProcessCollector(ProcessOptions(), Reader(pm2.home))
        self.last: dict[tuple[str, str], Tree] = {}

    async def look(self) -> dict[tuple[str, str], Tree]:
        """Look once."""
        before = self.last
        self.last = {tree.app: tree for tree in await self.collector.read(10)}
        for app, tree in self.last.items():
            if tree.totals and app in before and before[app].totals:
                assert all(now >= then for now, then in zip(tree.totals, before[app].totals or (), strict=True))
        return self.last

    def cpu(self, name: str, pm_id: int) -> float:
        """Return an app's CPU seconds as last seen."""
        totals = self.last[name, str(pm_id)].totals
        assert totals is not None
        return (totals[0] + totals[1]) / TICKS_PER_SECOND

    async def until(self, name: str, pm_id: int, *, processes: int) -> Tree:
        """Look until an app's tree has so many processes."""
        app = (name, str(pm_id))

        async def there() -> bool:
            return app in await self.look() and self.last[app].processes == processes

        await self.pm2.eventually(there)
        return self.last[app]


@pytest.fixture
async def watch(pm2_daemon: "PM2") -> Watch:
    """Return a watch that began before there were apps."""
    made = Watch(pm2_daemon)
    assert await made.look() == {}
    return made


async def pid(watch: Watch, pm_id: int) -> int:
    """Return the pid that PM2 gives an app at the moment."""
    listing = await Reader(watch.pm2.home).listing(5)
    return next(process.pid for process in listing.processes if process.pm_id == pm_id)


async def test_cluster_workers_are_one_tree_each_and_the_daemon_is_in_none(watch: Watch) -> None:
    """Workers are children of PM2's daemon: two of them are two series of one process each, and the daemon is nobody's."""
    watch.pm2.start({"name": "job", "source": IDLE})
    watch.pm2.start({"name": "web", "source": SERVE, "exec_mode": "cluster", "instances": 2})
    for name, pm_id in (("job", 0), ("web", 1), ("web", 2)):
        tree = await watch.until(name, pm_id, processes=1)
        process = psutil.Process(await pid(watch, pm_id))
        assert process.ppid() == watch.pm2.pid
        assert tree.resident == pytest.approx(process.memory_full_info().rss, rel=0.1)
        assert watch.cpu(name, pm_id) == pytest.approx(sum(process.cpu_times()[:4]), abs=0.1)
    assert len(watch.last) == 3


async def test_a_wrapper_is_measured_with_all_that_it_starts(watch: Watch) -> None:
    """A shell script that runs one program after another, and one beside it, has the usage of all of them."""
    watch.pm2.file("burn.js", BURN)
    watch.pm2.file("stay.js", BURN + IDLE)
    watch.pm2.file("run.sh", WRAPPER, mode=0o755)
    watch.pm2.start({"name": "npm", "script": "run.sh", "interpreter": "sh", "exec_mode": "fork"})
    await watch.until("npm", 0, processes=2)

    async def burnt() -> bool:
        await watch.look()
        return watch.cpu("npm", 0) > 0.55

    await watch.pm2.eventually(burnt)
    root = psutil.Process(await pid(watch, 0))
    (node,) = root.children()
    await watch.look()
    both = sum(root.cpu_times()[:4]) + sum(node.cpu_times()[:4])
    assert watch.cpu("npm", 0) == pytest.approx(both, abs=0.1)
    assert watch.last["npm", "0"].threads == root.num_threads() + node.num_threads()
    assert (watch.last["npm", "0"].resident or 0) > node.memory_info().rss


async def test_counters_go_on_when_pm2_replaces_the_process(watch: Watch) -> None:
    """A restart, a crash and a kill each give the app a new process, and none turns its counters back."""
    watch.pm2.start({"name": "app", "source": BURN + IDLE})
    used, before = 0.0, 0
    for how in ("start", "restart", "kill"):
        if how == "restart":
            watch.pm2.run("restart", "app")
        elif how == "kill":
            os.kill(before, signal.SIGKILL)

        async def replaced(used: float = used, before: int = before) -> bool:
            await watch.look()
            return (
                watch.last["app", "0"].processes == 1
                and await pid(watch, 0) != before
                and watch.cpu("app", 0) > used + 0.25
            )

        await watch.pm2.eventually(replaced)
        used, before = watch.cpu("app", 0), await pid(watch, 0)
    assert used > 0.75


async def test_apps_that_stop_vanish_or_are_renamed(watch: Watch) -> None:
    """A stopped app keeps its counters and holds nothing; a deleted one is gone; one of another name starts anew."""
    watch.pm2.start({"name": "one", "source": IDLE}, {"name": "two", "source": IDLE})
    await watch.until("one", 0, processes=1)
    await watch.until("two", 1, processes=1)
    watch.pm2.run("stop", "one")
    stopped = await watch.until("one", 0, processes=0)
    assert (stopped.resident, stopped.open_fds) == (None, None)
    assert stopped.totals is not None
    watch.pm2.run("delete", "one")
    watch.pm2.run("restart", "two", "--name", "three")
    await watch.until("three", 1, processes=1)
    assert list(watch.last) == [("three", "1")]


async def test_a_dead_daemon_is_pm2s_error_and_its_successor_is_found(watch: Watch) -> None:
    """Without PM2 the collector fails as PM2 did; with a new daemon and the same apps the counters never fall."""
    watch.pm2.start({"name": "app", "source": BURN + IDLE})
    await watch.until("app", 0, processes=1)
    watch.pm2.kill()
    with pytest.raises(PM2Error):
        await watch.look()
    watch.pm2.boot()
    watch.pm2.start({"name": "app", "source": BURN + IDLE})
    await watch.until("app", 0, processes=1)
