"""A MongoDB deployment as an app meets it: one ping, why it failed, and the few facts a server tells about itself.

Nothing here raises, logs or repeats what the driver said: its texts may hold the URI's credentials. pymongo is imported
when the first `Mongo` is made, and not before.
"""

import asyncio
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import msgspec

from exporter.grammar import Secret

if TYPE_CHECKING:
    from pymongo import AsyncMongoClient
    from pymongo.server_description import ServerDescription


class Reason(StrEnum):
    """Why a ping failed."""

    AUTH = "auth"
    """The credentials were refused."""
    TIMEOUT = "timeout"
    """No answer in time: frozen, overloaded, or packets are dropped on the way."""
    REFUSED = "refused"
    """Nothing listens there, or it hung up."""
    DNS = "dns"
    """The host's name, or the SRV record, cannot be resolved."""
    TLS = "tls"
    """The TLS handshake failed, or a certificate was not accepted."""
    NO_PRIMARY = "no_primary"
    """A member of the replica set answers, but none that the URI's read preference (primary, by default) allows."""
    URI = "uri"
    """The URI, or an option in it, is wrong."""
    OTHER = "other"
    """Anything else."""


class PingResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one ping."""

    seconds: float | None = None
    """From asking to the answer, connecting included where it had to; None where there was no answer."""
    reason: Reason | None = None
    """Why there was no answer; None where there was one."""

    @property
    def is_up(self) -> bool:
        """Whether MongoDB answered."""
        return self.reason is None


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the server that answered says of itself; None or empty where it did not, or where the user may not ask."""

    version: str = ""
    edition: str = ""
    vendor: str = ""
    uptime: float | None = None
    """Seconds."""
    connections: Mapping[str, int] = {}
    """Current, available and active ones, by these words."""
    operations: Mapping[str, int] = {}
    """Since the server started, by kind."""
    set_name: str = ""
    """Of the replica set; "" where there is none."""
    my_state: int | None = None
    """Of this member in its replica set, as MongoDB numbers the states."""


PRIMARY: Final = 1
SECONDARY: Final = 2
ARBITER: Final = 7

SCHEMES: Final = ("mongodb://", "mongodb+srv://")
GLANCE: Final = 0.05
"""Seconds between two looks at whether waiting for an answer still makes sense."""


class Mongo:
    """A deployment behind one URI, with one kept client; for one event loop."""

    def __init__(self, uri: Secret, timeout: float) -> None:
        """Prepare; a connection is made when it is needed, and given up on after `timeout` seconds."""
        import pymongo  # noqa: PLC0415 -- costs megabytes, so only who has a MongoDB pays

        self._make = pymongo.AsyncMongoClient
        self._uri, self._timeout = uri, timeout
        self._kept: AsyncMongoClient[dict[str, Any]] | None = None
        self._built: tuple[object, Mapping[str, Any]] = (None, {})

    async def ping(self, within: float) -> PingResult:
        """Ask for a sign of life; answers after at most `within` seconds, and after the timeout if that is less.

        Where no server can be reached, the answer comes as soon as each of them has been tried again.
        """
        begin = time.monotonic()
        deadline = begin + min(within, self._timeout)
        asked = asyncio.create_task(self._command("ping"), name="MongoDB ping")
        try:
            while not asked.done() and (left := deadline - time.monotonic()) > 0 and not self._is_hopeless(begin):
                await asyncio.wait((asked,), timeout=min(GLANCE, left))
            if not asked.done():
                return PingResult(reason=self._why_silent())
            asked.result()
        except Exception as error:  # noqa: BLE001 -- whatever fails here is MongoDB's state, and its text may hold a secret
            reason = classify(error)
            return PingResult(reason=self._why_silent() if reason is Reason.TIMEOUT else reason)
        finally:
            asked.cancel()
        return PingResult(seconds=time.monotonic() - begin)

    async def facts(self, within: float) -> Facts:
        """Ask what the server says of itself; what it does not say within this time, or not to this user, is left out."""
        deadline = time.monotonic() + within
        hello = await self._answer("hello", deadline)
        status = await self._answer("serverStatus", deadline, **_LEFT_OUT)
        state = _role(hello)
        if hello.get("setName") and state is None:
            state = _count((await self._answer("replSetGetStatus", deadline)).get("myState"))
        return read_facts(status, await self._build_info(hello, deadline), hello, state)

    async def _build_info(self, hello: Mapping[str, Any], deadline: float) -> Mapping[str, Any]:
        """Return what the server was built from, asked for once in a server process's life."""
        process = (hello.get("topologyVersion") or {}).get("processId")
        known, built = self._built
        if process is None or known != process or not built:
            built = await self._answer("buildInfo", deadline)
            self._built = process, built
        return built

    async def close(self) -> None:
        """End the client's connections and background tasks; a later ping makes a new client."""
        kept, self._kept = self._kept, None
        if kept is not None:
            await kept.close()

    async def _answer(self, command: str, deadline: float, **arguments: Any) -> Mapping[str, Any]:  # noqa: ANN401 -- any BSON
        """Return the answer to a command, an empty one where there is none."""
        try:
            async with asyncio.timeout(max(0, deadline - time.monotonic())):
                return await self._command(command, **arguments)
        except Exception:  # noqa: BLE001 -- a question that is refused costs its own facts
            return {}

    async def _command(self, command: str, **arguments: Any) -> Mapping[str, Any]:  # noqa: ANN401 -- any BSON
        client = self._client()
        answer: Mapping[str, Any] = await client.admin.command(command, read_preference=client.read_preference, **arguments)
        return answer

    def _client(self) -> "AsyncMongoClient[dict[str, Any]]":
        if self._kept is None:
            uri, milliseconds = self._uri.reveal(), max(1, round(1000 * self._timeout))
            if not uri.startswith(SCHEMES):
                # The driver would take it for the name of a host.
                raise ValueError("not a MongoDB URI")
            with warnings.catch_warnings():
                # Of options meant for other drivers, quoting what may be a piece of a password.
                warnings.simplefilter("ignore")
                self._kept = self._make(
                    uri,
                    appname="pm2-exporter",
                    connectTimeoutMS=milliseconds,
                    serverSelectionTimeoutMS=milliseconds,
                    # One connection to watch each server is enough for who asks now and then.
                    serverMonitoringMode="poll",
                    maxPoolSize=4,
                )
        return self._kept

    def _servers(self) -> "list[ServerDescription]":
        return [] if self._kept is None else list(self._kept.topology_description.server_descriptions().values())

    def _is_hopeless(self, since: float) -> bool:
        """Tell whether every server has been tried and found wanting since that moment."""
        servers = self._servers()
        return bool(servers) and all(
            server.error is not None and (server.last_update_time or 0) > since for server in servers
        )

    def _why_silent(self) -> Reason:
        """Tell why there was no answer, from what is known of the servers."""
        if self._kept is None:
            return Reason.TIMEOUT
        known = [server for server in self._servers() if server.is_server_type_known]
        if known:
            can_serve = self._kept.topology_description.has_readable_server(self._kept.read_preference)
            return Reason.TIMEOUT if can_serve else Reason.NO_PRIMARY
        reasons = [classify(server.error) for server in self._servers() if server.error is not None]
        return next((reason for reason in reasons if reason is not Reason.OTHER), Reason.TIMEOUT)


_LEFT_OUT: Final = dict.fromkeys(
    (
        "asserts",
        "catalogStats",
        "changeStreamPreImages",
        "defaultRWConcern",
        "electionMetrics",
        "extra_info",
        "featureCompatibilityVersion",
        "flowControl",
        "freeMonitoring",
        "globalLock",
        "indexBuilds",
        "indexBulkBuilder",
        "indexStats",
        "locks",
        "logicalSessionRecordCache",
        "metrics",
        "mirroredReads",
        "network",
        "opLatencies",
        "opWorkingTime",
        "oplogTruncation",
        "queryAnalyzers",
        "readConcernCounters",
        "readPreferenceCounters",
        "repl",
        "scramCache",
        "security",
        "shardedIndexConsistency",
        "storageEngine",
        "tcmalloc",
        "tenantMigrations",
        "transactions",
        "transportSecurity",
        "twoPhaseCommitCoordinator",
        "wiredTiger",
        "mem",
    ),
    0,
)
"""The parts of serverStatus that are not used, most of them expensive."""


def classify(error: BaseException) -> Reason:
    """Return the reason behind an error of pymongo; pure."""
    chain = list(_causes(error))
    if any(getattr(cause, "code", None) in _AUTH_CODES for cause in chain):
        return Reason.AUTH
    names = {kind.__name__ for cause in chain for kind in type(cause).__mro__}
    if len(chain) == 1 and "AutoReconnect" in names:
        # The driver keeps an error of its watching without its cause; only the text tells it, after "HOST:PORT: ".
        text = str(error).partition(": ")[2]
        for reason, sign in _TEXTS:
            if sign.search(text):
                return reason
    return next((reason for reason, signs in _SIGNS if signs & names), Reason.OTHER)


_AUTH_CODES: Final = frozenset({13, 18})
"""Unauthorized, AuthenticationFailed."""
_TEXTS: Final = (
    (Reason.TLS, re.compile(r"\[SSL|SSL handshake|CERTIFICATE_VERIFY_FAILED|TLS/SSL|certificate")),
    # Errors of the resolver are the negative ones.
    (Reason.DNS, re.compile(r"\[Errno -\d+\]")),
)
_SIGNS: Final = (
    (Reason.TLS, {"SSLError", "CertificateError"}),
    (Reason.DNS, {"gaierror", "DNSException"}),
    (Reason.REFUSED, {"ConnectionError"}),
    # Of a file named in the URI.
    (Reason.URI, {"FileNotFoundError", "PermissionError", "IsADirectoryError"}),
    (Reason.TIMEOUT, {"TimeoutError", "NetworkTimeout", "ExecutionTimeout", "WaitQueueTimeoutError"}),
    (Reason.URI, {"InvalidURI", "ConfigurationError", "InvalidName", "ValueError", "TypeError"}),
    (Reason.TIMEOUT, {"ServerSelectionTimeoutError"}),
    (Reason.REFUSED, {"AutoReconnect", "OSError"}),
)
"""What an error, a parent of its class or one of its causes is called, and what that means; the first that fits counts."""


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        yield cause
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__


def read_facts(status: Mapping[str, Any], build: Mapping[str, Any], hello: Mapping[str, Any], state: int | None) -> Facts:
    """Read the answers to serverStatus, buildInfo and hello; pure. Whatever is not as it should be is left out."""
    version = build.get("version") or status.get("version")
    modules = build.get("modules")
    edition = "Enterprise" if isinstance(modules, list) and "enterprise" in modules else "Community"
    uptime = status.get("uptime")
    set_name = hello.get("setName")
    return Facts(
        version=version if isinstance(version, str) else "",
        edition=edition if modules is not None else "",
        vendor=("Percona" if "psmdbVersion" in build else "MongoDB") if build else "",
        uptime=float(uptime) if isinstance(uptime, int | float) else None,
        connections=_counts(status.get("connections"), ("current", "available", "active")),
        operations=_counts(status.get("opcounters"), ("insert", "query", "update", "delete", "getmore", "command")),
        set_name=set_name if isinstance(set_name, str) else "",
        my_state=state,
    )


def _role(hello: Mapping[str, Any]) -> int | None:
    """Return the state of a member of a replica set, as far as `hello`, which anyone may ask, tells it."""
    if not hello.get("setName"):
        return None
    if hello.get("isWritablePrimary"):
        return PRIMARY
    return SECONDARY if hello.get("secondary") else ARBITER if hello.get("arbiterOnly") else None


def _counts(section: object, words: tuple[str, ...]) -> dict[str, int]:
    if not isinstance(section, Mapping):
        return {}
    return {word: count for word in words if (count := _count(section.get(word))) is not None}


def _count(value: object) -> int | None:
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else None
