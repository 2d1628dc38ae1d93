"""What a probe found."""

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

import msgspec


class Reason(Enum):
    """Why a probe failed: the first thing that was wrong."""

    RESOURCES = "resources"
    """This machine has no descriptors or threads left for a probe; it says nothing about the target."""
    MODULE = "module"
    """A file that the module names cannot be read, or holds no certificate."""
    DNS = "dns"
    """The host has no address, or none of the protocol wanted."""
    REFUSED_TARGET = "refused_target"
    """The address must not be probed."""
    CONNECTION_REFUSED = "connection_refused"
    """Nothing listens there."""
    UNREACHABLE = "unreachable"
    """There is no connection for another reason: no route, reset while connecting."""
    TLS = "tls"
    """The TLS handshake failed: certificate expired or for another name, unknown authority, no common version."""
    TIMEOUT = "timeout"
    """There was no complete answer in time."""
    DISCONNECTED = "disconnected"
    """The connection was closed or reset before the answer was complete."""
    PROTOCOL = "protocol"
    """The answer is no HTTP."""
    TOO_MANY_REDIRECTS = "too_many_redirects"
    """There were more than 10 redirects."""
    BAD_REDIRECT = "bad_redirect"
    """A redirect led to no HTTP URL."""
    STATUS = "status"
    """The status code is none of the valid ones."""
    HTTP_VERSION = "http_version"
    """The HTTP version is none of the valid ones."""
    SSL = "ssl"
    """TLS was used though it must not be, or not used though it must."""
    REGEX = "regex"
    """A regular expression for the body or a header did not hold."""
    JSON = "json"
    """The body is no JSON, or an assertion on it did not hold."""
    BODY_TOO_LARGE = "body_too_large"
    """The body, decompressed, is longer than body_size_limit."""
    DECODING = "decoding"
    """The body is not compressed as `compression` says."""


class Event(NamedTuple):
    """One line of a probe's log; never a credential, a query string or a body in it."""

    at: float
    """Seconds since the probe began."""
    level: str
    message: str
    fields: Mapping[str, object]


class Certificates(NamedTuple):
    """What the TLS session of the last answer says; times are Unix timestamps."""

    version: str
    """Such as "TLS 1.3"."""
    earliest_expiry: float
    """When the first of the certificates that the server sent expires."""
    chain_expiry: float | None
    """When the first certificate of the verified chain expires; None where nothing was verified."""
    fingerprint: str
    """SHA-256 of the leaf certificate, in hexadecimal."""
    subject: str
    issuer: str
    names: str
    """The leaf's DNS names, separated by commas."""
    serial: str


PHASES = ("resolve", "connect", "tls", "processing", "transfer")


class ProbeResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one probe found; a figure that was not reached is 0, as blackbox_exporter has it."""

    reason: Reason | None
    """Why the probe failed; None when it succeeded."""
    detail: str
    """The same in words, for people; empty when it succeeded."""
    began: float
    """Unix timestamp."""
    seconds: float
    lookup_seconds: float
    """How long the first name look-up took."""
    phases: Mapping[str, float]
    """Seconds in each of PHASES, summed over all redirects."""
    ip_protocol: int
    """4 or 6."""
    ip_hash: int
    """FNV-1a of the address, which tells that it changed without telling it."""
    status: int
    version: float
    """Such as 1.1."""
    redirects: int
    content_length: int
    """As the answer declares it; -1 where it does not."""
    body_length: int
    """Bytes of the body read, after decompression."""
    last_modified: float | None
    """Unix timestamp; None where the answer does not say."""
    certificates: Certificates | None
    """None when the last answer did not come over TLS."""
    events: tuple[Event, ...]

    @property
    def success(self) -> bool:
        """Whether all that the module asks for held."""
        return self.reason is None


class FailedError(Exception):
    """A probe cannot go on; it becomes the result's reason and detail."""

    def __init__(self, reason: Reason, detail: str) -> None:
        """Say why, as a word and in words."""
        super().__init__(detail)
        self.reason, self.detail = reason, detail
