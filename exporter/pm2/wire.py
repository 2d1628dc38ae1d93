"""axon over AMP, the protocol of PM2's sockets: bytes to messages and back. Pure.

A message is one byte `(1 << 4) | argc` (AMP version 1, at most 15 arguments), then per argument a 4-byte big-endian length
and the payload; there is no outer length. A payload is `j:` and JSON, `s:` and UTF-8 text, or raw bytes.

Sources: the npm packages amp, amp-message and pm2-axon, which PM2 4 to 7 use.
"""

from collections.abc import Iterator

import msgspec

VERSION = 1
MAX_ARGUMENTS = 15


class WireError(Exception):
    """The bytes are not AMP, or a message is larger than allowed."""


class TooLargeError(WireError):
    """A message is larger than allowed."""


def encode(*arguments: bytes) -> bytes:
    """Return one message; each argument already carries its `j:` or `s:` prefix."""
    if len(arguments) > MAX_ARGUMENTS:
        raise WireError(f"a message has at most {MAX_ARGUMENTS} arguments, not {len(arguments)}")
    parts = [bytes([VERSION << 4 | len(arguments)])]
    for argument in arguments:
        parts += (len(argument).to_bytes(4, "big"), argument)
    return b"".join(parts)


def json_argument(value: object) -> bytes:
    """Return `value` as a JSON argument."""
    return b"j:" + msgspec.json.encode(value)


def text_argument(text: str) -> bytes:
    """Return `text` as a string argument."""
    return b"s:" + text.encode()


class Decoder:
    """Turns a stream of bytes into messages, however it is cut.

    `feed` takes bytes and yields every message complete by then, as a tuple of arguments with their prefixes. Raises
    WireError for bytes that are no AMP, and TooLargeError as soon as one message says that it will be larger than `limit`
    bytes; nothing can be read after that.
    """

    __slots__ = ("_buffer", "_limit")

    def __init__(self, limit: int) -> None:
        """Accept messages of at most `limit` bytes."""
        self._buffer = bytearray()
        self._limit = limit

    @property
    def pending(self) -> int:
        """The bytes of the message that is not complete yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[tuple[bytes, ...]]:
        """Take in `data`; yield the messages it completes."""
        self._buffer += data
        while (found := self._next()) is not None:
            size, message = found
            del self._buffer[:size]
            yield message

    def _next(self) -> tuple[int, tuple[bytes, ...]] | None:
        buffer = self._buffer
        if not buffer:
            return None
        if buffer[0] >> 4 != VERSION:
            raise WireError(f"not AMP version {VERSION}: the first byte is 0x{buffer[0]:02x}")
        at, spans = 1, []
        for _ in range(buffer[0] & 0x0F):
            if len(buffer) < at + 4:
                return None
            size = int.from_bytes(buffer[at : at + 4], "big")
            spans.append((at + 4, at + 4 + size))
            at += 4 + size
            if at > self._limit:
                raise TooLargeError(f"a message is larger than {self._limit} bytes")
        if len(buffer) < at:
            return None
        with memoryview(buffer) as view:
            return at, tuple([bytes(view[start:end]) for start, end in spans])
