"""Calls to PM2's daemon over its socket: what Reader and Actor speak with, and all that can go wrong.

The only code that writes to `rpc.sock`. A malformed call ends the daemon, which then restarts every app, so a call is made
here and nowhere else: one method, exactly one argument. Every failure is a `PM2Error` with a `Reason`:

    PM2Error        PM2 cannot be asked, and why
    └── CallError   the daemon is well, and answered that it will not do this one call

Source: PM2's lib/Daemon.js and its modules pm2-axon and pm2-axon-rpc.
"""

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from exporter.pm2 import wire
from exporter.pm2.process import NonsenseError, ReplyError

T = TypeVar("T")

MAX_REPLY: Final = 32 * 1024 * 1024
"""Bytes; enough for some 5 000 processes."""


class Reason(StrEnum):
    """Why PM2 could not be asked."""

    NO_SOCKET = "no_socket"
    """There is no rpc.sock: PM2 was killed cleanly, or never started."""
    REFUSED = "refused"
    """Nobody listens on rpc.sock: the daemon crashed."""
    PERMISSION = "permission"
    """rpc.sock belongs to another user."""
    TIMEOUT = "timeout"
    """No answer in time: the daemon is frozen or overloaded."""
    DISCONNECTED = "disconnected"
    """The daemon hung up before its answer was complete."""
    NONSENSE = "nonsense"
    """What answered does not speak PM2's protocol, or the answer is no process list."""
    TOO_LARGE = "too_large"
    """The answer is larger than allowed."""
    REJECTED = "rejected"
    """The daemon answered the call with an error."""
    NO_DAEMON = "no_daemon"
    """The command found no running daemon."""
    COMMAND_MISSING = "command_missing"
    """The command cannot be started."""
    COMMAND_FAILED = "command_failed"
    """The command ended with an error."""
    UNREACHABLE = "unreachable"
    """Any other error of the operating system, such as no free file descriptors."""


class PM2Error(Exception):
    """PM2 could not be asked; `reason` says why, the text says it to a person. Holds nothing of a payload."""

    def __init__(self, reason: Reason, text: str) -> None:
        """Keep the reason beside the text."""
        super().__init__(text)
        self.reason = reason


class CallError(PM2Error):
    """The daemon is well, and answered this call with an error, such as an id that it does not know."""

    def __init__(self, text: str) -> None:
        """Keep PM2's own words, shortened."""
        super().__init__(Reason.REJECTED, text)


class Method(StrEnum):
    """Every call that can be made; those that end, profile or debug the daemon, or signal a process, are not among them."""

    PING = "ping"
    VERSION = "getVersion"
    REPORT = "getReport"
    LIST = "getMonitorData"
    START = "startProcessId"
    STOP = "stopProcessId"
    RESTART = "restartProcessId"
    RELOAD = "reloadProcessId"
    SOFT_RELOAD = "softReloadProcessId"
    DELETE = "deleteProcessId"
    DUPLICATE = "duplicateProcessId"
    RESET = "resetMetaProcessId"
    ANNOUNCE = "notifyByProcessId"
    PREPARE = "prepare"
    REOPEN_LOGS = "reloadLogs"


class Peer(NamedTuple):
    """Who listens on the socket, as the kernel says (SO_PEERCRED); None where it is not in our pid namespace."""

    pid: int | None
    uid: int


def call(method: Method, argument: Mapping[str, object] | int) -> bytes:
    """Return the request that calls `method` with its one argument."""
    return wire.json_argument({"type": "call", "method": Method(method), "args": [argument]})


METHODS: Final = wire.json_argument({"type": "methods"})
"""The request for the names of all calls."""


def read(decode: Callable[[bytes], T], reply: bytes) -> T:
    """Return what `decode` makes of a reply; its errors become PM2Errors."""
    try:
        return decode(reply)
    except ReplyError as error:
        raise CallError(str(error)) from None
    except NonsenseError as error:
        raise PM2Error(Reason.NONSENSE, str(error)) from None


_CHUNK = 256 * 1024
_UCRED = struct.Struct("3i")
_REASONS = {
    errno.ENOENT: Reason.NO_SOCKET,
    errno.ENOTDIR: Reason.NO_SOCKET,
    errno.ECONNREFUSED: Reason.REFUSED,
    errno.EACCES: Reason.PERMISSION,
    errno.EPERM: Reason.PERMISSION,
    # The daemon accepts no connection, and as many as the kernel keeps for it are waiting already.
    errno.EAGAIN: Reason.TIMEOUT,
    errno.ECONNRESET: Reason.DISCONNECTED,
    errno.EPIPE: Reason.DISCONNECTED,
}
_TEXTS = {
    Reason.NO_SOCKET: "there is no such socket: the daemon was ended cleanly, or never started",
    Reason.REFUSED: "nobody listens there: the daemon crashed",
    Reason.PERMISSION: "it belongs to another user",
    Reason.TIMEOUT: "the daemon did not answer in time",
    Reason.DISCONNECTED: "the daemon hung up before its answer was complete",
    Reason.TOO_LARGE: "the answer is larger than allowed",
    Reason.NONSENSE: "what answers does not speak PM2's protocol",
}


class Door:
    """The way to one daemon: a fresh connection for each question, so that a new daemon is simply found."""

    def __init__(self, home: str | os.PathLike[str], max_reply: int) -> None:
        """Lead to the daemon of this PM2 home; messages of more than `max_reply` bytes are refused."""
        self._path = os.fspath(Path(home) / "rpc.sock")
        self._limit = max_reply

    async def ask(self, within: float, *requests: bytes) -> tuple[list[bytes], Peer]:
        """Send every request at once; return the JSON of their answers in the same order, and who gave them."""
        try:
            async with asyncio.timeout(within):
                return await self._ask(requests)
        except TimeoutError:
            raise self._error(Reason.TIMEOUT) from None
        except wire.TooLargeError:
            raise self._error(Reason.TOO_LARGE) from None
        except wire.WireError:
            raise self._error(Reason.NONSENSE) from None
        except OSError as error:
            reason = _REASONS.get(error.errno or 0, Reason.UNREACHABLE)
            raise self._error(reason, error.strerror or str(error)) from None

    async def _ask(self, requests: Sequence[bytes]) -> tuple[list[bytes], Peer]:
        loop = asyncio.get_running_loop()
        decoder = wire.Decoder(self._limit)
        answers: dict[bytes, bytes] = {}
        ids = [wire.text_argument(str(number)) for number in range(len(requests))]
        frames = [wire.encode(request, identity) for request, identity in zip(requests, ids, strict=True)]
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)  # noqa: FBT003 -- the method takes it by position only
            # A unix socket connects at once or not at all.
            connection.connect(self._path)
            pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            await loop.sock_sendall(connection, b"".join(frames))
            while len(answers) < len(requests):
                data = await loop.sock_recv(connection, _CHUNK)
                if not data:
                    raise ConnectionResetError(errno.ECONNRESET, "")
                for message in decoder.feed(data):
                    match message:
                        # Each is answered once: while there is always more to read, no deadline is noticed.
                        case (answer, identity) if answer.startswith(b"j:") and identity in ids and identity not in answers:
                            answers[identity] = answer[2:]
                        case _:
                            raise wire.WireError("not an answer to what was asked")
        return [answers[identity] for identity in ids], Peer(pid or None, uid)

    def _error(self, reason: Reason, text: str = "") -> PM2Error:
        return PM2Error(reason, f"{self._path}: {_TEXTS.get(reason, text)}")
