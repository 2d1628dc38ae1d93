"""MongoDB as it is met: real servers, up and in every way down, and never a secret shown."""

import asyncio
import logging
import os
import signal
import socket
import time
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme
from pymongo import AsyncMongoClient

from exporter.collectors.mongodb import DESCS
from exporter.grammar import Secret
from exporter.mongo import Mongo

if TYPE_CHECKING:
    from tests.integration.conftest import Mongod
    from tests.integration.mongodb.conftest import Look

Looks = Callable[..., "Look"]
Servers = Callable[..., "Mongod"]
PASSWORD = "cor4rect-h0rse"  # noqa: S105 -- of servers that live for one test
NAMES = {desc.name for desc in DESCS}


async def test_a_server_is_up_and_tells_of_itself(mongod: "Mongod", look: Looks) -> None:
    """A server without access control tells everything; nothing is said of a replica set where there is none."""
    samples = await look(mongod.uri).page()
    assert samples["mongodb_up"] == 1
    assert 0 < samples["mongodb_ping_duration_seconds"] < 10
    assert samples['mongodb_version_info{mongodb="6.0.5",edition="Community",vendor="MongoDB"}'] == 1
    assert samples['mongodb_connections{state="current"}'] > 0
    assert samples['mongodb_op_counters_total{type="command"}'] > 0
    assert {name.partition("{")[0] for name in samples} == NAMES - {"mongodb_mongod_replset_my_state"}


async def test_closing_waits_for_those_who_look(mongod: "Mongod", look: Looks) -> None:
    """A reload amid scrapes neither tells them that MongoDB is down nor leaves a client behind."""
    at = look(mongod.uri)
    before = asyncio.all_tasks()
    for turns in range(1, 40, 4):
        looks = [asyncio.create_task(at.why()) for _ in range(3)]
        for _ in range(turns):
            await asyncio.sleep(0)
        await at.collector.close()
        assert await asyncio.gather(*looks) == ["", "", ""]
        assert asyncio.all_tasks() == before


async def test_a_killed_server_is_refused_and_comes_back_by_itself(mongod: "Mongod", look: Looks) -> None:
    """After a crash the reason is told at once and not after the timeout; after a start it is up again."""
    at = look(mongod.uri, 30)
    assert await at.why() == ""
    mongod.kill()
    begin = time.monotonic()
    assert await at.why(30) == "refused"
    assert await at.why(30) == "refused"
    assert time.monotonic() - begin < 20, "a refusal was waited out"
    mongod.start()
    await at.until("")


async def test_a_frozen_server_costs_no_more_than_the_deadline(mongod: "Mongod", look: Looks) -> None:
    """A server that takes connections and answers none is reported by the deadline, again and again, and recovers."""
    at = look(mongod.uri, 60)
    assert await at.why() == ""
    mongod.signal(signal.SIGSTOP)
    for within in (0.3, 0.3, 1.0):
        begin = time.monotonic()
        assert await at.why(within) == "timeout"
        assert time.monotonic() - begin < within + 0.3
    mongod.signal(signal.SIGCONT)
    await at.until("")


async def test_the_timeout_holds_where_it_is_less_than_the_deadline(mongod: "Mongod", look: Looks) -> None:
    """A scrape does not wait for MongoDB longer than its own timeout."""
    mongod.signal(signal.SIGSTOP)
    begin = time.monotonic()
    assert await look(mongod.uri, 0.3).why(60) == "timeout"
    assert time.monotonic() - begin < 10
    mongod.signal(signal.SIGCONT)


async def test_no_time_is_a_timeout(mongod: "Mongod", look: Looks) -> None:
    """A deadline that has passed is answered at once."""
    assert await look(mongod.uri).why(0) == "timeout"
    assert await look(mongod.uri).why(-1) == "timeout"


@pytest.fixture
def hole() -> AsyncIterator[int]:
    """Return the port of a listener that never accepts."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


async def test_a_black_hole_is_a_timeout(hole: int, look: Looks) -> None:
    """What takes the connection and says nothing is told from what refuses it."""
    assert await look(f"mongodb://127.0.0.1:{hole}/", 0.5).why() == "timeout"


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("mongodb://no-such-host.invalid/", "dns"),
        ("mongodb+srv://no-such-host.invalid/", "dns"),
        (f"mongodb://user:{PASSWORD}@x@y/", "uri"),
        (f"mongodb://user:{PASSWORD}/x@127.0.0.1/", "uri"),
        (f"{PASSWORD}", "uri"),
        ("", "uri"),
        (f"mongodb://user:{PASSWORD}@127.0.0.1/?tls=true&tlsCAFile=/nonexistent", "uri"),
        (f"mongodb://127.0.0.1:1/?{PASSWORD}=1&timeoutMS=x", "refused"),
    ],
)
async def test_a_wrong_uri_is_told_apart_and_not_shown(
    uri: str, why: str, look: Looks, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A URI that cannot work is reported as such; neither log, warnings nor metrics repeat any of it."""
    caplog.set_level(logging.DEBUG)
    at = look(uri, 5)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert await at.why() == why
        page = str(await at.page())
    shown = [
        caplog.text,
        *capfd.readouterr(),
        page,
        *map(str, warned),
        repr(at.collector.__dict__),
        repr(vars(at.collector)),
    ]
    assert not any(PASSWORD in text for text in shown)


@pytest.fixture
async def guarded(mongod_factory: Servers) -> "Mongod":
    """Return a server with access control: `boss` may do anything, `app` may use its own database."""
    server = mongod_factory("--auth")
    await server.ready()
    async with AsyncMongoClient(server.uri) as client:
        await client.admin.command("createUser", "boss", pwd=PASSWORD, roles=["root"])
    async with AsyncMongoClient(server.uri, username="boss", password=PASSWORD) as client:
        await client.admin.command("createUser", "app", pwd=PASSWORD, roles=[{"role": "readWrite", "db": "app"}])
    return server


async def test_rights_decide_what_is_told_and_not_whether_it_is_up(guarded: "Mongod", look: Looks) -> None:
    """Who may ask for serverStatus sees everything, any other user and even nobody sees that it is up."""
    host = f"127.0.0.1:{guarded.port}"
    boss = await look(f"mongodb://boss:{PASSWORD}@{host}/").page()
    assert boss['mongodb_connections{state="current"}'] > 0
    for uri in (f"mongodb://app:{PASSWORD}@{host}/", f"mongodb://{host}/"):
        samples = await look(uri).page()
        assert samples["mongodb_up"] == 1
        assert "mongodb_instance_uptime_seconds" not in samples
        assert not any(name.startswith("mongodb_connections") for name in samples)


async def test_a_wrong_password_is_an_auth_failure_and_is_never_shown(
    guarded: "Mongod", look: Looks, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Credentials that are refused are reported without them, though the driver logs all it does."""
    caplog.set_level(logging.DEBUG)
    wrong = "wr0ng-and-secret"
    at = look(f"mongodb://app:{wrong}@127.0.0.1:{guarded.port}/")
    assert await at.why() == "auth"
    shown = [caplog.text, *capfd.readouterr(), str(await at.page()), repr(at.collector.__dict__)]
    assert not any(wrong in text for text in shown)


async def test_the_role_in_a_replica_set_is_told(mongod_factory: Servers, look: Looks) -> None:
    """The member of a set of one is its primary; without one, the reads that the URI allows decide what is up."""
    first, second = mongod_factory("--replSet", "rs0"), mongod_factory("--replSet", "rs0")
    await first.ready()
    await second.ready()
    members = [
        {"_id": number, "host": f"127.0.0.1:{server.port}", "priority": 1 - number}
        for number, server in enumerate((first, second))
    ]
    settings = {"electionTimeoutMillis": 1000, "heartbeatIntervalMillis": 300}
    async with AsyncMongoClient(first.uri, directConnection=True) as client:
        await client.admin.command("replSetInitiate", {"_id": "rs0", "members": members, "settings": settings})
    both = f"mongodb://127.0.0.1:{first.port},127.0.0.1:{second.port}/?replicaSet=rs0"
    primary, any_member = look(both, 3), look(f"{both}&readPreference=primaryPreferred", 3)
    alone = look(f"mongodb://127.0.0.1:{second.port}/?directConnection=true", 3)
    await primary.until("")
    assert (await primary.page())['mongodb_mongod_replset_my_state{set="rs0"}'] == 1
    await alone.until_sample('mongodb_mongod_replset_my_state{set="rs0"}', 2)
    first.kill()
    await primary.until("no_primary")
    await any_member.until("")
    assert (await any_member.page())['mongodb_mongod_replset_my_state{set="rs0"}'] == 2
    first.start()
    await primary.until("")


async def test_tls_is_spoken_and_its_failures_are_told(mongod_factory: Servers, look: Looks, tmp_path: Path) -> None:
    """A certificate that is trusted lets through; one that is not, or names another host, is a TLS failure."""
    authority, other = trustme.CA(), trustme.CA()
    paths = {name: tmp_path / f"{name}.pem" for name in ("server", "authority", "other")}
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(paths["server"])
    authority.cert_pem.write_to_path(paths["authority"])
    other.cert_pem.write_to_path(paths["other"])
    server = mongod_factory(
        *("--tlsMode", "requireTLS", "--tlsCertificateKeyFile", str(paths["server"])),
        *("--tlsCAFile", str(paths["authority"]), "--tlsAllowConnectionsWithoutCertificates"),
    )
    await server.ready(tls=True, tlsCAFile=str(paths["authority"]))
    assert await look(f"{server.uri}?tls=true&tlsCAFile={paths['authority']}").why() == ""
    assert await look(f"{server.uri}?tls=true&tlsCAFile={paths['other']}").why() == "tls"
    named = f"mongodb://localhost:{server.port}/?tls=true&tlsCAFile={paths['authority']}"
    assert await look(named).why() == "tls"
    assert await look(server.uri).why() == "refused"


async def test_scrapes_may_overlap(mongod: "Mongod", look: Looks) -> None:
    """Two scrapes at once share the client, and both are told."""
    at = look(mongod.uri)
    assert await asyncio.gather(*[at.why() for _ in range(10)]) == [""] * 10


async def test_the_end_leaves_no_task_and_no_descriptor(mongod: "Mongod", look: Looks) -> None:
    """Closing closes everything, whether MongoDB was up or down."""

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files(), len(asyncio.all_tasks())
    for uri in (mongod.uri, "mongodb://127.0.0.1:1/"):
        at = look(uri, 0.5)
        await at.why()
        await at.collector.close()
    async with asyncio.timeout(10):
        while (open_files(), len(asyncio.all_tasks())) != before:  # noqa: ASYNC110 -- nothing tells of a closed descriptor
            await asyncio.sleep(0.01)


async def test_many_pings_of_a_frozen_server_leave_nothing_behind(mongod: "Mongod") -> None:
    """Pings that are given up on do not pile up connections or tasks."""
    mongo = Mongo(Secret(mongod.uri), 5)
    assert (await mongo.ping(5)).is_up
    mongod.signal(signal.SIGSTOP)
    counts: list[tuple[int, int]] = []
    for _ in range(12):
        assert not (await mongo.ping(0.1)).is_up
        counts.append((len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())))  # noqa: PTH208 -- a count
    mongod.signal(signal.SIGCONT)
    assert max(counts[6:]) <= max(counts[:6])
    assert (await mongo.ping(10)).is_up
    await mongo.close()
