"""Servers that misbehave: each still ends in a result with its reason, in time, and costs nothing but itself."""

import asyncio
import gzip
import os
import socket
import struct
import threading
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.grammar import Secret, Size
from exporter.probe.http import probe
from exporter.probe.module import (
    HttpProber,
    JsonAssertion,
    ProbeAuthorization,
    ProbeBasicAuth,
    ProbeHeader,
    ProbeModule,
    ProbeTLS,
)
from exporter.probe.reach import Address
from exporter.probe.result import ProbeResult, Reason

if TYPE_CHECKING:
    from tests.integration.probe.conftest import Site

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
PATIENCE = 10
"""Seconds after which a probe that should have ended by itself is given up."""


def module(**http: Any) -> ProbeModule:  # noqa: ANN401 -- any key of the grammar
    """Return a module with these keys of the HTTP prober."""
    return ProbeModule(http=HttpProber(**http))


async def ask(target: str, within: float = 5.0, like: ProbeModule | None = None, **more: Any) -> ProbeResult:  # noqa: ANN401
    """Probe `target`; fail when the probe does not end by itself."""
    async with asyncio.timeout(PATIENCE):
        return await probe(target, like or ProbeModule(), within=within, **more)


async def test_silent(site: "Site") -> None:
    """A server that accepts and says nothing is a timeout, and the result says what was waited for."""

    async def silent(_: bytes, reader: Reader, __: Writer) -> None:
        await reader.read()

    site.routes["/"] = silent
    result = await ask(site.url, within=0.3)
    assert result.reason is Reason.TIMEOUT
    assert result.detail == "no complete answer within 0.3s, while waiting for the answer"
    assert result.phases["connect"] > 0
    assert result.phases["processing"] == 0


async def test_silent_tls(deaf_site: "Site") -> None:
    """A server that never answers the TLS handshake is a timeout in the handshake."""
    result = await ask(f"https://127.0.0.1:{deaf_site.port}", within=0.3)
    assert result.reason is Reason.TIMEOUT
    assert result.detail.endswith("in the TLS handshake")


async def test_full_backlog() -> None:
    """A server that accepts no connection any more is a timeout while connecting."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        waiting = []
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)  # noqa: FBT003 -- socket's signature
            one.connect_ex(deaf.getsockname())
            waiting.append(one)
        result = await ask(f"127.0.0.1:{deaf.getsockname()[1]}", within=0.3)
        for one in waiting:
            one.close()
    assert result.reason is Reason.TIMEOUT
    assert result.detail.endswith("while connecting")


@pytest.mark.parametrize(
    ("before", "stage"),
    [(b"HTTP/1.1 200 OK\r\n", "while waiting for the answer"), (b"HTTP/1.1 200 OK\r\n\r\n", "while reading the body")],
    ids=["head", "body"],
)
async def test_drip(before: bytes, stage: str, site: "Site") -> None:
    """A server that drips one byte at a time cannot stretch the deadline, in the head or in the body."""

    async def drip(_: bytes, __: Reader, writer: Writer) -> None:
        writer.write(before)
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    site.routes["/"] = drip
    result = await ask(site.url, within=0.4)
    assert result.reason is Reason.TIMEOUT
    assert result.detail.endswith(stage)


@pytest.mark.parametrize(
    "flood",
    [b"X-Padding: " + b"x" * 1000 + b"\r\n", b"x" * 4096],
    ids=["many headers", "one long header"],
)
async def test_endless_head(flood: bytes, site: "Site") -> None:
    """A head without an end is cut off, as no HTTP, long before the deadline."""

    async def endless(_: bytes, __: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX-Start: ")
        while True:
            writer.write(flood)
            await writer.drain()

    site.routes["/"] = endless
    result = await ask(site.url)
    assert result.reason is Reason.PROTOCOL


async def test_endless_body(site: "Site") -> None:
    """A body without an end is read up to the limit only."""

    async def endless(_: bytes, __: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    site.routes["/"] = endless
    result = await ask(site.url)
    assert result.reason is Reason.BODY_TOO_LARGE
    assert result.body_length == 10 * 1024**2
    assert result.status == 200


async def test_gzip_bomb(site: "Site") -> None:
    """A compressed body counts as what it becomes, and is not decompressed beyond the limit."""
    bomb = gzip.compress(bytes(64 * 1024**2), 6)
    site.routes["/"] = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb
    result = await ask(site.url, like=module(compression="gzip", body_size_limit=Size(1024**2)))
    assert result.reason is Reason.BODY_TOO_LARGE
    assert result.body_length == 1024**2
    assert result.content_length == len(bomb)


async def test_reset(site: "Site") -> None:
    """A connection reset in the middle of the body is a result with the status that came before."""

    async def reset(_: bytes, __: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        await writer.drain()
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    site.routes["/"] = reset
    result = await ask(site.url)
    assert result.reason is Reason.DISCONNECTED


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200"], ids=["nothing", "half a line"])
async def test_hang_up(said: bytes, site: "Site") -> None:
    """A server that hangs up before its answer is asked once, not again: a probe tells of what it saw."""
    site.routes["/"] = said
    result = await ask(site.url)
    assert result.reason is Reason.DISCONNECTED
    assert len(site.asked) == 1


async def test_not_http(site: "Site") -> None:
    """What is no HTTP is told as that."""
    site.routes["/"] = b"SSH-2.0-OpenSSH_9.2\r\n\r\n"
    assert (await ask(site.url)).reason is Reason.PROTOCOL


async def test_redirect_loop(site: "Site") -> None:
    """A redirect that leads back to itself ends after ten."""
    site.routes["/"] = b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"
    result = await ask(site.url)
    assert result.reason is Reason.TOO_MANY_REDIRECTS
    assert result.redirects == 11
    assert len(site.asked) == 11


@pytest.mark.parametrize(
    "location", ["ftp://127.0.0.1/", "http://[::1", "http://", "//:0/", "file:///etc/passwd", "http://a b/"]
)
async def test_bad_redirect(location: str, site: "Site") -> None:
    """A redirect to no HTTP URL is told as that."""
    site.routes["/"] = f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
    assert (await ask(site.url)).reason is Reason.BAD_REDIRECT


async def test_credentials_stay(site: "Site", tls_site: "Site", ca_file: Path) -> None:
    """Credentials, cookies and the Host header go to the target's own origin, never to where it redirects."""
    like = module(
        tls_config=ProbeTLS(ca_file=str(ca_file)),
        basic_auth=ProbeBasicAuth(username="probe", password=Secret("correct horse")),
        headers={"Cookie": Secret("session=1"), "Host": Secret("probe.example"), "X-Plain": Secret("yes")},
        http_headers={"X-Api-Key": ProbeHeader(secrets=(Secret("battery"),))},
    )
    site.routes["/"] = f"HTTP/1.1 302 Found\r\nLocation: {tls_site.url}/\r\nSet-Cookie: a=1\r\n\r\n".encode()
    tls_site.routes["/"] = OK
    result = await ask(site.url, like=like)
    assert result.success, result.detail
    first, second = site.asked[0].decode(), tls_site.asked[0].decode()
    assert "Authorization: Basic " in first
    assert "X-Api-Key: battery" in first
    assert "Host: probe.example" in first
    assert "X-Plain: yes" in second
    assert f"Host: 127.0.0.1:{tls_site.port}" in second
    for private in ("Authorization", "session=1", "battery"):
        assert private not in second


async def test_credentials_in_url(site: "Site") -> None:
    """Credentials in the target are sent, and shown nowhere in the result."""
    site.routes["/"] = OK
    result = await ask(f"probe:correct%20horse@127.0.0.1:{site.port}/?token=battery")
    assert b"Authorization: Basic cHJvYmU6Y29ycmVjdCBob3JzZQ==" in site.asked[0]
    assert not [word for word in ("correct", "horse", "battery", "probe:") if word in repr(result)]


async def test_self_signed(tls_site: "Site") -> None:
    """A certificate from an unknown authority is told as TLS's fault, with OpenSSL's reason."""
    result = await ask(tls_site.url)
    assert result.reason is Reason.TLS
    assert "unable to get local issuer certificate" in result.detail or "self-signed" in result.detail
    assert result.certificates is None


async def test_expired(expired_site: "Site", ca_file: Path) -> None:
    """An expired certificate is told as such."""
    result = await ask(expired_site.url, like=module(tls_config=ProbeTLS(ca_file=str(ca_file))))
    assert result.reason is Reason.TLS
    assert result.detail == "the certificate was not accepted: certificate has expired"


async def test_expired_unverified(expired_site: "Site") -> None:
    """Where verifying is switched off, the expiry of an expired certificate is told."""
    expired_site.routes["/"] = OK
    result = await ask(expired_site.url, like=module(tls_config=ProbeTLS(insecure_skip_verify=True)))
    assert result.success
    assert result.certificates
    assert result.certificates.earliest_expiry < result.began
    assert result.certificates.chain_expiry is None


async def test_tls_where_there_is_none(site: "Site", tls_site: "Site") -> None:
    """TLS asked of a plain server fails in the handshake; a plain question to a TLS server is no HTTP answer."""
    result = await ask(f"https://127.0.0.1:{site.port}", within=0.5)
    assert result.reason in (Reason.TLS, Reason.UNREACHABLE, Reason.TIMEOUT)
    result = await ask(f"http://127.0.0.1:{tls_site.port}")
    assert result.reason in (Reason.DISCONNECTED, Reason.PROTOCOL)


async def test_client_certificate(choosy_site: "Site", authority: trustme.CA, ca_file: Path, tmp_path: Path) -> None:
    """A server that wants a client certificate gets it, and one that is not given it fails the probe."""
    choosy_site.routes["/"] = OK
    client = authority.issue_cert("client@example.org")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    client.private_key_pem.write_to_path(key)
    client.cert_chain_pems[0].write_to_path(certificate)
    with_it = ProbeTLS(ca_file=str(ca_file), cert_file=str(certificate), key_file=str(key))
    result = await ask(choosy_site.url, like=module(tls_config=with_it))
    assert result.success, result.detail
    result = await ask(choosy_site.url, like=module(tls_config=ProbeTLS(ca_file=str(ca_file))))
    assert result.reason in (Reason.TLS, Reason.DISCONNECTED)


async def test_backtracking_body(site: "Site") -> None:
    """A body made to send a backtracking matcher into the millennia is judged, while the loop goes on turning."""
    body = b"x" * (9 * 1024**2)
    site.routes["/"] = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    turning = asyncio.create_task(turn())
    like = module(fail_if_body_matches_regexp=("(x+x+)+y", "(x*)*$z", "^(([a-z])+.)+[A-Z]([a-z])+$"))
    result = await ask(site.url, like=like)
    turning.cancel()
    assert result.success, result.detail
    assert turns > 10


@pytest.mark.parametrize("body", [b"[" * 1_000_000, b'{"a":' * 100_000, b'{"status": "heal', b"", b"\xff\xfe", b"1e999999"])
async def test_bad_json(body: bytes, site: "Site") -> None:
    """A body that is no JSON, or nested to break a parser, fails the assertion and nothing else."""
    site.routes["/"] = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    result = await ask(site.url, like=module(json=(JsonAssertion(path="status", equals="healthy"),)))
    assert result.reason is Reason.JSON


async def test_health_endpoint(site: "Site") -> None:
    """What a health endpoint says decides, not only its status."""
    site.routes["/"] = b'HTTP/1.1 200 OK\r\nContent-Length: 21\r\n\r\n{"status":"degraded"}'
    healthy = module(json=(JsonAssertion(path="status", equals="healthy"),))
    result = await ask(site.url, like=healthy)
    assert result.reason is Reason.JSON
    assert result.detail == 'status is "degraded", wanted is "healthy"'
    site.routes["/"] = b'HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{"status":"healthy"}'
    assert (await ask(site.url, like=healthy)).success


async def test_module_files(site: "Site", tmp_path: Path) -> None:
    """Secrets and bodies from files are read at each probe; a file that is missing, a pipe or too long says so."""
    site.routes["/"] = OK
    token = tmp_path / "token"
    like = module(authorization=ProbeAuthorization(credentials_file=str(token)))
    result = await ask(site.url, like=like)
    assert result.reason is Reason.MODULE
    assert result.detail == f"cannot read {token}: No such file or directory"
    for text in ("first", "second"):
        token.write_text(f"{text}\n")
        assert (await ask(site.url, like=like)).success
        assert f"Authorization: Bearer {text}\r\n".encode() in site.asked[-1]
    token.write_text("two\nlines")
    assert (await ask(site.url, like=like)).reason is Reason.MODULE
    token.unlink()
    os.mkfifo(token)
    assert (await ask(site.url, like=like)).detail == f"cannot read {token}: not a regular file"
    body = tmp_path / "body"
    body.write_bytes(b"\x00\xff")
    assert (await ask(site.url, like=module(method="POST", body_file=str(body)))).success
    assert site.asked[-1].endswith(b"\r\n\r\n\x00\xff")
    assert (await ask(site.url, like=module(body_file="a\0b"))).reason is Reason.MODULE
    assert (
        await ask(site.url.replace("http", "https"), like=module(tls_config=ProbeTLS(ca_file=str(body))))
    ).reason is Reason.MODULE


async def test_hanging_look_up(site: "Site") -> None:
    """A name look-up that hangs is a timeout, and holds up neither the loop nor another probe."""
    release = threading.Event()

    def hang(_: str) -> list[Address]:
        release.wait(PATIENCE)
        return []

    site.routes["/"] = OK
    try:
        hanging, fine = await asyncio.gather(
            ask(f"http://localhost:{site.port}", within=0.3, look_up=hang), ask(f"http://127.0.0.1:{site.port}")
        )
    finally:
        release.set()
    assert hanging.reason is Reason.TIMEOUT
    assert hanging.detail.endswith("while looking up the address")
    assert hanging.lookup_seconds > 0
    assert fine.success


async def test_rebinding(site: "Site") -> None:
    """A name is looked up once a hop; the address judged is the one connected to, so a name that changes gains nothing."""
    site.routes["/"] = OK
    answers = [[ip_address("127.0.0.1")], [ip_address("169.254.169.254")]]
    seen: list[str] = []

    def rebind(host: str) -> list[Address]:
        seen.append(host)
        return answers[len(seen) - 1]

    assert (await ask(f"http://rebind.example:{site.port}", look_up=rebind)).success
    assert seen == ["rebind.example"]
    result = await ask(f"http://rebind.example:{site.port}", look_up=rebind)
    assert result.reason is Reason.REFUSED_TARGET
    assert len(site.asked) == 1


async def test_name_without_address(site: "Site") -> None:
    """A name without an address of the wanted protocol is a failure to resolve, not to connect."""
    only4 = module(preferred_ip_protocol="ip6", ip_protocol_fallback=False)
    result = await ask(f"http://four.example:{site.port}", like=only4, look_up=lambda _: [ip_address("127.0.0.1")])
    assert result.reason is Reason.DNS
    assert result.detail == "four.example has no ip6 address"
    result = await ask(f"http://{'a' * 64}.example/")
    assert result.reason is Reason.DNS


async def test_ipv6(site6: "Site") -> None:
    """IPv6 is spoken, by number and by name, and preferred as the module says."""
    site6.routes["/"] = OK
    result = await ask(f"[::1]:{site6.port}")
    assert result.success
    assert result.ip_protocol == 6
    assert f"Host: [::1]:{site6.port}".encode() in site6.asked[0]

    def two(_: str) -> list[Address]:
        return [ip_address("127.0.0.1"), ip_address("::1")]

    assert (await ask(f"two.example:{site6.port}", look_up=two)).success
    four = await ask(f"two.example:{site6.port}", like=module(preferred_ip_protocol="ip4"), look_up=two)
    assert four.reason is Reason.CONNECTION_REFUSED
    assert four.detail == "connection refused at 127.0.0.1; two.example is also ::1, see preferred_ip_protocol"
    assert four.ip_protocol == 4


async def test_cancelled(site: "Site") -> None:
    """A probe that is cancelled from outside leaves no connection behind."""
    asked, gone = asyncio.Event(), asyncio.Event()

    async def wait(_: bytes, reader: Reader, __: Writer) -> None:
        asked.set()
        await reader.read()
        gone.set()

    site.routes["/"] = wait
    task = asyncio.create_task(ask(site.url))
    async with asyncio.timeout(PATIENCE):
        await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(PATIENCE):
        await gone.wait()


SCRAPS = [
    b"HTTP/1.1 200 OK",
    b"HTTP/1.0 302 Found",
    b"HTTP/9.9 999 ",
    b"\r\n",
    b"\r\n\r\n",
    b"Content-Length: 5",
    b"Content-Length: -1",
    b"Content-Length: 99999999999999999999",
    b"Transfer-Encoding: chunked",
    b"Content-Encoding: gzip",
    b"Location: /",
    b"Location: http://[::1",
    b"Location: \xff\xfe",
    b"Set-Cookie: \x01=\xff; Domain=..",
    b"Last-Modified: Foo, 99 Bar 0000 99:99:99 GMT",
    b"X: \x00",
    b": empty",
    b"5\r\nhello\r\n",
    b"0\r\n\r\n",
    b"hello",
    b'{"status":"healthy"}',
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(SCRAPS) | st.binary(max_size=20), max_size=12))
def test_any_answer(scraps: list[bytes]) -> None:
    """Whatever bytes a server sends, the probe ends in a result."""

    async def play() -> ProbeResult:
        async def speak(reader: Reader, writer: Writer) -> None:
            try:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"".join(scraps))
                await writer.drain()
            finally:
                writer.close()

        server = await asyncio.start_server(speak, "127.0.0.1", 0)
        async with server:
            like = module(json=(JsonAssertion(path="status", equals="healthy"),), compression="gzip")
            result = await ask(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", like=like)
            # The server's side closes in the loop's next turns.
            for _ in range(3):
                await asyncio.sleep(0)
            return result

    assert asyncio.run(play()).reason is not None
