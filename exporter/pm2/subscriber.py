"""A lasting subscription to `pub.sock`: always drained, never in the daemon's way, back by itself.

The daemon keeps, without bound, whatever a subscriber does not read. So the socket is read whenever there is something,
unwanted messages are skipped without being gathered (exporter/pm2/sieve.py), and a subscriber that was kept from reading
for too long hangs up instead of having the backlog sent to it. Nothing is ever written to the socket, and connecting to it
cannot start a daemon.
"""

import asyncio
import logging
import math
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from exporter.pm2.sieve import Sieve
from exporter.pm2.wire import WireError

log = logging.getLogger(__name__)


class Down(StrEnum):
    """Why there is no subscription, or why one ended."""

    NOT_STARTED = "not_started"
    """Nobody has tried yet."""
    NO_SOCKET = "no_socket"
    """There is no pub.sock: PM2 was killed cleanly, never started, or is reached in another way."""
    REFUSED = "refused"
    """Nobody listens on pub.sock: the daemon crashed."""
    PERMISSION = "permission"
    """pub.sock belongs to another user."""
    TIMEOUT = "timeout"
    """The daemon accepts no connection, and as many as the kernel keeps for it are waiting already: it is frozen."""
    CLOSED = "closed"
    """The daemon ended, or hung up."""
    BEHIND = "behind"
    """We hung up: this process was kept from reading, and the daemon would have had to keep what it sent."""
    NONSENSE = "nonsense"
    """We hung up: what came is not PM2's protocol."""
    REPLACED = "replaced"
    """We hung up: another daemon has put its own pub.sock in place."""
    UNREACHABLE = "unreachable"
    """Any other error of the operating system, such as no free file descriptors, or no thread."""


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """How a subscription keeps out of the daemon's way; seconds and bytes."""

    max_frame: int = 4 * 1024 * 1024
    """Bytes; a wanted message that is larger is skipped."""
    max_lag: float = 5.0
    """How long reading may be held up before the subscriber hangs up."""
    min_backoff: float = 0.1
    """The pause before the first attempt to come back; doubled with each that fails, less up to half of it by chance."""
    max_backoff: float = 5.0
    """The longest pause; also how long a connection must have lasted for the pauses to start anew."""
    glance: float = 5.0
    """Between two looks at whether the socket's file is still the one that was connected to."""


BUFFER: Final = 256 * 1024
"""Bytes; more than the kernel holds for one unix socket, so that one read takes all there is."""
BACKLOG: Final = 64 * 1024
"""Bytes waiting after a hold-up from which on the daemon is taken to be keeping more."""
PULSE: Final = 0.5
"""Seconds between two signs that the event loop is not held up."""


class Subscriber:
    """Hears what PM2's daemon publishes, for as long as `run` runs.

    `began` is called at the start of each connection; `hear` with each wanted message, and returns when the daemon said it
    (Unix seconds, 0 where unknown), by which the subscriber knows how far behind it is. Neither may raise.
    """

    def __init__(
        self,
        path: Path,
        *,
        wanted: frozenset[str],
        began: Callable[[], None],
        hear: Callable[[str, bytes], float],
        patience: Patience,
    ) -> None:
        """Prepare for the socket at `path`."""
        self._path, self._patience = path, patience
        self.began, self.hear = began, hear
        self.sieve = Sieve(wanted, patience.max_frame)
        """Counts the messages of all connections."""
        self.buffer = bytearray(BUFFER)
        self.down: Down | None = Down.NOT_STARTED
        """None while connected."""
        self.connections = 0
        self.ended: Counter[Down] = Counter()
        """How often a connection has ended, by why."""

    async def run(self) -> None:
        """Subscribe, and again whenever the connection ends; until cancelled."""
        loop = asyncio.get_running_loop()
        pause, told = self._patience.min_backoff, None
        try:
            while True:
                start, connections = loop.time(), self.connections
                self.down = await self._subscribe()
                if self.connections > connections:
                    self.ended[self.down] += 1
                    if loop.time() - start >= self._patience.max_backoff:
                        pause = self._patience.min_backoff
                if self.down is not told or self.connections > connections:
                    told = self.down
                    log.info("no events from PM2", extra={"reason": told.value})
                await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 -- spreads attempts, hides nothing
                pause = min(2 * pause, self._patience.max_backoff)
        finally:
            self.down = Down.NOT_STARTED

    async def _subscribe(self) -> Down:
        """Hold one connection; return why there is none, or no longer."""
        loop = asyncio.get_running_loop()
        try:
            # A home on a file server that hangs must not hold up the event loop.
            identity = await asyncio.to_thread(_identity, self._path)
            transport, connection = await loop.create_unix_connection(self._connection, sock=_connected(self._path))
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be had
            return _REASONS.get(type(error), Down.UNREACHABLE)
        try:
            self.connections += 1
            self.down = None
            log.info("hearing PM2's events")
            while not connection.ended.done():
                await asyncio.wait((connection.ended,), timeout=self._patience.glance)
                with suppress(OSError, RuntimeError):
                    if await asyncio.to_thread(_identity, self._path) != identity:
                        connection.hang_up(Down.REPLACED)
            return connection.ended.result()
        finally:
            transport.abort()

    def _connection(self) -> "_Connection":
        self.sieve.start_anew()
        self.began()
        return _Connection(self, self._patience.max_lag)


_REASONS: Final[dict[type[Exception], Down]] = {
    FileNotFoundError: Down.NO_SOCKET,
    NotADirectoryError: Down.NO_SOCKET,
    ConnectionRefusedError: Down.REFUSED,
    PermissionError: Down.PERMISSION,
    BlockingIOError: Down.TIMEOUT,
}


def _connected(path: Path) -> socket.socket:
    """Return a connected socket. A unix socket connects at once or not at all; asyncio takes "not at all" for "later"."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)  # noqa: FBT003 -- the method takes it by position only
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


def _identity(path: Path) -> tuple[int, int, int]:
    """Return what tells a socket's file from one that took its place."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns


class _Connection(asyncio.BufferedProtocol):
    """One connection: reads whatever comes as soon as it comes, and hangs up where that was not soon enough."""

    def __init__(self, subscriber: Subscriber, max_lag: float) -> None:
        self._subscriber, self._max_lag = subscriber, max_lag
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[Down] = self._loop.create_future()
        self._transport: asyncio.BaseTransport | None = None
        self._least_lag = math.inf
        self._alive_at = self._loop.time()
        self._was_held_up = False
        self._pulse()

    def _pulse(self) -> None:
        # A process that was stopped comes to its timers first. What waited is read next, before the pulse after this one.
        self._was_held_up = self._is_held_up()
        self._alive_at = self._loop.time()
        self._next_pulse = self._loop.call_later(PULSE, self._pulse)

    def _is_held_up(self) -> bool:
        return self._loop.time() - self._alive_at > self._max_lag

    def hang_up(self, why: Down) -> None:
        """End the connection, for this reason."""
        if not self.ended.done():
            self.ended.set_result(why)
        self._next_pulse.cancel()
        if isinstance(self._transport, asyncio.Transport):
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002 -- asyncio's word
        return self._subscriber.buffer

    def buffer_updated(self, nbytes: int) -> None:
        # A loop that was busy serves sockets before timers: the pulse is still the one from before the hold-up.
        if nbytes >= BACKLOG and (self._was_held_up or self._is_held_up()):
            self.hang_up(Down.BEHIND)
            return
        said = 0.0
        try:
            for topic, payload in self._subscriber.sieve.feed(memoryview(self._subscriber.buffer)[:nbytes]):
                said = self._subscriber.hear(topic, payload)
        except WireError:
            self.hang_up(Down.NONSENSE)
        if said:
            # Compared with the least lag seen, so that a daemon with another idea of the time is heard as well.
            lag = time.time() - said
            self._least_lag = min(self._least_lag, lag)
            if lag - self._least_lag > self._max_lag:
                self.hang_up(Down.BEHIND)

    def connection_lost(self, exc: Exception | None) -> None:
        lost = exc is None or isinstance(exc, ConnectionError)
        self.hang_up(Down.CLOSED if lost else Down.UNREACHABLE)
