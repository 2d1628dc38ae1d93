"""WordPecker run from a copy of its sources: alone for its contract, under PM2 for its ecosystem file."""

import fcntl
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest
import requests

ROOT = Path(__file__).parents[3]
CACHE = Path(os.environ.get("PM2_TEST_CACHE") or ROOT / ".state")

T = TypeVar("T")
Environ = Mapping[str, str]


class Server:
    """One Node server, its address and what it printed."""

    def __init__(self, script: Path, environ: Environ, log: Path) -> None:
        """Start it on a free port; return once it listens."""
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(  # noqa: S603 -- nothing foreign in it
                ["node", str(script)],  # noqa: S607 -- the Node that the user has
                env={"PATH": os.environ["PATH"], "PORT": "0", **environ},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        listening = until(lambda: re.search(r"listens on (http://127\.0\.0\.1:(\d+))", self.printed()) or self._ended())
        if not isinstance(listening, re.Match):
            pytest.fail(f"{script} ended before it listened:\n{self.printed()}")
        self.url, self.port = listening[1], int(listening[2])
        self.session = requests.Session()
        self.session.trust_env = False  # no proxy of the machine stands between

    def _ended(self) -> bool:
        return self.process.poll() is not None

    def printed(self) -> str:
        """Return all it has printed."""
        return self.log.read_text()

    def ask(self, method: str, path: str, **options: object) -> requests.Response:
        """Send one request."""
        return self.session.request(method, self.url + path, timeout=10, **options)  # type: ignore[arg-type]

    def raw(self, text: bytes) -> bytes:
        """Send bytes as they are and return the answer's."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(text)
                connection.shutdown(socket.SHUT_WR)
            answer = b""
            with suppress(ConnectionResetError):
                while part := connection.recv(65536):
                    answer += part
            return answer

    def close(self) -> None:
        """End it, hung or not."""
        self.session.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def until(condition: Callable[[], T], *, within: float = 20) -> T:
    """Poll until `condition` is true or `within` seconds have passed; return what it returned."""
    deadline = time.monotonic() + within
    while not (met := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within} s")
        time.sleep(0.02)
    return met


def free_ports(count: int) -> list[int]:
    """Return that many different ports that nobody listens on now."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the example as it comes from a clone: nothing installed."""
    copy = tmp_path_factory.mktemp("estate") / "wordpecker"
    shutil.copytree(ROOT / "examples" / "wordpecker", copy, ignore=shutil.ignore_patterns("node_modules", "logs"))
    return copy


@pytest.fixture(scope="session")
def driver(sources: Path) -> Path:
    """Return a node_modules folder with what the lock file names."""
    folder = CACHE / "wordpecker"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = (sources / "package-lock.json").read_bytes()
        have = folder / "package-lock.json"
        if not (have.exists() and have.read_bytes() == wanted and (folder / "node_modules" / "mongodb").exists()):
            for name in (".npmrc", "package.json", "package-lock.json"):
                shutil.copy(sources / name, folder / name)
            subprocess.run(["npm", "ci", "--omit=dev", "--silent"], cwd=folder, check=True, timeout=300)  # noqa: S607 -- the user's npm
    return folder / "node_modules"


@pytest.fixture
def node(tmp_path: Path, sources: Path) -> Iterator[Callable[..., Server]]:
    """Return a function that starts `backend` or `frontend` with an environment."""
    started: list[Server] = []

    def start(part: str, environ: Environ | None = None) -> Server:
        server = Server(sources / part / "server.js", environ or {}, tmp_path / f"{part}-{len(started)}.log")
        started.append(server)
        return server

    try:
        yield start
    finally:
        for server in started:
            server.close()


@pytest.fixture
def backend(node: Callable[..., Server]) -> Server:
    """Return the backend as it comes: no MongoDB, no drills."""
    return node("backend")


@pytest.fixture
def drilled(node: Callable[..., Server]) -> Server:
    """Return the backend with drills allowed."""
    return node("backend", {"WORDPECKER_DRILL": "1"})
