"""The one door to PM2: its daemon's socket, or a command that prints `pm2 jlist`.

Every failure is a `PM2Error` with a `Reason`:

    PM2Error        the list cannot be had, and why
    └── CallError   the daemon answered that it will not do this one call
"""

from enum import StrEnum
from typing import Protocol

from exporter.pm2.process import Listing


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
    """The answer exceeds the configured limit."""
    REJECTED = "rejected"
    """The daemon answered the call with an error."""
    COMMAND_MISSING = "command_missing"
    """The configured command cannot be started."""
    COMMAND_FAILED = "command_failed"
    """The configured command ended with an error."""
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


class Source(Protocol):
    """Where the process list comes from."""

    async def listing(self, within: float) -> Listing:
        """Return PM2's list as it is now; raise PM2Error, at the latest after `within` seconds."""
        ...
