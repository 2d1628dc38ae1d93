"""The door for who may act: PM2's daemon is told over `rpc.sock` to do something to one process.

The exporter never imports this module. A malformed call ends the daemon, which then restarts every app, so every argument's
type is checked before anything is sent.

Source: PM2's lib/God/ActionMethods.js, lib/God/Reload.js and lib/God.js; what ends the daemon was tried on PM2 7 to 4.
"""

import os
import re
from collections.abc import Mapping, Sequence

from exporter.pm2.process import decode_result
from exporter.pm2.rpc import MAX_REPLY, Door, Method, call, read


class Actor:
    """Acts on single processes, named by their pm_id alone; what a name means is the caller's to resolve.

    Each call returns when PM2 has done it, which for a start is when the process was spawned: it proves nothing about its
    health. Raises TypeError or ValueError, before anything is sent, for an argument that is not what it should be;
    CallError where PM2 will not; PM2Error where PM2 cannot be asked, and then it is unknown whether the call was carried
    out, except for the reasons no_socket, refused and permission.

    PM2's sendSignalToProcessId is not offered: for a process that is not running it signals pid 0, which is the daemon's
    own process group, and so ends the daemon. Nor is any call that ends, profiles or debugs the daemon, or talks to an app.
    """

    def __init__(self, home: str | os.PathLike[str], *, max_reply: int = MAX_REPLY) -> None:
        """Act on the daemon of this PM2 home."""
        self._door = Door(home, max_reply)

    async def start(self, pm_id: int, *, within: float) -> None:
        """Start a stopped or errored process."""
        await self._call(within, Method.START, _pm_id(pm_id))

    async def stop(self, pm_id: int, *, within: float) -> None:
        """Stop a process; PM2 will not start it again by itself."""
        await self._call(within, Method.STOP, _pm_id(pm_id))

    async def restart(self, pm_id: int, *, within: float) -> None:
        """Stop and start a process, in the environment it has; resets PM2's own crash counter and back-off."""
        await self._call(within, Method.RESTART, {"id": _pm_id(pm_id)})

    async def reload(self, pm_id: int, *, within: float) -> None:
        """Start a replacement of a cluster-mode process, then stop the old one; a fork-mode process is restarted."""
        await self._call(within, Method.RELOAD, {"id": _pm_id(pm_id)})

    async def soft_reload(self, pm_id: int, *, within: float) -> None:
        """Do the same, and let the old process finish by itself (it is told `shutdown`)."""
        await self._call(within, Method.SOFT_RELOAD, {"id": _pm_id(pm_id)})

    async def delete(self, pm_id: int, *, within: float) -> None:
        """Stop a process and forget it."""
        await self._call(within, Method.DELETE, _pm_id(pm_id))

    async def duplicate(self, pm_id: int, *, within: float) -> None:
        """Start one more instance of a process."""
        await self._call(within, Method.DUPLICATE, _pm_id(pm_id))

    async def reset(self, pm_id: int, *, within: float) -> None:
        """Set a process's restart counters to 0."""
        await self._call(within, Method.RESET, _pm_id(pm_id))

    async def announce(self, pm_id: int, action: str, *, within: float) -> None:
        """Tell PM2's subscribers that `action` was done to a process by hand, as the pm2 command does for its own."""
        if action not in _ACTIONS:
            raise ValueError(f"an action is one of {', '.join(_ACTIONS)}")
        await self._call(within, Method.ANNOUNCE, {"id": _pm_id(pm_id), "action_name": action, "manually": True})

    async def prepare(self, app: Mapping[str, object], *, within: float) -> None:
        """Start an app from its entry in a dump, as `pm2 resurrect` does."""
        await self._call(within, Method.PREPARE, _dumped(app))

    async def reopen_logs(self, *, within: float) -> None:
        """Close and open every log file again, as after a rotation."""
        await self._call(within, Method.REOPEN_LOGS, {})

    async def _call(self, within: float, method: Method, argument: Mapping[str, object] | int) -> None:
        (reply,), _ = await self._door.ask(within, call(method, argument))
        read(decode_result, reply)


_ACTIONS = ("start", "restart", "stop", "delete", "reload", "graceful reload")
_PM_ID_MAX = 2**31


def _pm_id(value: int) -> int:
    if value.__class__ is not int:
        raise TypeError(f"a pm_id is a whole number, not {type(value).__name__}")
    if not 0 <= value < _PM_ID_MAX:
        raise ValueError(f"no pm_id is {value}")
    return value


_TEXTS = ("name", "exec_mode", "pm_exec_path", "pm_cwd", "pm_pid_path", "pm_out_log_path", "pm_err_log_path")


def _dumped(app: Mapping[str, object]) -> dict[str, object]:
    """Check an entry of a dump: PM2 uses these fields unseen, and what it cannot use ends the daemon."""
    found = _json(app)
    if not isinstance(found, dict):
        raise TypeError("an app is a mapping")
    env = found.get("env")
    if not isinstance(env, dict):
        raise TypeError("env is a mapping")
    if "instances" in found:
        raise ValueError("an entry of a dump is one instance, and does not say how many there are")
    for field in _TEXTS:
        _text(field, found.get(field))
    # PM2 lays the environment over the other fields.
    for fields in (found, env):
        if "pm_id" in fields:
            raise ValueError("an app that is to be started anew has no pm_id yet")
        for field in (*_TEXTS, "pm_log_path", "exec_interpreter"):
            if field in fields:
                _text(field, fields[field])
        if fields.get("exec_mode", "fork_mode") not in ("fork_mode", "cluster_mode"):
            raise ValueError("exec_mode is fork_mode or cluster_mode")
        _watch(fields.get("watch", False))
        _cron(fields.get("cron_restart"))
    return found


def _text(field: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{field} is text, not {type(value).__name__}")
    if not value or "\0" in value:
        raise ValueError(f"{field} is empty or holds a null character")


def _watch(value: object) -> None:
    paths = value if isinstance(value, list) else [value]
    if not all(isinstance(path, bool | str) for path in paths):
        raise TypeError("watch is true, false, a path or a list of paths")


# PM2 4 counts months from 0 and has no day 7: only what every version takes, so December is refused.
_CRON_RANGES = ((0, 59), (0, 59), (0, 23), (1, 31), (1, 11), (0, 6))
_CRON_ITEM = re.compile(r"(\*|\d{1,2}-\d{1,2})(?:/(\d{1,2}))?|(\d{1,2})", re.ASCII)
_CRON_NAME = re.compile(r"\b[a-z]{3}\b")
_MONTHS = ("", "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


def _cron(pattern: object) -> None:
    """Check a cron pattern: five or six fields of numbers, names, ranges, lists and steps; PM2 survives no wrong one."""
    if pattern in (None, False, 0, "", "0"):
        return
    if not isinstance(pattern, str):
        raise TypeError(f"cron_restart is text, not {type(pattern).__name__}")
    fields = pattern.lower().split()
    if len(fields) not in (len(_CRON_RANGES) - 1, len(_CRON_RANGES)):
        raise ValueError("cron_restart has five or six fields")
    fields[-2:] = [_numbered(fields[-2], _MONTHS), _numbered(fields[-1], _DAYS)]
    for field, (low, high) in zip(reversed(fields), reversed(_CRON_RANGES), strict=False):
        for item in field.split(","):
            match = _CRON_ITEM.fullmatch(item)
            if not match or not 1 <= int(match[2] or 1) <= high - low:
                raise ValueError("cron_restart is not a pattern that is surely understood")
            numbers = [int(number) for number in (match[3] or match[1]).split("-") if number != "*"]
            if numbers != sorted(numbers) or not all(low <= number <= high for number in numbers):
                raise ValueError("cron_restart has a number out of its range")


def _numbered(field: str, names: Sequence[str]) -> str:
    return _CRON_NAME.sub(lambda match: str(names.index(match[0])) if match[0] in names else match[0], field)


_DEPTH_MAX = 32
_INTEGER_MAX = 2**53


def _json(value: object, depth: int = 0) -> object:
    """Return a copy of `value`; raise TypeError or ValueError where JavaScript would not read it as what it is."""
    if depth > _DEPTH_MAX:
        raise ValueError("nested too deeply")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        value.encode()
        return value
    if isinstance(value, int | float):
        if not abs(value) < _INTEGER_MAX:
            raise ValueError("a number that JavaScript cannot hold")
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a key is text")
        return {_json(key): _json(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item, depth + 1) for item in value]
    raise TypeError(f"{type(value).__name__} is not JSON")
