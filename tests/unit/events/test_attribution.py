"""What the bus says, attributed to a cause: on streams of real PM2 daemons, on their every mutilation, and on garbage."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.pm2.events import (
    MARKS_MAX,
    RUNS_MAX,
    WANTED,
    Attribution,
    Cause,
    Command,
    DaemonKilled,
    Exit,
    Heard,
    OverLimit,
    Record,
    Uncaught,
)

FIXTURES = Path(__file__).parents[2] / "fixtures" / "events"
STREAMS = sorted(FIXTURES.glob("*/*.jsonl"))
Message = tuple[str, bytes]
CLUSTER = {"exec_mode": "cluster_mode"}


def read(path: Path) -> list[Message]:
    """Return a captured stream."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(topic, json.dumps(payload).encode()) for topic, payload in lines]


def records(stream: Iterable[Message], attribution: Attribution | None = None) -> Iterator[Record]:
    """Yield what a stream means."""
    attribution = attribution or Attribution()
    for topic, payload in stream:
        if (record := attribution.step(topic, payload)) is not None:
            yield record


def exits(stream: Iterable[Message]) -> list[Exit]:
    """Return the exits of a stream."""
    return [record for record in records(stream) if isinstance(record, Exit)]


def event(kind: str, *, at: int = 5000, manually: bool = False, **process: object) -> Message:
    """Make a process:event."""
    process = {"name": "app", "pm_id": 0, "status": "stopped", "pm_uptime": 1000, "exit_code": 0} | process
    body = {"event": kind, "manually": manually, "process": process, "at": at}
    return "process:event", json.dumps(body).encode()


def log(text: str, *, at: int = 4999) -> Message:
    """Make a line of the daemon's log."""
    process = {"pm_id": "PM2", "name": "PM2", "rev": None}
    return "log:PM2", json.dumps({"process": process, "at": at, "data": text + "\n"}).encode()


def thrown(*, at: int = 4995) -> Message:
    """Make the report of an uncaught exception, or of an unhandled rejection."""
    return "process:exception", json.dumps({"process": {"name": "app", "pm_id": 0}, "at": at, "data": {}}).encode()


def exited(code: int, signal: str, who: str = "app:0") -> Message:
    """Make the daemon's log line of an exit."""
    return log(f"App [{who}] exited with code [{code}] via signal [{signal}]")


@pytest.mark.parametrize("path", STREAMS, ids=[f"{path.parent.name}/{path.stem}" for path in STREAMS])
def test_a_real_stream_counts_each_ending_once_with_its_cause(path: Path) -> None:
    """Each ending provoked on a real PM2 is counted once, with the cause that was provoked."""
    expected = json.loads(path.with_name(f"{path.stem}.expected.json").read_text(encoding="utf-8"))
    attribution = Attribution()
    found = list(records(read(path), attribution))
    assert Counter(record.cause.value for record in found if isinstance(record, Exit)) == Counter(expected["exits"])
    assert sum(isinstance(record, Uncaught) for record in found) == expected["exceptions"]
    assert sum(isinstance(record, OverLimit) for record in found) == expected["overlimit"]
    assert attribution.malformed == 0


def test_every_major_version_has_every_stream() -> None:
    """The fixtures cover PM2 4 to 7 alike."""
    by_version: dict[str, set[str]] = {}
    for path in STREAMS:
        by_version.setdefault(path.parent.name.split(".", maxsplit=1)[0], set()).add(path.stem)
    assert set(by_version) == {"4", "5", "6", "7"}
    assert len({frozenset(names) for names in by_version.values()}) == 1


@pytest.mark.parametrize("path", STREAMS, ids=[f"{path.parent.name}/{path.stem}" for path in STREAMS])
def test_a_daemon_that_keeps_its_log_to_itself_costs_causes_and_no_exit(path: Path) -> None:
    """Without log lines the number of exits is the same, and what PM2 did is still told from what it did not do."""
    stream = read(path)
    with_log, without = exits(stream), exits(message for message in stream if message[0] != "log:PM2")
    asked = {Cause.MANUAL, Cause.MEMORY_LIMIT, Cause.WATCH}
    assert [record.cause in asked for record in without] == [record.cause in asked for record in with_log]


@pytest.mark.parametrize("path", STREAMS, ids=[f"{path.parent.name}/{path.stem}" for path in STREAMS])
def test_a_stream_joined_at_any_point_invents_nothing(path: Path) -> None:
    """A subscriber that comes late counts nothing that was not there, and takes no stop for a crash.

    Only a crash whose exception it has missed may be an exit to it.
    """
    stream = read(path)
    whole = Counter(record.cause for record in exits(stream))
    for cut, (topic, _) in enumerate(stream):
        # The daemon sends an event and the log line before it in one go: nobody comes between them.
        if topic != "process:event":
            late = Counter(record.cause for record in exits(stream[cut:]))
            assert late.total() <= whole.total() + path.name.startswith("stop-of-")
            assert all(late[cause] <= whole[cause] for cause in (Cause.CRASH, Cause.SIGNAL))
            assert late[Cause.CRASH] + late[Cause.EXIT] <= whole[Cause.CRASH] + whole[Cause.EXIT]


@pytest.mark.parametrize(
    ("stream", "cause", "signal"),
    [
        ([exited(0, "SIGKILL"), event("exit")], Cause.SIGNAL, "SIGKILL"),
        ([exited(0, "SIGINT"), event("exit")], Cause.EXIT, ""),
        ([exited(1, "SIGINT"), event("exit", exit_code=1)], Cause.CRASH, ""),
        ([exited(7, "SIGINT"), event("exit", exit_code=7, stop_exit_codes=[7])], Cause.EXIT, ""),
        ([exited(7, "SIGINT"), event("exit", exit_code=7, stop_exit_codes="7")], Cause.EXIT, ""),
        ([exited(143, "SIGINT"), event("exit", exit_code=143)], Cause.CRASH, ""),
        ([exited(0, "SIGKILL"), event("exit", status="stopping")], Cause.MANUAL, "SIGKILL"),
        ([log("Stopping app:app id:0"), exited(1, "SIGINT"), event("exit", status="errored")], Cause.MANUAL, ""),
        ([exited(1, "SIGINT"), event("exit", status="errored", exit_code=1)], Cause.CRASH, ""),
        ([exited(0, "SIGINT", "app:_old_0"), event("exit", pm_id="_old_0")], Cause.MANUAL, ""),
        ([exited(1, "SIGINT", "app:_old_0"), event("exit", pm_id="_old_0", exit_code=1)], Cause.CRASH, ""),
        ([log("pid=1 msg=process killed"), event("exit")], Cause.MANUAL, ""),
        ([event("exit", exit_code=1)], Cause.CRASH, ""),
        ([event("exit")], Cause.EXIT, ""),
        ([thrown(), exited(0, "SIGINT"), event("exit", **CLUSTER)], Cause.CRASH, ""),
        ([thrown(), event("exit", **CLUSTER)], Cause.CRASH, ""),
        ([thrown(), exited(0, "SIGKILL"), event("exit", **CLUSTER)], Cause.SIGNAL, "SIGKILL"),
        ([thrown(), exited(0, "SIGINT"), event("exit", status="stopping", **CLUSTER)], Cause.MANUAL, ""),
        ([thrown(), exited(7, "SIGINT"), event("exit", stop_exit_codes=[7], **CLUSTER)], Cause.EXIT, ""),
        ([thrown(at=3000), exited(0, "SIGINT"), event("exit", **CLUSTER)], Cause.EXIT, ""),
        ([thrown(at=900), exited(0, "SIGINT"), event("exit", **CLUSTER)], Cause.EXIT, ""),
        ([thrown(), exited(0, "SIGINT"), event("exit", exec_mode="fork_mode")], Cause.EXIT, ""),
    ],
)
def test_an_exit_has_the_cause_that_the_log_and_the_event_tell(stream: list[Message], cause: Cause, signal: str) -> None:
    """The log line before the event names the signal; the status says who wanted the end, a report that it has thrown."""
    (exit_,) = exits(stream)
    assert (exit_.cause, exit_.signal, exit_.name, exit_.began_at, exit_.at) == (cause, signal, "app", 1.0, 5.0)


def test_an_exit_line_of_another_process_lends_nothing() -> None:
    """The signal of one process is never given to another."""
    (exit_,) = exits([exited(0, "SIGKILL", "app:1"), event("exit", status="stopping")])
    assert exit_.signal == ""


def test_a_run_that_began_after_the_announcement_is_not_meant_by_it() -> None:
    """A restart for memory explains the end of the run it ended, and not the ends of later runs."""
    over = log(
        "[PM2][WORKER] Process 0 restarted because it exceeds --max-memory-restart value (current_memory=2 ...)", at=2000
    )
    stream = [
        over,
        event("exit", status="stopping", pm_uptime=1000, at=2100),
        event("exit", status="stopping", pm_uptime=2200, at=2300),
    ]
    assert [record.cause for record in exits(stream)] == [Cause.MEMORY_LIMIT, Cause.MANUAL]


def test_a_crash_of_the_new_worker_during_a_reload_for_memory_is_a_crash() -> None:
    """What PM2 announced for the old worker does not excuse the new one."""
    over = log(
        "[PM2][WORKER] Process 0 restarted because it exceeds --max-memory-restart value (current_memory=2 ...)", at=2000
    )
    stream = [
        over,
        exited(1, "SIGINT"),
        event("exit", pm_uptime=2000, exit_code=1, at=2100),
        event("exit", status="stopping", pm_id="_old_0", pm_uptime=1000, at=2200),
    ]
    assert [record.cause for record in exits(stream)] == [Cause.CRASH, Cause.MEMORY_LIMIT]


@pytest.mark.parametrize(
    "name",
    [
        "x:0] exited with code [1] via signal [SIGKILL",
        "a\nApp [victim:9] exited with code [0] via signal [SIGKILL]\nb",
        "a id:3",
        "%s",
    ],
)
def test_a_name_cannot_forge_a_log_line(name: str) -> None:
    """Lines are read from their end, where PM2 writes and no name reaches."""
    stream = [
        log(f"App [{name}:0] online"),
        log(f"Stopping app:{name} id:0"),
        exited(0, "SIGINT", f"{name}:0"),
        event("exit", name=name, status="stopping"),
        event("exit", name="victim", pm_id=9, status="stopped", exit_code=0),
        event("exit", name="other", pm_id=3, pm_uptime=900),
    ]
    assert [(record.name, record.signal) for record in exits(stream)] == [(name, ""), ("victim", ""), ("other", "")]


def test_what_an_app_sends_itself_forges_nothing() -> None:
    """An app's own message bears the daemon's word for its sender, and no event."""
    sender = {"pm_id": 3, "name": "evil", "namespace": "default"}
    forged = {"event": "exit", "process": {"name": "victim", "pm_id": 0, "pm_uptime": 1, "status": "stopped"}}
    attribution = Attribution()
    stream = [
        ("process:event", json.dumps({"at": 1, "data": forged, "process": sender}).encode()),
        ("log:PM2", json.dumps({"at": 1, "data": "Stopping app:app id:0\n", "process": sender}).encode()),
        ("pm2:kill", json.dumps({"at": 1, "data": {"status": "killed"}, "process": sender}).encode()),
        event("exit", exit_code=1),
    ]
    assert [type(record) for record in records(stream, attribution)] == [Exit]
    assert exits(stream)[0].cause is Cause.CRASH


def test_half_a_surrogate_pair_in_a_name_costs_no_count() -> None:
    """JavaScript may send what is no Unicode; the exit counts all the same."""
    payload = event("exit", name="NAME")[1].replace(b"NAME", b"a\\ud800b")
    (exit_,) = exits([("process:event", payload)])
    assert exit_.name == "a?b"


@pytest.mark.parametrize(
    ("message", "record"),
    [
        (event("online"), Heard("app", "0", 5.0)),
        (event("start", manually=True), Heard("app", "0", 5.0)),
        (event("restart", manually=True), Command("app", "0", "restart", 5.0)),
        (event("restart overlimit"), OverLimit("app", "0", 5.0)),
        (event("whatever"), None),
        (("pm2:kill", b'{"status":"killed","msg":"pm2 has been killed by SIGNAL"}'), DaemonKilled()),
        (
            ("process:exception", b'{"at":5000,"data":{"stack":"x"},"process":{"pm_id":0,"name":"app"}}'),
            Uncaught("app", "0", 5.0),
        ),
        (("log:out", b"{}"), None),
    ],
)
def test_a_message_means_its_record(message: Message, record: Record | None) -> None:
    """What the healer needs to tell its own doing from a crash is told as well."""
    assert next(records([message]), None) == record


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"process":5}',
        b"\xff",
        b"[" * 5000,
        b'{"event":"exit","process":{"name":"a","pm_id":0}}',
    ],
)
def test_what_cannot_be_read_is_counted(payload: bytes) -> None:
    """Nothing is dropped in silence."""
    attribution = Attribution()
    assert attribution.step("process:event", payload) is None
    assert attribution.malformed == 1


def test_pending_state_is_bounded() -> None:
    """An endless number of processes and announcements is held in bounded memory."""
    attribution = Attribution()
    for number in range(3 * RUNS_MAX):
        attribution.step(*log(f"Stopping app:app id:{number}"))
        attribution.step(*event("exit", pm_id=number))
    assert len(attribution._ended) == RUNS_MAX  # noqa: SLF001 -- what is kept is the point
    assert len(attribution._marks) == MARKS_MAX  # noqa: SLF001 -- the same


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["name", "pm_id", "status", "pm_uptime", "exit_code", "stop_exit_codes"]
LINES = [
    "App [app:0] exited with code [0] via signal [SIGKILL]",
    "Stopping app:app id:0",
    "[PM2][WORKER] Process 0 restarted because it exceeds --max-memory-restart value (1)",
    "Change detected on path /x for app app - restarting",
]
PROCESSES = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(FIELDS, JSON)
    | {
        "name": st.just("app") | JSON,
        "pm_id": st.sampled_from([0, "_old_0"]) | JSON,
        "pm_uptime": st.sampled_from([1000, 2000]) | JSON,
    },
)
BODIES = st.fixed_dictionaries(
    {"process": PROCESSES | st.just({"pm_id": "PM2"}) | JSON},
    optional={
        "event": st.sampled_from(["exit", "online", "restart overlimit"]) | JSON,
        "data": st.sampled_from(LINES) | JSON,
        "at": st.integers(0, 5000) | JSON,
        "manually": JSON,
    },
)
MESSAGES = st.tuples(
    st.sampled_from([*sorted(WANTED), "log:out"]) | st.text(max_size=5),
    st.binary(max_size=20) | (BODIES | JSON).map(lambda body: json.dumps(body).encode()),
)
REAL = [message for path in STREAMS for message in read(path)]


@settings(max_examples=300, deadline=None)
@given(st.lists(MESSAGES | st.sampled_from(REAL), max_size=40))
def test_any_messages_in_any_order_never_raise_and_never_end_a_run_twice(stream: list[Message]) -> None:
    """Garbage costs itself: nothing raises, and a run of a process ends once."""
    found = exits(stream)
    runs = [(record.pm_id, record.began_at) for record in found]
    assert len(runs) == len(set(runs))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(STREAMS), st.data())
def test_a_repeated_or_reordered_stream_counts_no_exit_twice(path: Path, data: st.DataObject) -> None:
    """Whatever is sent again, and in whatever order, each run of a process still ends once."""
    stream = read(path)
    once = {(record.pm_id, record.began_at) for record in exits(stream)}
    again = data.draw(st.lists(st.sampled_from(stream), max_size=2 * len(stream)))
    found = [(record.pm_id, record.began_at) for record in exits(stream + again)]
    assert sorted(found) == sorted(once)
