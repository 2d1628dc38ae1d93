"""Stand-ins for PM2's daemon: real unix sockets whose other end says what a test wants it to say."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Serve = Callable[[Talk], AbstractAsyncContextManager[Path]]


@pytest.fixture(scope="session")
def homes() -> Iterator[Callable[[], Path]]:
    """Return a function that makes an empty PM2 home with a short path, as a socket's path must be."""
    with tempfile.TemporaryDirectory(prefix="pm2-") as base:
        yield lambda: Path(tempfile.mkdtemp(dir=base))


@pytest.fixture(scope="session")
def serve(homes: Callable[[], Path]) -> Serve:
    """Return an async context manager: a home whose rpc.sock is answered by a function of reader and writer."""

    @asynccontextmanager
    async def start(talk: Talk) -> AsyncIterator[Path]:
        home = homes()
        ends: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await talk(reader, writer)
            writer.close()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            ends[asyncio.create_task(answer(reader, writer))] = writer

        server = await asyncio.start_unix_server(connected, home / "rpc.sock")
        try:
            yield home
        finally:
            server.close()
            await asyncio.sleep(0)
            for task, writer in ends.items():
                task.cancel()
                writer.transport.abort()
            await asyncio.gather(*ends, return_exceptions=True)
            await asyncio.gather(*(writer.wait_closed() for writer in ends.values()), return_exceptions=True)

    return start
