"""TLS as blackbox_exporter's Go speaks it, and what a session's certificates say."""

import contextvars
import functools
import hashlib
import os
import re
import ssl
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from exporter.probe.module import ProbeTLS
from exporter.probe.result import Certificates

handshake: contextvars.ContextVar[Callable[[], None]] = contextvars.ContextVar("handshake")
"""What is called when a handshake begins, which is when the TCP connection is there."""


class _Context(ssl.SSLContext):
    """A TLS context that tells when a handshake begins."""

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:  # noqa: ANN401 -- handed on
        if begins := handshake.get(None):
            begins()
        return super().wrap_bio(*args, **kwargs)


_VERSIONS = {
    "TLS10": ssl.TLSVersion.TLSv1,
    "TLS11": ssl.TLSVersion.TLSv1_1,
    "TLS12": ssl.TLSVersion.TLSv1_2,
    "TLS13": ssl.TLSVersion.TLSv1_3,
}


def context(options: ProbeTLS) -> ssl.SSLContext:
    """Return the context of `options`, which is made anew when one of its files has changed. Blocks; raises OSError."""
    names = (options.ca_file, options.cert_file, options.key_file)
    stats = [_home(name).stat() for name in names if name]
    return _context(options, tuple([(found.st_mtime_ns, found.st_ino) for found in stats]))


def _home(name: str) -> Path:
    return Path(os.path.expanduser(name))  # noqa: PTH111 -- Path's raises where there is no such home


@functools.lru_cache(maxsize=16)
def _context(options: ProbeTLS, _files: tuple[tuple[int, int], ...]) -> ssl.SSLContext:
    """Make a context; loading the system's authorities takes 20 ms and 1 MB, too much for every probe."""
    made = _Context(ssl.PROTOCOL_TLS_CLIENT)
    # As Go verifies: no common names, a trusted leaf is enough, RFC 5280 not to the letter.
    made.hostname_checks_common_name = False
    made.verify_flags = ssl.VerifyFlags.VERIFY_X509_TRUSTED_FIRST | ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    oldest = options.min_version or min("TLS12", options.max_version or "TLS12")
    if oldest in ("TLS10", "TLS11"):
        # OpenSSL 3 signs nothing with SHA-1, as these versions must, at its default security level.
        made.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings():
        # Old versions are deprecated; whoever asks for one by name knows.
        warnings.simplefilter("ignore", DeprecationWarning)
        made.minimum_version = _VERSIONS[oldest]
        if options.max_version:
            made.maximum_version = _VERSIONS[options.max_version]
    if options.insecure_skip_verify:
        made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    elif options.ca_file:
        made.load_verify_locations(_home(options.ca_file))
    else:
        made.load_default_certs()
    if options.cert_file:
        # Without a password at hand, OpenSSL would ask the terminal for one.
        made.load_cert_chain(_home(options.cert_file), _home(options.key_file), password="")
    return made


_NAMES = {"TLSv1": "TLS 1.0", "TLSv1.1": "TLS 1.1", "TLSv1.2": "TLS 1.2", "TLSv1.3": "TLS 1.3"}


def certificates(session: ssl.SSLObject) -> Certificates | None:
    """Read the certificates of a TLS session."""
    # Before Python 3.13 the chain has no public door, and later only one to bare bytes, which ssl cannot read.
    inner = session._sslobj  # type: ignore[attr-defined]  # noqa: SLF001
    sent = [certificate.get_info() for certificate in inner.get_unverified_chain() or ()]
    leaf_bytes = session.getpeercert(binary_form=True)
    if not sent or leaf_bytes is None:
        return None
    leaf = sent[0]
    # OpenSSL returns a chain even where nothing was verified.
    verified = inner.get_verified_chain() if session.context.verify_mode is ssl.CERT_REQUIRED else None
    return Certificates(
        version=_NAMES.get(session.version() or "", "unknown"),
        earliest_expiry=min(map(_not_after, sent)),
        chain_expiry=min(_not_after(certificate.get_info()) for certificate in verified) if verified else None,
        fingerprint=hashlib.sha256(leaf_bytes).hexdigest(),
        subject=distinguished_name(leaf.get("subject", ())),
        issuer=distinguished_name(leaf.get("issuer", ())),
        names=",".join(name for kind, name in leaf.get("subjectAltName", ()) if kind == "DNS"),
        serial=leaf.get("serialNumber", "").lower(),
    )


def _not_after(certificate: Mapping[str, Any]) -> float:
    return float(ssl.cert_time_to_seconds(certificate["notAfter"]))


_ATTRIBUTES = {
    "countryName": "C",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "commonName": "CN",
    "serialNumber": "SERIALNUMBER",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "streetAddress": "STREET",
    "postalCode": "POSTALCODE",
}


def distinguished_name(name: tuple[tuple[tuple[str, str], ...], ...]) -> str:
    """Write a certificate's name as RFC 2253 does, last part first: "CN=example.com,O=Example"."""
    return ",".join(
        "+".join(f"{_ATTRIBUTES.get(kind, kind)}={_escaped(value)}" for kind, value in part) for part in reversed(name)
    )


def _escaped(value: str) -> str:
    value = re.sub(r'([,+"\\<>;])', r"\\\1", value)
    return f"\\{value}" if value[:1] in (" ", "#") else value
