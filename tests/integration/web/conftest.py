"""A real listener behind a web config file."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trustme
from aiohttp import web

from exporter.webconfig import WebGate

Serve = Callable[[str], Awaitable[str]]


@pytest.fixture
def authority() -> trustme.CA:
    """Return a certificate authority of this test alone."""
    return trustme.CA()


@pytest.fixture
def server_files(tmp_path: Path, authority: trustme.CA) -> trustme.LeafCert:
    """Write server.pem, server.key and ca.pem beside the web config file."""
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "server.key")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return certificate


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Return a function that writes web.yml, serves "hello" behind it and returns HOST:PORT."""
    runners = []

    async def hello(_: web.Request) -> web.Response:
        return web.Response(text="hello")

    async def start(text: str) -> str:
        path = tmp_path / "web.yml"
        path.write_text(text)
        gate = WebGate(path, {})
        app = web.Application(middlewares=[gate.middleware])
        app.router.add_get("/", hello)
        runner = web.AppRunner(app)
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=gate.context).start()
        host, port = runner.addresses[0][:2]
        return f"{host}:{port}"

    yield start
    for runner in runners:
        await runner.cleanup()
