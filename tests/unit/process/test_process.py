"""The collector, over a /proc made of files and a list that is an argument."""

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from exporter.collectors.process import DESCS, ProcessCollector, ProcessOptions, UnseenError
from exporter.exposition import Format, render
from exporter.pm2.client import PM2Error, Reason
from exporter.pm2.process import Daemon, Listing, Process

if TYPE_CHECKING:
    from tests.unit.process.conftest import FakeProc

DAEMON = 9


class Fixed:
    """A source whose list, or failure, the test decides."""

    def __init__(self, *processes: Process, daemon: int | None = DAEMON) -> None:
        """List these processes."""
        self.now: Listing | PM2Error = Listing(processes=processes, daemon=Daemon(pid=daemon))

    async def listing(self, within: float) -> Listing:
        """Return or raise what was decided."""
        assert within > 0
        if isinstance(self.now, PM2Error):
            raise self.now
        return self.now


def app(name: str, pm_id: int, pid: int) -> Process:
    """Return one entry of PM2's list."""
    return Process(name=name, pm_id=pm_id, pid=pid, status="online" if pid else "stopped")


async def scrape(collector: ProcessCollector) -> dict[str, float]:
    """Return the samples of one scrape, by series, without the metrics' common prefix."""
    page = render(collector.metrics(await collector.read(5)), Format.TEXT, account=None).decode()
    lines = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
    return {series.removeprefix("pm2_process_"): float(value) for series, _, value in lines}


def of(samples: dict[str, float], pm_id: int) -> dict[str, float]:
    """Return the samples of one app, without its labels."""
    label = f'pm_id="{pm_id}"'
    return {
        series.partition("{")[0] + series.partition(label)[2].removesuffix("}"): value
        for series, value in samples.items()
        if label in series
    }


async def test_every_metric_of_a_tree(fake: "FakeProc") -> None:
    """A wrapper and its child are one app: sizes are sums, the counters are what was used since the first look."""
    fake.add(10, DAEMON, comm="npm run start", times=(100, 10, 5, 5), io=(1000, 2000), fds=4)
    fake.add(11, 10, times=(500, 50, 0, 0), io=(0, 0), fds=6, limit="12")
    fake.add(12, 10, state="Z", fds=0)
    fake.add(13, DAEMON)
    collector = ProcessCollector(ProcessOptions(), Fixed(app("web", 0, 10)), fake.root)
    await scrape(collector)
    fake.add(10, DAEMON, comm="npm run start", times=(100, 10, 5, 5), io=(1000, 2000), fds=4)
    fake.add(11, 10, times=(650, 75, 0, 0), io=(512, 4096), fds=6, limit="12")
    samples = await scrape(collector)
    assert all('{name="web",pm_id="0"' in series for series in samples)
    ticks = os.sysconf("SC_CLK_TCK")
    assert of(samples, 0) == {
        'cpu_seconds_total,mode="user"': 150 / ticks,
        'cpu_seconds_total,mode="system"': 25 / ticks,
        "resident_memory_bytes": 2 * 40324 * 1024,
        "virtual_memory_bytes": 2 * 745713664,
        "swap_bytes": 2 * 12 * 1024,
        "open_fds": 6,
        "max_fds": 12,
        "tree_open_fds": 10,
        "threads": 22,
        'context_switches_total,kind="voluntary"': 0,
        'context_switches_total,kind="involuntary"': 0,
        "read_bytes_total": 512,
        "written_bytes_total": 4096,
        "tree_processes": 2,
    }


async def test_every_metric_is_described(fake: "FakeProc") -> None:
    """The collector emits exactly what it announces."""
    fake.add(10, DAEMON)
    collector = ProcessCollector(ProcessOptions(), Fixed(app("web", 0, 10)), fake.root)
    metrics = list(collector.metrics(await collector.read(5)))
    assert tuple(metric.desc for metric in metrics) == DESCS == collector.descs
    assert all(metric.rows for metric in metrics)
    assert all(desc.help.endswith(".") and desc.source for desc in DESCS)


async def test_a_stopped_app_keeps_its_counters_and_has_no_processes(fake: "FakeProc") -> None:
    """The counters of an app that stops stay as they are; it holds nothing, and tells so by its number of processes."""
    fake.add(10, DAEMON)
    source = Fixed(app("web", 0, 10))
    collector = ProcessCollector(ProcessOptions(), source, fake.root)
    await scrape(collector)
    fake.add(10, DAEMON, times=(300, 0, 0, 0))
    await scrape(collector)
    fake.remove(10)
    source.now = Listing(processes=(app("web", 0, 0), app("never", 1, 0)))
    samples = await scrape(collector)
    assert of(samples, 0).pop('cpu_seconds_total,mode="user"') == 300 / os.sysconf("SC_CLK_TCK")
    assert of(samples, 0)["tree_processes"] == 0
    assert "resident_memory_bytes" not in of(samples, 0)
    assert of(samples, 1) == {"tree_processes": 0}


async def test_a_process_that_is_gone_by_now_costs_only_its_own_samples(fake: "FakeProc") -> None:
    """PM2 lists a pid that /proc no longer has: nothing is said of it, and all of the others."""
    fake.add(10, DAEMON)
    samples = await scrape(ProcessCollector(ProcessOptions(), Fixed(app("web", 0, 10), app("gone", 1, 11)), fake.root))
    assert of(samples, 1) == {}
    assert of(samples, 0)["tree_processes"] == 1


async def test_a_process_of_another_pid_namespace_is_not_taken_for_the_app(fake: "FakeProc") -> None:
    """A process that has the listed pid but is no child of the daemon is somebody else's, and nothing is said of it."""
    fake.add(10, DAEMON)
    fake.add(11, 1)
    source = Fixed(app("web", 0, 10), app("elsewhere", 1, 11))
    assert of(await scrape(ProcessCollector(ProcessOptions(), source, fake.root)), 1) == {}
    source.now = Listing(processes=(app("web", 0, 10), app("elsewhere", 1, 11)))
    assert of(await scrape(ProcessCollector(ProcessOptions(), source, fake.root)), 1) != {}, "a command tells of no daemon"


async def test_a_daemon_without_a_pid_here_has_no_processes_here(fake: "FakeProc") -> None:
    """Asked over a socket from a container of its own, PM2 lists pids that mean other processes here, or none."""
    fake.add(10, 1)
    collector = ProcessCollector(ProcessOptions(), Fixed(app("web", 0, 10), daemon=None), fake.root)
    with pytest.raises(UnseenError, match="another pid namespace"):
        await collector.read(5)


async def test_that_nothing_can_be_seen_is_a_failure(fake: "FakeProc") -> None:
    """Where /proc hides every process of PM2's, the collector fails and says what may be the cause."""
    fake.add(11, 1)
    collector = ProcessCollector(ProcessOptions(), Fixed(app("web", 0, 10)), fake.root)
    with pytest.raises(UnseenError, match="hidepid"):
        await collector.read(5)
    assert await scrape(ProcessCollector(ProcessOptions(), Fixed(app("web", 0, 0)), fake.root)) != {}
    assert await scrape(ProcessCollector(ProcessOptions(), Fixed(), fake.root)) == {}


async def test_the_only_app_dying_at_the_first_look_is_no_hidden_process(fake: "FakeProc") -> None:
    """Where PM2's daemon can be seen, a process that cannot has ended since PM2 listed it."""
    fake.add(DAEMON, 1)
    samples = await scrape(ProcessCollector(ProcessOptions(), Fixed(app("web", 0, 10)), fake.root))
    assert "resident_memory_bytes" not in of(samples, 0)


async def test_a_process_that_becomes_an_app_is_looked_at_again(fake: "FakeProc") -> None:
    """What was seen of a process while it was no app's is not shown once it is one."""
    fake.add(10, DAEMON)
    fake.add(11, DAEMON)
    source = Fixed(app("web", 0, 10))
    collector = ProcessCollector(ProcessOptions(), source, fake.root)
    for _ in range(2):
        await scrape(collector)
    fake.add(11, DAEMON, state="Z")
    source.now = Fixed(app("web", 0, 10), app("api", 1, 11)).now
    samples = await scrape(collector)
    assert (of(samples, 0)["tree_processes"], of(samples, 1)["tree_processes"]) == (1, 0)


async def test_a_reused_pid_is_another_process(fake: "FakeProc") -> None:
    """A process with the pid of a stranger that has ended is not taken for it."""
    fake.add(10, DAEMON)
    fake.add(11, 1)
    collector = ProcessCollector(ProcessOptions(), Fixed(app("web", 0, 10)), fake.root)
    for _ in range(2):
        await scrape(collector)
    (fake.root / "11").rename(fake.root / "ended")
    fake.add(11, 10, start=200)
    assert of(await scrape(collector), 0)["tree_processes"] == 2


async def test_hidden_io_of_one_process_hides_the_sum_and_nothing_else(fake: "FakeProc") -> None:
    """A sum that lacks a part is not told; the other app's is."""
    fake.add(10, DAEMON)
    fake.add(11, 10, io=None)
    fake.add(12, DAEMON)
    collector = ProcessCollector(ProcessOptions(), Fixed(app("web", 0, 10), app("api", 1, 12)), fake.root)
    samples = await scrape(collector)
    assert {"read_bytes_total", "written_bytes_total"} == of(samples, 1).keys() - of(samples, 0).keys()


async def test_io_that_comes_to_be_seen_is_no_burst(fake: "FakeProc") -> None:
    """What a process did while its I/O was hidden is not counted at once when it shows."""
    fake.add(10, DAEMON)
    fake.add(11, 10, io=None, start=200)
    collector = ProcessCollector(ProcessOptions(), Fixed(app("web", 0, 10)), fake.root)
    await scrape(collector)
    fake.add(11, 10, io=(5_000_000, 0), start=200)
    assert of(await scrape(collector), 0)["read_bytes_total"] == 0
    fake.add(11, 10, io=(5_000_007, 0), start=200)
    assert of(await scrape(collector), 0)["read_bytes_total"] == 7


async def test_the_process_closest_to_its_limit_is_told(fake: "FakeProc") -> None:
    """Many processes with a few descriptors each are not near any limit; one that is decides, however few it has."""
    fake.add(10, DAEMON, fds=20, limit="1000")
    fake.add(11, 10, fds=8, limit="10")
    fake.add(12, 10, fds=30, limit="1000")
    fake.add(13, 10, fds=9, limit="unlimited")
    samples = of(await scrape(ProcessCollector(ProcessOptions(), Fixed(app("web", 0, 10)), fake.root)), 0)
    assert (samples["open_fds"], samples["max_fds"], samples["tree_open_fds"]) == (8, 10, 67)


async def test_pm2_down_is_pm2s_error(fake: "FakeProc") -> None:
    """Without a list there is nothing to look at: the failure is PM2's own, and the counters go on once it is back."""
    fake.add(10, DAEMON)
    source = Fixed(app("web", 0, 10))
    listing = source.now
    collector = ProcessCollector(ProcessOptions(), source, fake.root)
    await scrape(collector)
    fake.add(10, DAEMON, times=(70, 0, 0, 0))
    source.now = PM2Error(Reason.REFUSED, "nobody listens")
    with pytest.raises(PM2Error, match="nobody listens"):
        await collector.read(5)
    source.now = listing
    assert of(await scrape(collector), 0)['cpu_seconds_total,mode="user"'] == 70 / os.sysconf("SC_CLK_TCK")


async def test_without_descriptors_of_our_own_the_scrape_fails_and_no_count_is_lost(fake: "FakeProc") -> None:
    """An error of ours is not taken for the end of the apps: what they used meanwhile counts once it is over."""
    fake.add(10, DAEMON, times=(10, 0, 0, 0))
    collector = ProcessCollector(ProcessOptions(), Fixed(app("web", 0, 10)), fake.root)
    await scrape(collector)
    (fake.root / "10" / "status").rename(fake.root / "status")
    (fake.root / "10" / "status").mkdir()
    with pytest.raises(IsADirectoryError):
        await collector.read(5)
    (fake.root / "10" / "status").rmdir()
    fake.add(10, DAEMON, times=(25, 0, 0, 0))
    assert of(await scrape(collector), 0)['cpu_seconds_total,mode="user"'] == 15 / os.sysconf("SC_CLK_TCK")


async def test_a_read_that_hangs_costs_its_scrape_and_no_later_one(fake: "FakeProc") -> None:
    """A process that sleeps uninterruptibly holds up neither loop nor deadline; once it answers, all is as before."""
    fake.add(10, DAEMON, state="D")
    collector = ProcessCollector(ProcessOptions(), Fixed(app("web", 0, 10)), fake.root)
    await scrape(collector)
    io = fake.root / "10" / "io"
    text = io.read_text()
    io.unlink()
    os.mkfifo(io)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await collector.read(0.05)
    writer = await asyncio.to_thread(io.open, "w")
    io.unlink()
    io.write_text(text)
    with writer:
        writer.write(text)
    assert of(await scrape(collector), 0)["tree_processes"] == 1


async def test_overlapping_scrapes_all_answer(fake: "FakeProc") -> None:
    """Scrapes at the same time each see everything, and what they count is counted once."""
    fake.add(10, DAEMON)
    collector = ProcessCollector(ProcessOptions(), Fixed(app("web", 0, 10)), fake.root)
    await scrape(collector)
    fake.add(10, DAEMON, times=(40, 0, 0, 0))
    for samples in await asyncio.gather(*[scrape(collector) for _ in range(8)]):
        assert of(samples, 0)['cpu_seconds_total,mode="user"'] == 40 / os.sysconf("SC_CLK_TCK")
