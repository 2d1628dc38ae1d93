"""Real servers for the probes: HTTP over TCP and TLS that answers byte for byte as told, and a real blackbox_exporter."""

import asyncio
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import trustme

Behaviour = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

MODULES = Path(__file__).with_name("modules.yml")
"""The modules under test, in blackbox_exporter's own grammar; CA_FILE stands for a path."""


class Site:
    """A server that answers each path with fixed bytes, or as a coroutine does; everything asked is kept."""

    def __init__(self, context: ssl.SSLContext | None = None, *, deaf: bool = False) -> None:
        """Make a server; with a context it speaks TLS, and a deaf one never says a word."""
        self._deaf = deaf
        self.routes: dict[str, bytes | Behaviour] = {}
        self.asked: list[bytes] = []
        self._context = context
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self, host: str = "127.0.0.1") -> "Site":
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._serve, host, 0, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Hang up on everybody."""
        assert self._server
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # The transports close in the loop's next turns.
        for _ in range(3):
            await asyncio.sleep(0)

    @property
    def url(self) -> str:
        """Where the server is, without a path."""
        return f"{'https' if self._context else 'http'}://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError, asyncio.CancelledError):
                if self._deaf:
                    await reader.read()
                head = await reader.readuntil(b"\r\n\r\n")
                length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                body = await reader.readexactly(int(length[0].partition(b":")[2])) if length else b""
                self.asked.append(head + body)
                path = head.split(b" ")[1].decode().partition("?")[0]
                route = self.routes.get(path, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                if isinstance(route, bytes):
                    whole = not head.startswith(b"HEAD ")
                    writer.write(route if whole else route.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
                    await writer.drain()
                else:
                    await route(head, reader, writer)
        finally:
            writer.close()
            self._tasks.discard(task)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    """Return a plain server on loopback."""
    one = await Site().start()
    yield one
    await one.stop()


@pytest.fixture
async def deaf_site() -> AsyncIterator[Site]:
    """Return a server that accepts connections and says nothing."""
    one = await Site(deaf=True).start()
    yield one
    await one.stop()


@pytest.fixture
async def site6() -> AsyncIterator[Site]:
    """Return a plain server on IPv6's loopback."""
    try:
        one = await Site().start("::1")
    except OSError:
        pytest.skip("there is no IPv6 here")
    yield one
    await one.stop()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """Return the authority that the tests' certificates come from."""
    return trustme.CA(organization_name="Probe Tests", organization_unit_name="Authority")


@pytest.fixture(scope="session")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the authority's certificate as a file."""
    path = tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


def server_context(leaf: trustme.LeafCert) -> ssl.SSLContext:
    """Return the context of a server with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf.configure_cert(context)
    return context


@pytest.fixture
async def tls_site(authority: trustme.CA) -> AsyncIterator[Site]:
    """Return a TLS server whose certificate is good for 127.0.0.1 and localhost."""
    leaf = authority.issue_cert("127.0.0.1", "localhost", "probe.example", common_name="probe.example")
    one = await Site(server_context(leaf)).start()
    yield one
    await one.stop()


@pytest.fixture
async def expired_site(authority: trustme.CA) -> AsyncIterator[Site]:
    """Return a TLS server whose certificate expired yesterday."""
    now = datetime.now(UTC)
    leaf = authority.issue_cert("127.0.0.1", not_before=now - timedelta(days=9), not_after=now - timedelta(days=1))
    one = await Site(server_context(leaf)).start()
    yield one
    await one.stop()


@pytest.fixture
async def choosy_site(authority: trustme.CA) -> AsyncIterator[Site]:
    """Return a TLS server that wants a client certificate of the authority."""
    context = server_context(authority.issue_cert("127.0.0.1"))
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    one = await Site(context).start()
    yield one
    await one.stop()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Return a port on which nothing listens, kept from others meanwhile."""
    with socket.socket() as kept:
        kept.bind(("127.0.0.1", 0))
        yield kept.getsockname()[1]


@pytest.fixture(scope="session")
def modules_text(ca_file: Path) -> str:
    """Return the modules under test with their path filled in."""
    return MODULES.read_text().replace("CA_FILE", str(ca_file))


@pytest.fixture(scope="session")
def blackbox(modules_text: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of a real blackbox_exporter with the modules under test."""
    command = shutil.which("prometheus-blackbox-exporter")
    if command is None:
        pytest.skip("prometheus-blackbox-exporter is not installed")
    folder = tmp_path_factory.mktemp("blackbox")
    (folder / "blackbox.yml").write_text(modules_text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(  # noqa: S603 -- the exporter just found
            [command, f"--config.file={folder / 'blackbox.yml'}", f"--web.listen-address={address}", "--timeout-offset=0"],
            stdout=log,
            stderr=log,
        )
    try:
        for _ in range(200):
            with suppress(URLError, ConnectionError), urlopen(f"http://{address}/-/healthy", timeout=1):
                break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait(5)
