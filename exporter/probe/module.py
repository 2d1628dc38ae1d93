"""How to probe and what a good answer is, in the grammar of blackbox_exporter, so that its modules can be pasted.

`json` (assertions on a JSON body) is this project's own. What blackbox_exporter can and this prober cannot is an error when
the file is read. Regular expressions are RE2's: Go's syntax, and linear in the text, so no answer can make one run away.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from exporter.grammar import Duration, Secret, Size, Strict, default

BODY_LIMIT = Size(10 * 1024**2)


class Expression(NamedTuple):
    """A compiled regular expression; unanchored, as blackbox_exporter's are."""

    text: str
    search: Callable[[bytes], object]


@functools.lru_cache(maxsize=256)
def expression(text: str) -> Expression:
    """Compile `text` in RE2's syntax, which is Go's; raise ValueError for what is none."""
    import re2  # type: ignore[import-untyped]  # noqa: PLC0415 -- 2.6 MB that only a module with expressions needs

    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    try:
        compiled = re2.compile(text.encode(), options)
    except re2.error as error:
        rule = error.args[0].decode("utf-8", "replace") if error.args else "unknown"
        raise ValueError(f"{text!r} is no regular expression in RE2's syntax: {rule}") from None
    return Expression(text, compiled.search)


class HeaderMatch(Strict, frozen=True, kw_only=True):
    """A regular expression for the values of one response header."""

    header: str
    """The header's name."""
    regexp: str
    """RE2 syntax, not anchored."""
    allow_missing: bool = False
    """Whether a response without that header passes (default: no)."""

    def __post_init__(self) -> None:
        """Compile the expression once, so that a wrong one is found when the file is read."""
        if not self.header or not self.regexp:
            raise ValueError("header and regexp must both be set")
        expression(self.regexp)


Scalar = str | int | float | bool | None


_STEP = re.compile(r"""\.?([^.\[\]"]+)|\.?\["([^"]*)"\]|\[(-?\d{1,9})\]""")


def steps(path: str) -> tuple[str | int, ...]:
    """Read `a.b[0]["c.d"]` as ("a", "b", 0, "c.d"); raise ValueError for what is no path."""
    found: list[str | int] = []
    at = 0
    while at < len(path):
        step = _STEP.match(path, at)
        if not step or (step[0][0] == "." and not at) or (step[1] is not None and at and step[0][0] != "."):
            raise ValueError(f'path {path!r} is no path such as status, checks[0].ok or ["a key"] (at character {at + 1})')
        found.append(int(step[3]) if step[3] is not None else step[1] if step[1] is not None else step[2])
        at = step.end()
    return tuple(found)


class JsonAssertion(Strict, frozen=True, kw_only=True):
    """What one value of a JSON body must be."""

    path: str
    """Where the value is: `status`, `checks.mongodb[0].ok`, `["a key"].x`, `[-1]`; empty for the whole body."""
    equals: Scalar = None
    """The value itself; a number equals a number, `true` only `true`. For null write `one_of: [null]`."""
    one_of: tuple[Scalar, ...] = ()
    """The values allowed."""
    matches: str = ""
    """A regular expression (RE2, not anchored) for the value's text; what is no text is matched as JSON writes it."""

    def __post_init__(self) -> None:
        """Hold that a path is a path, and that there is exactly one way to judge its value."""
        steps(self.path)
        if (self.equals is not None) + bool(self.one_of) + bool(self.matches) != 1:
            raise ValueError(f"path {self.path!r}: exactly one of equals, one_of and matches must be set")
        if self.matches:
            expression(self.matches)


class ProbeTLS(Strict, frozen=True, kw_only=True):
    """How TLS is spoken."""

    insecure_skip_verify: bool = False
    """Accept any certificate (default: no). There is then no verified chain whose expiry could be told."""
    ca_file: str = ""
    """PEM file with the authorities to trust (default: the system's)."""
    cert_file: str = ""
    """PEM file with the client certificate."""
    key_file: str = ""
    """PEM file with the client certificate's key."""
    server_name: str = ""
    """The name that the certificate must be for (default: the Host header, else the target's host)."""
    min_version: Literal["", "TLS10", "TLS11", "TLS12", "TLS13"] = ""
    """The oldest TLS version accepted: TLS10, TLS11, TLS12 or TLS13 (default TLS12)."""
    max_version: Literal["", "TLS10", "TLS11", "TLS12", "TLS13"] = ""
    """The newest TLS version accepted (default: the newest there is)."""

    def __post_init__(self) -> None:
        """Hold that a client certificate comes with its key."""
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file must be set together")


class ProbeBasicAuth(Strict, frozen=True, kw_only=True):
    """HTTP basic authentication."""

    username: str = ""
    """The user."""
    password: Secret | None = None
    """The password."""
    password_file: str = ""
    """A file with the password, read at each probe."""


class ProbeAuthorization(Strict, frozen=True, kw_only=True):
    """An Authorization header of any type but Basic."""

    type: str = "Bearer"
    """The first word of the header (default Bearer)."""
    credentials: Secret | None = None
    """The rest of the header."""
    credentials_file: str = ""
    """A file with the rest of the header, read at each probe."""


class ProbeHeader(Strict, frozen=True, kw_only=True):
    """The values of one request header, from any of three sources."""

    values: tuple[str, ...] = ()
    """Plain values."""
    secrets: tuple[Secret, ...] = ()
    """Values that are secret."""
    files: tuple[str, ...] = ()
    """Files with one value each, read at each probe."""


_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
HEADER_VALUE = re.compile(r"[^\x00\r\n]*")
_NO_PROXY = "probes do not go through a proxy"
_REFUSED = {
    "proxy_url": _NO_PROXY,
    "no_proxy": _NO_PROXY,
    "proxy_from_environment": _NO_PROXY,
    "proxy_connect_header": _NO_PROXY,
    "skip_resolve_phase_with_proxy": _NO_PROXY,
    "oauth2": "probes do not fetch OAuth 2.0 tokens; use authorization with credentials_file",
    "fail_if_body_json_matches_cel": "CEL is not spoken here; use json",
    "fail_if_body_json_not_matches_cel": "CEL is not spoken here; use json",
}


class HttpProber(Strict, frozen=True, kw_only=True):
    """How an HTTP request is made and what its answer must be."""

    valid_status_codes: tuple[int, ...] = ()
    """Status codes that are a success (default: 200 to 299)."""
    valid_http_versions: tuple[str, ...] = ()
    """HTTP versions that are a success, such as HTTP/1.1 (default: any). HTTP/1.1 is spoken, never HTTP/2."""
    method: str = "GET"
    """The request's method (default GET)."""
    headers: dict[str, Secret] = default({})
    """Request headers; `Host` sets the host asked for."""
    http_headers: dict[str, ProbeHeader] = default({})
    """Request headers with several values, or with values from files."""
    body: str = ""
    """The request's body."""
    body_file: str = ""
    """A file with the request's body, read at each probe."""
    body_size_limit: Size = default(BODY_LIMIT)
    """The most bytes of a body, after decompression; a longer one fails the probe (default, and what 0 means: 10MiB)."""
    compression: Literal["", "identity", "gzip", "deflate", "br"] = ""
    """How every body must be compressed: gzip, deflate or identity (default: bodies are taken as they come)."""
    follow_redirects: bool = True
    """Whether redirects are followed, at most 10 of them (default: yes)."""
    no_follow_redirects: bool | None = None
    """The old, opposite name of follow_redirects; it wins where it is set."""
    fail_if_ssl: bool = False
    """Fail when the last answer came over TLS (default: no)."""
    fail_if_not_ssl: bool = False
    """Fail when the last answer did not come over TLS (default: no)."""
    fail_if_body_matches_regexp: tuple[str, ...] = ()
    """Fail when the body matches any of these regular expressions (RE2, not anchored)."""
    fail_if_body_not_matches_regexp: tuple[str, ...] = ()
    """Fail when the body does not match all of these regular expressions (RE2, not anchored)."""
    fail_if_header_matches: tuple[HeaderMatch, ...] = ()
    """Fail when any value of a header matches."""
    fail_if_header_not_matches: tuple[HeaderMatch, ...] = ()
    """Fail when no value of a header matches."""
    json: tuple[JsonAssertion, ...] = ()
    """Fail unless the body is JSON, of at most 1 MiB, in which each of these holds. Not known to blackbox_exporter."""
    tls_config: ProbeTLS = default(ProbeTLS())
    """How TLS is spoken."""
    basic_auth: ProbeBasicAuth | None = None
    """HTTP basic authentication."""
    authorization: ProbeAuthorization | None = None
    """Any other Authorization header."""
    bearer_token: Secret | None = None
    """The old way to write authorization's credentials."""
    bearer_token_file: str = ""
    """The old way to write authorization's credentials_file."""
    preferred_ip_protocol: Literal["ip4", "ip6"] = "ip6"
    """Which address of a name is asked first: ip4 or ip6 (default ip6)."""
    ip_protocol_fallback: bool = True
    """Whether the other protocol is used where the preferred one has no address (default: yes)."""
    enable_http2: bool = True
    """Taken for blackbox_exporter's sake, without effect: HTTP/1.1 is spoken."""
    proxy_url: Any = None
    """Refused: probes do not go through a proxy."""
    no_proxy: Any = None
    """Refused: probes do not go through a proxy."""
    proxy_from_environment: Any = None
    """Refused: probes do not go through a proxy."""
    proxy_connect_header: Any = None
    """Refused: probes do not go through a proxy."""
    skip_resolve_phase_with_proxy: Any = None
    """Refused: probes do not go through a proxy."""
    oauth2: Any = None
    """Refused: probes do not fetch OAuth 2.0 tokens; use authorization with credentials_file."""
    fail_if_body_json_matches_cel: Any = None
    """Refused: CEL is not spoken here; use json."""
    fail_if_body_json_not_matches_cel: Any = None
    """Refused: CEL is not spoken here; use json."""

    def __post_init__(self) -> None:
        """Hold what a field's type cannot say."""
        for key, why in _REFUSED.items():
            if getattr(self, key):
                raise ValueError(f"{key}: {why}")
        if self.compression == "br":
            raise ValueError("compression: br cannot be decompressed here; there are: gzip, deflate, identity")
        if self.valid_http_versions and not {"HTTP/1.0", "HTTP/1.1"} & set(self.valid_http_versions):
            raise ValueError("valid_http_versions: HTTP/1.1 is spoken, so it or HTTP/1.0 must be among them")
        if not _TOKEN.fullmatch(self.method):
            raise ValueError(f"method: {self.method!r} is no HTTP method")
        self._check_headers()
        if self.body and self.body_file:
            raise ValueError("body and body_file cannot be set together")
        for key in ("fail_if_body_matches_regexp", "fail_if_body_not_matches_regexp"):
            for text in getattr(self, key):
                try:
                    expression(text)
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from None
        self._check_authorization()

    def _check_headers(self) -> None:
        for name, value in self.headers.items():
            if not _TOKEN.fullmatch(name) or not HEADER_VALUE.fullmatch(value.reveal()):
                raise ValueError(f"headers: {name!r} is no header name, or its value has a line break")
        for name, header in self.http_headers.items():
            values = (*header.values, *(secret.reveal() for secret in header.secrets))
            if not _TOKEN.fullmatch(name) or not all(map(HEADER_VALUE.fullmatch, values)):
                raise ValueError(f"http_headers: {name!r} is no header name, or a value has a line break")

    def _check_authorization(self) -> None:
        bearer = bool(self.bearer_token) + bool(self.bearer_token_file)
        if (self.basic_auth is not None) + (self.authorization is not None) + bearer > 1:
            raise ValueError("at most one of basic_auth, authorization, bearer_token and bearer_token_file can be set")
        if (basic := self.basic_auth) and basic.password is not None and basic.password_file:
            raise ValueError("basic_auth: password and password_file cannot be set together")
        if other := self.authorization:
            if other.credentials is not None and other.credentials_file:
                raise ValueError("authorization: credentials and credentials_file cannot be set together")
            if other.type.strip().lower() == "basic":
                raise ValueError("authorization: for the type Basic there is basic_auth")

    @property
    def follows(self) -> bool:
        """Whether redirects are followed, whichever key said so."""
        return self.follow_redirects if self.no_follow_redirects is None else not self.no_follow_redirects

    @property
    def reads_body(self) -> bool:
        """Whether what the body says matters, not only its length."""
        return bool(self.fail_if_body_matches_regexp or self.fail_if_body_not_matches_regexp or self.json)


class ProbeModule(Strict, frozen=True, kw_only=True):
    """A named way to probe."""

    prober: str = "http"
    """What probes; only http is built in (default http)."""
    timeout: Duration = default(Duration(0))
    """The longest a probe may take (default, and what 0 means: until the scrape's deadline)."""
    http: HttpProber = default(HttpProber())
    """The request and what its answer must be."""
    tcp: Any = None
    """Refused: there is no TCP prober."""
    dns: Any = None
    """Refused: there is no DNS prober."""
    icmp: Any = None
    """Refused: there is no ICMP prober."""
    grpc: Any = None
    """Refused: there is no gRPC prober."""

    def __post_init__(self) -> None:
        """Hold that the prober is one that there is."""
        if self.prober != "http":
            raise ValueError(f"prober: {self.prober!r} is not built in; only http is (for others run blackbox_exporter)")
        for key in ("tcp", "dns", "icmp", "grpc"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key}: only the http prober is built in (for others run blackbox_exporter)")
