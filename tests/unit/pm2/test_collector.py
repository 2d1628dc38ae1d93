"""The PM2 collector: what a page says of what was seen, and of what was not."""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from exporter import grammar
from exporter.collectors import pm2
from exporter.collectors.pm2 import AppOptions, PM2Collector, PM2Options, Seen
from exporter.exposition import Format, render
from exporter.pm2.client import PM2Error, Reason
from exporter.pm2.command import GUARD
from exporter.pm2.process import Daemon, Listing, Monitor, Process, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

HOME = "/home/deploy/.pm2"


class Said:
    """A source that says what it is told to."""

    def __init__(self, *answers: Listing | Reason) -> None:
        """Give these answers in turn, the last one for ever."""
        self.answers = list(answers)

    async def listing(self, within: float) -> Listing:  # noqa: ARG002 -- the source's shape
        """Return the next answer, or raise it."""
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Reason):
            raise PM2Error(answer, "as told")
        return answer


def page(seen: Seen, options: PM2Options | None = None) -> list[str]:
    """Return the samples of a page, comments left out."""
    collector = PM2Collector(options or PM2Options(home=HOME), Said(Reason.TIMEOUT))
    text = render(collector.metrics(seen), Format.TEXT).decode()
    return [line for line in text.splitlines() if not line.startswith("#")]


def listed(*processes: Process, files: Mapping[str, int] | None = None) -> Seen:
    """Return what is seen of a PM2 with these processes."""
    return Seen(Listing(processes=processes), None, files or {}, None)


def starting(lines: "Iterable[str]", *names: str) -> list[str]:
    """Return the samples of these metrics."""
    return [line for line in lines if line.startswith(names)]


async def test_when_pm2_is_down_the_rest_stays() -> None:
    """pm2_up is 0, the reason is told, expectations and the dump remain, and nothing is said about processes."""
    options = PM2Options(home=HOME, files=False, apps={"web": AppOptions(instances=2), "old": AppOptions(expected=False)})
    collector = PM2Collector(options, Said(Reason.REFUSED))
    seen = await collector.read(1)
    lines = starting(page(Seen(seen.listing, seen.reason, {}, 12.5), options), "pm2_")
    assert [line for line in lines if not line.startswith(("pm2_down_reason", "pm2_exporter"))] == [
        "pm2_up 0",
        "pm2_dump_timestamp_seconds 12.5",
        'pm2_app_expected{name="web"} 1',
        'pm2_app_expected{name="old"} 0',
        'pm2_app_instances_desired{name="web"} 2',
    ]
    reasons = starting(lines, "pm2_down_reason")
    assert len(reasons) == len(Reason)
    assert [line for line in reasons if line.endswith(" 1")] == ['pm2_down_reason{reason="refused"} 1']


async def test_nothing_is_remembered_from_better_days() -> None:
    """Processes seen before PM2 went down are not shown again."""
    collector = PM2Collector(
        PM2Options(home=HOME, files=False), Said(Listing(processes=(Process(name="w", pm_id=0),)), Reason.TIMEOUT)
    )
    assert (await collector.read(1)).listing is not None
    assert (await collector.read(1)).listing is None


async def test_the_log_tells_of_changes_only(caplog: pytest.LogCaptureFixture) -> None:
    """Going down, going down for another reason and coming back are one line each, however often it is asked."""
    caplog.set_level(logging.INFO)
    up = Listing()
    answers = [up, Reason.REFUSED, Reason.REFUSED, Reason.TIMEOUT, up, up]
    collector = PM2Collector(PM2Options(home=HOME, files=False), Said(*answers))
    for _ in answers:
        await collector.read(1)
    assert [(record.message, getattr(record, "reason", "")) for record in caplog.records] == [
        ("PM2 cannot be asked", "refused"),
        ("PM2 cannot be asked", "timeout"),
        ("PM2 answers again", ""),
    ]


async def test_pm2_gets_no_more_than_its_own_time(homes: "Callable[[], Path]") -> None:
    """Whoever asks, PM2 may take its own timeout; a scrape that has more does not wait for a frozen PM2 with all of it."""
    home = homes()
    options = PM2Options(home=str(home), timeout=grammar.Duration(0.05))
    with socket.socket(socket.AF_UNIX) as frozen:
        frozen.bind(str(home / "rpc.sock"))
        frozen.listen()
        async with asyncio.timeout(5):
            with pytest.raises(PM2Error, match="in time"):
                await pm2.source(options, {}).listing(60)


def test_a_home_that_cannot_be_told_is_no_crash() -> None:
    """A user without an entry and without HOME, or a user who is unknown, has a PM2 that is not found."""
    assert pm2.home(PM2Options(home="~no-such-user/.pm2"), {}) == Path.cwd() / "~no-such-user" / ".pm2"


def test_every_status_is_counted() -> None:
    """Each status that PM2 knows is there with 0, and one it does not know yet under its own name."""
    lines = page(
        listed(*(Process(name="a", pm_id=i, status=s) for i, s in enumerate(("online", "online", "brand new", ""))))
    )
    assert starting(lines, "pm2_processes{") == [
        'pm2_processes{status="online"} 2',
        *(f'pm2_processes{{status="{status}"}} 0' for status in list(Status)[1:]),
        'pm2_processes{status="brand new"} 1',
        'pm2_processes{status="unknown"} 1',
    ]
    assert 'pm2_process_status{name="a",pm_id="2",status="brand new"} 1' in lines
    assert 'pm2_process_status{name="a",pm_id="2",status="online"} 0' in lines
    assert len(starting(lines, 'pm2_process_status{name="a",pm_id="0"')) == len(Status)


def test_a_start_time_and_a_use_of_cpu_are_for_what_runs() -> None:
    """PM2 keeps the time of the last start, which would be an uptime that grows, and calls the CPU of what is stopped 0."""
    processes = [Process(name="a", pm_id=i, pid=pid, started_at=5.0, created_at=4.0, cpu=0) for i, pid in enumerate((7, 0))]
    lines = page(listed(*processes))
    assert starting(lines, "pm2_process_start_time") == ['pm2_process_start_time_seconds{name="a",pm_id="0"} 5.0']
    assert starting(lines, "pm2_process_cpu_ratio") == ['pm2_process_cpu_ratio{name="a",pm_id="0"} 0.0']
    assert len(starting(lines, "pm2_process_created")) == 2


def test_what_was_not_said_is_not_shown() -> None:
    """A process that PM2 says nothing about is there, without a single made-up figure."""
    lines = starting(page(listed(Process(name="a", pm_id=0))), "pm2_process_")
    assert [line for line in lines if "status" not in line] == [
        (
            'pm2_process_info{name="a",pm_id="0",namespace="default",exec_mode="",version="",interpreter="",node_version="",'
            'user=""} 1'
        ),
        'pm2_process_module{name="a",pm_id="0"} 0',
        'pm2_process_given_up{name="a",pm_id="0"} 0',
    ]


def test_facts_are_in_the_info_metric() -> None:
    """Facts about an app and about the daemon are labels of their info metrics; what PM2 calls N/A is not known."""
    process = Process(
        name="web", pm_id=0, pid=5, namespace="front", exec_mode="cluster_mode", version="N/A", interpreter="node",
        node_version="20.1.0", user="deploy", is_module=True,
    )  # fmt: skip
    daemon = Daemon(pm2_version="7.0.4", node_version="20.1.0", user="deploy", started_at=100.5)
    lines = page(Seen(Listing(processes=(process,), daemon=daemon, undecodable=3), None, {}, None))
    assert (
        'pm2_process_info{name="web",pm_id="0",namespace="front",exec_mode="cluster",version="",interpreter="node",'
        'node_version="20.1.0",user="deploy"} 1'
    ) in lines
    assert 'pm2_process_module{name="web",pm_id="0"} 1' in lines
    assert 'pm2_daemon_info{pm2_version="7.0.4",node_version="20.1.0",user="deploy"} 1' in lines
    assert "pm2_daemon_start_time_seconds 100.5" in lines
    assert "pm2_processes_undecodable 3" in lines


@pytest.mark.parametrize(
    ("monitor", "sample"),
    [
        (Monitor("Used Heap Size", 2.0, "MiB"), 'heap_used_bytes{name="a",pm_id="0"} 2097152.0'),
        (Monitor("Heap Size", 2.0, ""), 'heap_total_bytes{name="a",pm_id="0"} 2097152.0'),
        (Monitor("Heap Size", 2.0, "GB"), 'heap_total_bytes{name="a",pm_id="0"} 2000000000.0'),
        (Monitor("Event Loop Latency", 5.0, "ms"), 'event_loop_latency_seconds{name="a",pm_id="0",quantile="0.5"} 0.005'),
        (
            Monitor("Event Loop Latency p95", -0.3, "ms"),
            'event_loop_latency_seconds{name="a",pm_id="0",quantile="0.95"} 0.0',
        ),
        (Monitor("Active handles", 4.0, ""), 'active_handles{name="a",pm_id="0"} 4.0'),
        (Monitor("HTTP", 120.0, "req/min"), 'http_requests_per_second{name="a",pm_id="0"} 2.0'),
        (Monitor("HTTP P95 Latency", 250.0, "ms"), 'http_latency_seconds{name="a",pm_id="0",quantile="0.95"} 0.25'),
        (Monitor("Heap Size", 2.0, "potatoes"), 'custom_metric{name="a",pm_id="0",metric="Heap Size",unit="potatoes"} 2.0'),
        (Monitor("hits", 98.0, "%"), 'custom_metric{name="a",pm_id="0",metric="hits",unit="ratio"} 0.98'),
        (Monitor("jobs", -7.0, "jobs"), 'custom_metric{name="a",pm_id="0",metric="jobs",unit="jobs"} -7.0'),
        (Monitor("Heap Usage", 50.0, "%"), None),
        (Monitor("big", 1e308, "TiB"), None),
    ],
)
def test_figures_come_in_base_units(monitor: Monitor, sample: str | None) -> None:
    """PM2's own figures have metrics of their own, an app's others are custom, and all are in base units."""
    lines = starting(page(listed(Process(name="a", pm_id=0, pid=5, status="online", monitors=(monitor,)))), "pm2_process_")
    facts = tuple(f"pm2_process_{name}{{" for name in ("info", "status", "module", "given_up"))
    shown = [line for line in lines if not line.startswith(facts)]
    assert shown == ([f"pm2_process_{sample}"] if sample else [])


def test_figures_of_what_ended_are_not_shown() -> None:
    """What an app published before it ended says nothing about now."""
    lines = page(listed(Process(name="a", pm_id=0, status="errored", monitors=(Monitor("jobs", 5.0, ""),))))
    assert not starting(lines, "pm2_process_custom")


def test_an_app_cannot_flood_the_page() -> None:
    """The first custom metrics by name are shown, the rest are counted, per process."""
    many = tuple(Monitor(f"m{i:03}", float(i), "") for i in reversed(range(120)))
    few = (Monitor("x", 1.0, ""),)
    processes = [Process(name="a", pm_id=i, pid=5, monitors=m) for i, m in enumerate((many, few))]
    lines = page(listed(*processes), PM2Options(home=HOME, custom_metrics=50))
    shown = starting(lines, "pm2_process_custom_metric")
    assert len(shown) == 51
    assert 'metric="m049"' in shown[49]
    assert "pm2_custom_metrics_dropped 70" in lines


def test_doubles_and_hostile_names_cannot_break_a_page() -> None:
    """Two entries that claim one (name, pm_id), and names made to forge lines, leave a page without double series."""
    names = ["a", "a", 'x"} 1\npm2_up 0 #', "\\", "\ud83d", "\x00\x1b[31m", "n" * 5000, "42"]
    monitors = (Monitor("m", 1.0, ""), Monitor("m", 2.0, ""))
    lines = page(listed(*(Process(name=name, pm_id=0, pid=5, monitors=monitors) for name in names)))
    series = [line.rpartition(" ")[0] for line in lines]
    assert len(series) == len(set(series))
    assert "pm2_up 1" in lines
    assert "pm2_up 0 #" not in lines


def test_log_sizes_are_those_of_the_paths() -> None:
    """Each stream shows its file's size; a file that could not be looked at is not shown."""
    process = Process(name="a", pm_id=0, out_log="/l/o", err_log="/l/e")
    assert starting(page(listed(process, files={"/l/o": 512})), "pm2_log") == [
        'pm2_log_file_bytes{name="a",pm_id="0",stream="out"} 512'
    ]


async def test_files_are_looked_at(tmp_path: Path) -> None:
    """Log files and the dump are measured; links to nothing, folders, FIFOs and devices are not."""
    (tmp_path / "dump.pm2").write_text("[]")
    os.utime(tmp_path / "dump.pm2", (1000.0, 2000.0))
    (tmp_path / "out").write_bytes(b"x" * 300)
    os.mkfifo(tmp_path / "fifo")
    processes = (
        Process(name="a", pm_id=0, out_log=str(tmp_path / "out"), err_log=str(tmp_path / "missing")),
        Process(name="b", pm_id=1, out_log=str(tmp_path / "fifo"), err_log="/dev/null"),
        Process(name="c", pm_id=2, out_log=str(tmp_path), err_log=str(tmp_path / ("x" * 300))),
    )
    collector = PM2Collector(PM2Options(home=str(tmp_path)), Said(Listing(processes=processes)))
    seen = await collector.read(5)
    assert seen.log_bytes == {str(tmp_path / "out"): 300}
    assert seen.dumped == 2000.0
    unlooked = await PM2Collector(PM2Options(home=str(tmp_path), files=False), Said(Listing(processes=processes))).read(5)
    assert (unlooked.log_bytes, unlooked.dumped) == ({}, None)


async def test_scrapes_that_overlap_look_together(tmp_path: Path) -> None:
    """Two scrapes at once both see the files."""
    (tmp_path / "out").write_bytes(b"x")
    listing = Listing(processes=(Process(name="a", pm_id=0, out_log=str(tmp_path / "out")),))
    collector = PM2Collector(PM2Options(home=str(tmp_path)), Said(listing))
    seen = await asyncio.gather(*(collector.read(5) for _ in range(5)))
    assert [list(one.log_bytes.values()) for one in seen] == [[1]] * 5


async def test_a_hanging_disk_cannot_hang_a_scrape(tmp_path: Path) -> None:
    """What was seen before a file hung is shown; then no look is begun until it comes back; then all is as before."""
    (tmp_path / "good").write_bytes(b"xx")
    back = threading.Event()
    looked: list[str] = []

    def stat_of(path: str) -> os.stat_result:
        looked.append(path)
        if path.endswith("dead"):
            back.wait(30)
        return os.stat(path)  # noqa: PTH116 -- what it stands in for

    files = pm2._Files(stat_of)  # noqa: SLF001 -- a disk cannot be made to hang here
    (tmp_path / "dead").write_bytes(b"x")
    paths = [str(tmp_path / name) for name in ("good", "dead")]
    assert list(await files.look(paths, 0.05)) == [paths[0]]
    assert list(await files.look(paths, 0.05)) == [paths[0]]
    begun = len(looked)
    try:
        async with asyncio.timeout(10):
            while await files.look(paths, 0.2):
                pass
        assert len(looked) == begun
    finally:
        back.set()
    async with asyncio.timeout(10):
        while len(await files.look(paths, 5)) < 2:  # noqa: ASYNC110 -- nothing tells when the disk is back
            await asyncio.sleep(0.01)


async def test_a_machine_without_a_thread_to_spare_costs_the_files_alone(tmp_path: Path) -> None:
    """Where an app has used up what processes its user may have, no file is looked at, and PM2 is still told of."""

    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    (tmp_path / "out").touch()
    files = pm2._Files(thread=NoThread)  # noqa: SLF001 -- a machine cannot be used up here
    assert await files.look([str(tmp_path / "out")], 5) == {}


def test_the_catalogue_is_complete() -> None:
    """Every metric that a page can hold is in DESCS, once."""
    monitors = tuple(Monitor(name, 1.0, "") for name in [*pm2._STANDARD, "own"])  # noqa: SLF001 -- the list itself
    process = Process(
        name="a", pm_id=0, pid=5, status="online", restart_time=1, unstable_restarts=1, started_at=1.0, created_at=1.0,
        cpu=1.0, max_memory_restart=5, out_log="/o", monitors=monitors,
    )  # fmt: skip
    seen = Seen(Listing(processes=(process,), daemon=Daemon(started_at=1.0)), None, {"/o": 1}, 1.0)
    options = PM2Options(home=HOME, apps={"a": AppOptions(instances=1)})
    shown = [metric.desc for metric in PM2Collector(options, Said(Listing())).metrics(seen) if metric.rows]
    assert sorted(desc.name for desc in shown) == sorted(desc.name for desc in pm2.DESCS)
    assert len({desc.name for desc in pm2.DESCS}) == len(pm2.DESCS)


def test_the_home_is_found_as_pm2_finds_it() -> None:
    """The option, else PM2_HOME, else ~/.pm2; always absolute."""
    assert pm2.home(PM2Options(home="/a"), {"PM2_HOME": "/b"}) == Path("/a")
    assert pm2.home(PM2Options(), {"PM2_HOME": "/b"}) == Path("/b")
    assert pm2.home(PM2Options(), {}) == Path.home() / ".pm2"
    assert pm2.home(PM2Options(home="~/x"), {}) == Path.home() / "x"


def test_defaults() -> None:
    """The defaults are those of the documentation."""
    assert grammar.written(PM2Options()) == {
        "home": "",
        "timeout": "5s",
        "max_reply": "32MiB",
        "command": [],
        "files": True,
        "custom_metrics": 50,
        "apps": {},
    }
    assert grammar.written(AppOptions()) == {"expected": True, "instances": None}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("command: [sudo, -u, deploy, pm2, jlist]", "PM2_LOG_FILE_PATH"),
        ("command: pm2 jlist", "list"),
        ("timeout: 0", "longer than 0"),
        ("timeout: 5", "unit"),
        ("max_reply: 0", "more than 0"),
        ("custom_metrics: -1", "negative"),
        ("apps: {web: {instances: -1}}", "negative"),
        ("apps: {web: {instances: true}}", "int"),
        ("apps: {'': {}}", "empty"),
        ("apps: {web: {expectd: true}}", "expected"),
    ],
)
def test_wrong_options_are_refused(text: str, rule: str) -> None:
    """A wrong option is an error that says what is wrong."""
    with pytest.raises(grammar.ConfigError, match=rule):
        grammar.decode(text, PM2Options, file="exporter.yml", environ={})


def test_options_as_written() -> None:
    """The section as the documentation shows it."""
    text = f"""
        home: /home/deploy/.pm2
        timeout: 2s
        command: [sudo, -n, -u, deploy, env, {GUARD}, timeout, "5", pm2, jlist]
        apps:
          web: {{instances: 4}}
          nightly: {{expected: false}}
    """
    options = grammar.decode(text, PM2Options, file="exporter.yml", environ={})
    assert options.apps == {"web": AppOptions(expected=True, instances=4), "nightly": AppOptions(expected=False)}
    assert pm2.source(options, {}) is not None
