"""PM2's answers to typed values: real ones of four versions, odd ones, and any JSON there is."""

import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from exporter.collectors.pm2 import PM2Collector, PM2Options, Seen
from exporter.exposition import Format, render
from exporter.pm2.client import Reader
from exporter.pm2.process import (
    Listing,
    Monitor,
    NonsenseError,
    Process,
    ReplyError,
    decode_output,
    decode_reply,
    decode_report,
    decode_result,
)

FIXTURES = Path(__file__).parents[2] / "fixtures" / "pm2"
CAPTURED = sorted(path.parent for path in FIXTURES.glob("*/reply.json"))
OUTPUTS = sorted(FIXTURES.glob("output/*.txt"))

SOUND = {"name": "sound", "pm_id": 1, "pid": 10, "pm2_env": {"status": "online"}, "monit": {"cpu": 1.5, "memory": 4096}}


def reply(*rows: object) -> bytes:
    """Return the reply that lists `rows`, as JavaScript would write it."""
    return json.dumps({"args": [rows]}, separators=(",", ":")).encode()


def one(**env: object) -> Process:
    """Return the process whose pm2_env is `env`."""
    (process,) = decode_reply(reply({**SOUND, "pm2_env": {"status": "online", **env}})).processes
    return process


@pytest.mark.parametrize("folder", CAPTURED, ids=lambda path: path.name)
def test_captured_replies_make_their_page(folder: Path) -> None:
    """What each version of PM2 really answered becomes the page beside it."""
    listing = decode_reply((folder / "reply.json").read_bytes())
    assert listing.undecodable == 0
    listing = msgspec.structs.replace(listing, daemon=decode_report((folder / "report.json").read_bytes()))
    collector = PM2Collector(PM2Options(home="/nowhere"), Reader("/nowhere"))
    page = render(collector.metrics(Seen(listing, None, {}, None)), Format.TEXT, account=None).decode()
    assert page == (folder / "metrics.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("status", "created_at", "given_up"),
    [
        ("errored", None, True),
        ("errored", 1, True),
        ("waiting restart", None, True),
        ("waiting restart", 1, False),
        ("online", None, False),
        ("stopped", None, False),
    ],
)
def test_given_up_whatever_the_status_says(status: str, created_at: int | None, given_up: bool) -> None:  # noqa: FBT001 -- a column
    """An app that PM2 will not start again is told from one that waits for its next start."""
    assert one(status=status, created_at=created_at).is_given_up is given_up


@pytest.mark.parametrize("folder", CAPTURED, ids=lambda path: path.name)
def test_environments_are_never_kept(folder: Path) -> None:
    """No variable of an app's or the daemon's environment survives the decoding."""
    listing = decode_reply((folder / "reply.json").read_bytes())
    daemon = decode_report((folder / "report.json").read_bytes())
    assert b"battery staple" in (folder / "reply.json").read_bytes()
    assert "battery staple" not in repr(listing) + repr(daemon)


@pytest.mark.parametrize("path", OUTPUTS, ids=lambda path: path.stem)
def test_captured_output_holds_its_list(path: Path) -> None:
    """What the command really printed, chatter included, gives the processes beside it."""
    expected = json.loads(path.with_suffix(".expected.json").read_text())
    assert [[process.name, process.pm_id] for process in decode_output(path.read_bytes()).processes] == expected


def test_the_captured_estates_agree() -> None:
    """Four versions of PM2 tell the same facts about the same apps."""
    told = [
        sorted((process.name, process.status, process.namespace, process.exec_mode, process.max_memory_restart or 0)
               for process in decode_reply((folder / "reply.json").read_bytes()).processes)
        for folder in CAPTURED
    ]  # fmt: skip
    assert len(told) == 4
    assert told.count(told[0]) == 4


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    *("namespace", "status", "exec_mode", "version", "exec_interpreter", "node_version", "username", "uid", "restart_time"),
    *("unstable_restarts", "pm_uptime", "created_at", "max_memory_restart", "autorestart", "instances", "pm_out_log_path"),
    *("pm_err_log_path", "pmx_module", "axm_monitor", "env"),
]
environments = st.dictionaries(st.sampled_from(FIELDS), anything)
rows = st.fixed_dictionaries(
    {"name": anything, "pm_id": anything, "pid": anything, "monit": anything, "pm2_env": environments | anything}
)


def is_sane(process: Process) -> bool:
    """Tell whether every field has the type and the range it promises."""
    assert msgspec.convert(msgspec.to_builtins(process), Process) == process
    counts = (process.restart_time, process.unstable_restarts, process.memory, process.max_memory_restart, process.pid)
    return bool(process.name) and process.pm_id >= 0 and all(count is None or 0 <= count < 2**63 for count in counts)


@given(row=rows | anything)
def test_any_json_in_any_field_hides_no_other_process(row: object) -> None:
    """Whatever stands in one process's fields, its neighbours are read, and it is read or counted."""
    listing = decode_reply(json.dumps({"args": [[row, SOUND, row]]}).encode("utf-8", "surrogatepass"))
    assert [process for process in listing.processes if process.name == "sound" and process.pid == 10]
    assert len(listing.processes) + listing.undecodable == 3
    assert all(is_sane(process) for process in listing.processes)


units = st.sampled_from(["GiB", "%", "ms", "req/min", ""]) | anything
figures = anything | st.fixed_dictionaries({"value": anything, "unit": units})


@given(monitors=st.dictionaries(st.sampled_from(["Heap Size", "HTTP", "Event Loop Latency", "own"]) | st.text(), figures))
@example({"Heap Size": {"value": "1e308", "unit": "GiB"}})
def test_any_figure_makes_a_page(monitors: dict[str, object]) -> None:
    """Whatever an app publishes, the page can be rendered and no value on it is infinite."""
    processes = (one(axm_monitor=monitors),)
    collector = PM2Collector(PM2Options(home="/nowhere"), Reader("/nowhere"))
    page = render(collector.metrics(Seen(Listing(processes=processes), None, {}, None)), Format.OPENMETRICS).decode()
    assert not [line for line in page.splitlines() if line.endswith(("Inf", "NaN")) and not line.startswith("#")]


@pytest.mark.parametrize(
    "broken",
    [
        rb'{"name":"\ud83d","pm_id":5,"pm2_env":{}}',
        rb'{"name":"x","pm_id":5,"pm2_env":{"LANG":"\udc00"}}',
        b'{"name":"x","pm_id":5,"pm2_env":{"version":1e999}}',
        b'{"name":"\xff\xfe","pm_id":5,"pm2_env":{}}',
        b'{"name":"a]b}c\\"","pm_id":5,"pm2_env":null}',
    ],
    ids=["half-a-pair", "half-a-pair-elsewhere", "beyond-float", "not-utf-8", "brackets-in-text"],
)
def test_what_javascript_may_write_is_read(broken: bytes) -> None:
    """JSON that msgspec refuses as a whole costs nothing: neither the process itself nor its neighbours."""
    sound = json.dumps(SOUND).encode()
    listing = decode_reply(b'{"args":[[' + sound + b"," + broken + b"," + sound + b"]]}")
    assert [process.pm_id for process in listing.processes] == [1, 5, 1]
    assert listing.undecodable == 0


@pytest.mark.parametrize(
    "lost",
    [
        b'{"name":"x","pm_id":5,"pm2_env":{"deep":' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
        b"17",
        b"null",
        b'"text"',
        b"[]",
    ],
    ids=["too-deep", "number", "null", "text", "list"],
)
def test_what_cannot_be_read_is_counted(lost: bytes) -> None:
    """An entry that is no process, or that no parser takes, is counted and hides no other."""
    sound = json.dumps(SOUND).encode()
    listing = decode_reply(b'{"args":[[' + lost + b"," + sound + b"," + lost + b"," + lost + b"]]}")
    assert [process.name for process in listing.processes] == ["sound"]
    assert listing.undecodable == 3


def test_no_processes_is_a_list() -> None:
    """A daemon without apps is up and has none."""
    assert decode_reply(b'{"args":[[]]}') == Listing()


@pytest.mark.parametrize(
    "answer",
    [b"", b"[]", b"{}", b'{"args":[]}', b'{"args":[5]}', b'{"args":[{"a":1}]}', b'{"args":[[{"a":1}', b'{"args":[[{"'],
)  # fmt: skip
def test_no_list_is_nonsense(answer: bytes) -> None:
    """A reply without a process list, or cut in the middle, is no empty list."""
    with pytest.raises(NonsenseError):
        decode_reply(answer)


def test_errors_are_pm2s_own_words_bounded() -> None:
    """An error reply raises PM2's words on one line, bounded, without the stack."""
    answer = json.dumps({"error": "id\nunknown " + "x" * 999, "stack": "at God"}).encode()
    for decode in (decode_reply, decode_report, decode_result):
        with pytest.raises(ReplyError) as caught:
            decode(answer)
        assert str(caught.value).startswith("id unknown xxx")
        assert len(str(caught.value)) == 200


@pytest.mark.parametrize(
    ("status", "pid"), [("stopped", 0), ("errored", 0), ("waiting restart", 0), ("online", 10), ("new", 10)]
)
def test_a_dead_pid_is_not_believed(status: str, pid: int) -> None:
    """PM2 keeps naming the pid of a process that died, which another may have by now: where none can be, it is 0."""
    assert one(status=status).pid == pid


@pytest.mark.parametrize(
    ("entry", "monitor"),
    [
        ({"value": "6.98", "unit": "MiB"}, (6.98, "MiB")),
        ({"value": "-0.01", "unit": "ms"}, (-0.01, "ms")),
        ({"value": "12.5ms"}, (12.5, "ms")),
        ({"value": " 3 req/min "}, (3.0, "req/min")),
        ({"value": "98%", "unit": "other"}, (98.0, "%")),
        ({"value": 5}, (5.0, "")),
        ({"value": "1e3"}, (1000.0, "")),
        ({"value": True}, (1.0, "")),
        ({"value": 5, "unit": {"a": 1}}, (5.0, "")),
        (7, (7.0, "")),
        ("7.5 MB", (7.5, "MB")),
        ({"value": "N/A"}, None),
        ({"value": ""}, None),
        ({"value": "1.2.3"}, None),
        ({"value": "1,234"}, None),
        ({"value": "1e999"}, None),
        ({"value": "Infinity"}, None),
        ({"value": None}, None),
        ({"value": {"value": 5}}, None),
        ({}, None),
        (None, None),
        ([1], None),
    ],
)
def test_figures_of_every_shape(entry: object, monitor: tuple[float, str] | None) -> None:
    """Figures come as text and as numbers, with their unit beside or behind them; what is no figure is not seen."""
    assert one(axm_monitor={"m": entry}).monitors == ((Monitor("m", *monitor),) if monitor else ())


@pytest.mark.parametrize(
    ("limit", "size"),
    [(209715200, 209715200), ("200M", 209715200), ("1G", 1073741824), ("512", 512), (0, None), ("", None), ("a lot", None),
     (-5, None), (True, None), (1.5, None)],
)  # fmt: skip
def test_memory_limits(limit: object, size: int | None) -> None:
    """A memory limit is bytes, or text as people write it for PM2; 0 is none."""
    assert one(max_memory_restart=limit).max_memory_restart == size


def test_numbers_may_come_as_text() -> None:
    """An environment variable that overrides a field makes it text."""
    process = one(
        restart_time="3", instances="2", pm_uptime="1795503750206", autorestart="false", uid="1001", username="root"
    )
    assert (process.restart_time, process.instances, process.started_at) == (3, 2, 1795503750.206)
    assert (process.autorestart, process.user) == (False, "1001")


@pytest.mark.parametrize("path", ["relative.log", "", None, 5, "/nul\0l", ["/a"]])
def test_only_absolute_log_paths(path: object) -> None:
    """What is no absolute path is never looked at."""
    assert one(pm_out_log_path=path).out_log == ""


LIST = json.dumps([SOUND, {**SOUND, "name": 'say "[{" \x1b[1m', "pm_id": 2}], separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "chatter",
    [
        b"",
        b"[PM2] Spawning PM2 daemon with pm2_home=/home/x/.pm2\n[PM2] PM2 Successfully daemonized\n",
        b"\x1b[31m\x1b[1m>>>> In-memory PM2 is out-of-date, do:\x1b[22m\x1b[39m\n",
        b'[{not json}] and [] and [{ "open\n',
        b'warning: [{"a":1}] is deprecated [{}]\n',
        b"\x1b]0;title [{\x07\r\n[]\n",
        b"\xff\xfe garbage [\n",
        b"no newline before the list: ",
    ],
)  # fmt: skip
@pytest.mark.parametrize("after", [b"", b"\n", b"\r\n", b"\n[PM2][WARN] bye [{}] []\n", b"\x1b[0m"])
def test_chatter_around_the_list(chatter: bytes, after: bytes) -> None:
    """Banners, colours and brackets before and after the list do not hide it."""
    listing = decode_output(chatter + LIST + after)
    assert [process.pm_id for process in listing.processes] == [1, 2]
    assert listing.undecodable == 0


@pytest.mark.parametrize(
    "output", [b"[]", b"[]\n", b"hello [PM2]\n [ ] \r\nbye [x]\n", b"\x1b[32m[PM2]\x1b[0m\n\x1b[1m[]\x1b[0m\n"]
)
def test_an_empty_list_stands_alone_on_its_line(output: bytes) -> None:
    """No apps is an empty list on a line of its own, so that no brackets in chatter mean no apps."""
    assert decode_output(output) == Listing()


@pytest.mark.parametrize(
    "output", [b"", b"[PM2] loaded [] modules\n", LIST[:-1], LIST[: len(LIST) // 2], b"[{}]", b"[[]]", b"[" * 9999]
)
def test_no_list_in_the_output_is_nonsense(output: bytes) -> None:
    """Chatter alone, and a list that was cut off, are no list."""
    with pytest.raises(NonsenseError):
        decode_output(output)


@given(before=st.binary(max_size=60), after=st.binary(max_size=60))
def test_any_output_is_a_list_or_nonsense(before: bytes, after: bytes) -> None:
    """Whatever a command prints, decoding it gives a list or NonsenseError."""
    for output in (before + after, before + LIST + after):
        with contextlib.suppress(NonsenseError):
            decode_output(output)


@given(report=anything)
def test_any_report_is_a_daemon_or_nonsense(report: object) -> None:
    """Whatever a daemon says of itself, it is read or refused."""
    try:
        decode_report(json.dumps({"args": [report]}).encode("utf-8", "surrogatepass"))
    except NonsenseError:
        assert not isinstance(report, dict)
