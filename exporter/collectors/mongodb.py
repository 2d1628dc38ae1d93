"""MongoDB: whether it answers, how fast, why not, and what it says of itself, with mongodb_exporter's names.

Sources: a ping through pymongo, then the commands hello, buildInfo and serverStatus of the server that answered. A user who
may not ask for serverStatus is still told whether MongoDB is up.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import NamedTuple

from exporter.exposition import Desc, Metric, counter, gauge, single
from exporter.grammar import Duration, Secret, Strict, default
from exporter.mongo import Facts, Mongo, PingResult, Reason

_UP = gauge("mongodb_up", "Whether MongoDB answered a ping (1) or not (0).", source="MongoDB ping")
_PING = gauge(
    "mongodb_ping_duration_seconds",
    "How long the ping took, connecting included where it had to; absent without an answer.",
    source="MongoDB ping",
)
_DOWN = gauge(
    "mongodb_down_reason",
    "Why MongoDB did not answer a ping: 1 for the reason that holds.",
    ("reason",),
    source="MongoDB ping; what the driver met",
)
_VERSION = gauge(
    "mongodb_version_info", "The server version.", ("mongodb", "edition", "vendor"), source="MongoDB buildInfo"
)
_UPTIME = gauge(
    "mongodb_instance_uptime_seconds", "Seconds since the server process started.", source="MongoDB serverStatus uptime"
)
_CONNECTIONS = gauge(
    "mongodb_connections",
    "Connections of clients to the server: current, available (that could still be opened), active (with work under way).",
    ("state",),
    source="MongoDB serverStatus connections",
)
_OPERATIONS = counter(
    "mongodb_op_counters_total",
    "Operations since the server process started, by type.",
    ("type",),
    source="MongoDB serverStatus opcounters",
)
_STATE = gauge(
    "mongodb_mongod_replset_my_state",
    "The replica set state of this member: 1 primary, 2 secondary, 7 arbiter; the others as MongoDB numbers them.",
    ("set",),
    source="MongoDB hello, else replSetGetStatus myState",
)

DESCS: tuple[Desc, ...] = (_UP, _PING, _DOWN, _VERSION, _UPTIME, _CONNECTIONS, _OPERATIONS, _STATE)


class MongodbOptions(Strict, frozen=True, kw_only=True):
    """The MongoDB that the apps depend on."""

    uri: Secret | None = None
    """Connection string, mongodb:// or mongodb+srv://, with credentials and TLS options. Default none: no metrics."""
    timeout: Duration = default(Duration(2))
    """How long to wait for an answer, at most; less where the scrape's deadline is nearer. Default 2s."""

    def __post_init__(self) -> None:
        """Hold that there is time for an answer."""
        if self.timeout <= 0:
            raise ValueError("timeout must be more than 0")


class MongodbSeen(NamedTuple):
    """One look at MongoDB."""

    ping: PingResult
    facts: Facts | None


class MongodbCollector:
    """Pings MongoDB once a scrape, over a client that is kept."""

    descs = DESCS

    def __init__(self, options: MongodbOptions) -> None:
        """Look at the MongoDB of these options; at none where they name none."""
        self._mongo = None if options.uri is None else Mongo(options.uri, options.timeout)
        self._reads: set[asyncio.Future[None]] = set()

    async def close(self) -> None:
        """Close the client, when no read needs it any more: each ends by its deadline, and would open it anew."""
        if self._reads:
            await asyncio.wait(self._reads)
        if self._mongo is not None:
            await self._mongo.close()

    async def read(self, within: float) -> MongodbSeen | None:
        """Ping, and ask for facts in the time that is left; None where no MongoDB is configured."""
        if self._mongo is None:
            return None
        until = time.perf_counter() + within
        done = asyncio.get_running_loop().create_future()
        self._reads.add(done)
        try:
            ping = await self._mongo.ping(within)
            return MongodbSeen(ping, await self._mongo.facts(until - time.perf_counter()) if ping.is_up else None)
        finally:
            self._reads.discard(done)
            done.set_result(None)

    def metrics(self, seen: MongodbSeen | None) -> Iterable[Metric]:
        """Turn what was seen into metrics."""
        if seen is None:
            return
        ping, facts = seen
        yield single(_UP, int(ping.is_up))
        yield single(_PING, ping.seconds)
        yield Metric(_DOWN, [((reason.value,), int(reason is ping.reason)) for reason in Reason])
        if facts is None:
            return
        if facts.version:
            yield Metric(_VERSION, [((facts.version, facts.edition, facts.vendor), 1)])
        yield single(_UPTIME, facts.uptime)
        yield Metric(_CONNECTIONS, [((state,), count) for state, count in facts.connections.items()])
        yield Metric(_OPERATIONS, [((kind,), count) for kind, count in facts.operations.items()])
        yield Metric(_STATE, [((facts.set_name,), facts.my_state)])
