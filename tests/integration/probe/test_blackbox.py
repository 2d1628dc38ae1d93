"""The same servers probed by this prober and by a real blackbox_exporter: the same series, type by type, value by value."""

import gzip
import re
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from exporter.collectors.http import HttpOptions, answer_probe
from exporter.exposition import Format
from exporter.grammar import Strict, decode

if TYPE_CHECKING:
    from tests.integration.probe.conftest import Site

OURS = {"probe_failed_due_to_json", "probe_failure_reason"}
"""Metrics that blackbox_exporter does not have."""
TIMES = re.compile(r"probe_duration_seconds|probe_dns_lookup_time_seconds|probe_http_duration_seconds")
"""Figures that differ from one probe to the next."""

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Pasted(Strict, frozen=True, kw_only=True):
    """A file of which only the section under test is read."""

    http: HttpOptions


@pytest.fixture(scope="session")
def options(modules_text: str) -> HttpOptions:
    """Read the modules that blackbox_exporter reads, pasted into our section."""
    text = "http:\n" + "".join(f"  {line}\n" for line in modules_text.splitlines())
    return decode(text, Pasted, file="exporter.yml", environ={}).http


def answer(head: str, body: bytes = b"") -> bytes:
    """Return an answer, its head written in lines."""
    return "\r\n".join([*head.strip().splitlines(), "", ""]).encode() + body


PAGE = b"the database is connected\n"
ROUTES: Mapping[str, bytes] = {
    "/": answer(f"HTTP/1.1 200 OK\nContent-Length: {len(PAGE)}\nX-Mode: normal", PAGE),
    "/modified": answer("HTTP/1.1 200 OK\nContent-Length: 2\nLast-Modified: Tue, 24 Nov 2020 06:36:26 GMT", b"ok"),
    "/created": answer("HTTP/1.1 201 Created\nContent-Length: 0"),
    "/empty": answer("HTTP/1.1 204 No Content"),
    "/unmodified": answer("HTTP/1.1 304 Not Modified"),
    "/broken": answer("HTTP/1.1 500 Internal Server Error\nContent-Length: 4", b"oops"),
    "/old": answer("HTTP/1.0 200 OK", PAGE),
    "/unsized": answer("HTTP/1.1 200 OK\nConnection: close", PAGE),
    "/chunked": answer("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", b"5\r\nthe d\r\n8\r\natabase \r\n0\r\n\r\n"),
    "/bad-chunks": answer("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", b"5\r\nthe d\r\nzz\r\n"),
    "/cut-chunks": answer("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", b"5\r\nthe d\r\n8\r\nata"),
    "/short": answer("HTTP/1.1 200 OK\nContent-Length: 100", b"the database"),
    "/nonsense": b"\x00\x01\x02 no HTTP at all\r\n\r\n",
    "/silent-close": b"",
    "/redirect": answer("HTTP/1.1 302 Found\nLocation: /\nContent-Length: 3", b"go!"),
    "/redirect-308": answer("HTTP/1.1 308 Permanent Redirect\nLocation: /redirect\nContent-Length: 0"),
    "/redirect-bare": answer("HTTP/1.1 301 Moved Permanently\nContent-Length: 0"),
    "/redirect-301": answer("HTTP/1.1 301 Moved Permanently\nLocation: /nowhere\nContent-Length: 0"),
    "/redirect-ftp": answer("HTTP/1.1 302 Found\nLocation: ftp://127.0.0.1/x\nContent-Length: 0"),
    "/loop": answer("HTTP/1.1 302 Found\nLocation: /loop\nContent-Length: 0"),
    "/failing": answer("HTTP/1.1 200 OK\nContent-Length: 26", b"Could not connect to it.\r\n"),
    "/cookies": answer("HTTP/1.1 200 OK\nSet-Cookie: a=1\nSet-Cookie: b=2; Secure\nContent-Length: 0"),
    "/down": answer("HTTP/1.1 200 OK\nX-State: down\nX-Mode: normal\nContent-Length: 0"),
    "/read-only": answer("HTTP/1.1 200 OK\nX-Mode: normal\nX-Mode: read-only\nContent-Length: 0"),
    "/gzip": answer("HTTP/1.1 200 OK\nContent-Encoding: gzip\nContent-Length: 28", gzip.compress(b"squeezed", mtime=0)),
    "/gzip-cut": answer("HTTP/1.1 200 OK\nConnection: close", gzip.compress(b"squeezed")[:-3]),
    "/deflate": answer("HTTP/1.1 200 OK\nConnection: close", zlib.compress(b"squeezed", wbits=-15)),
    "/set-and-go": answer("HTTP/1.1 302 Found\nSet-Cookie: seen=1\nLocation: /\nContent-Length: 0"),
    "/trailing": answer("HTTP/1.1 200 OK\nContent-Length: 2", b"okay, and more than was said"),
    "/continue": answer("HTTP/1.1 100 Continue") + answer("HTTP/1.1 200 OK\nContent-Length: 2", b"ok"),
}

PLAIN = [
    *[(path, "http_2xx") for path in ROUTES],
    ("/missing", "http_2xx"),
    ("/missing", "status"),
    ("/redirect-301", "status"),
    ("/", "status"),
    ("/redirect", "no_redirects"),
    ("/redirect", "no_redirects_old"),
    ("/old", "only_http_1_0"),
    ("/", "only_http_1_0"),
    ("/", "versions"),
    ("/", "post"),
    ("/redirect", "post"),
    ("/redirect-308", "post"),
    ("/", "put_empty"),
    ("/", "head"),
    ("/unsized", "head"),
    ("/redirect", "head"),
    ("/", "host"),
    ("/redirect", "host"),
    ("/", "fail_if_ssl"),
    ("/", "fail_if_not_ssl"),
    ("/broken", "fail_if_not_ssl"),
    ("/failing", "body_matches"),
    ("/", "body_matches"),
    ("/broken", "body_matches"),
    ("/", "body_not_matches"),
    ("/chunked", "body_not_matches"),
    ("/failing", "body_not_matches"),
    ("/empty", "body_not_matches"),
    ("/", "header_matches"),
    ("/down", "header_matches"),
    ("/read-only", "header_matches"),
    ("/created", "header_matches"),
    ("/cookies", "header_not_matches"),
    ("/", "header_not_matches"),
    ("/gzip", "gzip"),
    ("/gzip-cut", "gzip"),
    ("/", "gzip"),
    ("/empty", "gzip"),
    ("/deflate", "deflate"),
    ("/", "small"),
    ("/modified", "small"),
    ("/", "basic_auth"),
    ("/redirect", "basic_auth"),
    ("/", "bearer"),
    ("/", "authorization"),
    ("/", "ip6_only"),
    ("/", "ip4"),
    ("/", "bare"),
    ("/set-and-go", "bare"),
]
OVER_TLS = [
    "tls",
    "tls_name",
    "tls_wrong_name",
    "tls_unverified",
    "tls13",
    "http_2xx",
    "fail_if_ssl",
    "fail_if_not_ssl",
    "host",
]


def series(page: str) -> tuple[dict[str, str], Series]:
    """Return the type of each metric of a page, and its series."""
    families = list(text_string_to_metric_families(page))
    kinds = {family.name: family.type for family in families}
    values = {
        (sample.name, frozenset(sample.labels.items())): sample.value for family in families for sample in family.samples
    }
    return kinds, values


async def both(options: HttpOptions, blackbox: str, target: str, module: str, **more: str) -> tuple[str, str]:
    """Return what this prober and blackbox_exporter answer to the same request."""
    query = {"target": target, "module": module, **more}
    ours, _, status = await answer_probe(options, query, 9.5, Format.TEXT)
    assert status == 200, ours
    async with aiohttp.ClientSession() as session, session.get(f"http://{blackbox}/probe", params=query) as theirs:
        assert theirs.status == 200
        return ours.decode(), await theirs.text()


def compare(ours: str, theirs: str, differs: frozenset[str] = frozenset()) -> None:
    """Hold that two pages have the same types, series and values, but for the metrics named in `differs`."""
    our_kinds, our_values = series(ours)
    their_kinds, their_values = series(theirs)
    assert {name: kind for name, kind in our_kinds.items() if name not in OURS | differs} == {
        name: kind for name, kind in their_kinds.items() if name not in differs
    }
    ours_left = {key: value for key, value in our_values.items() if key[0] not in OURS | differs}
    theirs_left = {key: value for key, value in their_values.items() if key[0] not in differs}
    # Later versions of blackbox_exporter tell the serial number too; 0.23 does not yet.
    ours_left = {
        (name, frozenset(pair for pair in labels if pair[0] != "serialnumber")): v
        for (name, labels), v in ours_left.items()
    }
    assert {key: None if TIMES.match(key[0]) else value for key, value in ours_left.items()} == {
        key: None if TIMES.match(key[0]) else value for key, value in theirs_left.items()
    }


DIFFERS: Mapping[tuple[str, str], tuple[str, frozenset[str]]] = {
    ("/bad-chunks", "http_2xx"): (
        "the head and the garbage come in one piece, of which the parser keeps nothing",
        frozenset({"probe_http_status_code", "probe_http_version", "probe_http_content_length"})
        | {"probe_http_uncompressed_body_length"},
    ),
    ("/trailing", "http_2xx"): (
        "a body longer than it says is no HTTP, and would be the next answer's beginning elsewhere",
        frozenset({"probe_success", "probe_http_status_code", "probe_http_version", "probe_http_content_length"})
        | {"probe_http_uncompressed_body_length"},
    ),
    ("/redirect-ftp", "http_2xx"): (
        "the answer that redirects to no HTTP URL is still an answer, so it is shown",
        frozenset({"probe_http_status_code", "probe_http_version"}),
    ),
    ("/gzip-cut", "gzip"): (
        "a body that cannot be read is not a regular expression's fault",
        frozenset({"probe_failed_due_to_regex"}),
    ),
    ("/", "ip6_only"): (
        "every phase is there even when the name has no address",
        frozenset({"probe_http_duration_seconds"}),
    ),
    ("/", "tls_unverified"): (
        "where nothing was verified there is no chain; 0.23 says that it expired in the year 1",
        frozenset({"probe_ssl_last_chain_expiry_timestamp_seconds"}),
    ),
}
"""Where this prober differs on purpose: why, and in which metrics."""


@pytest.mark.parametrize(("path", "module"), PLAIN)
async def test_plain(path: str, module: str, site: "Site", options: HttpOptions, blackbox: str) -> None:
    """Over plain HTTP every assertion key gives the same series, and the same values, as blackbox_exporter."""
    site.routes.update(ROUTES)
    ours, theirs = await both(options, blackbox, f"{site.url}{path}", module)
    compare(ours, theirs, DIFFERS.get((path, module), ("", frozenset()))[1])


@pytest.mark.parametrize("module", OVER_TLS)
async def test_tls(module: str, tls_site: "Site", options: HttpOptions, blackbox: str) -> None:
    """Over TLS too: version, names, fingerprint and expiry of the certificate, and each way not to accept it."""
    tls_site.routes.update(ROUTES)
    ours, theirs = await both(options, blackbox, f"{tls_site.url}/", module)
    compare(ours, theirs, DIFFERS.get(("/", module), ("", frozenset()))[1] if module == "tls_unverified" else frozenset())


async def test_expired(expired_site: "Site", options: HttpOptions, blackbox: str) -> None:
    """An expired certificate fails the probe, and its expiry is not told, as blackbox_exporter does not."""
    expired_site.routes.update(ROUTES)
    compare(*await both(options, blackbox, expired_site.url, "tls"))


async def test_nothing_there(closed_port: int, options: HttpOptions, blackbox: str) -> None:
    """A port where nothing listens gives the same series as blackbox_exporter's."""
    compare(*await both(options, blackbox, f"127.0.0.1:{closed_port}", "http_2xx"))


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("/", "bare"),
        ("/", "post"),
        ("/redirect", "post"),
        ("/redirect-308", "post"),
        ("/", "put_empty"),
        ("/redirect", "head"),
        ("/", "host"),
        ("/redirect", "host"),
        ("/", "basic_auth"),
        ("/redirect", "basic_auth"),
        ("/", "bearer"),
        ("/", "authorization"),
        ("/set-and-go", "bare"),
        ("/", "gzip"),
        ("/?q=a%20b&c=%2Fd+e", "bare"),
        ("/a%2Fb/%C3%BC", "bare"),
    ],
)
async def test_requests(path: str, module: str, site: "Site", options: HttpOptions, blackbox: str) -> None:
    """What the server is asked is the same too, but for the User-Agent."""
    site.routes.update(ROUTES)
    url = f"{site.url}{path}"
    await both(options, blackbox, url, module)
    half = len(site.asked) // 2
    ours, theirs = ([_request(asked) for asked in part] for part in (site.asked[:half], site.asked[half:]))
    assert ours == theirs


def _request(asked: bytes) -> tuple[bytes, frozenset[bytes], bytes]:
    head, _, body = asked.partition(b"\r\n\r\n")
    first, *headers = head.split(b"\r\n")
    # Go asks for a referring page on redirects; nobody checks health by it.
    told = frozenset(line for line in headers if not line.lower().startswith((b"user-agent:", b"referer:")))
    return first, told, body


async def test_hostname(site: "Site", options: HttpOptions, blackbox: str) -> None:
    """The hostname parameter is sent as the Host header, as blackbox_exporter sends it."""
    site.routes.update(ROUTES)
    compare(*await both(options, blackbox, site.url, "http_2xx", hostname="probe.example"))
    assert all(b"Host: probe.example\r\n" in asked for asked in site.asked)
    assert len(site.asked) == 2
