"""The web config file of Prometheus's exporter-toolkit: TLS, client certificates, basic-auth users, response headers.

The grammar is the toolkit's own, so that `promtool check web-config` and existing files work. What Python's TLS cannot do
is refused with the reason instead of ignored. The file and the certificates it names are looked at again on every
connection and request: a change needs no restart, and a change for the worse keeps the old state and is logged.
"""

import asyncio
import base64
import hashlib
import hmac
import logging
import os
import re
import ssl
import warnings
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import bcrypt
from aiohttp import hdrs, web

from exporter.grammar import FILE_MAX, ConfigError, Strict, default, load, read_file

log = logging.getLogger("web")

_VERSIONS = {
    "TLS10": ssl.TLSVersion.TLSv1,
    "TLS11": ssl.TLSVersion.TLSv1_1,
    "TLS12": ssl.TLSVersion.TLSv1_2,
    "TLS13": ssl.TLSVersion.TLSv1_3,
}
_CLIENT_AUTH = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_CURVES = {"CurveP256": "prime256v1", "CurveP384": "secp384r1", "CurveP521": "secp521r1", "X25519": "X25519"}
_CIPHERS = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
}
_ALWAYS_ON = frozenset({"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"})
_BCRYPT = re.compile(r"\$2[aby]\$(0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{53}")
_HEADERS = (
    "Content-Security-Policy",
    "Strict-Transport-Security",
    "X-Content-Type-Options",
    "X-Frame-Options",
    "X-XSS-Protection",
)


def _one_of(value: str, known: Mapping[str, object], what: str) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; known here: {', '.join(known)}")


class TlsServer(Strict, frozen=True, kw_only=True):
    """How the listener speaks TLS."""

    cert_file: str
    """The certificate chain, PEM; relative paths start at the web config file's folder."""
    key_file: str
    """The private key, PEM."""
    client_auth_type: str = "NoClientCert"
    """Whether clients show a certificate: NoClientCert, VerifyClientCertIfGiven or RequireAndVerifyClientCert."""
    client_ca_file: str = ""
    """The authorities that client certificates are verified against, PEM."""
    client_allowed_sans: tuple[str, ...] = ()
    """When given, a client certificate needs one of these subject alternative names."""
    min_version: str = "TLS12"
    """The oldest TLS version spoken: TLS10, TLS11, TLS12 or TLS13."""
    max_version: str = "TLS13"
    """The newest TLS version spoken."""
    cipher_suites: tuple[str, ...] = ()
    """The TLS 1.2 suites allowed, by their standard names; empty means OpenSSL's default. TLS 1.3's are always on; where
    only those are listed, TLS 1.3 is all that is spoken."""
    prefer_server_cipher_suites: bool = True
    """Whether the server's order of suites wins."""
    curve_preferences: tuple[str, ...] = ()
    """At most one of CurveP256, CurveP384, CurveP521, X25519; empty means OpenSSL's default."""

    def __post_init__(self) -> None:
        """Refuse what cannot be kept."""
        if self.client_auth_type in ("RequestClientCert", "RequireAnyClientCert"):
            raise ValueError(
                f"{self.client_auth_type} takes certificates without verifying them, which Python's TLS cannot do"
            )
        _one_of(self.client_auth_type, _CLIENT_AUTH, "client_auth_type")
        _one_of(self.min_version, _VERSIONS, "TLS version")
        _one_of(self.max_version, _VERSIONS, "TLS version")
        if self.min_version > self.max_version:
            raise ValueError(f"min_version: {self.min_version} is newer than max_version {self.max_version}")
        for suite in self.cipher_suites:
            _one_of(suite, dict.fromkeys([*_CIPHERS, *sorted(_ALWAYS_ON)]), "cipher suite")
        for curve in self.curve_preferences:
            _one_of(curve, _CURVES, "curve")
        if len(self.curve_preferences) > 1:
            raise ValueError("Python's TLS takes one curve at the most in curve_preferences")
        if self.client_auth_type != "NoClientCert" and not self.client_ca_file:
            raise ValueError(f"client_auth_type {self.client_auth_type} needs client_ca_file")
        if self.client_auth_type == "NoClientCert" and (self.client_ca_file or self.client_allowed_sans):
            raise ValueError("client_ca_file and client_allowed_sans need a client_auth_type that verifies")


class HttpServer(Strict, frozen=True, kw_only=True):
    """How the listener speaks HTTP."""

    http2: bool = True
    """Taken for compatibility; HTTP/1.1 is what is spoken."""
    headers: dict[str, str] = default({})
    """Headers added to every response: the security headers that exporter-toolkit allows."""

    def __post_init__(self) -> None:
        """Allow exporter-toolkit's headers only."""
        for name, value in self.headers.items():
            _one_of(name, dict.fromkeys(_HEADERS), "header")
            if not value.isprintable():
                raise ValueError(f"the header {name} has a control character")


class WebConfig(Strict, frozen=True, kw_only=True):
    """The whole web config file."""

    tls_server_config: TlsServer | None = None
    """TLS; without it plain HTTP is spoken."""
    http_server_config: HttpServer = default(HttpServer())
    """HTTP."""
    basic_auth_users: dict[str, str] = default({})
    """User names and the bcrypt hashes of their passwords; without any, nobody is asked."""

    def __post_init__(self) -> None:
        """Refuse what is no bcrypt hash."""
        for user, hashed in self.basic_auth_users.items():
            if not _BCRYPT.fullmatch(hashed):
                raise ValueError(f"the password of user {user!r} is not a bcrypt hash")


def tls_context(options: TlsServer, folder: Path) -> ssl.SSLContext:
    """Return a server context; raise ValueError when a file cannot be used."""
    for key in ("cert_file", "key_file", "client_ca_file"):
        if name := getattr(options, key):
            try:
                read_file(folder / name, FILE_MAX)
            except (OSError, ValueError) as error:
                raise ValueError(f"{key} cannot be read: {getattr(error, 'strerror', error)}") from None
    try:
        return _tls_context(options, folder)
    except ssl.SSLError as error:
        raise ValueError(
            f"cannot be used: {error.reason or error} (files are PEM, a key is for its certificate and has no pass phrase)"
        ) from None


def _tls_context(options: TlsServer, folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with warnings.catch_warnings():
        # Old versions are deprecated; whoever asks for one by name knows.
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = _VERSIONS[options.min_version]
        context.maximum_version = _VERSIONS[options.max_version]
    # Without a password at hand, OpenSSL would ask the terminal for one, and wait.
    context.load_cert_chain(folder / options.cert_file, folder / options.key_file, password="")
    context.verify_mode = _CLIENT_AUTH[options.client_auth_type]
    if options.client_ca_file:
        context.load_verify_locations(folder / options.client_ca_file)
    older = [_CIPHERS[suite] for suite in options.cipher_suites if suite in _CIPHERS]
    if options.cipher_suites and not older:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    elif options.min_version in ("TLS10", "TLS11"):
        # OpenSSL 3 signs nothing with SHA-1, as these versions must, at its default security level.
        context.set_ciphers(":".join(older or ["DEFAULT"]) + ":@SECLEVEL=0")
    elif older:
        context.set_ciphers(":".join(older))
    if options.prefer_server_cipher_suites:
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    for curve in options.curve_preferences:
        context.set_ecdh_curve(_CURVES[curve])
    return context


_State = tuple[tuple[int, int, int], ...]


def _stat(path: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116 -- on every request
    except (OSError, ValueError):
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_size, found.st_ino)


class WebGate:
    """What stands before every handler: the web config file, kept up to date.

    `context` is what the listener is made with (None: plain HTTP; that choice is fixed at the start), `middleware` what the
    application is made with.
    """

    def __init__(self, path: Path | None, environ: Mapping[str, str]) -> None:
        """Read `path`; raise ConfigError when it, or a file that it names, is wrong."""
        self._path = path
        self._environ = environ
        self._folder = path.parent if path else Path()
        self._passwords = Passwords()
        self.config = WebConfig()
        self._tls: ssl.SSLContext | None = None
        self._state: _State = ()
        if path:
            self._load(path)
        self.context = _FreshContext.around(self) if self.config.tls_server_config else None

    def _look(self, path: Path, config: WebConfig) -> _State:
        tls = config.tls_server_config
        names = (tls.cert_file, tls.key_file, tls.client_ca_file) if tls else ()
        return (_stat(path), *(_stat(self._folder / name) for name in names if name))

    def _load(self, path: Path) -> None:
        config = load(path, WebConfig, environ=self._environ)
        # Looked at before it is read: what changes meanwhile is then seen as a change.
        state = self._look(path, config)
        tls = None
        if config.tls_server_config:
            try:
                tls = tls_context(config.tls_server_config, self._folder)
            except ValueError as error:
                raise ConfigError(str(error), file=str(path), key="tls_server_config") from None
        if self._state and (tls is None) != (self._tls is None):
            raise ConfigError("switching TLS on or off needs a restart", file=str(path), key="tls_server_config")
        self.config, self._tls, self._state = config, tls, state

    def refresh(self) -> None:
        """Take in what has changed on disk; keep the old state, and log, when the new one is wrong."""
        if self._path is None or (state := self._look(self._path, self.config)) == self._state:
            return
        self._state = state
        try:
            self._load(self._path)
        except ConfigError as error:
            log.error("web config not reloaded, the old one stays in force", extra={"error": str(error)})  # noqa: TRY400
        else:
            log.info("web config reloaded", extra={"file": str(self._path)})

    def fresh_tls(self) -> ssl.SSLContext:
        """Return the TLS context of the files as they are now."""
        self.refresh()
        if self._tls is None:
            raise ssl.SSLError("this listener speaks no TLS")
        return self._tls

    @web.middleware
    async def middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Admit or refuse a request, and add the configured headers to its response."""
        self.refresh()
        config = self.config
        try:
            response = await self._admit(request, config) or await handler(request)
        except web.HTTPException as error:
            error.headers.update(config.http_server_config.headers)
            raise
        response.headers.update(config.http_server_config.headers)
        return response

    async def _admit(self, request: web.Request, config: WebConfig) -> web.Response | None:
        tls = config.tls_server_config
        if tls and tls.client_allowed_sans and not _has_san(request, tls.client_allowed_sans):
            return web.Response(status=403, text="the client certificate has none of the allowed names\n")
        if not config.basic_auth_users:
            return None
        given = credentials(request.headers.get(hdrs.AUTHORIZATION, ""))
        if given and await self._passwords.match(config.basic_auth_users, *given):
            return None
        return web.Response(status=401, text="Unauthorized\n", headers={hdrs.WWW_AUTHENTICATE: "Basic"})


def credentials(header: str) -> tuple[str, str] | None:
    """Return user and password of a Basic Authorization header (RFC 7617); None for anything else."""
    scheme, _, encoded = header.partition(" ")
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except ValueError:
        return None
    return (user, password) if scheme.lower() == "basic" and colon else None


def _has_san(request: web.Request, allowed: tuple[str, ...]) -> bool:
    certificate: Any = request.transport and request.transport.get_extra_info("peercert")
    names = (certificate or {}).get("subjectAltName", ())
    # OpenSSL writes ::1 as 0:0:0:0:0:0:0:1.
    return any((str(ip_address(name)) if kind == "IP Address" else name) in allowed for kind, name in names)


class _FreshContext(ssl.SSLContext):
    """A context that hands every new connection to the gate's context of that moment."""

    _gate: WebGate

    @classmethod
    def around(cls, gate: WebGate) -> "_FreshContext":
        context = cls(ssl.PROTOCOL_TLS_SERVER)
        context._gate = gate
        return context

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:  # noqa: ANN401 -- passed through as it is
        return self._gate.fresh_tls().wrap_bio(*args, **options)


class Passwords:
    """Compares passwords with bcrypt hashes, off the event loop, and remembers the results.

    An unknown user costs what a known one costs, so that users cannot be told by the clock; the comparing thread is one,
    and few may wait for it, so that guessing cannot take the machine. Who was let in is let in again without waiting.
    """

    REMEMBERED = 128
    """Wrong passwords that are known as such; of the right ones there is one a user."""
    WAITING = 32

    def __init__(self, check: Callable[[bytes, bytes], bool] | None = None) -> None:
        """Start with no results; `check` compares a password with a hash."""
        self._check = check or _check
        self._right: set[bytes] = set()
        self._wrong: dict[bytes, None] = {}
        self._waiting = 0
        self._salt = os.urandom(32)
        self._nobody = bcrypt.hashpw(os.urandom(16), bcrypt.gensalt(10))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bcrypt")

    async def match(self, users: Mapping[str, str], user: str, password: str) -> bool:
        """Tell whether `password` is that of `user`; bcrypt takes 72 bytes, a longer one matches nothing.

        Raises web.HTTPServiceUnavailable where too many wait to be told.
        """
        hashed = users.get(user, "").encode() or self._nobody
        secret = password.encode()
        key = hmac.digest(self._salt, b"\0".join((user.encode(), hashed, secret)), hashlib.sha256)
        if key in self._right or key in self._wrong:
            return key in self._right
        if self._waiting >= self.WAITING:
            raise web.HTTPServiceUnavailable(text="Too many passwords to check, try again later.\n")
        self._waiting += 1
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._thread, self._check, secret, hashed)
        finally:
            self._waiting -= 1
        if result and user in users:
            self._right.add(key)
            return True
        while len(self._wrong) >= self.REMEMBERED:
            del self._wrong[next(iter(self._wrong))]
        self._wrong[key] = None
        return False


def _check(secret: bytes, hashed: bytes) -> bool:
    try:
        return bcrypt.checkpw(secret, hashed)
    except ValueError:
        return False
