"""Endings of PM2's processes, counted by cause from the daemon's own event stream.

A scrape sees states; what begins and ends between two scrapes is seen here. While there is no subscription nothing is
counted, and nothing is guessed afterwards: `pm2_process_restarts_total`, PM2's own counter, has no such gaps, and
`pm2_exporter_events_connected` tells when these have.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from exporter.exposition import LABEL_VALUE_MAX, Desc, Metric, counter, gauge, single
from exporter.grammar import Duration, Size, Strict, default
from exporter.pm2.client import PM2Error, Source
from exporter.pm2.events import WANTED, Attribution, Cause, Exit, Heard, OverLimit, Uncaught
from exporter.pm2.subscriber import Down, Patience, Subscriber

_EXITS = counter(
    "pm2_process_exits_total",
    "Processes of the app that ended since the exporter started, by cause: crash (exit code other than 0, or an"
    " uncaught exception), exit (code 0, or a SIGINT that PM2 did not send), signal (any other signal that PM2 did not"
    " send), memory_limit (max_memory_restart), watch (a watched file changed), manual (asked for, or by cron_restart).",
    ("name", "cause"),
    source="PM2 bus process:event exit; log:PM2 for signals, memory limit and watch",
)
_EXCEPTIONS = counter(
    "pm2_process_exceptions_total",
    "Uncaught exceptions and unhandled rejections that processes of the app reported since the exporter started.",
    ("name",),
    source="PM2 bus process:exception",
)
_OVERLIMIT = counter(
    "pm2_process_restart_overlimit_total",
    "Times PM2 gave up on a process of the app, after max_restarts unstable restarts, since the exporter started.",
    ("name",),
    source="PM2 bus process:event restart overlimit",
)
_CONNECTED = gauge(
    "pm2_exporter_events_connected",
    "Whether the exporter is subscribed to PM2's events (1) or not (0); while it is not, endings go uncounted.",
    source="the exporter itself",
)
_DOWN = gauge(
    "pm2_exporter_events_down_reason",
    "Why the exporter is not subscribed to PM2's events: 1 for the reason that holds, 0 for the others: not_started,"
    " no_socket (ended cleanly, never started, or asked by a command), refused (crashed), permission, timeout (frozen),"
    " unreachable, and until it subscribes anew closed, behind, nonsense, replaced.",
    ("reason",),
    source="connecting to pub.sock",
)
_RECEIVED = counter("pm2_exporter_events_received_total", "Messages that PM2's bus sent.", source="messages on pub.sock")
_DROPPED = counter(
    "pm2_exporter_events_dropped_total",
    "Messages that were dropped: topic (nothing to count in it, such as the apps' output), size (larger than max_frame),"
    " malformed (unreadable), name_limit (of an app beyond max_names).",
    ("reason",),
    source="messages on pub.sock",
)
_RECONNECTS = counter(
    "pm2_exporter_events_reconnects_total", "Subscriptions to PM2's events after the first.", source="the exporter itself"
)
_DISCONNECTS = counter(
    "pm2_exporter_events_disconnects_total",
    "Subscriptions that ended: closed (by the daemon), behind (the exporter could not keep up and hung up), nonsense (not"
    " PM2's protocol), replaced (another daemon took over the socket), unreachable (any other error).",
    ("reason",),
    source="the connection to pub.sock",
)

DESCS: tuple[Desc, ...] = (
    _EXITS,
    _EXCEPTIONS,
    _OVERLIMIT,
    _CONNECTED,
    _DOWN,
    _RECEIVED,
    _DROPPED,
    _RECONNECTS,
    _DISCONNECTS,
)


class EventsOptions(Strict, frozen=True, kw_only=True):
    """How the exporter listens to PM2's events."""

    max_names: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1000
    """App names counted at most; those that PM2 no longer lists make room for new ones. Default 1000."""
    max_frame: Size = default(Size(4 * 1024 * 1024))
    """Bytes above which an event is skipped. Default 4MiB."""
    max_lag: Duration = default(Duration(5))
    """How long reading may be held up before the exporter hangs up, so that the daemon need not buffer. Default 5s."""
    min_backoff: Duration = default(Duration(0.1))
    """The first pause before connecting again; doubled with every failure. Default 0.1s."""
    max_backoff: Duration = default(Duration(5))
    """The longest pause before connecting again. Default 5s."""

    def __post_init__(self) -> None:
        """Hold what the values must be to each other."""
        if not 0 < self.min_backoff <= self.max_backoff:
            raise ValueError("min_backoff must be more than 0 and at most max_backoff")
        if not self.max_lag >= 1:
            raise ValueError("max_lag must be at least 1s")


class Counts(msgspec.Struct):
    """What has been counted of one app."""

    exits: dict[Cause, int]
    exceptions: int = 0
    overlimit: int = 0


class Tally:
    """Counts by app name; of at most `max_names` names, so that an app renamed for ever costs no more than that."""

    def __init__(self, max_names: int) -> None:
        """Count nothing yet."""
        self._max_names = max_names
        self.counts: dict[str, Counts] = {}
        """Longest unheard of first."""
        self._listed: frozenset[str] = frozenset()
        self.refused = 0
        """Records of names for which there was no room."""

    def learn(self, names: Iterable[str]) -> None:
        """Take in the names that PM2 lists now: each is counted from 0."""
        self._listed = frozenset([name[:LABEL_VALUE_MAX] for name in names])
        for name in self._listed:
            self._of(name)

    def add(self, record: object) -> None:
        """Count a record of the event stream."""
        match record:
            case Heard(name=name) | Exit(name=name) | Uncaught(name=name) | OverLimit(name=name):
                counts = self._of(name[:LABEL_VALUE_MAX])
            case _:
                return
        if counts is None:
            self.refused += 1
            return
        match record:
            case Exit(cause=cause):
                counts.exits[cause] += 1
            case Uncaught():
                counts.exceptions += 1
            case OverLimit():
                counts.overlimit += 1

    def _of(self, name: str) -> Counts | None:
        counts = self.counts.pop(name, None)
        if counts is None:
            if len(self.counts) >= self._max_names:
                gone = next((known for known in self.counts if known not in self._listed), None)
                if gone is None:
                    return None
                del self.counts[gone]
            counts = Counts(dict.fromkeys(Cause, 0))
        self.counts[name] = counts
        return counts


class EventsSeen(NamedTuple):
    """The counters as they stood."""

    exits: tuple[tuple[str, tuple[int, ...]], ...]
    """Name, and a count for each Cause."""
    others: tuple[tuple[str, int, int], ...]
    """Name, exceptions, overlimit."""
    down: Down | None
    received: int
    dropped: dict[str, int]
    connections: int
    disconnects: dict[Down, int]


class EventsCollector:
    """Counts what PM2's bus says while `run` runs; a scrape reads the counters."""

    descs = DESCS

    def __init__(self, options: EventsOptions, home: Path, source: Source) -> None:
        """Listen to the daemon of this PM2 home; `source` lists the apps, so that each is at 0 before its first ending."""
        self._source = source
        self._attribution = Attribution()
        self._tally = Tally(options.max_names)
        self._subscriber = Subscriber(
            Path(home) / "pub.sock",
            wanted=WANTED,
            began=self._attribution.gap,
            hear=self._hear,
            patience=Patience(
                max_frame=options.max_frame,
                max_lag=options.max_lag,
                min_backoff=options.min_backoff,
                max_backoff=options.max_backoff,
            ),
        )

    def _hear(self, topic: str, payload: bytes) -> float:
        record = self._attribution.step(topic, payload)
        if record is not None:
            self._tally.add(record)
        return self._attribution.said_at

    async def run(self) -> None:
        """Listen, until cancelled."""
        await self._subscriber.run()

    async def read(self, within: float) -> EventsSeen:
        """Return the counters, with every app that PM2 lists."""
        with suppress(PM2Error):
            listing = await self._source.listing(within)
            self._tally.learn([process.name for process in listing.processes])
        subscriber, counts = self._subscriber, self._tally.counts
        sieve = subscriber.sieve
        return EventsSeen(
            exits=tuple([(name, tuple(count.exits.values())) for name, count in counts.items()]),
            others=tuple([(name, count.exceptions, count.overlimit) for name, count in counts.items()]),
            down=subscriber.down,
            received=sieve.received,
            dropped={
                "topic": sieve.unwanted,
                "size": sieve.oversized,
                "malformed": sieve.malformed + self._attribution.malformed,
                "name_limit": self._tally.refused,
            },
            connections=subscriber.connections,
            disconnects={down: subscriber.ended[down] for down in _ENDINGS},
        )

    def metrics(self, seen: EventsSeen) -> Iterable[Metric]:
        """Turn the counters into metrics."""
        yield Metric(
            _EXITS,
            [((name, cause), count) for name, counts in seen.exits for cause, count in zip(_CAUSES, counts, strict=True)],
        )
        yield Metric(_EXCEPTIONS, [((name,), exceptions) for name, exceptions, _ in seen.others])
        yield Metric(_OVERLIMIT, [((name,), overlimit) for name, _, overlimit in seen.others])
        yield single(_CONNECTED, int(seen.down is None))
        yield Metric(_DOWN, [((down.value,), int(down is seen.down)) for down in Down])
        yield single(_RECEIVED, seen.received)
        yield Metric(_DROPPED, [((reason,), count) for reason, count in seen.dropped.items()])
        yield single(_RECONNECTS, max(0, seen.connections - 1))
        yield Metric(_DISCONNECTS, [((down.value,), count) for down, count in seen.disconnects.items()])


_CAUSES = tuple([cause.value for cause in Cause])
_ENDINGS = (Down.CLOSED, Down.BEHIND, Down.NONSENSE, Down.REPLACED, Down.UNREACHABLE)
