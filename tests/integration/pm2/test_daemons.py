"""Real PM2 daemons of four versions: one page for one estate, every failure told apart, and recovery by itself."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from exporter.collectors import pm2 as collector
from exporter.collectors.pm2 import PM2Collector, PM2Options
from exporter.exposition import Format, render
from exporter.grammar import Duration
from exporter.pm2.actor import Actor
from exporter.pm2.client import CallError, PM2Error, Reader, Reason, Shared
from exporter.pm2.command import Command
from exporter.pm2.process import Listing, Process, Status

if TYPE_CHECKING:
    from tests.integration.conftest import PM2

VERSIONS = (7, 6, 5, 4)
ALL = pytest.mark.parametrize("pm2_daemon", VERSIONS, indirect=True)
IDLE = "setInterval(() => {}, 60000)"
LISTENING = (
    "require('http').createServer((q, s) => s.end()).listen(0, '127.0.0.1');"
    "process.on('message', (message) => message === 'shutdown' && process.exit(0))"
)
STANDARD = {"Used Heap Size", "Heap Size", "Event Loop Latency", "Active handles"}


async def reason_of(home: Path, within: float = 5.0) -> Reason | None:
    """Return why the daemon of `home` cannot be asked; None where it answers."""
    try:
        await Reader(home).listing(within)
    except PM2Error as error:
        return error.reason
    return None


async def page(pm2: "PM2", **options: object) -> str:
    """Return the page of one scrape."""
    settings = PM2Options(home=str(pm2.home), **options)  # type: ignore[arg-type]
    collected = PM2Collector(settings, collector.source(settings, {}))
    return render(collected.metrics(await collected.read(10)), Format.TEXT).decode()


async def by_name(pm2: "PM2") -> dict[str, Process]:
    """Return the processes by name; of several the last."""
    return {process.name: process for process in (await Reader(pm2.home).listing(5)).processes}


async def settled(pm2: "PM2") -> Listing:
    """Wait until the estate is in its final states and has published; return its list."""

    async def is_settled() -> Listing | None:
        listing = await Reader(pm2.home).listing(5)
        found = {process.name: process for process in listing.processes}
        states = [found[name].status for name in ("dies", "waits", "done")]
        publish = [process for process in listing.processes if process.is_running and process.interpreter == "node"]
        if states != [Status.ERRORED, Status.WAITING_RESTART, Status.STOPPED]:
            return None
        published = [{monitor.name for monitor in process.monitors} for process in publish]
        return listing if all(names >= STANDARD for names in published) else None

    listing = await pm2.eventually(is_settled, within=30)
    assert listing is not None
    return listing


def shape(text: str) -> list[str]:
    """Return a page's series without what differs by nature: values, ids, versions, PM2's own memory of unstable deaths."""
    lines = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    lines = [re.sub(r'pm_id="\d+"|(pm2|node)_version="[^"]*"', "-", line) for line in lines]
    return sorted(line for line in lines if "http_" not in line)


async def test_four_versions_make_the_same_page(pm2_factory: "Callable[..., PM2]") -> None:
    """The same estate under PM2 7, 6, 5 and 4 has the same series, and the facts agree."""
    pages = {}
    for version in VERSIONS:
        pm2 = pm2_factory(version).boot()
        pm2.start_estate()
        await settled(pm2)
        pages[version] = text = await page(pm2)
        pm2.close()
        for sample in (
            'pm2_processes{status="online"} 9',
            'pm2_processes{status="errored"} 1',
            'pm2_processes{status="waiting restart"} 1',
            'pm2_processes{status="stopped"} 1',
            "pm2_processes_undecodable 0",
            'pm2_exporter_samples_dropped{reason="duplicate"} 0',
        ):
            assert sample in text.splitlines()
        assert len(re.findall(r'pm2_process_max_memory_restart_bytes{name="web",pm_id="\d+"} 209715200', text)) == 2
        assert re.search(r'pm2_process_module{name="pm2-watcher",pm_id="\d+"} 1', text)
        assert re.search(
            r'pm2_process_info{name="worker",.*namespace="back",exec_mode="fork",.*interpreter="python3"', text
        )
        assert re.search(
            r'pm2_process_custom_metric{name="metrics",pm_id="\d+",metric="upload size",unit="bytes"} 3145728', text
        )
        assert f'pm2_version="{pm2.cli.parents[2].name}"' in text
    for version in VERSIONS:
        assert shape(pages[version]) == shape(pages[7])


@ALL
async def test_down_is_told_apart_and_up_again(pm2_daemon: "PM2") -> None:
    """Crash, freeze, thaw, clean end and start are each seen as what they are, by one and the same reader."""
    pm2 = pm2_daemon
    home = pm2.home
    pm2.start({"name": "web", "source": IDLE})
    assert await reason_of(home) is None
    os.kill(pm2.pid, signal.SIGSTOP)
    assert await reason_of(home, 0.2) is Reason.TIMEOUT
    os.kill(pm2.pid, signal.SIGCONT)
    assert await reason_of(home) is None
    pm2.kill()
    assert await reason_of(home) is Reason.REFUSED
    pm2.boot()
    assert await reason_of(home) is None
    pm2.run("kill")
    assert await reason_of(home) is Reason.NO_SOCKET
    pm2.boot()
    assert await reason_of(home) is None


async def test_the_page_while_pm2_is_down(pm2_daemon: "PM2") -> None:
    """A crash leaves pm2_up 0 with its reason, the dump's age, and no process; a new daemon shows the saved apps again."""
    pm2 = pm2_daemon
    pm2.start({"name": "web", "source": IDLE})
    pm2.run("save")
    assert "pm2_up 1" in await page(pm2)
    pm2.kill()
    text = await page(pm2)
    assert "pm2_up 0" in text
    assert 'pm2_down_reason{reason="refused"} 1' in text
    assert re.search(r"^pm2_dump_timestamp_seconds \d", text, re.MULTILINE)
    assert "pm2_process" not in text
    pm2.boot()
    pm2.run("resurrect")
    assert 'pm2_process_status{name="web",pm_id="0",status="online"} 1' in await page(pm2)


async def test_a_frozen_daemon_costs_no_more_than_its_time(pm2_daemon: "PM2") -> None:
    """Frozen for longer than the kernel queues connections, it is still frozen and not gone, and thaws to an answer."""
    pm2 = pm2_daemon
    os.kill(pm2.pid, signal.SIGSTOP)
    waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in range(600)]
    try:
        with contextlib.suppress(BlockingIOError):
            for one in waiting:
                one.connect(str(pm2.socket))
        assert await reason_of(pm2.home, 0.2) is Reason.TIMEOUT
    finally:
        for one in waiting:
            one.close()
    os.kill(pm2.pid, signal.SIGCONT)
    await pm2.eventually(lambda: answers(pm2))


async def answers(pm2: "PM2") -> bool:
    """Tell whether the daemon answers."""
    return await reason_of(pm2.home) is None


def test_another_users_socket_is_a_matter_of_permission(pm2_daemon: "PM2") -> None:
    """Who may not write to the socket is told so: root asks as nobody here, and whoever else shuts the socket to itself."""
    pm2 = pm2_daemon
    is_root = os.getuid() == 0
    pm2.base.chmod(0o755)
    pm2.socket.chmod(0o700 if is_root else 0o000)
    # The interpreter and the package may lie where nobody may look, so the rights are dropped once all is imported.
    drop = "os.setgroups([]); os.setgid(65534); os.setuid(65534)" if is_root else "pass"
    code = (
        f"import asyncio, os, sys\nfrom exporter.pm2.client import PM2Error, Reader\n{drop}\n"
        "try:\n    asyncio.run(Reader(sys.argv[1]).listing(5))\nexcept PM2Error as error:\n    print(error.reason)\n"
    )
    command = [sys.executable, "-c", code, str(pm2.home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603 -- our own code
    assert done.stdout == "permission\n", done.stderr
    pm2.socket.chmod(0o775)
    assert asyncio.run(reason_of(pm2.home)) is None


@ALL
async def test_acting_does_what_it_says_and_never_harms_the_daemon(pm2_daemon: "PM2") -> None:
    """Each acting call does its work on running, stopped and unknown processes, and the daemon lives on."""
    pm2 = pm2_daemon
    actor = Actor(pm2.home)
    pm2.start(
        {"name": "web", "source": LISTENING, "exec_mode": "cluster"},
        {"name": "bash", "script": "/bin/sleep", "args": "999", "interpreter": "none"},
    )
    daemon = pm2.pid
    before = await by_name(pm2)
    web, plain = before["web"].pm_id, before["bash"].pm_id

    await actor.restart(plain, within=10)
    after = await by_name(pm2)
    assert after["bash"].pid not in (0, before["bash"].pid)
    assert after["bash"].restart_time == 1
    await actor.reset(plain, within=10)
    assert (await by_name(pm2))["bash"].restart_time == 0
    await actor.reload(web, within=10)
    assert (await by_name(pm2))["web"].pid not in (0, before["web"].pid)
    await actor.soft_reload(web, within=15)
    await actor.announce(web, "restart", within=10)
    await actor.reopen_logs(within=10)
    for _ in range(2):
        await actor.stop(plain, within=10)
        stopped = (await by_name(pm2))["bash"]
        assert (stopped.status, stopped.pid) == (Status.STOPPED, 0)
    await actor.start(plain, within=10)
    with pytest.raises(CallError, match="already online"):
        await actor.start(plain, within=10)
    await actor.duplicate(web, within=10)
    assert len((await Reader(pm2.home).listing(5)).processes) == 3
    await actor.delete(plain, within=10)
    assert "bash" not in await by_name(pm2)
    for act in (actor.start, actor.stop, actor.restart, actor.reload, actor.soft_reload, actor.delete, actor.duplicate):
        with pytest.raises(CallError):
            await act(99, within=10)
    with pytest.raises(CallError):
        await actor.announce(99, "stop", within=10)
    assert (await Reader(pm2.home).ping(5)).pid == daemon == pm2.pid


@ALL
async def test_a_dumped_app_comes_back(pm2_daemon: "PM2") -> None:
    """An entry of a real dump starts its app, and what would end the daemon is refused before it is sent."""
    pm2 = pm2_daemon
    pm2.start({"name": "web", "source": IDLE})
    pm2.run("save")
    (entry,) = json.loads((pm2.home / "dump.pm2").read_text())
    actor, daemon = Actor(pm2.home), pm2.pid
    await actor.delete((await by_name(pm2))["web"].pm_id, within=10)
    for field in ("env", "pm_pid_path", "pm_out_log_path", "pm_err_log_path"):
        with pytest.raises((TypeError, ValueError)):
            await actor.prepare({**entry, field: None}, within=10)
    await actor.prepare(entry, within=10)
    assert (await by_name(pm2))["web"].status == Status.ONLINE
    assert (await Reader(pm2.home).ping(5)).pid == daemon


@ALL
async def test_no_entry_that_is_sent_ends_the_daemon(pm2_daemon: "PM2") -> None:
    """Whatever passes the checks, odd as it may be, PM2 starts or refuses, and lives on."""
    pm2 = pm2_daemon
    pm2.start({"name": "web", "source": IDLE})
    pm2.run("save")
    (entry,) = json.loads((pm2.home / "dump.pm2").read_text())
    actor, daemon = Actor(pm2.home), pm2.pid
    patterns = ("0 3 * * MON-FRI", "*/5 0-6/2 1,15 jan,nov 6", "30 0 0 1 1 *", "59 23 31 11 0", "*/59 */23 */30 */10 */6")
    odd = [
        *({"cron_restart": pattern} for pattern in patterns),
        *({"watch": value} for value in (True, "src", ["src", "/nowhere"])),
        *({"uid": value} for value in ("nosuch", {}, -1)),
        {"exec_interpreter": "/nowhere"},
        *({"env": {**entry["env"], "ODD": value}} for value in (None, {}, "nul\0l")),
        *({"args": value} for value in (5, {}, [{}])),
        {"pm_log_path": "/nowhere/x.log"},
        {"pm_exec_path": "/nowhere.js"},
        {"pm_cwd": "/nowhere"},
        {"stop_exit_codes": 5},
        {"kill_timeout": {}},
    ]
    for number, fields in enumerate(odd):
        with contextlib.suppress(CallError):
            await actor.prepare({**entry, "name": f"odd-{number}", **fields}, within=10)
        assert (await Reader(pm2.home).ping(5)).pid == daemon, fields


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_command_lists_and_never_starts_a_daemon(pm2_factory: "Callable[..., PM2]", version: int) -> None:
    """`pm2 jlist` gives the same list as the socket; where no daemon runs, or one crashed, it says so and starts none."""
    pm2 = pm2_factory(version)
    command = Command([str(pm2.cli), "jlist"], environ=pm2.environ)

    async def has_none() -> None:
        with pytest.raises(PM2Error) as caught:
            await command.listing(30)
        assert caught.value.reason is Reason.NO_DAEMON, caught.value
        assert pm2.processes() == []

    await has_none()
    assert not pm2.socket.exists()
    pm2.boot()
    pm2.start(*({"name": f"app-{i}", "source": IDLE, "env": {"LARGE": "x" * 60_000}} for i in range(3)))
    listing = await command.listing(30)
    asked = await Reader(pm2.home).listing(5)
    assert [(process.name, process.pid, process.status) for process in listing.processes] == [
        (process.name, process.pid, process.status) for process in asked.processes
    ]
    pm2.kill()
    pm2.until(lambda: not pm2.processes())
    await has_none()


async def test_without_its_guard_the_command_would_start_one(pm2_factory: "Callable[..., PM2]") -> None:
    """The danger is real: the same command, run by hand, starts a daemon and says so above the list."""
    pm2 = pm2_factory()
    assert "Spawning PM2 daemon" in pm2.run("jlist")
    assert pm2.processes() == [pm2.pid]


async def test_apps_appear_vanish_and_change_their_names(pm2_daemon: "PM2") -> None:
    """Each scrape shows the list as it is: what is deleted is gone, what is renamed has its new name alone."""
    pm2 = pm2_daemon
    assert "pm2_process_info" not in await page(pm2)
    pm2.start({"name": "one", "source": IDLE}, {"name": "two", "source": IDLE})
    assert set(await by_name(pm2)) == {"one", "two"}
    pm2.run("restart", "one", "--name", "renamed")
    pm2.run("delete", "two")
    text = await page(pm2)
    assert 'name="renamed",pm_id="0"' in text
    assert 'name="one"' not in text
    assert 'name="two"' not in text


async def test_an_app_that_lays_its_environment_over_pm2s_fields(pm2_daemon: "PM2") -> None:
    """Variables named like PM2's own fields replace them in its list; the page stays whole, the neighbours untouched."""
    pm2 = pm2_daemon
    hostile = {
        "restart_time": "many", "max_memory_restart": "lots", "instances": "[]", "namespace": 'a"} 1\n', "autorestart": "",
        "created_at": "NaN", "unstable_restarts": "-5", "pmx_module": "{}", "username": "\\", "exec_interpreter": "node",
    }  # fmt: skip
    pm2.start({"name": "hostile", "source": IDLE, "env": hostile}, {"name": "good", "source": IDLE})
    await Actor(pm2.home).restart((await by_name(pm2))["hostile"].pm_id, within=10)
    found = await by_name(pm2)
    assert found["good"].restart_time == 0
    bad = found["hostile"]
    assert (bad.restart_time, bad.unstable_restarts, bad.max_memory_restart, bad.created_at) == (None, None, None, None)
    text = await page(pm2)
    assert 'namespace="a\\"} 1\\n"' in text
    assert "pm2_processes_undecodable 0" in text
    assert 'pm2_exporter_samples_dropped{reason="invalid"} 0' in text


@asynccontextmanager
async def speaking(path: Path, said: bytes, *, forever: bool = False) -> AsyncIterator[None]:
    """Answer on the socket `path` with `said`, once or without end, and stay connected."""
    writers: list[asyncio.StreamWriter] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError):
            await reader.read(100)
            writer.write(said)
            while forever:
                writer.write(b"x" * 65536)
                await writer.drain()
            await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(talk, path)
    try:
        yield
    finally:
        server.close()
        await asyncio.sleep(0)
        for writer in writers:
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@pytest.mark.parametrize(
    ("said", "forever", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", False, Reason.NONSENSE),
        (b"\x99" * 4096, True, Reason.NONSENSE),
        (b"\x12\x3f\xff\xff\xff", True, Reason.TOO_LARGE),
        (b"\x12\x00\x00\xff\xff" + b"j:[", False, Reason.TIMEOUT),
        (b"", False, Reason.TIMEOUT),
    ],
    ids=["http", "endless-nonsense", "endless-answer", "half-an-answer", "silence"],
)
async def test_what_sits_on_the_socket_is_seen_through(
    pm2_daemon: "PM2",
    said: bytes,
    forever: bool,  # noqa: FBT001 -- a column of the table
    reason: Reason,
) -> None:
    """Something else on PM2's socket costs pm2_up, in time and with its reason; PM2 itself is found again after it."""
    pm2 = pm2_daemon
    aside = pm2.home / "aside.sock"
    pm2.socket.rename(aside)
    async with speaking(pm2.socket, said, forever=forever):
        text = await page(pm2, timeout=Duration(0.5))
    assert "pm2_up 0" in text
    assert f'pm2_down_reason{{reason="{reason}"}} 1' in text
    pm2.socket.unlink(missing_ok=True)
    aside.rename(pm2.socket)
    assert "pm2_up 1" in await page(pm2)


async def test_a_daemon_that_dies_while_it_answers(pm2_daemon: "PM2") -> None:
    """Killed in the middle of questions, it has hung up, crashed or gone, and nothing else comes of it."""
    pm2 = pm2_daemon
    pm2.start({"name": "web", "source": IDLE})
    asking = [asyncio.create_task(reason_of(pm2.home)) for _ in range(50)]
    await asyncio.sleep(0)
    os.kill(pm2.pid, signal.SIGKILL)
    assert set(await asyncio.gather(*asking)) <= {None, Reason.DISCONNECTED, Reason.REFUSED, Reason.NO_SOCKET}
    pm2.until(lambda: not pm2.processes())
    assert await reason_of(pm2.home) is Reason.REFUSED


async def test_a_thousand_questions_leave_nothing_behind(pm2_daemon: "PM2") -> None:
    """Neither the exporter nor the daemon keeps a descriptor of a question that was answered."""
    pm2 = pm2_daemon
    reader = Shared(Reader(pm2.home))

    def descriptors(pid: int | str) -> int:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))

    await reader.listing(5)
    pm2.until(lambda: descriptors(pm2.pid) > 0)
    before = descriptors("self")
    for _ in range(1000):
        await reader.listing(5)
    assert descriptors("self") == before
    pm2.until(lambda: descriptors(pm2.pid) < 60)


@pytest.fixture
def no_descriptors() -> Iterator[Callable[[], None]]:
    """Return a function that takes every free file descriptor of this process; they are given back at the end."""
    import resource  # noqa: PLC0415 -- for this fixture only

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[socket.socket] = []

    def take() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
        with contextlib.suppress(OSError):
            while True:
                taken.append(socket.socket(socket.AF_UNIX))

    try:
        yield take
    finally:
        for one in taken:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_without_descriptors_pm2_is_unreachable(pm2_daemon: "PM2", no_descriptors: Callable[[], None]) -> None:
    """An exporter out of file descriptors says that it cannot reach PM2, and not that PM2 is gone."""
    assert await reason_of(pm2_daemon.home) is None
    no_descriptors()
    assert await reason_of(pm2_daemon.home) is Reason.UNREACHABLE


def test_the_command_line_is_here() -> None:
    """The tests ask a real pm2, which needs a real Node.js."""
    assert shutil.which("node")
