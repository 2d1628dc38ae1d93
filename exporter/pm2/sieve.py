"""The bytes of `pub.sock` to the few messages that are wanted; the rest is skipped by its length. Pure.

Everything an app prints travels over this socket, so what is not wanted is never gathered, let alone decoded: AMP says the
length of each argument before it comes (exporter/pm2/wire.py), and the first argument is the topic.
"""

from collections.abc import Iterator
from enum import Enum

from exporter.pm2.wire import VERSION, WireError

TOPIC_MAX = 256
"""Bytes; a longer topic is no topic of PM2's."""


class _Next(Enum):
    HEAD = 0
    LENGTH = 1
    BODY = 2


class Sieve:
    """Turns a stream of bytes into the wanted messages, however it is cut.

    `feed` yields (topic, JSON payload) of each wanted message. It holds at most `limit` bytes at any time, and raises
    WireError for bytes that are no AMP; nothing can be read after that. Each message received is counted, and is either
    yielded or counted as one of `unwanted` (by its topic), `oversized` or `malformed`.
    """

    __slots__ = (
        "_arguments",
        "_held",
        "_left",
        "_limit",
        "_next",
        "_payload",
        "_skipping",
        "_topic",
        "_wanted",
        "_words",
        "malformed",
        "oversized",
        "received",
        "unwanted",
    )

    def __init__(self, wanted: frozenset[str], limit: int) -> None:
        """Let the topics `wanted` through, with payloads of at most `limit` bytes."""
        self._wanted = {b"s:" + topic.encode(): topic for topic in wanted}
        self._limit = limit
        self.received = self.unwanted = self.oversized = self.malformed = 0
        self._held = bytearray()
        self._await_message()

    def start_anew(self) -> None:
        """Forget a message that is not complete: the next byte is the first of another stream."""
        self._held.clear()
        self._await_message()

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[str, bytes]]:
        """Take in `data`; yield the wanted messages it completes. Must be run to its end."""
        data = memoryview(data)
        at, end = 0, len(data)
        while True:
            taken = min(self._left, end - at)
            if not self._skipping:
                self._held += data[at : at + taken]
            at += taken
            self._left -= taken
            if self._left:
                return
            message = self._step(bytes(self._held))
            self._held.clear()
            if message is not None:
                yield message

    def _await_message(self) -> None:
        self._next, self._left, self._skipping = _Next.HEAD, 1, False
        self._words = self._arguments = 0
        self._topic: str | None = None
        self._payload: bytes | None = None

    def _step(self, part: bytes) -> tuple[str, bytes] | None:
        """Take the awaited part; set what is awaited next."""
        match self._next:
            case _Next.HEAD:
                if part[0] >> 4 != VERSION:
                    raise WireError(f"not AMP version {VERSION}: the first byte is 0x{part[0]:02x}")
                self._arguments = part[0] & 0x0F
            case _Next.LENGTH:
                size = int.from_bytes(part, "big")
                self._next, self._left, self._skipping = _Next.BODY, size, not self._is_wanted(size)
                return None
            case _Next.BODY:
                if self._words == 0:
                    self._topic = self._wanted.get(part)
                elif self._words == 1 and not self._skipping:
                    self._payload = part
                self._words += 1
        if self._words < self._arguments:
            self._next, self._left, self._skipping = _Next.LENGTH, 4, False
            return None
        message = self._finished()
        self._await_message()
        return message

    def _is_wanted(self, size: int) -> bool:
        if self._words == 0:
            return size <= TOPIC_MAX
        return self._words == 1 and self._topic is not None and size <= self._limit

    def _finished(self) -> tuple[str, bytes] | None:
        self.received += 1
        if self._topic is None:
            self.unwanted += 1
        elif self._payload is None and self._arguments > 1:
            self.oversized += 1
        elif self._payload is None or self._payload[:2] != b"j:":
            self.malformed += 1
        else:
            return self._topic, self._payload[2:]
        return None
