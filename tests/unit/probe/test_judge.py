"""Answers held against modules, as data."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from exporter.probe.judge import decoder, wrong_in_body, wrong_in_head, wrong_in_json, wrong_in_transport
from exporter.probe.module import HeaderMatch, HttpProber, JsonAssertion
from exporter.probe.result import Reason


def headers(*pairs: tuple[str, str]) -> CIMultiDictProxy[str]:
    """Return response headers."""
    return CIMultiDictProxy(CIMultiDict(pairs))


def reason(found: tuple[Reason, str] | None) -> Reason | None:
    """Return the reason alone."""
    return found[0] if found else None


@pytest.mark.parametrize(
    ("valid", "status", "right"),
    [((), 200, True), ((), 299, True), ((), 300, False), ((), 199, False), ((404,), 404, True), ((404,), 200, False)],
)
def test_status(valid: tuple[int, ...], status: int, right: bool) -> None:  # noqa: FBT001 -- a column of the table
    """Without valid_status_codes any 2xx is right, with it only those."""
    found = wrong_in_head(HttpProber(valid_status_codes=valid), status, headers())
    assert (found is None) is right


def test_header_rules() -> None:
    """fail_if_header_matches fails on any value, fail_if_header_not_matches only when none matches; names ignore case."""
    two = headers(("Set-Cookie", "a=1"), ("set-cookie", "b=2; Secure"))
    secure = HeaderMatch(header="SET-COOKIE", regexp="Secure")
    assert reason(wrong_in_head(HttpProber(fail_if_header_matches=(secure,)), 200, two)) is Reason.REGEX
    assert wrong_in_head(HttpProber(fail_if_header_not_matches=(secure,)), 200, two) is None
    missing = HeaderMatch(header="X-None", regexp=".")
    for key in ("fail_if_header_matches", "fail_if_header_not_matches"):
        assert reason(wrong_in_head(HttpProber(**{key: (missing,)}), 200, two)) is Reason.REGEX
        allowed = msgspec.structs.replace(missing, allow_missing=True)
        assert wrong_in_head(HttpProber(**{key: (allowed,)}), 200, two) is None


def test_status_comes_first() -> None:
    """Where the status is wrong, headers are not looked at, as blackbox_exporter does not."""
    rule = HeaderMatch(header="X-None", regexp=".")
    assert reason(wrong_in_head(HttpProber(fail_if_header_matches=(rule,)), 500, headers())) is Reason.STATUS


def test_transport_rules() -> None:
    """The HTTP version and TLS are judged apart, so that each can be told."""
    assert not list(wrong_in_transport(HttpProber(), "HTTP/1.0", tls=False))
    only = HttpProber(valid_http_versions=("HTTP/1.1",), fail_if_not_ssl=True)
    assert [found for found, _ in wrong_in_transport(only, "HTTP/1.0", tls=False)] == [Reason.HTTP_VERSION, Reason.SSL]
    assert [found for found, _ in wrong_in_transport(HttpProber(fail_if_ssl=True), "HTTP/1.1", tls=True)] == [Reason.SSL]


def test_body_rules() -> None:
    """No expression of fail_if_body_matches_regexp may match, and all of fail_if_body_not_matches_regexp must."""
    assert reason(wrong_in_body(HttpProber(fail_if_body_matches_regexp=("x", "(?i)DOWN")), b"is down")) is Reason.REGEX
    assert wrong_in_body(HttpProber(fail_if_body_matches_regexp=("x", "y")), b"is down") is None
    assert reason(wrong_in_body(HttpProber(fail_if_body_not_matches_regexp=("is", "up")), b"is down")) is Reason.REGEX
    assert wrong_in_body(HttpProber(fail_if_body_not_matches_regexp=("^is", "down$")), b"is down") is None


def test_body_need_not_be_text() -> None:
    """Expressions are matched against bytes, text or not."""
    assert wrong_in_body(HttpProber(fail_if_body_not_matches_regexp=("ok$",)), b"\xff\x00\xfeok") is None


TREE = {
    "status": "healthy",
    "up": True,
    "n": 3,
    "nothing": None,
    "checks": [{"name": "mongodb", "ok": True}, {"name": "disk", "ok": False}],
    "a.b": 1.5,
}
RIGHT = [
    {"path": "status", "equals": "healthy"},
    {"path": "status", "one_of": ("ok", "healthy")},
    {"path": "status", "matches": "^heal"},
    {"path": "up", "equals": True},
    {"path": "n", "equals": 3},
    {"path": "n", "equals": 3.0},
    {"path": "n", "matches": "^3$"},
    {"path": "up", "matches": "true"},
    {"path": "nothing", "one_of": (None,)},
    {"path": "checks[0].ok", "equals": True},
    {"path": "checks[-1].name", "equals": "disk"},
    {"path": '["a.b"]', "equals": 1.5},
    {"path": "checks[0]", "matches": '"mongodb"'},
]
WRONG = [
    ({"path": "status", "equals": "ok"}, 'status is "healthy", wanted is "ok"'),
    ({"path": "status", "one_of": ("ok", None)}, 'status is "healthy", wanted is "ok" or null'),
    ({"path": "up", "equals": 1}, "up is true, wanted is 1"),
    ({"path": "n", "equals": "3"}, 'n is 3, wanted is "3"'),
    ({"path": "checks[2].ok", "equals": True}, "checks[2].ok is missing"),
    ({"path": "checks.ok", "equals": True}, "checks.ok is missing"),
    ({"path": "status.x", "equals": True}, "status.x is missing"),
    ({"path": "status[0]", "equals": "h"}, "status[0] is missing"),
    ({"path": "nothing", "equals": "x"}, 'nothing is null, wanted is "x"'),
    ({"path": "status", "matches": "^ok$"}, "status does not match '^ok$'"),
    ({"path": "", "equals": "x"}, "the body is"),
]


@pytest.mark.parametrize("assertion", RIGHT, ids=str)
def test_json_right(assertion: dict[str, Any]) -> None:
    """A value is judged as JSON has it: true is not 1, "3" is not 3, 3 is 3.0."""
    assert wrong_in_json(JsonAssertion(**assertion), TREE) == ""


@pytest.mark.parametrize(("assertion", "text"), WRONG, ids=str)
def test_json_wrong(assertion: dict[str, Any], text: str) -> None:
    """What is wrong names the path, the value and what was wanted."""
    assert wrong_in_json(JsonAssertion(**assertion), TREE).startswith(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(JSON, st.sampled_from(["a", "[0]", "a.b[1]", '["x y"]', ""]))
def test_any_json(tree: object, path: str) -> None:
    """Whatever the body says, an assertion on it holds or does not; it never raises."""
    assert isinstance(wrong_in_json(JsonAssertion(path=path, equals="ok"), tree), str)


@given(st.binary(max_size=200))
def test_any_body(body: bytes) -> None:
    """Whatever bytes the body is made of, it is JSON in which the assertion holds, or the reason is json."""
    found = wrong_in_body(HttpProber(json=(JsonAssertion(path="status", equals="ok"),)), body)
    assert reason(found) in (None, Reason.JSON)


def test_long_json() -> None:
    """A body longer than 1 MiB is not read as JSON: a flood of brackets costs many times its length."""
    flood = b"[" + b"[]," * 400_000 + b"[]]"
    found = wrong_in_body(HttpProber(json=(JsonAssertion(path="[0]", one_of=(None,)),)), flood)
    assert found == (Reason.JSON, "the body is longer than the 1048576 bytes read as JSON")


def fed(decode: Callable[[bytes | None], Iterator[bytes]], chunks: list[bytes]) -> bytes:
    """Return what comes out of a decoder."""
    parts = [part for chunk in (*chunks, None) for part in decode(chunk)]
    assert all(len(part) <= 65536 for part in parts)
    return b"".join(parts)


SQUEEZE: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "two gzips": ("gzip", lambda data: gzip.compress(data[:7]) + gzip.compress(data[7:])),
    "zlib": ("deflate", zlib.compress),
    "bare": ("deflate", lambda data: zlib.compress(data, wbits=-15)),
}


@given(st.sampled_from(sorted(SQUEEZE)), st.binary(max_size=2000), st.integers(1, 50))
def test_decoders(kind: str, data: bytes, size: int) -> None:
    """What was compressed comes out whole, however it was cut on the way."""
    compression, squeeze = SQUEEZE[kind]
    packed = squeeze(data)
    chunks = [packed[at : at + size] for at in range(0, len(packed), size)]
    assert fed(decoder(compression), chunks) == data


@given(st.sampled_from(sorted(SQUEEZE)), st.binary(min_size=20, max_size=200), st.data())
def test_cut_streams(kind: str, data: bytes, draw: st.DataObject) -> None:
    """A compressed body that ends too early is an error, never a short body taken for a whole one."""
    compression, squeeze = SQUEEZE[kind]
    packed = squeeze(data)
    cut = draw.draw(st.integers(0, len(packed) - 1))
    if kind == "two gzips" and cut == len(gzip.compress(data[:7])):
        return
    with pytest.raises(zlib.error):
        fed(decoder(compression), [packed[:cut]] if cut else [])


@given(st.sampled_from(["gzip", "deflate"]), st.lists(st.binary(min_size=1, max_size=50), max_size=5))
def test_any_stream(compression: str, chunks: list[bytes]) -> None:
    """Any bytes decompress, or are zlib.error."""
    try:
        fed(decoder(compression), chunks)
    except zlib.error:
        return


def test_plain_bodies() -> None:
    """Without compression bodies come as they are."""
    assert fed(decoder(""), [b"a", b"b"]) == b"ab"
    assert fed(decoder("identity"), []) == b""
