"""What the driver met, put into one word; what the server said, as far as it makes sense; and what is imported when."""

import socket
import ssl
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymongo import errors

from exporter.collectors.mongodb import DESCS, MongodbCollector, MongodbOptions, MongodbSeen
from exporter.exposition import Format, render
from exporter.grammar import Duration
from exporter.mongo import Facts, PingResult, Reason, classify, read_facts


def caused(error: BaseException, cause: BaseException) -> BaseException:
    """Return an error as `raise ... from` makes it."""
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.OperationFailure("Authentication failed.", 18), Reason.AUTH),
        (errors.OperationFailure("not authorized", 13), Reason.AUTH),
        (errors.OperationFailure("node is recovering", 11600), Reason.OTHER),
        (caused(errors.AutoReconnect("x"), ConnectionRefusedError()), Reason.REFUSED),
        (caused(errors.AutoReconnect("x"), ConnectionResetError()), Reason.REFUSED),
        (caused(errors.AutoReconnect("x"), OSError("connection closed")), Reason.REFUSED),
        (errors.AutoReconnect("h:1: connection closed"), Reason.REFUSED),
        (caused(errors.AutoReconnect("x"), socket.gaierror(-2, "Name or service not known")), Reason.DNS),
        (errors.AutoReconnect("h:1: [Errno -2] Name or service not known"), Reason.DNS),
        (errors.AutoReconnect("h:1: [Errno 111] Connection refused"), Reason.REFUSED),
        (errors.AutoReconnect("certificate-[SSL: 1: [Errno 111] Connection refused"), Reason.REFUSED),
        (caused(errors.AutoReconnect("x"), ssl.SSLCertVerificationError("bad")), Reason.TLS),
        (errors.AutoReconnect("h:1: SSL handshake failed: [SSL: CERTIFICATE_VERIFY_FAILED]"), Reason.TLS),
        (errors.NetworkTimeout("h:1: timed out"), Reason.TIMEOUT),
        (errors.ServerSelectionTimeoutError("no servers"), Reason.TIMEOUT),
        (errors.ExecutionTimeout("operation exceeded time limit", 50), Reason.TIMEOUT),
        (TimeoutError(), Reason.TIMEOUT),
        (errors.InvalidURI("bad"), Reason.URI),
        (errors.ConfigurationError("bad"), Reason.URI),
        (ValueError("bad"), Reason.URI),
        (FileNotFoundError(2, "no such CA file"), Reason.URI),
        (RuntimeError("what is this"), Reason.OTHER),
    ],
    ids=repr,
)
def test_an_error_has_its_reason(error: BaseException, reason: Reason) -> None:
    """Each thing that can fail is told apart by one word of a closed set."""
    assert classify(error) is reason


def test_errors_that_cause_each_other_end() -> None:
    """A loop of causes is followed once."""
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert classify(first) is Reason.OTHER


BSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.fixed_dictionaries({}, optional={key: BSON for key in ("uptime", "connections", "opcounters", "version")}),  # noqa: C420
    st.fixed_dictionaries({}, optional={"version": BSON, "modules": BSON, "psmdbVersion": BSON}),
    st.fixed_dictionaries({}, optional={"setName": BSON}),
)
def test_whatever_the_server_says_can_be_shown(
    status: dict[str, object], build: dict[str, object], hello: dict[str, object]
) -> None:
    """Facts that make no sense are left out; nothing raises."""
    facts = read_facts(status, build, hello, None)
    seen = MongodbSeen(PingResult(seconds=0.1), facts)
    render(MongodbCollector(MongodbOptions()).metrics(seen), Format.TEXT)


def test_the_edition_and_the_vendor_are_read_as_the_established_exporter_does() -> None:
    """Enterprise is a module, Percona has a version of its own."""
    enterprise = read_facts({}, {"version": "7.0.1", "modules": ["enterprise"]}, {}, None)
    assert (enterprise.version, enterprise.edition, enterprise.vendor) == ("7.0.1", "Enterprise", "MongoDB")
    percona = read_facts({}, {"version": "7.0.1", "modules": [], "psmdbVersion": "7.0.1-1"}, {}, None)
    assert (percona.edition, percona.vendor) == ("Community", "Percona")


async def test_without_a_uri_nothing_is_emitted() -> None:
    """No MongoDB configured is no MongoDB that is down."""
    collector = MongodbCollector(MongodbOptions())
    assert list(collector.metrics(await collector.read(1))) == []


def test_only_described_metrics_are_emitted() -> None:
    """DESCS is the whole of what can be seen."""
    facts = Facts(version="6", uptime=1.0, connections={"current": 1}, operations={"insert": 1}, set_name="rs", my_state=1)
    metrics = list(MongodbCollector(MongodbOptions()).metrics(MongodbSeen(PingResult(seconds=0.1), facts)))
    assert {metric.desc for metric in metrics} == set(DESCS)


def test_a_failure_shows_its_one_reason_and_no_facts() -> None:
    """Down is 0, with one reason at 1, and no figure of before."""
    seen = MongodbSeen(PingResult(reason=Reason.AUTH), None)
    page = render(MongodbCollector(MongodbOptions()).metrics(seen), Format.TEXT, account=None).decode()
    samples = [line for line in page.splitlines() if not line.startswith("#")]
    assert samples == ["mongodb_up 0", *[f'mongodb_down_reason{{reason="{r}"}} {int(r is Reason.AUTH)}' for r in Reason]]


def test_the_driver_is_not_imported_without_need() -> None:
    """Who watches no MongoDB does not pay for its driver."""
    code = (
        "import sys; from exporter.collectors.mongodb import MongodbCollector, MongodbOptions;"
        "MongodbCollector(MongodbOptions()); assert not any(name.startswith('pymongo') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)  # noqa: S603 -- our own code


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"timeout": 5}, {"url": "mongodb://x/"}])
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    """No time, a bare number and an unknown key are errors."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, MongodbOptions, dec_hook=lambda kind, value: {Duration: Duration.parse}[kind](value))


def test_the_defaults_are_these() -> None:
    """The defaults are part of the interface."""
    assert msgspec.structs.asdict(MongodbOptions()) == {"uri": None, "timeout": 2}
