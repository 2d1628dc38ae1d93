"""A stand-in for the daemon's end of pub.sock, and patience for what takes a moment."""

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from exporter.pm2.wire import encode


class Bus:
    """Listens at pub.sock as PM2's daemon does, and sends whoever listens what it is told to."""

    def __init__(self, path: Path) -> None:
        """Prepare for the socket at `path`."""
        self.path = path
        self.writers: list[asyncio.StreamWriter] = []
        self._servers: list[asyncio.Server] = []

    async def open(self) -> None:
        """Begin to listen, in place of whoever did before."""
        self.path.unlink(missing_ok=True)
        self._servers.append(await asyncio.start_unix_server(self._accept, self.path))

    async def _accept(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)

    def send(self, topic: str, body: object) -> None:
        """Publish one message."""
        self.send_raw(encode(b"s:" + topic.encode(), b"j:" + json.dumps(body).encode()))

    def send_raw(self, data: bytes) -> None:
        """Publish bytes."""
        for writer in self.writers:
            writer.write(data)

    def exit(self, number: int, *, name: str = "app", code: int = 1, at: float | None = None) -> None:
        """Publish the end of the run that began at `number` milliseconds."""
        process = {"name": name, "pm_id": 0, "status": "stopped", "pm_uptime": number, "exit_code": code}
        said = round(1000 * (time.time() if at is None else at))
        self.send("process:event", {"event": "exit", "manually": False, "process": process, "at": said})

    def hang_up(self) -> None:
        """End every connection."""
        for writer in self.writers:
            writer.close()
        self.writers.clear()

    def close(self, *, unlink: bool = True) -> None:
        """End as a clean kill does; as a crash does where the socket's file is left behind."""
        # From Python 3.13 on a server that closes removes its socket's file itself, which a crash does not.
        aside = self.path.with_suffix(".aside")
        if left := self.path.exists() and not unlink:
            self.path.rename(aside)
        while self._servers:
            self._servers.pop().close()
        self.hang_up()
        if left:
            aside.rename(self.path)
        if unlink:
            self.path.unlink(missing_ok=True)


@pytest.fixture
def home() -> Iterator[Path]:
    """Return a PM2 home with a path short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="bus"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
async def bus(home: Path) -> AsyncIterator[Bus]:
    """Return a listening bus."""
    made = Bus(home / "pub.sock")
    await made.open()
    yield made
    made.close()


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], object]:
    """Return a function that waits until a condition holds."""

    async def wait(condition: Callable[[], object], within: float = 20) -> None:
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline, "the condition was not met in time"
            await asyncio.sleep(0.01)

    return wait


@asynccontextmanager
async def _running(runner: object) -> AsyncIterator[None]:
    task = asyncio.create_task(runner.run(), name="the subscription under test")  # type: ignore[attr-defined]
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def running() -> Callable[[object], object]:
    """Return a context in which the `run` of something runs."""
    return _running
