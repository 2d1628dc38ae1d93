"""Whatever breaks, every scrape answers in its deadline with the truth about what failed, and recovers by itself."""

import os
import resource
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import requests

if TYPE_CHECKING:
    from tests.integration.conftest import PM2, Mongod
    from tests.integration.face.conftest import Exporter, Page, Start

IDLE = "setInterval(() => {}, 1000)"
SERVER = "require('http').createServer((q, r) => r.end('ok')).listen(%d, '127.0.0.1')"
TIMEOUT = 3.0
"""Seconds that these scrapes may take."""


def why_down(page: "Page") -> str:
    """Return the one reason that the page gives for PM2 being down; empty when it is up."""
    reasons = [label["reason"] for label in page.labels("pm2_down_reason") if page.value("pm2_down_reason", **label)]
    assert len(reasons) <= 1
    assert bool(reasons) == (page.value("pm2_up") == 0)
    return reasons[0] if reasons else ""


def stale(page: "Page") -> list[str]:
    """Return the metrics that still speak of processes, but for the counts of what happened to them."""
    counts = {"pm2_process_exits_total", "pm2_process_exceptions_total", "pm2_process_restart_overlimit_total"}
    return sorted({name for name, _ in page.series if name.startswith("pm2_process_")} - counts)


@pytest.fixture
def watched(start: "Start", pm2_daemon: "PM2") -> "Exporter":
    """Start an app, and an exporter that has seen it."""
    pm2_daemon.start({"name": "web", "source": IDLE})
    exporter = start(f"pm2: {{home: {pm2_daemon.home}}}")
    exporter.until(lambda: exporter.scrape().value("pm2_exporter_events_connected") == 1)
    assert exporter.scrape().value("pm2_process_status", name="web", status="online") == 1
    return exporter


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Make a folder whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def heals(exporter: "Exporter") -> None:
    """Wait until the estate is seen as well again."""
    exporter.until(lambda: exporter.scrape().value("pm2_process_status", name="web", status="online") == 1)
    exporter.until(lambda: exporter.scrape().value("pm2_exporter_events_connected") == 1)
    page = exporter.scrape()
    assert why_down(page) == ""
    assert not page.failed()
    assert page.value("pm2_process_cpu_seconds_total", name="web", mode="user") is not None


def test_daemon_killed(watched: "Exporter", pm2_daemon: "PM2") -> None:
    """Kill -9 of the daemon: refused, nothing stale, the host still there; a new daemon is found by itself."""
    pm2_daemon.kill()
    page = watched.scrape(timeout=TIMEOUT)
    assert why_down(page) == "refused"
    assert not stale(page)
    assert page.value("node_load1") is not None
    assert {"host", "filesystem"}.isdisjoint(page.failed())
    pm2_daemon.start({"name": "web", "source": IDLE})
    heals(watched)


def test_daemon_ended(watched: "Exporter", pm2_daemon: "PM2") -> None:
    """`pm2 kill`: no socket; and no scrape starts a daemon."""
    pm2_daemon.run("kill")
    for _ in range(3):
        page = watched.scrape(timeout=TIMEOUT)
        assert why_down(page) == "no_socket"
        assert not stale(page)
    assert not pm2_daemon.processes() or pm2_daemon.processes() == [watched.pid]
    assert not pm2_daemon.socket.exists()
    pm2_daemon.start({"name": "web", "source": IDLE})
    heals(watched)


def test_daemon_frozen(watched: "Exporter", pm2_daemon: "PM2") -> None:
    """SIGSTOP of the daemon: timeout, in time; SIGCONT is enough to recover."""
    os.kill(pm2_daemon.pid, signal.SIGSTOP)
    try:
        page = watched.scrape(timeout=TIMEOUT)
        assert why_down(page) == "timeout"
        assert not stale(page)
        assert page.value("node_load1") is not None
    finally:
        os.kill(pm2_daemon.pid, signal.SIGCONT)
    heals(watched)


@pytest.mark.parametrize(
    ("speech", "reasons"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", {"nonsense"}),
        (b"\x12\xff\xff\xff\xff", {"too_large"}),
        (b"\x12\x00\x00\x00\x09j:{broken", {"timeout", "nonsense"}),
        (b"", {"timeout"}),
        (None, {"disconnected"}),
    ],
    ids=["http", "endless", "half", "silent", "hang-up"],
)
def test_socket_full_of_nonsense(start: "Start", short_folder: Path, speech: bytes | None, reasons: set[str]) -> None:
    """Whatever answers on rpc.sock and pub.sock, the scrape ends in time and says what it met."""
    home = short_folder
    with _talking(home / "rpc.sock", speech), _talking(home / "pub.sock", speech):
        exporter = start(f"pm2: {{home: {home}, timeout: 500ms}}")
        for _ in range(3):
            page = exporter.scrape(timeout=TIMEOUT)
            assert why_down(page) in reasons
            assert page.value("node_load1") is not None


def test_app_frozen(start: "Start", pm2_daemon: "PM2") -> None:
    """A frozen app is online to PM2, and its probe fails in time and says why."""
    port = _free_port()
    pm2_daemon.start({"name": "web", "source": SERVER % port})
    exporter = start(
        f"pm2: {{home: {pm2_daemon.home}}}\nhttp: {{targets: [{{url: 'http://127.0.0.1:{port}/', app: web}}]}}"
    )
    exporter.until(lambda: exporter.scrape().value("probe_success", app="web") == 1)
    pid = next(pid for pid in pm2_daemon.processes() if "web.js" in " ".join(psutil.Process(pid).cmdline()))
    os.kill(pid, signal.SIGSTOP)
    page = exporter.scrape(timeout=TIMEOUT)
    assert page.value("probe_success", app="web") == 0
    assert page.value("pm2_process_status", name="web", status="online") == 1
    assert page.value("pm2_process_resident_memory_bytes", name="web")
    os.kill(pid, signal.SIGCONT)
    exporter.until(lambda: exporter.scrape().value("probe_success", app="web") == 1)


def test_probe_target_hangs(start: "Start") -> None:
    """A target that takes the connection and says nothing costs its own probe, in time; the other targets are probed."""
    with socket.create_server(("127.0.0.1", 0)) as silent, _http_server() as good:
        hung = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        exporter = start(f"http: {{targets: [{{url: '{hung}'}}, {{url: '{good}'}}]}}")
        page = exporter.scrape(timeout=TIMEOUT)
        assert page.value("probe_success", target=hung) == 0
        assert page.value("probe_success", target=good) == 1


async def test_mongodb_pulled_away(start: "Start", mongod: "Mongod") -> None:
    """A MongoDB that is frozen or killed is down with its reason, in time, and is up again by itself."""
    exporter = start(f"mongodb: {{uri: '{mongod.uri}'}}")

    def why() -> str:
        page = exporter.scrape(timeout=TIMEOUT)
        assert page.value("node_load1") is not None
        reasons = [
            label["reason"] for label in page.labels("mongodb_down_reason") if page.value("mongodb_down_reason", **label)
        ]
        assert bool(reasons) == (page.value("mongodb_up") == 0)
        return "".join(reasons)

    exporter.until(lambda: why() == "")
    mongod.signal(signal.SIGSTOP)
    assert why() == "timeout"
    mongod.signal(signal.SIGCONT)
    exporter.until(lambda: why() == "")
    mongod.kill()
    assert why() == "refused"
    mongod.start()
    exporter.until(lambda: why() == "")


def test_directory_vanishes(start: "Start", tmp_path: Path) -> None:
    """A directory that is removed is said to be gone, and is measured again when it is back."""
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "a.log").write_bytes(b"x" * 5000)
    exporter = start(f"directory: {{interval: 1s, paths: [{{path: {logs}}}]}}")
    exporter.until(lambda: exporter.scrape().value("pm2_directory_files", path=str(logs)) == 1)
    shutil.rmtree(logs)
    exporter.until(lambda: exporter.scrape().value("pm2_directory_files", path=str(logs)) is None)
    assert not exporter.scrape().failed() - {"process"}
    logs.mkdir()
    exporter.until(lambda: exporter.scrape().value("pm2_directory_files", path=str(logs)) == 0)


def test_descriptors_exhausted(watched: "Exporter") -> None:
    """Without a free file descriptor a scrape on a kept connection is answered with what failed, and recovers by itself."""
    headers = {"X-Prometheus-Scrape-Timeout-Seconds": str(TIMEOUT), "Accept": "text/plain"}
    with requests.Session() as session:
        url = f"http://{watched.address}/metrics"
        assert session.get(url, timeout=10).status_code == 200
        open_now = len(os.listdir(f"/proc/{watched.pid}/fd"))  # noqa: PTH208 -- a count
        before = resource.prlimit(watched.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(watched.pid, resource.RLIMIT_NOFILE, (open_now - 2, before[1]))
        try:
            answer = session.get(url, headers=headers, timeout=TIMEOUT)
            assert answer.status_code == 200
            assert "pm2_up 0\n" in answer.text
            assert 'pm2_down_reason{reason="unreachable"} 1\n' in answer.text
            assert 'pm2_exporter_collector_success{collector="host"}' in answer.text
        finally:
            resource.prlimit(watched.pid, resource.RLIMIT_NOFILE, before)
    heals(watched)


def test_a_frozen_exporter_leaves_the_backlog_to_nobody(start: "Start", pm2_daemon: "PM2") -> None:
    """Frozen while PM2 had much to say, the exporter hangs up once it goes on, and subscribes anew."""
    chatter = "setInterval(() => { for (let i = 0; i < 20; i++) process.stdout.write('y'.repeat(8000) + '\\n') }, 20)"
    exporter = start(f"{{pm2: {{home: {pm2_daemon.home}}}, events: {{max_lag: 1s}}}}")
    exporter.until(lambda: exporter.scrape().value("pm2_exporter_events_connected") == 1)
    pm2_daemon.start({"name": "chatter", "source": chatter, "out_file": "/dev/null"})
    daemon = psutil.Process(pm2_daemon.pid)
    before = daemon.memory_info().rss
    os.kill(exporter.pid, signal.SIGSTOP)
    frozen = time.monotonic()
    # So much that no kernel buffer holds it, and for longer than may be.
    pm2_daemon.until(lambda: daemon.memory_info().rss > before + 8 * 2**20 and time.monotonic() > frozen + 1.5)
    os.kill(exporter.pid, signal.SIGCONT)
    exporter.until(lambda: exporter.scrape().value("pm2_exporter_events_disconnects_total", reason="behind") == 1, within=5)
    exporter.until(lambda: exporter.scrape().value("pm2_exporter_events_connected") == 1)


def test_thousand_scrapes_leave_no_trace(watched: "Exporter") -> None:
    """1 000 scrapes in a row leave descriptors, threads and memory where they were after the first hundred."""
    process = psutil.Process(watched.pid)

    def use() -> tuple[int, int, int]:
        return process.num_fds(), process.num_threads(), process.memory_info().rss

    for _ in range(100):
        watched.get("/metrics").raise_for_status()
    files, threads, memory = use()
    for _ in range(900):
        watched.get("/metrics").raise_for_status()
    files_after, threads_after, memory_after = use()
    assert files_after <= files + 2
    assert threads_after <= threads + 2
    assert memory_after <= memory + 6 * 2**20


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _serving(listener: socket.socket, speech: bytes | None, *, hang_up: bool) -> Iterator[None]:
    """Answer everyone who connects to `listener` with `speech` (None: with nothing); then hang up, or stay."""
    kept: list[socket.socket] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                peer, _ = listener.accept()
                with suppress(OSError):
                    peer.recv(65536) if hang_up else None
                    peer.sendall(speech or b"")
                if hang_up:
                    peer.close()
                else:
                    kept.append(peer)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for peer in kept:
            peer.close()


@contextmanager
def _talking(path: Path, speech: bytes | None) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with _serving(listener, speech, hang_up=speech is None):
            yield


@contextmanager
def _http_server() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        speech = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
        with _serving(listener, speech, hang_up=True):
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
