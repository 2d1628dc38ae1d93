"""PM2's process list and daemon report: the reply's bytes to typed values. Pure.

Only what is used is decoded: the reply is mostly the apps' environments, which are skipped and never kept. PM2 lays the
variables of an app's environment over its own fields (`Utility.extend(pm2_env, env)`), and metric values come from the apps
themselves, so any field may hold any JSON; whatever is not what it should be counts as not seen. A process without a name
or without a number for an id is left out and counted, and hides no other.

Source: PM2's lib/God/Methods.js (getFormatedProcesses) and lib/God/ActionMethods.js (getMonitorData, getReport).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any

import msgspec


class Status(StrEnum):
    """The states that PM2 knows (constants.js); a process may one day be in another."""

    ONLINE = "online"
    STOPPING = "stopping"
    STOPPED = "stopped"
    LAUNCHING = "launching"
    ERRORED = "errored"
    WAITING_RESTART = "waiting restart"
    ONE_LAUNCH = "one-launch-status"


GONE = frozenset({Status.STOPPED, Status.ERRORED, Status.WAITING_RESTART})
"""The states without a process of the operating system; PM2 may still name the pid of the one that ended."""


class Monitor(msgspec.Struct, frozen=True):
    """One of the figures an app publishes about itself (`pm2_env.axm_monitor`)."""

    name: str
    value: float
    unit: str
    """As written by the app: "ms", "MiB", "req/min", ...; "" where there is none."""


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One process as PM2 lists it; None is "not said", or said in a way that makes no sense."""

    name: str
    """Not unique: (name, pm_id) is."""
    pm_id: int
    pid: int = 0
    """0 when it is not running."""
    status: str = ""
    """PM2's word for the state, most likely one of Status; "" where it is not said."""
    namespace: str = ""
    exec_mode: str = ""
    """"fork_mode" or "cluster_mode"."""
    version: str = ""
    """Of the app, from its package.json; PM2 writes "N/A" where there is none."""
    interpreter: str = ""
    node_version: str = ""
    user: str = ""
    """The user PM2 started it as (`username`, `uid`), else the daemon's USER."""
    restart_time: int | None = None
    """Restarts of every kind since it was added, or reset."""
    unstable_restarts: int | None = None
    """Restarts in a row that came before min_uptime."""
    started_at: float | None = None
    """Unix time in seconds of the last start (`pm_uptime`), whether or not it still runs."""
    created_at: float | None = None
    """Unix time in seconds when it was added (`created_at`)."""
    cpu: float | None = None
    """Per cent of one core, as PM2 says."""
    memory: int | None = None
    """Resident bytes of the main process, as PM2 says."""
    max_memory_restart: int | None = None
    """Bytes above which PM2 restarts it."""
    autorestart: bool = True
    instances: int | None = None
    """As declared."""
    out_log: str = ""
    err_log: str = ""
    is_module: bool = False
    """A PM2 module (`pm2 install`), no app of the user's."""
    monitors: tuple[Monitor, ...] = ()

    @property
    def is_running(self) -> bool:
        """Whether it has a process of the operating system."""
        return self.pid > 0

    @property
    def is_given_up(self) -> bool:
        """Whether PM2 has given up on it: it died max_restarts times in a row, and PM2 will not start it again by itself.

        Beside restart_delay or exp_backoff_restart_delay PM2 then says "waiting restart" for good instead of errored; what
        tells is that it forgets when the process was added (God.js handleExit).
        """
        return self.status == Status.ERRORED or (self.status == Status.WAITING_RESTART and self.created_at is None)


class Daemon(msgspec.Struct, frozen=True, kw_only=True):
    """What PM2's daemon (God) says of itself; its environment is never kept."""

    pm2_version: str = ""
    node_version: str = ""
    user: str = ""
    uid: int | None = None
    started_at: float | None = None
    """Unix time in seconds."""
    pid: int | None = None
    """From the kernel, not from the reply; None where it is not in our pid namespace."""


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """One look at PM2."""

    processes: tuple[Process, ...] = ()
    daemon: Daemon | None = None
    """None where the source cannot tell."""
    undecodable: int = 0
    """Entries of the list that could not be read as a process."""


class ReplyError(Exception):
    """The daemon answered with an error; the text is PM2's own, shortened."""


class NonsenseError(Exception):
    """What came is no answer to what was asked. The text holds nothing of it."""


def decode_reply(reply: bytes) -> Listing:
    """Read the reply to `getMonitorData`; raise ReplyError or NonsenseError where it is none."""
    try:
        answer = _LIST_REPLY.decode(reply)
    except _UNREADABLE:
        if not (head := _LIST_HEAD.match(reply)):
            raise NonsenseError("the reply holds no process list") from None
        return _decode_each(_elements(reply, head.end()))
    if answer.error is not msgspec.UNSET:
        raise ReplyError(_shortened(answer.error))
    if not answer.args:
        raise NonsenseError("the reply holds no process list")
    return _listing(answer.args[0])


def decode_output(output: bytes) -> Listing:
    """Find and read the list that `pm2 jlist` printed, among whatever else was printed; raise NonsenseError without one.

    Banners, progress and warnings may stand before or after it, with colours and with brackets of their own. What counts as
    the list is the first JSON array with at least one process in it, else an empty array alone on its line.
    """
    text = _ESCAPES.sub(b"", output)
    for candidate in list(_CANDIDATES.finditer(text))[:_MAX_CANDIDATES]:
        start = candidate.end()
        listing = _decode_array(text, start)
        if listing is not None and listing.processes:
            return listing
    if _EMPTY_LIST.search(text):
        return Listing()
    raise NonsenseError("the output holds no process list")


def decode_report(reply: bytes) -> Daemon:
    """Read the reply to `getReport`, less the daemon's environment; raise ReplyError or NonsenseError where it is none."""
    report = decode_result(reply)
    if not isinstance(report, Mapping):
        raise NonsenseError("the reply holds no report")
    return Daemon(
        pm2_version=_text(report.get("pm2_version")),
        node_version=_text(report.get("node_version")),
        user=_text(report.get("user")),
        uid=_count(report.get("uid")),
        started_at=_seconds(report.get("started_at")),
    )


def decode_result(reply: bytes) -> Any:  # noqa: ANN401 -- any JSON
    """Return the first value of a reply; raise ReplyError or NonsenseError where there is none."""
    try:
        answer = json.loads(reply)
    except (ValueError, RecursionError):
        raise NonsenseError("the reply is not JSON") from None
    match answer:
        case {"error": error}:
            raise ReplyError(_shortened(error))
        case {"args": [result, *_]}:
            return result
        case {"args": []}:
            return None
        case {"methods": dict(methods)}:
            return methods
    raise NonsenseError("the reply has no result")


class _Env(msgspec.Struct):
    namespace: Any = None
    status: Any = None
    exec_mode: Any = None
    version: Any = None
    exec_interpreter: Any = None
    node_version: Any = None
    username: Any = None
    uid: Any = None
    restart_time: Any = None
    unstable_restarts: Any = None
    pm_uptime: Any = None
    created_at: Any = None
    max_memory_restart: Any = None
    autorestart: Any = None
    instances: Any = None
    pm_out_log_path: Any = None
    pm_err_log_path: Any = None
    pmx_module: Any = None
    axm_monitor: Any = None


class _Row(msgspec.Struct):
    pm2_env: _Env
    name: Any = None
    pm_id: Any = None
    pid: Any = None
    monit: Any = None


class _ListReply(msgspec.Struct):
    args: list[list[_Row]] = []
    error: Any = msgspec.UNSET


_LIST_REPLY = msgspec.json.Decoder(_ListReply)
_ROW = msgspec.json.Decoder(_Row)
_LIST_HEAD = re.compile(rb'\s*\{\s*"args"\s*:\s*\[\s*\[')
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_TOKEN = re.compile(rb'[^"\[\]{}]*+(?:"(?:[^"\\]++|\\.)*+"[^"\[\]{}]*+)*+([\[\]{}])', re.DOTALL)
_ESCAPES = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
_CANDIDATES = re.compile(rb"\[\s*(?=\{)")
_EMPTY_LIST = re.compile(rb"^\s*\[\s*\]\s*$", re.MULTILINE)
_MAX_CANDIDATES = 64


def _elements(data: bytes, at: int) -> Iterator[bytes]:
    """Yield the elements of the JSON array whose inside begins at `at`; raise NonsenseError where it has no end.

    Looks at brackets and strings only, so that one element which no JSON parser takes (nested too deeply, half a surrogate
    pair) costs none of the others.
    """
    depth, begin, end = 0, at, at
    while token := _TOKEN.match(data, at):
        at = token.end()
        if token[1] in b"[{":
            if not depth:
                begin = at - 1
                yield from _pieces(data[end:begin])
            depth += 1
        elif depth > 1:
            depth -= 1
        elif depth:
            depth, end = 0, at
            yield data[begin:end]
        else:
            yield from _pieces(data[end : at - 1])
            return
    raise NonsenseError("the process list has no end")


def _pieces(gap: bytes) -> list[bytes]:
    return [piece for piece in gap.split(b",") if piece.strip()]


def _decode_each(elements: Iterator[bytes]) -> Listing:
    rows = [_decode_row(element) for element in elements]
    listing = _listing([row for row in rows if row is not None])
    return msgspec.structs.replace(listing, undecodable=listing.undecodable + rows.count(None))


def _decode_array(data: bytes, at: int) -> Listing | None:
    try:
        return _decode_each(_elements(data, at))
    except NonsenseError:
        return None


def _decode_row(element: bytes) -> _Row | None:
    try:
        return _ROW.decode(element)
    except _UNREADABLE:
        pass
    try:
        found = json.loads(element.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    env = found.get("pm2_env")
    return msgspec.convert({**found, "pm2_env": env if isinstance(env, dict) else {}}, _Row)


def _listing(rows: Sequence[_Row]) -> Listing:
    found = [process for row in rows if (process := _process(row)) is not None]
    return Listing(processes=tuple(found), undecodable=len(rows) - len(found))


def _process(row: _Row) -> Process | None:
    env, monit = row.pm2_env, row.monit if isinstance(row.monit, dict) else {}
    name, pm_id, status = _text(row.name), _count(row.pm_id), _text(env.status)
    if not name or pm_id is None:
        return None
    return Process(
        name=name,
        pm_id=pm_id,
        pid=0 if status in GONE else _count(row.pid) or 0,
        status=status,
        namespace=_text(env.namespace),
        exec_mode=_text(env.exec_mode),
        version=_text(env.version),
        interpreter=_text(env.exec_interpreter),
        node_version=_text(env.node_version),
        user=_text(env.uid) or _text(env.username),
        restart_time=_count(env.restart_time),
        unstable_restarts=_count(env.unstable_restarts),
        started_at=_seconds(env.pm_uptime),
        created_at=_seconds(env.created_at),
        cpu=_number(monit.get("cpu")),
        memory=_count(monit.get("memory")),
        max_memory_restart=_bytes(env.max_memory_restart),
        autorestart=env.autorestart not in (False, "false"),
        instances=_count(env.instances),
        out_log=_path(env.pm_out_log_path),
        err_log=_path(env.pm_err_log_path),
        is_module=env.pmx_module is True or env.pmx_module == "true",
        monitors=_monitors(env.axm_monitor),
    )


_COUNT_MAX = 2**63
_VALUE = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*([^\s\d.,][^\d,]{0,31})?\s*", re.ASCII)
_MEMORY = re.compile(r"(\d{1,15})([KMG]?)", re.ASCII)
_MEMORY_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}


def _text(value: object) -> str:
    """Return text as text and a number as its digits; anything else is not said."""
    if value.__class__ is str:
        # Half a surrogate pair, which JavaScript allows, is no UTF-8.
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)[:32]
    return ""


def _path(value: object) -> str:
    text = _text(value)
    return text if text.startswith("/") and "\0" not in text else ""


def _number(value: object) -> float | None:
    if isinstance(value, str):
        match = _VALUE.fullmatch(value)
        value = float(match[1]) if match and not match[2] else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def _count(value: object) -> int | None:
    """Return a whole number from 0 on, written as a number or as text."""
    if value.__class__ is not int:
        number = _number(value)
        if number is None or not number.is_integer():
            return None
        value = int(number)
    return value if 0 <= value < _COUNT_MAX else None


def _seconds(value: object) -> float | None:
    """Return JavaScript's milliseconds since 1970 as seconds."""
    number = _number(value)
    return number / 1000 if number is not None and 0 < number < 1e14 else None  # noqa: PLR2004 -- the year 5138


def _bytes(value: object) -> int | None:
    """Return a memory limit: bytes, or as people write it for PM2 ("300M", powers of 1024)."""
    if isinstance(value, str) and (match := _MEMORY.fullmatch(value)):
        value = int(match[1]) * _MEMORY_UNITS[match[2]]
    return _count(value) or None


def _monitors(value: object) -> tuple[Monitor, ...]:
    if not isinstance(value, dict):
        return ()
    return tuple([found for name, entry in value.items() if (found := _monitor(name, entry)) is not None])


def _monitor(name: str, entry: object) -> Monitor | None:
    """Read a figure: {"value": "6.98", "unit": "MiB"}, {"value": "12ms"}, or a bare value."""
    value, unit = (entry.get("value"), entry.get("unit")) if isinstance(entry, dict) else (entry, None)
    if isinstance(value, str):
        match = _VALUE.fullmatch(value)
        if not match:
            return None
        value, unit = float(match[1]), (match[2] or "").strip() or unit
    number = float(value) if isinstance(value, bool) else _number(value)
    if number is None:
        return None
    return Monitor(_text(name), number, _text(unit)[:32] if isinstance(unit, str) else "")


def _shortened(error: object) -> str:
    """Return PM2's own words for an error, bounded and on one line."""
    words = " ".join(_text(error).split())
    return "".join([char if char.isprintable() else "\ufffd" for char in words])[:200] or "an error without words"
