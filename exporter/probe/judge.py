"""What is wrong with an answer, held against a module. Pure."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
from multidict import CIMultiDictProxy

from exporter.probe.module import HttpProber, JsonAssertion, expression, steps
from exporter.probe.result import Reason

JSON_LIMIT = 1024**2
"""Bytes; a longer body is not read as JSON, for what is in it may take twenty times its length in memory."""


def decoder(compression: str) -> Callable[[bytes | None], Iterator[bytes]]:
    """Return what decompresses chunk after chunk, into parts of at most 64 KiB, and at None holds that all was there.

    Raises zlib.error. `deflate` is taken both as zlib writes it, which HTTP means by it, and bare, which Go does.
    """
    if compression in ("", "identity"):
        return lambda chunk: iter((chunk,) if chunk else ())
    stream: Any = None
    wbits = zlib.MAX_WBITS | 16

    def decode(chunk: bytes | None) -> Iterator[bytes]:
        nonlocal stream, wbits
        if chunk is None:
            if stream is None or not stream.eof:
                raise zlib.error("it ends too early")
            return
        if stream is None and compression == "deflate":
            wbits = zlib.MAX_WBITS if chunk[0] & 15 == 8 else -zlib.MAX_WBITS  # noqa: PLR2004 -- zlib's method number
        while chunk:
            if stream is None or stream.eof:
                stream = zlib.decompressobj(wbits)
            yield stream.decompress(chunk, 64 * 1024)
            chunk = stream.unconsumed_tail or (stream.unused_data if compression == "gzip" else b"")

    return decode


def wrong_in_head(http: HttpProber, status: int, headers: CIMultiDictProxy[str]) -> tuple[Reason, str] | None:
    """Return which rule about the status or the headers does not hold; None when all do."""
    if status not in http.valid_status_codes if http.valid_status_codes else not 200 <= status < 300:  # noqa: PLR2004 -- 2xx
        return Reason.STATUS, f"the status is {status}, wanted is {_or(http.valid_status_codes) or '2xx'}"
    if wrong := wrong_in_headers(http, headers):
        return Reason.REGEX, wrong
    return None


def wrong_in_transport(http: HttpProber, version: str, *, tls: bool) -> Iterator[tuple[Reason, str]]:
    """Yield each rule about the HTTP `version`, such as "HTTP/1.1", and about TLS that does not hold."""
    if http.valid_http_versions and version not in http.valid_http_versions:
        yield Reason.HTTP_VERSION, f"the version is {version}, wanted is {_or(http.valid_http_versions)}"
    if tls and http.fail_if_ssl:
        yield Reason.SSL, "the last answer came over TLS"
    if not tls and http.fail_if_not_ssl:
        yield Reason.SSL, "the last answer did not come over TLS"


def _or(items: Iterable[object]) -> str:
    return " or ".join(map(str, items))


def wrong_in_headers(http: HttpProber, headers: CIMultiDictProxy[str]) -> str:
    """Return which rule about headers does not hold; empty when all do."""
    for rule in http.fail_if_header_matches:
        values = headers.getall(rule.header, ())
        if not values and not rule.allow_missing:
            return f"the header {rule.header} is missing"
        if any(expression(rule.regexp).search(_bytes(value)) for value in values):
            return f"the header {rule.header} matches {rule.regexp!r}"
    for rule in http.fail_if_header_not_matches:
        values = headers.getall(rule.header, ())
        if not values and not rule.allow_missing:
            return f"the header {rule.header} is missing"
        if values and not any(expression(rule.regexp).search(_bytes(value)) for value in values):
            return f"the header {rule.header} does not match {rule.regexp!r}"
    return ""


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def wrong_in_body(http: HttpProber, body: bytes) -> tuple[Reason, str] | None:
    """Return which rule about the body does not hold; None when all do. Pure."""
    for text in http.fail_if_body_matches_regexp:
        if expression(text).search(body):
            return Reason.REGEX, f"the body matches {text!r}"
    for text in http.fail_if_body_not_matches_regexp:
        if not expression(text).search(body):
            return Reason.REGEX, f"the body does not match {text!r}"
    if not http.json:
        return None
    if len(body) > JSON_LIMIT:
        return Reason.JSON, f"the body is longer than the {JSON_LIMIT} bytes read as JSON"
    try:
        tree = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return Reason.JSON, "the body is no JSON"
    for assertion in http.json:
        if wrong := wrong_in_json(assertion, tree):
            return Reason.JSON, wrong
    return None


def wrong_in_json(assertion: JsonAssertion, tree: object) -> str:
    """Return what is wrong with the value at the assertion's path; empty when nothing is. Pure."""
    name = assertion.path or "the body"
    value: Any = tree
    for step in steps(assertion.path):
        try:
            if isinstance(step, int) != isinstance(value, list):
                raise LookupError  # noqa: TRY301 -- one way to say that there is no such value
            value = value[step]
        except (LookupError, TypeError):
            return f"{name} is missing"
    if assertion.matches:
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        return "" if expression(assertion.matches).search(_bytes(text)) else f"{name} does not match {assertion.matches!r}"
    wanted = assertion.one_of or (assertion.equals,)
    if any(_same(value, one) for one in wanted):
        return ""
    return f"{name} is {_short(value)}, wanted is {_or(map(_short, wanted))}"


def _same(value: object, wanted: object) -> bool:
    if isinstance(value, bool) or isinstance(wanted, bool) or not isinstance(value, int | float):
        return type(value) is type(wanted) and value == wanted
    return isinstance(wanted, int | float) and value == wanted


def _short(value: object) -> str:
    text = msgspec.json.encode(value).decode("utf-8", "replace")
    return text if len(text) <= 100 else text[:99] + "…"  # noqa: PLR2004 -- enough to know it by
