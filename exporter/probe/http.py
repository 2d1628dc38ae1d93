"""One HTTP probe: a target and a module in, a ProbeResult out, within a deadline, whatever the other side does.

The address that is connected to is looked up once, judged by a `Reach` and then connected to by number, at every hop of a
redirect: a name that changes its address between the question and the connection gains nothing. Semantics are those of
blackbox_exporter: its documentation, and its 0.23 binary, beside which the tests run this prober.
"""

import asyncio
import base64
import contextlib
import errno
import functools
import ipaddress
import os
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from exporter.grammar import read_file
from exporter.probe.aside import BusyError, aside
from exporter.probe.judge import decoder, wrong_in_body, wrong_in_head, wrong_in_transport
from exporter.probe.module import BODY_LIMIT, HEADER_VALUE, HttpProber, ProbeModule
from exporter.probe.reach import Address, Reach, guarded, normalise, redirected, shown
from exporter.probe.result import PHASES, Event, FailedError, ProbeResult, Reason
from exporter.probe.tls import certificates, context, handshake

USER_AGENT = "pm2-selfheal (HTTP probe)"
REDIRECTS_MAX = 10
ASIDE_FROM = 16 * 1024
"""Bytes; a larger body is judged in a thread."""


def look_up(host: str) -> list[Address]:
    """Return the addresses of `host`, in the resolver's order. Blocks; raises OSError when there are none."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found))


async def probe(
    target: str | URL,
    module: ProbeModule,
    *,
    within: float,
    reach: Reach = guarded,
    host: str = "",
    look_up: Callable[[str], list[Address]] = look_up,
) -> ProbeResult:
    """Probe `target` as `module` says, for at most `within` seconds; whatever happens, there is a result.

    `host` is sent as the Host header. `look_up` may block; it is called once for each name on the way. Raises ValueError
    when the target is no HTTP URL, and nothing else.
    """
    run = _Run(normalise(target) if isinstance(target, str) else target, module.http, reach, host, look_up)
    seconds = min(within, module.timeout or within)
    run.log("info", "Beginning probe", probe="http", timeout_seconds=seconds)
    try:
        async with asyncio.timeout(seconds):
            await run.go()
    except TimeoutError:
        run.fail(Reason.TIMEOUT, f"no complete answer within {seconds:.3g}s, {run.stage}")
    except FailedError as failed:
        run.fail(failed.reason, failed.detail)
    except BusyError:
        run.fail(Reason.RESOURCES, "too many name look-ups or files hang already")
    return run.result()


@dataclass(slots=True)
class _Hop:
    """One request of a probe; times are seconds since the probe began, 0 for what was not reached."""

    url: URL
    start: float
    address: Address | None = None
    others: list[Address] = field(default_factory=list)
    """What else the name leads to, over the other protocol."""
    resolved: float = 0.0
    connecting: float = 0.0
    connected: float = 0.0
    ready: float = 0.0
    answered: float = 0.0
    end: float = 0.0
    session: ssl.SSLObject | None = None

    @property
    def tls(self) -> bool:
        return self.url.scheme == "https"

    def phases(self) -> Iterator[tuple[str, float]]:
        if self.resolved:
            yield "resolve", self.resolved - self.start
        if self.ready:
            connected = self.connected or self.ready
            yield "connect", connected - self.connecting
            yield "tls", self.ready - connected
        if self.answered:
            yield "processing", self.answered - self.ready
        if self.end:
            yield "transfer", self.end - self.answered

    @property
    def stage(self) -> str:
        """What is being waited for."""
        if not self.resolved:
            return "while looking up the address"
        if not self.ready:
            return "in the TLS handshake" if self.connected else "while connecting"
        return "while reading the body" if self.answered else "while waiting for the answer"


_TIMES = ("start", "resolved", "connecting", "connected", "ready", "answered", "end")


@dataclass(slots=True)
class _Run:
    """A probe under way."""

    target: URL
    http: HttpProber
    reach: Reach
    host: str
    look_up: Callable[[str], list[Address]]
    began: float = field(default_factory=time.time)
    zero: float = field(default_factory=time.perf_counter)
    hops: list[_Hop] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    reason: Reason | None = None
    detail: str = ""
    redirects: int = 0
    body_length: int = 0
    answer: aiohttp.ClientResponse | None = None

    def now(self) -> float:
        return time.perf_counter() - self.zero

    def log(self, level: str, message: str, **fields: object) -> None:
        self.events.append(Event(self.now(), level, message, fields))

    def fail(self, reason: Reason, detail: str) -> None:
        """Note what is wrong; the first thing that is wrong is the reason."""
        self.log("error", "Probe is failing", reason=reason.value, detail=detail)
        if self.reason is None:
            self.reason, self.detail = reason, detail

    @property
    def stage(self) -> str:
        """What the probe is waiting for."""
        return self.hops[-1].stage if self.hops else "while reading the module's files"

    def result(self) -> ProbeResult:
        seconds = self.now()
        phases = dict.fromkeys(PHASES, 0.0)
        for number, hop in enumerate(self.hops):
            for phase, took in hop.phases():
                phases[phase] += took
            times = {name: round(getattr(hop, name), 6) for name in _TIMES if getattr(hop, name)}
            self.log("info", "Response timings for roundtrip", roundtrip=number, **times)
        if self.reason is None:
            self.log("info", "Probe succeeded", duration_seconds=round(seconds, 6))
        else:
            self.log("error", "Probe failed", duration_seconds=round(seconds, 6))
        first = self.hops[0] if self.hops else None
        address = first.address if first else None
        answer, session = self.answer, self.hops[-1].session if self.answer else None
        return ProbeResult(
            reason=self.reason,
            detail=self.detail,
            began=self.began,
            seconds=seconds,
            lookup_seconds=(first.resolved or seconds) - first.start if first else 0.0,
            phases=phases,
            ip_protocol=address.version if address else 0,
            ip_hash=fnv1a(address) if address else 0,
            status=answer.status if answer else 0,
            version=float("{}.{}".format(*answer.version)) if answer and answer.version else 0.0,
            redirects=self.redirects,
            content_length=_content_length(answer) if answer else 0,
            body_length=self.body_length,
            last_modified=_timestamp(answer.headers.get(hdrs.LAST_MODIFIED, "")) if answer else None,
            certificates=certificates(session) if session else None,
            events=tuple(self.events),
        )

    async def go(self) -> None:
        """Ask, follow where that leads, and judge the last answer."""
        request = await _Request.of(self.http, self.target, self.host)
        async with aiohttp.ClientSession(
            connector=_Connector(self),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            skip_auto_headers=(hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE),
            max_line_size=64 * 1024,
            max_field_size=64 * 1024,
        ) as session:
            while True:
                self.answer = None
                self.answer = answer = await self._ask(session, request)
                self.log("info", "Received HTTP response", status_code=answer.status)
                location = answer.headers.get(hdrs.LOCATION, "")
                if answer.status not in _REDIRECTS or not location:
                    await self._judge(answer, read=True)
                    return
                self.redirects += 1
                follow = self.http.follows and self.redirects <= REDIRECTS_MAX
                message = "Received redirect" if follow else "Not following redirect"
                self.log("info", message, location=_shown_location(request.url, location))
                if not follow:
                    # Its body is not read, as blackbox_exporter does not.
                    await self._judge(answer, read=False)
                    return
                answer.close()
                request.redirect(answer, location)

    async def _ask(self, session: aiohttp.ClientSession, request: "_Request") -> aiohttp.ClientResponse:
        """Make one request, of an address that may be reached."""
        before = self.hops[-1].address if self.hops else None
        hop = _Hop(request.url, self.now())
        self.hops.append(hop)
        hop.address, hop.others = await self._resolve(request.url)
        hop.resolved = self.now()
        self.log("info", "Resolved target address", ip=str(hop.address))
        if refusal := self.reach(request.url, hop.address, before):
            raise FailedError(Reason.REFUSED_TARGET, refusal)
        headers = request.headers()
        self.log("info", "Making HTTP request", url=shown(request.url), host=headers[hdrs.HOST], method=request.method)
        tls: Any = True
        if hop.tls:
            try:
                tls = await aside(functools.partial(context, self.http.tls_config))
            except (OSError, ValueError) as error:
                raise _failed(Reason.MODULE, "tls_config", error) from None

        def begins() -> None:
            hop.connected = self.now()

        token = handshake.set(begins)
        hop.connecting = self.now()
        try:
            answer = await session.request(
                request.method,
                # By number, so that the address connected to is the one that was judged.
                request.url.with_host(str(hop.address)),
                headers=headers,
                data=request.body or None,
                allow_redirects=False,
                ssl=tls,
                server_hostname=request.server_name(self.http.tls_config.server_name) if hop.tls else None,
            )
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failed = _explained(error)
            if failed.reason is Reason.CONNECTION_REFUSED and hop.others:
                # The trap of `localhost`: its IPv6 address comes first, and the app listens on 127.0.0.1 only.
                also = f"{request.url.raw_host} is also {hop.others[0]}, see preferred_ip_protocol"
                failed = FailedError(failed.reason, f"{failed.detail} at {hop.address}; {also}")
            raise failed from None
        finally:
            handshake.reset(token)
        hop.answered = self.now()
        return answer

    async def _resolve(self, url: URL) -> tuple[Address, list[Address]]:
        """Return the address to connect to, and those of the other protocol."""
        host, preferred = url.raw_host or "", self.http.preferred_ip_protocol
        self.log("info", "Resolving target address", host=host, ip_protocol=preferred)
        try:
            found = [ipaddress.ip_address(host)]
        except ValueError:
            try:
                found = await aside(functools.partial(self.look_up, host))
            except (OSError, UnicodeError) as error:
                raise _failed(Reason.DNS, host, error) from None
        address = choose(found, preferred, fallback=self.http.ip_protocol_fallback)
        if address is None:
            raise FailedError(Reason.DNS, f"{host} has no {preferred} address")
        return address, [other for other in found if other.version != address.version]

    async def _judge(self, answer: aiohttp.ClientResponse, *, read: bool) -> None:
        """Hold the last answer against what the module asks for."""
        if self.redirects > REDIRECTS_MAX and answer.status not in self.http.valid_status_codes:
            self.fail(Reason.TOO_MANY_REDIRECTS, f"more than {REDIRECTS_MAX} redirects")
        if found := wrong_in_head(self.http, answer.status, answer.headers):
            self.fail(*found)
        body = b""
        if read:
            try:
                body = await self._read(answer)
            finally:
                answer.close()
            self.hops[-1].end = self.now()
        if self.reason is None and self.http.reads_body:
            wrong = functools.partial(wrong_in_body, self.http, body)
            if found := (wrong() if len(body) < ASIDE_FROM else await aside(wrong)):
                self.fail(*found)
        version = "HTTP/{}.{}".format(*answer.version) if answer.version else "none"
        for reason, detail in wrong_in_transport(self.http, version, tls=self.hops[-1].tls):
            self.fail(reason, detail)

    async def _read(self, answer: aiohttp.ClientResponse) -> bytes:
        """Read the body to its end, within the limit; return it where it matters, else count it only."""
        limit = self.http.body_size_limit or BODY_LIMIT
        decode = decoder(self.http.compression)
        kept: list[bytes] = []
        try:
            async for chunk in answer.content.iter_any():
                for part in decode(chunk):
                    if self.body_length + len(part) > limit:
                        self.body_length = limit
                        raise FailedError(Reason.BODY_TOO_LARGE, f"the body is longer than {limit} bytes")
                    self.body_length += len(part)
                    if self.http.reads_body:
                        kept.append(part)
            for _ in decode(None):
                pass
        except zlib.error as error:
            raise FailedError(Reason.DECODING, f"the body is not {self.http.compression}: {error}") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _explained(error) from None
        return b"".join(kept)


# The request


_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PRIVATE = frozenset({"authorization", "cookie", "proxy-authorization"})


@dataclass(slots=True)
class _Request:
    """What is asked next; what is private goes only to where the target is."""

    url: URL
    method: str
    body: bytes
    public: CIMultiDict[str]
    private: CIMultiDict[str]
    host: str
    """The Host header that is asked for; empty for the URL's own."""
    origin: URL
    jar: aiohttp.CookieJar

    @classmethod
    async def of(cls, http: HttpProber, target: URL, host: str) -> "_Request":
        """Return the first request, with the values that stand in files."""
        url = target.with_user(None)
        public: CIMultiDict[str] = CIMultiDict({hdrs.USER_AGENT: USER_AGENT})
        private: CIMultiDict[str] = CIMultiDict()
        for name, secret in http.headers.items():
            (private if name.lower() in _PRIVATE else public)[name] = secret.reveal()
        for name, header in http.http_headers.items():
            plain = not (header.secrets or header.files or name.lower() in _PRIVATE)
            texts = [*header.values, *(one.reveal() for one in header.secrets)]
            texts += [await _read_line(file) for file in header.files]
            public.popall(name, None)
            (public if plain else private).extend([(name, text) for text in texts])
        if hdrs.AUTHORIZATION not in private and (text := await _authorization(http, target)):
            private[hdrs.AUTHORIZATION] = text
        host = host or public.get(hdrs.HOST, "")
        public.popall(hdrs.HOST, None)
        body = await _read_file(http.body_file) if http.body_file else http.body.encode()
        return cls(url, http.method, body, public, private, host, url.origin(), aiohttp.CookieJar(unsafe=True))

    def headers(self) -> CIMultiDict[str]:
        """Return the headers of the next request."""
        found = CIMultiDict({hdrs.HOST: self.host or self.url.host_port_subcomponent or ""})
        found.extend(self.public)
        if self.url.origin() == self.origin:
            found.extend(self.private)
        if hdrs.COOKIE not in found and (cookies := self.jar.filter_cookies(self.url)):
            found[hdrs.COOKIE] = "; ".join(f"{name}={cookie.value}" for name, cookie in cookies.items())
        return found

    def server_name(self, wanted: str) -> str:
        """Return the name that the certificate must be for; `wanted` is for where the target is."""
        if self.url.origin() != self.origin:
            return self.url.raw_host or ""
        if not wanted and self.host:
            with contextlib.suppress(ValueError):
                wanted = URL(f"https://{self.host}").raw_host or ""
        return wanted or self.url.raw_host or ""

    def redirect(self, answer: aiohttp.ClientResponse, location: str) -> None:
        """Turn to where an answer sends the client, with the method and the body that browsers would send there."""
        self.jar.update_cookies(answer.cookies, self.url)
        try:
            there = redirected(self.url, location)
        except ValueError:
            raise FailedError(Reason.BAD_REDIRECT, "the Location header leads to no HTTP URL") from None
        if there.origin() != self.url.origin():
            # The Host header asked for is for the target only.
            self.host = ""
        self.url = there
        if answer.status in (301, 302, 303):
            self.method, self.body = "HEAD" if self.method == "HEAD" else "GET", b""


def _shown_location(url: URL, location: str) -> str:
    try:
        return shown(redirected(url, location))
    except ValueError:
        return "no HTTP URL"


async def _authorization(http: HttpProber, target: URL) -> str:
    if basic := http.basic_auth:
        password = basic.password.reveal() if basic.password else ""
        return _basic(basic.username, await _read_line(basic.password_file) if basic.password_file else password)
    if other := http.authorization:
        credentials = other.credentials.reveal() if other.credentials else ""
        return f"{other.type} {await _read_line(other.credentials_file) if other.credentials_file else credentials}".strip()
    if http.bearer_token or http.bearer_token_file:
        token = http.bearer_token.reveal() if http.bearer_token else ""
        return f"Bearer {await _read_line(http.bearer_token_file) if http.bearer_token_file else token}"
    if target.user is not None or target.password is not None:
        return _basic(target.user or "", target.password or "")
    return ""


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


async def _read_file(name: str) -> bytes:
    try:
        return await aside(lambda: read_file(os.path.expanduser(name), BODY_LIMIT))  # noqa: PTH111 -- Path's raises
    except (OSError, ValueError) as error:
        raise _failed(Reason.MODULE, f"cannot read {name}", error) from None


async def _read_line(name: str) -> str:
    text = (await _read_file(name)).decode("utf-8", "surrogateescape").strip()
    if not HEADER_VALUE.fullmatch(text):
        raise FailedError(Reason.MODULE, f"{name} holds more than one line")
    return text


# The address and the connection


def choose(found: list[Address], preferred: Literal["ip4", "ip6"], *, fallback: bool) -> Address | None:
    """Return the first address of the preferred protocol, else, with `fallback`, the first of the other; else None."""
    version = 4 if preferred == "ip4" else 6
    for address in found:
        if address.version == version:
            return address
    return found[0] if found and fallback else None


def fnv1a(address: Address) -> int:
    """Hash an address as blackbox_exporter does: FNV-1a in 32 bits of its bytes."""
    number = 0x811C9DC5
    for byte in address.packed:
        number = (number ^ byte) * 0x01000193 & 0xFFFFFFFF
    return number


class _Connector(aiohttp.TCPConnector):
    """A fresh connection for each request, with its times noted."""

    def __init__(self, run: _Run) -> None:
        super().__init__(force_close=True, use_dns_cache=False, happy_eyeballs_delay=None, limit=0)
        self._run = run

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Any],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 -- aiohttp's signature
    ) -> aiohttp.connector.Connection:
        hop = self._run.hops[-1]
        if hop.ready:
            # aiohttp asks again when a connection is cut before the answer; a probe tells of the first time.
            raise aiohttp.ServerDisconnectedError
        connection = await super().connect(req, traces, timeout)
        hop.ready = self._run.now()
        if hop.tls and connection.transport is not None:
            hop.session = connection.transport.get_extra_info("ssl_object")
        return connection


_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL})


def _failed(reason: Reason, what: str, error: Exception) -> FailedError:
    """Say that `what` failed for `reason`, unless it is this machine that has nothing left to try it with."""
    if isinstance(error, OSError) and error.errno in _SCARCE:
        reason = Reason.RESOURCES
    return FailedError(reason, f"{what}: {getattr(error, 'strerror', None) or 'not valid'}")


def _explained(error: BaseException) -> FailedError:
    """Say why there is no answer, in words that quote no URL, as aiohttp's do."""
    found: tuple[Reason, str]
    number = getattr(getattr(error, "os_error", error), "errno", None)
    match error:
        case _ if number in _SCARCE:
            found = Reason.RESOURCES, os.strerror(number)
        case aiohttp.ClientConnectorCertificateError():
            why = getattr(error.certificate_error, "verify_message", "") or "it does not fit the name"
            found = Reason.TLS, f"the certificate was not accepted: {why}"
        case aiohttp.ClientConnectorSSLError():
            found = Reason.TLS, f"the handshake failed: {getattr(error.os_error, 'reason', '') or 'no TLS'}"
        case ssl.SSLError():
            found = Reason.TLS, f"TLS failed: {error.reason or 'no TLS'}"
        case aiohttp.ClientConnectorError():
            if number == errno.ECONNREFUSED:
                found = Reason.CONNECTION_REFUSED, "connection refused"
            elif number == errno.ETIMEDOUT:
                found = Reason.TIMEOUT, "connecting timed out"
            else:
                found = Reason.UNREACHABLE, error.os_error.strerror or "the connection was closed while it was made"
        case aiohttp.ClientResponseError():
            found = Reason.PROTOCOL, "the answer is no HTTP"
        case aiohttp.ClientPayloadError() | aiohttp.ClientConnectionError() | OSError():
            found = Reason.DISCONNECTED, "the connection was closed or reset before the answer was complete"
        case _:
            found = Reason.PROTOCOL, f"the request could not be made ({type(error).__name__})"
    return FailedError(*found)


# The answer


def _content_length(answer: aiohttp.ClientResponse) -> int:
    """Return what the answer says of its length, as Go does: -1 where it says nothing."""
    if "chunked" in answer.headers.get(hdrs.TRANSFER_ENCODING, "").lower():
        return -1
    declared = answer.headers.get(hdrs.CONTENT_LENGTH, "")
    if answer.status in (204, 304) and not declared:
        return 0
    return int(declared) if declared.isascii() and declared.isdigit() else -1


def _timestamp(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError, TypeError):
        return None
