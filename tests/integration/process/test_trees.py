"""The collector on real processes: what the kernel does when children end, against what psutil says."""

import asyncio
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from exporter.collectors.process import ProcessCollector, ProcessOptions, Tree, UnseenError
from exporter.pm2.process import Listing, Process
from exporter.proc import TICKS_PER_SECOND, Proc

if TYPE_CHECKING:
    from tests.integration.process.conftest import Root

    Start = Callable[..., Root]

BURN = "import time; end = time.process_time() + 0.15\nwhile time.process_time() < end: pass"
ONE_TICK_A_PROCESS = 0.1
"""Seconds: each of a handful of processes may be cut to the tick below."""

SUPERVISOR = """
import os, signal, subprocess, sys
children = []
for line in sys.stdin:
    word, *rest = line.split()
    if word == "run":  # a child that burns and ends
        subprocess.run([sys.executable, "-c", os.environ["BURN"]], check=True)
    elif word == "keep":  # a child that burns and stays
        child = subprocess.Popen(
            [sys.executable, "-c", "import signal\\n" + os.environ["BURN"] + "\\nprint(flush=True); signal.pause()"],
            stdout=subprocess.PIPE,
        )
        child.stdout.readline()
        children.append(child)
        rest = [str(child.pid)]
    elif word == "wait":  # for the oldest kept child to end
        children.pop(0).wait()
    elif word == "ignore":  # children, from now on
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    elif word == "write":
        dd = ["dd", "if=/dev/zero", "of=" + rest[0], "bs=64k", "count=16", "conv=fsync", "status=none"]
        subprocess.run(dd, check=True)
    print(*rest, flush=True)
"""


class Listed:
    """A list of apps that the test writes."""

    def __init__(self) -> None:
        """List nothing yet."""
        self.pids: dict[str, int] = {}

    async def listing(self, within: float) -> Listing:
        """Return it."""
        del within
        return Listing(processes=tuple(Process(name=name, pm_id=0, pid=pid) for name, pid in self.pids.items()))


class Watch:
    """A collector, and what it last saw; every look checks that nothing ran backwards."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        """Watch nothing yet."""
        self.source = Listed()
        self.collector = ProcessCollector(ProcessOptions(), self.source, proc)
        self.trees: dict[str, Tree] = {}

    async def look(self) -> dict[str, Tree]:
        """Look once."""
        before = self.trees
        self.trees = {tree.app[0]: tree for tree in await self.collector.read(10)}
        for name, tree in self.trees.items():
            if tree.totals and name in before and before[name].totals:
                assert all(now >= then for now, then in zip(tree.totals, before[name].totals or (), strict=True))
        return self.trees

    async def cpu(self, name: str) -> float:
        """Look, and return the CPU seconds of an app."""
        totals = (await self.look())[name].totals
        assert totals is not None
        return (totals[0] + totals[1]) / TICKS_PER_SECOND


def truth(pid: int) -> float:
    """Return the CPU seconds of a living tree and of all children that it waited for, as psutil has them."""
    root = psutil.Process(pid)
    return sum(sum(process.cpu_times()[:4]) for process in [root, *root.children(recursive=True)])


@pytest.fixture
async def watch() -> Watch:
    """Return a watch whose first look is done, so that all that starts from now on counts in full."""
    made = Watch()
    await made.look()
    # The kernel counts starts in ticks; what starts within the tick of the first look counts as older.
    await asyncio.sleep(2 / TICKS_PER_SECOND)
    return made


@pytest.fixture
def supervisor(start: "Start", monkeypatch: pytest.MonkeyPatch) -> "Root":
    """Return a root that starts children as it is told."""
    monkeypatch.setenv("BURN", BURN)
    return start(python=SUPERVISOR)


async def test_children_that_live_and_die_between_two_looks_count(watch: Watch, supervisor: "Root") -> None:
    """What short-lived children used is there as soon as their parent waited for them, and once."""
    watch.source.pids["app"] = supervisor.pid
    supervisor.tell("run")
    first = await watch.cpu("app")
    assert first == pytest.approx(truth(supervisor.pid), abs=ONE_TICK_A_PROCESS)
    for _ in range(3):
        supervisor.tell("run")
    assert await watch.cpu("app") == pytest.approx(truth(supervisor.pid), abs=ONE_TICK_A_PROCESS)
    assert await watch.cpu("app") - first >= 3 * 0.15 - ONE_TICK_A_PROCESS


async def test_workers_that_are_killed_and_replaced_count_once(watch: Watch, supervisor: "Root") -> None:
    """A worker counts while it lives, while it is a zombie and after it was waited for, and its successor adds to it."""
    watch.source.pids["app"] = supervisor.pid
    for _ in range(3):
        worker = int(supervisor.tell("keep"))
        assert await watch.cpu("app") == pytest.approx(truth(supervisor.pid), abs=ONE_TICK_A_PROCESS)
        assert watch.trees["app"].processes == 2
        os.kill(worker, signal.SIGKILL)
        assert await watch.cpu("app") == pytest.approx(truth(supervisor.pid), abs=ONE_TICK_A_PROCESS)
        supervisor.tell("wait")
        assert await watch.cpu("app") == pytest.approx(truth(supervisor.pid), abs=ONE_TICK_A_PROCESS)
        assert watch.trees["app"].processes == 1


async def test_workers_that_nobody_waits_for_keep_what_they_were_seen_to_use(watch: Watch, supervisor: "Root") -> None:
    """Where the parent ignores SIGCHLD, the kernel forgets its children's times, and the counter does not."""
    watch.source.pids["app"] = supervisor.pid
    supervisor.tell("ignore")
    seen = 0.0
    for number in range(1, 4):
        worker = int(supervisor.tell("keep"))
        seen = await watch.cpu("app")
        os.kill(worker, signal.SIGKILL)
        with suppress(psutil.NoSuchProcess):
            psutil.Process(worker).wait()
        assert await watch.cpu("app") >= seen >= number * 0.15 - ONE_TICK_A_PROCESS
    assert truth(supervisor.pid) < seen


async def test_a_child_that_outlives_its_parent_leaves_the_tree(watch: Watch, start: "Start", tmp_path: Path) -> None:
    """A daemon of an app's making is no longer below it; what it used until then stays."""
    (tmp_path / "burn.py").write_text(
        f"import pathlib, os, signal\n{BURN}\npathlib.Path('pid').write_text(str(os.getpid()))\nsignal.pause()"
    )
    inner = f"cd {tmp_path}; {sys.executable} burn.py & read line"
    root = start("sh", "-c", f"sh -c '{inner}'; echo gone; read line")
    watch.source.pids["app"] = root.pid
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():  # noqa: ASYNC110 -- another process's doing
        await asyncio.sleep(0.01)
    orphan = int((tmp_path / "pid").read_text())
    try:
        used = await watch.cpu("app")
        assert watch.trees["app"].processes == 3
        assert used == pytest.approx(truth(root.pid), abs=ONE_TICK_A_PROCESS)
        assert root.tell("go") == "gone"
        assert await watch.cpu("app") >= used
        assert watch.trees["app"].processes == 1
    finally:
        os.kill(orphan, signal.SIGKILL)


async def test_an_app_below_an_app_is_its_own(watch: Watch, supervisor: "Root") -> None:
    """Where one app's tree holds another app, it is cut there, and nothing counts twice."""
    watch.source.pids["outer"] = supervisor.pid
    watch.source.pids["inner"] = int(supervisor.tell("keep"))
    inner, outer = await watch.cpu("inner"), await watch.cpu("outer")
    assert (watch.trees["inner"].processes, watch.trees["outer"].processes) == (1, 1)
    assert inner + outer == pytest.approx(truth(supervisor.pid), abs=ONE_TICK_A_PROCESS)
    os.kill(watch.source.pids["inner"], signal.SIGKILL)
    supervisor.tell("wait")
    watch.source.pids["inner"] = 0
    assert await watch.cpu("inner") + await watch.cpu("outer") == pytest.approx(
        truth(supervisor.pid), abs=2 * ONE_TICK_A_PROCESS
    )


async def test_io_of_children_counts_once(watch: Watch, supervisor: "Root", tmp_path: Path) -> None:
    """The kernel adds to a process's I/O that of the children it waited for; so does psutil, and so do we."""
    watch.source.pids["app"] = supervisor.pid
    await watch.look()
    before = psutil.Process(supervisor.pid).io_counters()
    supervisor.tell(f"write {tmp_path / 'file'}")
    totals = (await watch.look())["app"].totals
    after = psutil.Process(supervisor.pid).io_counters()
    assert totals is not None
    assert totals[5] >= after.write_bytes - before.write_bytes
    assert totals[4:] == (after.read_bytes, after.write_bytes)


async def test_every_figure_is_psutils(watch: Watch, supervisor: "Root") -> None:
    """Memory, swap, threads, descriptors, their limit and context switches are what psutil says of the same processes."""
    worker = int(supervisor.tell("keep"))
    watch.source.pids["app"] = supervisor.pid
    both = [psutil.Process(supervisor.pid), psutil.Process(worker)]

    def through_psutil() -> dict[str, object]:
        limit = both[0].rlimit(psutil.RLIMIT_NOFILE)[0]
        return {
            "virtual": sum(process.memory_info().vms for process in both),
            "swapped": sum(process.memory_full_info().swap for process in both),
            "threads": sum(process.num_threads() for process in both),
            "tree_open_fds": sum(process.num_fds() for process in both),
            "open_fds": max(process.num_fds() for process in both),
            "max_fds": limit,
            "switches": tuple(sum(process.num_ctx_switches()[kind] for process in both) for kind in (0, 1)),
        }

    before, tree, after = through_psutil(), (await watch.look())["app"], through_psutil()
    while before != after:  # they have only just been told to stand still
        before, tree, after = after, (await watch.look())["app"], through_psutil()
    assert tree.totals is not None
    assert {**tree._asdict(), "switches": tree.totals[2:4]}.items() >= after.items()
    assert tree.resident == pytest.approx(sum(process.memory_full_info().rss for process in both), rel=0.05)


def test_a_great_many_descriptors_are_counted_in_both_ways(start: "Start", tmp_path: Path) -> None:
    """As many as the limit allows, up to 100 000: by the size the kernel tells, and by listing where it tells none."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(100_000, hard if hard != resource.RLIM_INFINITY else 100_000) - 100
    root = start(
        python=f"import os, resource, sys\nresource.setrlimit(resource.RLIMIT_NOFILE, ({wanted + 100}, {wanted + 100}))\n"
        f"for _ in range({wanted}): os.dup(0)\nfor line in sys.stdin: print(flush=True)"
    )
    root.tell("ready?")
    (tmp_path / str(root.pid)).symlink_to(f"/proc/{root.pid}")
    for proc in (Proc(), Proc(tmp_path)):
        usage = proc.usage(root.pid)
        assert usage is not None
        assert (usage.open_fds, usage.max_fds) == (wanted + 3, wanted + 100)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Have no rights to other users' processes; nothing to do for who has none anyway."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


def test_another_users_process_hides_its_io_and_nothing_else() -> None:
    """Permission denied costs the figures that are not ours to see, which are few; on old kernels also the descriptors."""
    with as_nobody():
        usage = Proc().usage(1)
    assert usage is not None
    assert (usage.read, usage.written) == (None, None)
    assert usage.resident > 0
    assert usage.voluntary > 0
    assert usage.max_fds


@contextmanager
def mounted(hidepid: str) -> Iterator[Path]:
    """Mount a /proc of its own that hides other users' processes, but from a group that is not root's."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    # Before Linux 5.8 the option would have gone for every mounted /proc of the machine.
    if os.geteuid() or not mount or not umount or tuple(map(int, os.uname().release.split(".")[:2])) < (5, 8):
        pytest.skip("takes root, and Linux 5.8")
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        done = subprocess.run([mount, "-t", "proc", "-o", f"hidepid={hidepid},gid=1", "proc", path], check=False)  # noqa: S603 -- ours
        if done.returncode:
            pytest.skip("root has no right to mount here")
        try:
            yield Path(path)
        finally:
            subprocess.run([umount, path], check=True)  # noqa: S603 -- ours


@pytest.mark.parametrize("hidepid", ["1", "2"])
async def test_hidden_processes_are_a_failure_that_says_so(supervisor: "Root", hidepid: str) -> None:
    """On a /proc mounted with hidepid, a user without rights sees nothing of others, and that is told."""
    with mounted(hidepid) as proc:
        watch = Watch(proc)
        watch.source.pids["app"] = supervisor.pid
        with as_nobody(), pytest.raises(UnseenError, match="hidepid"):
            await watch.look()
        assert (await watch.look())["app"].processes == 1


async def test_exhausted_descriptors_fail_the_scrape_and_lose_no_count(watch: Watch, supervisor: "Root") -> None:
    """When the exporter itself can open nothing more, it says so; afterwards all that was used meanwhile is there."""
    watch.source.pids["app"] = supervisor.pid
    await watch.look()
    supervisor.tell("run")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208 -- as short as can be
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(used) + 1, limits[1]))
        with suppress(OSError):
            while True:
                opened.append(os.dup(0))
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            await watch.look()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in opened:
            os.close(fd)
    assert await watch.cpu("app") == pytest.approx(truth(supervisor.pid), abs=ONE_TICK_A_PROCESS)
