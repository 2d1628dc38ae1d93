"""The collector's options, where /probe may go, and results turned into metrics, as data."""

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from exporter.collectors.http import (
    DESCS,
    PROBE_DESCS,
    Allowed,
    HttpCollector,
    HttpOptions,
    HttpTarget,
    Refused,
    authorise,
    debug_text,
    module_of,
    probe_metrics,
)
from exporter.exposition import Format, Kind, render
from exporter.grammar import ConfigError, Secret, Strict, decode, json_schema
from exporter.probe.module import HttpProber, ProbeBasicAuth, ProbeModule
from exporter.probe.reach import normalise
from exporter.probe.result import PHASES, Certificates, Event, ProbeResult, Reason


class File(Strict, frozen=True, kw_only=True):
    """A file with the section under test only."""

    http: HttpOptions


def read(text: str) -> HttpOptions:
    """Read the section `http`."""
    return decode(f"http: {text}", File, file="exporter.yml", environ={}).http


def result(**more: Any) -> ProbeResult:  # noqa: ANN401 -- any field
    """Return a result; a success unless told otherwise."""
    fields: dict[str, Any] = {
        "reason": None,
        "detail": "",
        "began": 1700000000.0,
        "seconds": 0.25,
        "lookup_seconds": 0.01,
        "phases": dict.fromkeys(PHASES, 0.05),
        "ip_protocol": 4,
        "ip_hash": 7,
        "status": 200,
        "version": 1.1,
        "redirects": 0,
        "content_length": 20,
        "body_length": 20,
        "last_modified": None,
        "certificates": None,
        "events": (),
    }
    return ProbeResult(**(fields | more))


def test_defaults() -> None:
    """Without a section nothing is probed, http_2xx is there, and /probe reaches loopback only."""
    options = HttpOptions()
    assert options.targets == ()
    assert options.concurrency == 20
    assert options.allow == ("localhost", "127.0.0.0/8", "::1")
    assert module_of(options, "http_2xx") == ProbeModule()
    assert module_of(options, "other") is None


def test_own_http_2xx() -> None:
    """A module named http_2xx replaces the one built in."""
    options = read("{modules: {http_2xx: {http: {method: HEAD}}}}")
    module = module_of(options, "http_2xx")
    assert module
    assert module.http.method == "HEAD"


WRONG = {
    "{targets: [{url: 'ftp://x'}]}": "targets[0].url: only http:// and https:// can be probed",
    "{targets: [{url: 'http://u:secret@:80'}]}": "targets[0].url: the target",
    "{targets: [{url: a}, {url: b, module: x}]}": "targets[1].module: there is no module 'x'; there are: http_2xx",
    "{targets: [{url: 'a?x'}, {url: 'a?y'}]}": "targets[1]: another target is 'http://a/' with the module 'http_2xx' too",
    "{targets: [{name: n}]}": "the key 'url' is required",
    "{concurrency: 0}": "http.concurrency: Expected `int` >= 1",
    "{allow: ['10.0.0.1/8']}": "allow[0]: '10.0.0.1/8' is no network: 10.0.0.1/8 has host bits set",
    "{allow: ['10.0.0']}": "allow[0]: '10.0.0' is no network",
    "{allow: ['a b']}": "allow[0]: 'a b' is no host name, network or URL prefix",
    "{allow: ['ftp://a']}": "allow[0]: only http:// and https:// can be probed",
    "{allow: [a, 'b:0']}": "allow[1]: 'b:0' has no port from 1 to 65535",
    "{allow: ['b:65536']}": "allow[0]: 'b:65536' has no port from 1 to 65535",
    "{allow: ['*']}": "allow[0]: '*' is no host name, network or URL prefix",
    "{target: []}": "unknown key; did you mean 'targets'?",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong(text: str) -> None:
    """Each mistake is one error that names the key and the rule, and quotes no URL of a target."""
    with pytest.raises(ConfigError) as wrong:
        read(text)
    assert WRONG[text] in str(wrong.value)
    assert "secret" not in str(wrong.value)


def test_schema() -> None:
    """The section has a JSON Schema for editors."""
    assert {"HttpOptions", "HttpTarget", "ProbeModule"} <= json_schema(File, title="file")["$defs"].keys()


ALLOW = (
    "localhost",
    "api.internal",
    "*.example.com",
    "example.org:8443",
    "10.0.0.0/8",
    "fd12::/16",
    "https://example.net/health",
)
LISTED = [
    ("http://localhost:3000/x", "127.0.0.1", True),
    ("http://api.internal/", "192.0.2.1", True),
    ("http://API.Internal./", "192.0.2.1", True),
    ("http://a.b.example.com/", "192.0.2.1", True),
    ("http://example.com/", "192.0.2.1", False),
    ("http://notexample.com/", "192.0.2.1", False),
    ("http://evilapi.internal/", "192.0.2.1", False),
    ("https://example.org:8443/", "192.0.2.1", True),
    ("https://example.org/", "192.0.2.1", False),
    ("http://anything.example/", "10.1.2.3", True),
    ("http://anything.example/", "::ffff:10.1.2.3", True),
    ("http://anything.example/", "11.0.0.1", False),
    ("http://[fd12::1]/", "fd12::1", True),
    ("https://example.net/health", "192.0.2.1", True),
    ("https://example.net/health/live?x=1", "192.0.2.1", True),
    ("https://example.net/healthz", "192.0.2.1", False),
    ("https://example.net/health/../admin", "192.0.2.1", False),
    ("https://example.net/health/%2e%2e/admin", "192.0.2.1", False),
    ("https://example.net/health%2F..%2Fadmin", "192.0.2.1", False),
    ("http://example.net/health", "192.0.2.1", False),
    ("https://example.net:444/health", "192.0.2.1", False),
    ("http://api.internal/", "169.254.169.254", False),
    ("http://10.0.0.1/", "169.254.169.254", False),
]


@pytest.mark.parametrize(("url", "address", "may"), LISTED)
def test_requested(url: str, address: str, may: bool) -> None:  # noqa: FBT001 -- a column of the table
    """A requested target is let through by its name, its prefix or its address, and by nothing that only looks like it."""
    refusal = Allowed.of(ALLOW).requested(normalise(url), ip_address(address), None)
    assert (refusal == "") is may


EVERYWHERE = ("0.0.0.0/0", "::/0")
EXPLICIT = [
    (EVERYWHERE, False),
    (("169.0.0.0/8",), False),
    (("169.254.169.254",), True),
    (("169.254.0.0/16",), True),
    (("169.254.169.254/32", *EVERYWHERE), True),
    (("*.internal",), False),
]


@pytest.mark.parametrize(("allow", "may"), EXPLICIT)
def test_metadata(allow: tuple[str, ...], may: bool) -> None:  # noqa: FBT001 -- a column of the table
    """A metadata service is reached only when it is listed for itself, by a request or by the configuration alike."""
    allowed = Allowed.of(allow)
    url, address = URL("http://169.254.169.254/latest/meta-data"), ip_address("169.254.169.254")
    assert (allowed.requested(url, address, None) == "") is may
    assert (allowed.configured(url, address, None) == "") is may


def test_metadata_by_name() -> None:
    """A metadata service's name is refused too, unless it is listed by that name."""
    url, address = URL("http://metadata.google.internal/"), ip_address("169.254.169.254")
    assert Allowed.of(("*.google.internal", "0.0.0.0/0")).requested(url, address, None)
    assert Allowed.of(("metadata.google.internal",)).requested(url, address, None) == ""


def test_configured() -> None:
    """A configured target may be anywhere, and be redirected anywhere but further inside, unless that is listed."""
    public, private, loopback = ip_address("93.184.215.14"), ip_address("10.0.0.1"), ip_address("127.0.0.1")
    nothing, listed = Allowed.of(()), Allowed.of(("10.0.0.0/8",))
    assert nothing.configured(URL("http://a/"), private, None) == ""
    assert nothing.configured(URL("http://a/"), loopback, private)
    assert nothing.configured(URL("http://a/"), private, public)
    assert listed.configured(URL("http://a/"), private, public) == ""


def test_authorise() -> None:
    """What cannot be understood is a 400, what must not be done a 403, told without a look-up where it can be."""
    options = HttpOptions(targets=(HttpTarget(url="user:pass@app.example/health?deep=1"),))
    assert authorise(options, "") == Refused(400, "Target parameter is missing")
    assert authorise(options, "ftp://x") == Refused(
        400, "Target parameter is wrong: only http:// and https:// can be probed, not ftp://"
    )
    assert isinstance(authorise(options, "http://app.example/health?deep=1"), URL)
    assert isinstance(authorise(options, "127.0.0.5:3000"), URL)
    assert isinstance(authorise(options, "localhost:3000"), URL)
    for refused in (
        "app.example/health",
        "app.example",
        "10.0.0.1",
        "169.254.169.254",
        "2130706433.example",
        "example.com",
    ):
        found = authorise(options, refused)
        assert isinstance(found, Refused), refused
        assert found.status == 403
    assert isinstance(authorise(HttpOptions(allow=("10.0.0.0/8",)), "db.internal"), URL)


@given(st.text(max_size=50))
def test_any_request(target: str) -> None:
    """Whatever a request asks for, by default it is turned down or leads to this machine's loopback."""
    found = authorise(HttpOptions(), target)
    if isinstance(found, URL):
        host = found.raw_host or ""
        assert host.rstrip(".").lower() == "localhost" or ip_address(host).is_loopback


def test_metrics() -> None:
    """A result has blackbox_exporter's series, each once, and the certificates' only over TLS."""
    names = {metric.desc.name for metric in probe_metrics(result())}
    assert {desc.name for desc in PROBE_DESCS} - names == {
        "probe_ssl_earliest_cert_expiry",
        "probe_ssl_last_chain_expiry_timestamp_seconds",
        "probe_ssl_last_chain_info",
        "probe_tls_version_info",
    }
    told = Certificates("TLS 1.3", 1.9e9, 1.8e9, "ab" * 32, "CN=a", "CN=b", "a,b", "0c")
    page = render(probe_metrics(result(certificates=told, last_modified=5.0)), Format.TEXT, account=None).decode()
    assert "probe_success 1\n" in page
    assert "probe_http_ssl 1\n" in page
    assert "probe_ssl_earliest_cert_expiry 1900000000.0\n" in page
    assert (
        'probe_tls_version_info{version="TLS 1.3"} 1.0\n' in page or 'probe_tls_version_info{version="TLS 1.3"} 1\n' in page
    )
    assert "probe_http_last_modified_timestamp_seconds 5.0\n" in page


def test_all_are_gauges() -> None:
    """Every metric is a gauge, as in blackbox_exporter, and none has a label that scraping sets."""
    for desc in DESCS:
        assert desc.kind is Kind.GAUGE
        assert not {"instance", "job"} & set(desc.labels)


@pytest.mark.parametrize("reason", [None, *Reason])
def test_one_reason(reason: Reason | None) -> None:
    """All reasons are there at all times; the one that holds is 1."""
    metrics = {metric.desc.name: metric.rows for metric in probe_metrics(result(reason=reason))}
    rows = metrics["probe_failure_reason"]
    assert len(rows) == len(Reason)
    assert [labels for labels, value in rows if value] == ([(reason.value,)] if reason else [])
    assert metrics["probe_success"] == (((), int(reason is None)),)


def test_labels() -> None:
    """On /metrics each series says which target, module and app it is of; a target not probed has none, and is counted."""
    options = HttpOptions(
        targets=(
            HttpTarget(url="user:secret@a.example/x?token=secret", app="api"),
            HttpTarget(url="b.example", name="front page"),
        )
    )
    collector = HttpCollector(options)
    first, second = collector._targets  # noqa: SLF001 -- what `read` would return, without the network
    page = render(collector.metrics(((first, result()), (second, None))), Format.TEXT).decode()
    assert 'probe_success{target="http://a.example/x",module="http_2xx",app="api"} 1\n' in page
    assert 'phase="tls"' in page
    assert "pm2_exporter_http_probes_skipped 1\n" in page
    assert "secret" not in page
    assert "front page" not in page
    assert second.labels == ("front page", "http_2xx", "")


def test_nothing_configured() -> None:
    """Without targets there are no series, not even of the collector itself."""
    assert not list(HttpCollector(HttpOptions()).metrics(()))


def test_debug_text() -> None:
    """The debug page shows the log, the metrics and what the module says, with every secret hidden."""
    module = ProbeModule(
        http=HttpProber(
            method="POST",
            headers={"X-Key": Secret("hush")},
            basic_auth=ProbeBasicAuth(username="someone", password=Secret("hush")),
        )
    )
    events = (Event(0.5, "info", "Making HTTP request", {"url": "http://a/?…", "roundtrip": 0}),)
    text = debug_text(URL("http://u:hush@a/?t=hush"), "m", module, result(events=events))
    assert "hush" not in text
    assert (
        'ts=2023-11-14T22:13:20.500000+00:00 level=info module=m target=http://a/?… msg="Making HTTP request" '
        "url=http://a/?… roundtrip=0\n" in text
    )
    assert "\nprobe_success 1\n" in text
    assert text.endswith(
        "Module configuration:\nhttp:\n  method: POST\n  headers:\n    X-Key: <secret>\n  basic_auth:\n"
        "    username: someone\n    password: <secret>\n    password_file: ''\n"
    )
