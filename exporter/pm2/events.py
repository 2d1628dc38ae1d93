"""What PM2's bus says, attributed to a cause. Pure.

`Attribution.step` takes one message of `pub.sock` and returns the record of what it means, if it means anything here.

How an ending shows itself (PM2 4 to 7; God.js, God/ActionMethods.js, Worker.js, Watcher.js):

* God.handleExit writes "App [NAME:ID] exited with code [C] via signal [S]" to its log and publishes one `exit`, both in
  one go. A stop (and so a restart, a reload, a deletion) publishes a second `exit` once the process is gone. Both bear
  `pm_uptime`, the moment that this run of the process began, so (pm_id, pm_uptime) ends once and is counted once.
* The code of a death by signal is 0; the log line alone names the signal. PM2 writes SIGINT where there was none, so an
  exit with code 0 and a death by a foreign SIGINT look the same: both are EXIT.
* The status in the first `exit` is "stopping" where PM2 was asked to end the process. Why it was asked stands in an earlier
  log line for the memory limit and the watcher; a cron restart is not told from one by hand.
* An uncaught exception ends a cluster worker with code 0: PM2 emits `disconnect` in it before it exits with 1, and Node's
  cluster module exits at once then. A report of the exception comes some milliseconds before (ProcessContainer.js).
* PM2 writes no log lines to the bus when PM2_LOG_DATE_FORMAT is empty. Then SIGNAL is seen as EXIT, MEMORY_LIMIT and WATCH
  as MANUAL; the number of exits stays right.

An app cannot forge any of it: what it sends to the bus carries the daemon's word for who sent it, and no `event`.
"""

import json
import math
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

T = TypeVar("T")

PROCESS_EVENT: Final = "process:event"
EXCEPTION: Final = "process:exception"
DAEMON_LOG: Final = "log:PM2"
KILL: Final = "pm2:kill"
WANTED: Final = frozenset({PROCESS_EVENT, EXCEPTION, DAEMON_LOG, KILL})
"""The topics that mean something here."""


class Cause(StrEnum):
    """Why a process ended."""

    CRASH = "crash"
    """By itself, with an exit code other than 0 that is not one of its stop_exit_codes, or by an uncaught exception."""
    EXIT = "exit"
    """By itself, with code 0 or one of its stop_exit_codes; or by a SIGINT from outside, which PM2 cannot tell apart."""
    SIGNAL = "signal"
    """By a signal that PM2 did not send: killed from outside, out of memory, or aborted by its own runtime."""
    MEMORY_LIMIT = "memory_limit"
    """PM2 ended it, as it was above max_memory_restart."""
    WATCH = "watch"
    """PM2 ended it, as a watched file changed."""
    MANUAL = "manual"
    """PM2 ended it on request: stop, restart, reload, delete, scale; also by cron_restart."""


class Heard(msgspec.Struct, frozen=True, tag=True):
    """A process was heard of: it came online, or PM2 was asked to start it."""

    name: str
    pm_id: str
    at: float


class Exit(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A process ended; once per run of a process."""

    name: str
    pm_id: str
    """The number as text; "_old_0" for the worker that a reload of 0 replaces."""
    cause: Cause
    code: int
    """0 for a death by signal."""
    signal: str
    """Such as "SIGKILL"; "" where there was none, or none that is known."""
    began_at: float
    """Unix time in seconds when this run of the process began."""
    at: float
    """Unix time in seconds, by the daemon's clock."""


class Uncaught(msgspec.Struct, frozen=True, tag=True):
    """A Node.js app reported an uncaught exception or an unhandled rejection; it need not have ended by it."""

    name: str
    pm_id: str
    at: float


class OverLimit(msgspec.Struct, frozen=True, tag=True):
    """PM2 gave up on a process: too many unstable restarts (max_restarts)."""

    name: str
    pm_id: str
    at: float


class Command(msgspec.Struct, frozen=True, tag=True):
    """A command was carried out on a process: "restart", "reload", "stop", ...; told after it was done."""

    name: str
    pm_id: str
    action: str
    at: float


class DaemonKilled(msgspec.Struct, frozen=True, tag=True):
    """PM2's daemon is about to end, on request."""


Record = Heard | Exit | Uncaught | OverLimit | Command | DaemonKilled

RUNS_MAX: Final = 4096
"""Runs whose end is remembered, so that it is not counted again."""
MARKS_MAX: Final = 1024
"""Log lines that announce an exit and are remembered until it comes."""
ANNOUNCED: Final = 300.0
"""Seconds within which an exit follows its announcement: listen_timeout, watch_delay and kill_timeout lie between them."""
THROWN: Final = 1.0
"""Seconds within which a cluster worker is gone after the exception that ends it."""


class Attribution:
    """Attributes what the bus says; holds only what the next messages may refer to.

    `step` never raises and returns no run's exit twice, whatever comes in whatever order. `gap` says that messages may have
    been missed.
    """

    __slots__ = ("_ended", "_last_exit", "_marks", "_speaks", "at", "malformed", "said_at")

    def __init__(self) -> None:
        """Know nothing yet."""
        self.malformed = 0
        """Messages of a wanted topic that could not be read."""
        self.at = 0.0
        """When the latest message that said so was sent, in Unix seconds by the daemon's clock."""
        self.said_at = 0.0
        """The same of the last message alone; 0 where it does not say."""
        self._ended: dict[tuple[str, float], float] = {}
        """(pm_id, beginning) of a run that has ended -> when."""
        self._marks: dict[tuple[str, str], float] = {}
        """(what, pm_id or name) -> when the log said so."""
        self._last_exit: tuple[str, int, str] | None = None
        """pm_id, code and signal of an exit that the log has told and the event has not."""
        self._speaks = False
        """Whether the daemon's log lines come over the bus."""

    def gap(self) -> None:
        """Forget what only holds while no message is missed."""
        self._last_exit, self._speaks = None, False

    def step(self, topic: str, payload: bytes) -> Record | None:
        """Return what the message means; None where it means nothing new."""
        message = _decode(topic, payload)
        self.said_at = (message and _seconds(message.at)) or 0.0
        if message is None:
            self.malformed += topic in WANTED
            return None
        self.at = self.said_at or self.at
        if topic == KILL:
            return DaemonKilled() if message.status == "killed" else None
        if isinstance(message, _LogLine):
            self._log(message)
            return None
        name, pm_id = _text(message.process.name), _text(message.process.pm_id)
        if not name or not pm_id:
            self.malformed += 1
            return None
        if topic == EXCEPTION:
            self._mark("exception", pm_id)
            return Uncaught(name, pm_id, self.at)
        return self._event(message, name, pm_id)

    def _event(self, message: "_Message", name: str, pm_id: str) -> Record | None:
        match message.event:
            case "exit":
                return self._exit(message.process, name, pm_id)
            case "online" | "start":
                return Heard(name, pm_id, self.at)
            case "restart overlimit":
                return OverLimit(name, pm_id, self.at)
            case str(action) if message.manually is True:
                return Command(name, pm_id, action[:64], self.at)
        return None

    def _log(self, message: "_LogLine") -> None:
        # An app that sends this topic itself is named as its sender, with a number for an id.
        if message.process.pm_id != "PM2" or not isinstance(message.data, str):
            return
        self._speaks = True
        line = message.data.removesuffix("\n")
        if found := _EXITED.fullmatch(line):
            self._last_exit = (found["id"], int(found["code"]), found["signal"])
        elif found := _STOPPING.fullmatch(line):
            self._mark("stop", found["id"])
        elif found := _OVER_MEMORY.match(line):
            self._mark("memory", found["id"])
        elif found := _CHANGED.fullmatch(line):
            self._mark("watch", found["name"])

    def _mark(self, what: str, whom: str) -> None:
        _remember(self._marks, (what, whom), self.at, MARKS_MAX)

    def _exit(self, process: "_Process", name: str, pm_id: str) -> Exit | None:
        told, self._last_exit = self._last_exit, None
        began = _seconds(process.pm_uptime)
        if began is None:
            self.malformed += 1
            return None
        if (pm_id, began) in self._ended:
            return None
        _remember(self._ended, (pm_id, began), self.at, RUNS_MAX)
        known = told is not None and told[0] == pm_id
        code, signal = _whole(process.exit_code) or 0, ""
        if told is not None and known:
            # PM2 writes SIGINT for "none", and no code stands beside a signal.
            code, signal = told[1], "" if told[1] or told[2] == "SIGINT" else told[2]
        run = _Run(name, pm_id, began)
        clean = not signal and (code == 0 or code in _codes(process.stop_exit_codes))
        if self._was_asked(run, process.status, known=known) or (clean and pm_id.startswith("_old_")):
            cause = self._why_asked(run)
        elif clean and not self._has_thrown(run, code, process.exec_mode):
            cause = Cause.EXIT
        else:
            cause = Cause.SIGNAL if signal else Cause.CRASH
        return Exit(name=name, pm_id=pm_id, cause=cause, code=code, signal=signal, began_at=began, at=self.at)

    def _was_asked(self, run: "_Run", status: object, *, known: bool) -> bool:
        """Tell whether PM2 itself ended this run; `known` is whether the log has told its exit."""
        if status == "stopping" or self._is_announced("stop", run.pm_id, run):
            return True
        # The second exit of a stop, the first having been missed: an ending of its own would have its log line.
        return self._speaks and not known

    def _has_thrown(self, run: "_Run", code: int, mode: object) -> bool:
        """Tell whether an uncaught exception ended this run, though its code is 0."""
        return code == 0 and mode == "cluster_mode" and self._is_announced("exception", run.pm_id, run, THROWN)

    def _why_asked(self, run: "_Run") -> Cause:
        # The worker that a reload replaces was announced by the id it had until then.
        if self._is_announced("memory", run.pm_id.removeprefix("_old_"), run):
            return Cause.MEMORY_LIMIT
        return Cause.WATCH if self._is_announced("watch", run.name, run) else Cause.MANUAL

    def _is_announced(self, what: str, whom: str, run: "_Run", within: float = ANNOUNCED) -> bool:
        """Tell whether the end of this run, and not of one before it, was announced."""
        said = self._marks.get((what, whom))
        return said is not None and run.began < said <= self.at <= said + within


class _Run(NamedTuple):
    name: str
    pm_id: str
    began: float


_EXITED = re.compile(
    r"App \[.*:(?P<id>(?:_old_)?\d{1,15})\] exited with code \[(?P<code>-?\d{1,10})\] via signal \[(?P<signal>\w{1,20})\]",
    re.DOTALL,
)
_STOPPING = re.compile(r"Stopping app:.* id:(?P<id>(?:_old_)?\d{1,15})", re.DOTALL)
_OVER_MEMORY = re.compile(
    r"\[PM2\]\[WORKER\] Process (?P<id>\d{1,15}) restarted because it exceeds --max-memory-restart value "
)
_CHANGED = re.compile(r"Change detected on path .* for app (?P<name>.*) - restarting", re.DOTALL)


class _Process(msgspec.Struct):
    name: Any = None
    pm_id: Any = None
    status: Any = None
    pm_uptime: Any = None
    exec_mode: Any = None
    exit_code: Any = None
    stop_exit_codes: Any = None


class _Message(msgspec.Struct):
    process: _Process = msgspec.field(default_factory=_Process)
    event: Any = None
    manually: Any = None
    at: Any = None
    status: Any = None


class _LogLine(_Message):
    """The one message whose data is used: an exception's is of any size, and the app's own."""

    data: Any = None


_DECODERS = dict.fromkeys(WANTED, msgspec.json.Decoder(_Message)) | {DAEMON_LOG: msgspec.json.Decoder(_LogLine)}


def _decode(topic: str, payload: bytes) -> _Message | None:
    decoder = _DECODERS.get(topic)
    if decoder is None:
        return None
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    # JavaScript writes half surrogate pairs, which msgspec takes for malformed.
    try:
        return msgspec.convert(json.loads(payload), decoder.type)
    except (ValueError, msgspec.MsgspecError, RecursionError):
        return None


def _remember(memory: dict[T, float], key: T, value: float, most: int) -> None:
    """Put the key last; drop the one that was put longest ago where there are too many."""
    memory.pop(key, None)
    memory[key] = value
    if len(memory) > most:
        del memory[next(iter(memory))]


def _text(value: object) -> str:
    """Return text as text and a number as its digits; anything else is not said."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)[:32]
    return ""


def _seconds(value: object) -> float | None:
    """Return JavaScript's milliseconds since 1970 as seconds."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e14:  # noqa: PLR2004 -- the year 5138
        return value / 1000
    return None


def _whole(value: object) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,10}", value):
        return int(value)
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _codes(value: object) -> frozenset[int]:
    """Return the stop_exit_codes: one or several, as numbers or as text."""
    if isinstance(value, Mapping):
        return frozenset()
    several = value if isinstance(value, list) else [value]
    return frozenset(code for item in several if (code := _whole(item)) is not None)
