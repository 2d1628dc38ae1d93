"""What may leave for PM2's daemon: a malformed call ends it, and it then restarts every app."""

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.pm2 import rpc
from exporter.pm2.actor import Actor
from exporter.pm2.client import CallError, PM2Error, Reader, Reason

if TYPE_CHECKING:
    from tests.unit.pm2.conftest import Serve

DUMPED: dict[str, object] = {
    "name": "web",
    "exec_mode": "fork_mode",
    "pm_exec_path": "/srv/web.js",
    "pm_cwd": "/srv",
    "pm_pid_path": "/home/x/.pm2/pids/web.pid",
    "pm_out_log_path": "/home/x/.pm2/logs/web-out.log",
    "pm_err_log_path": "/home/x/.pm2/logs/web-error.log",
    "env": {"PATH": "/usr/bin"},
    "watch": False,
    "restart_time": 2,
}
TEXTS = ("name", "exec_mode", "pm_exec_path", "pm_cwd", "pm_pid_path", "pm_out_log_path", "pm_err_log_path")
LETHAL = ("pm_id", "instances", "cron_restart", "pm_log_path", "exec_interpreter")
FORBIDDEN = {"killMe", "notifyKillPM2", "profileCPU", "profileMEM", "sendSignalToProcessId", "sendSignalToProcessName"}


def is_id(value: object) -> bool:
    """Tell whether `value` is a pm_id in JSON: a whole number, no boolean."""
    return type(value) is int and 0 <= value < 2**31


def is_object_with_id(value: object) -> bool:
    """Tell whether `value` is {"id": a pm_id}."""
    return isinstance(value, dict) and set(value) == {"id"} and is_id(value["id"])


def is_announcement(value: object) -> bool:
    """Tell whether `value` is what notifyByProcessId takes."""
    return isinstance(value, dict) and set(value) == {"id", "action_name", "manually"} and is_id(value["id"])


def is_dumped(value: object) -> bool:
    """Tell whether `value` has the fields whose want ends the daemon, after PM2 laid the environment over them."""
    if not isinstance(value, dict) or not isinstance(value.get("env"), dict):
        return False
    merged = {**value, **value["env"]}
    watched = merged.get("watch", False)
    return (
        all(isinstance(merged.get(field), str) and merged[field] for field in TEXTS)
        and all(isinstance(merged.get(field, "unset"), str) for field in ("pm_log_path", "exec_interpreter"))
        and all(isinstance(path, bool | str) for path in (watched if isinstance(watched, list) else [watched]))
        and isinstance(merged.get("cron_restart") or "", str)
        and not {"pm_id"} & set(merged)
        and "instances" not in value
    )


ARGUMENTS: Mapping[str, Callable[[object], bool]] = {
    **dict.fromkeys(("ping", "getVersion", "getReport", "getMonitorData", "reloadLogs"), lambda value: value == {}),
    **dict.fromkeys(
        ("startProcessId", "stopProcessId", "deleteProcessId", "duplicateProcessId", "resetMetaProcessId"), is_id
    ),
    **dict.fromkeys(("restartProcessId", "reloadProcessId", "softReloadProcessId"), is_object_with_id),
    "notifyByProcessId": is_announcement,
    "prepare": is_dumped,
}


def frames(data: bytes) -> list[list[bytes]]:
    """Take AMP apart, independently of the code under test; fail unless every byte belongs to a whole message."""
    found, at = [], 0
    while at < len(data):
        assert data[at] >> 4 == 1
        count, arguments = data[at] & 15, []
        at += 1
        for _ in range(count):
            size = int.from_bytes(data[at : at + 4], "big")
            arguments.append(data[at + 4 : at + 4 + size])
            assert len(arguments[-1]) == size
            at += 4 + size
        found.append(arguments)
    return found


def check_sent(data: bytes, most: int) -> None:
    """Hold the rule: well-formed frames of two arguments, a known method, exactly one argument of its type."""
    messages = frames(data)
    assert len(messages) <= most
    for message in messages:
        call, identity = message
        assert call.startswith(b"j:")
        assert identity.startswith(b"s:")
        tree = json.loads(call[2:])
        if tree == {"type": "methods"}:
            continue
        assert set(tree) == {"type", "method", "args"}
        assert tree["type"] == "call"
        assert tree["method"] not in FORBIDDEN
        (argument,) = tree["args"]
        assert ARGUMENTS[tree["method"]](argument), tree


anything: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.just(object())
    | st.complex_numbers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
likely = st.integers(-2, 5) | st.sampled_from(["all", "0", "web", "/re/", "restart", True, 2**31, 1.0]) | anything
dumped = st.builds(
    lambda changed, without, env: {key: value for key, value in {**DUMPED, **changed, **env}.items() if key not in without},
    st.dictionaries(st.sampled_from([*DUMPED, *LETHAL]) | st.text(max_size=4), anything, max_size=3),
    st.sets(st.sampled_from(list(DUMPED)), max_size=1),
    st.just({})
    | st.fixed_dictionaries({"env": st.dictionaries(st.sampled_from([*DUMPED, *LETHAL]), anything, max_size=2)}),
)
PUBLIC = {
    (kind, name)
    for kind in (Actor, Reader)
    for name, _ in inspect.getmembers(kind, inspect.iscoroutinefunction)
    if not name.startswith("_")
}


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(method=st.sampled_from(sorted(PUBLIC, key=str)), first=likely | dumped, second=likely)
def test_only_well_formed_calls_leave(serve: "Serve", method: tuple[type[Any], str], first: object, second: object) -> None:
    """Whatever is passed to whichever method, it is refused before a byte is written, or a well-formed call leaves."""
    sent = bytearray()
    kind, name = method

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent.extend(await reader.read(1_000_000))
        for _, identity in frames(bytes(sent)):
            writer.write(
                b"\x12" + b"".join([len(part).to_bytes(4, "big") + part for part in (b'j:{"args":[{}]}', identity)])
            )

    async def run() -> type[Exception] | None:
        async with serve(talk) as home:
            call = getattr(kind(home), name)
            names = list(inspect.signature(call).parameters)
            arguments = dict(
                zip([parameter for parameter in names if parameter != "within"], (first, second), strict=False)
            )
            try:
                await call(**arguments, within=5)
            except (TypeError, ValueError, PM2Error) as error:
                return type(error)
        return None

    error = asyncio.run(run())
    if error is not None and issubclass(error, TypeError | ValueError):
        assert not sent
    else:
        check_sent(bytes(sent), most=2)


def test_the_exporter_cannot_act() -> None:
    """Reading offers no method that acts, and neither door offers a call by name."""
    assert {name for kind, name in PUBLIC if kind is Reader} == {"ping", "version", "report", "listing", "methods"}
    acting = {name for kind, name in PUBLIC if kind is Actor}
    assert acting == {
        *("start", "stop", "restart", "reload", "soft_reload", "delete", "duplicate", "reset", "announce", "prepare"),
        "reopen_logs",
    }


def test_no_forbidden_call_exists() -> None:
    """What ends, profiles or signals cannot even be named."""
    assert not FORBIDDEN & set(rpc.Method)
    assert set(rpc.Method) == set(ARGUMENTS)
    for name in FORBIDDEN:
        with pytest.raises(ValueError, match=name):
            rpc.call(name, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("pm_id", [True, "0", "all", 1.0, None, [0], {"id": 0}, -1, 2**31, 10**30])
async def test_only_a_number_names_a_process(tmp_path: Path, pm_id: Any) -> None:  # noqa: ANN401 -- whatever is passed
    """A name, a pattern, a boolean or a number out of range is refused before the socket is looked for."""
    with pytest.raises((TypeError, ValueError), match="pm_id"):
        await Actor(tmp_path).restart(pm_id, within=1)


@pytest.mark.parametrize(
    "field", ["name", "exec_mode", "pm_exec_path", "pm_cwd", "pm_pid_path", "pm_out_log_path", "pm_err_log_path"]
)
@pytest.mark.parametrize("value", [None, 5, {}, "", "nul\0l"])
async def test_a_dumped_app_has_what_pm2_needs(tmp_path: Path, field: str, value: object) -> None:
    """A field that PM2 uses unseen is text, in the entry itself and where its environment would override it."""
    env = DUMPED["env"]
    assert isinstance(env, dict)
    for app in ({**DUMPED, field: value}, {**DUMPED, "env": {**env, field: value}}):
        with pytest.raises((TypeError, ValueError), match=field):
            await Actor(tmp_path).prepare(app, within=1)


@pytest.mark.parametrize(
    "pattern",
    ["garbage", "* * * *", "* * * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 12 *", "* * * dec *",
     "* * * * 7", "5-1 * * * *", "*/0 * * * *", "*/99 * * * *", "5/15 * * * *", "1,,2 * * * *", "-1 * * * *", "* * * foo *",
     "* * * * sunmon", "* * * * 1mon", "* * * * fri-mon", "mon * * * *", "* * L * *", "@daily", 5, True, {"a": 1}, [],
     "\u0661 * * * *"],
)  # fmt: skip
async def test_a_cron_pattern_is_one(tmp_path: Path, pattern: object) -> None:
    """A pattern that PM2 may not understand is refused, in the entry itself and in its environment."""
    for app in ({**DUMPED, "cron_restart": pattern}, {**DUMPED, "env": {"cron_restart": pattern}}):
        with pytest.raises((TypeError, ValueError), match="cron_restart"):
            await Actor(tmp_path).prepare(app, within=1)


@pytest.mark.parametrize(
    "extra",
    [{"pm_id": 3}, {"env": {"pm_id": "3"}}, {"instances": 2}, {"instances": "max"}, {"watch": 5}, {"watch": {}},
     {"watch": ["a", 5]}],
)  # fmt: skip
async def test_what_no_dump_holds_is_refused(tmp_path: Path, extra: Mapping[str, object]) -> None:
    """An id would replace another process, a count or a watch of the wrong type would end the daemon."""
    with pytest.raises((TypeError, ValueError)):
        await Actor(tmp_path).prepare({**DUMPED, **extra}, within=1)


@pytest.mark.parametrize(
    "extra",
    [{"cron_restart": "0 3 * * MON-FRI"}, {"cron_restart": "*/5 0-6/2 1,15 jan,nov 6"}, {"cron_restart": "30 0 0 1 1 *"},
     {"cron_restart": ""}, {"cron_restart": None}, {"watch": True}, {"watch": ["src", "lib"]}, {"pm_log_path": "/l"}],
)  # fmt: skip
async def test_what_a_dump_may_hold_is_sent(tmp_path: Path, extra: Mapping[str, object]) -> None:
    """A sound entry goes as far as the socket, which is not there."""
    with pytest.raises(PM2Error) as caught:
        await Actor(tmp_path).prepare({**DUMPED, **extra}, within=1)
    assert caught.value.reason is Reason.NO_SOCKET


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53, b"bytes", object(), "\ud83d", {1: 2}])
async def test_a_dumped_app_is_json(tmp_path: Path, value: object) -> None:
    """What JavaScript would not read as what it is, is refused."""
    with pytest.raises((TypeError, ValueError)):
        await Actor(tmp_path).prepare({**DUMPED, "extra": value}, within=1)


async def test_a_refusal_is_a_call_error(serve: "Serve") -> None:
    """PM2's own refusal is told apart from a daemon that is not well, in its own words."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (message,) = frames(await reader.read(1000))
        parts = (b'j:{"error":"99 id unknown","stack":"at God"}', message[1])
        writer.write(b"\x12" + b"".join([len(part).to_bytes(4, "big") + part for part in parts]))

    async with serve(talk) as home:
        with pytest.raises(CallError, match="^99 id unknown$") as caught:
            await Actor(home).stop(99, within=5)
        assert caught.value.reason is Reason.REJECTED
