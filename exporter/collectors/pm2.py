"""What PM2 says of its processes and itself, and what the configuration expects of them.

Where PM2 cannot be asked, `pm2_up` is 0, `pm2_down_reason` says why, and nothing is said about processes.
"""

import asyncio
import logging
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from exporter.exposition import Desc, Metric, Row, counter, gauge, single, summary
from exporter.grammar import Duration, Size, Strict, default
from exporter.pm2.client import PM2Error, Reader, Reason, Shared, Source
from exporter.pm2.command import Command, check
from exporter.pm2.process import Listing, Monitor, Process, Status

log = logging.getLogger("pm2")

_APP = ("name", "pm_id")

UP = gauge("pm2_up", "Whether PM2's daemon answered (1) or not (0).", source="getMonitorData over rpc.sock, or the command")
DOWN_REASON = gauge(
    "pm2_down_reason",
    "1 for the reason why PM2 could not be asked, 0 for the others: "
    "no_socket (ended cleanly or never started), refused (crashed), permission, timeout (frozen), disconnected, nonsense, "
    "too_large, rejected, no_daemon (the command found none), command_missing, command_failed, unreachable.",
    ("reason",),
    source="the attempt to ask PM2",
)
DAEMON_INFO = gauge(
    "pm2_daemon_info",
    "PM2's daemon; the value is always 1.",
    ("pm2_version", "node_version", "user"),
    source="PM2 getReport",
)
DAEMON_START = gauge(
    "pm2_daemon_start_time_seconds", "When PM2's daemon started, as Unix time.", source="PM2 getReport started_at"
)
PROCESSES = gauge(
    "pm2_processes",
    "Processes in PM2's list, by status; every status that PM2 knows is there, others when they occur.",
    ("status",),
    source="PM2 pm2_env.status",
)
UNDECODABLE = gauge(
    "pm2_processes_undecodable",
    "Entries in PM2's list that could not be read as a process, and so are missing from every other metric.",
    source="PM2 getMonitorData",
)
INFO = gauge(
    "pm2_process_info",
    "Facts about the process; the value is always 1. The version is that of its package.json, the user is whom PM2 started "
    "it as, node_version is empty for what Node.js does not run.",
    (*_APP, "namespace", "exec_mode", "version", "interpreter", "node_version", "user"),
    source="PM2 pm2_env",
)
MODULE = gauge(
    "pm2_process_module",
    "Whether the process is a PM2 module (1), added with `pm2 install`, or an app (0).",
    _APP,
    source="PM2 pm2_env.pmx_module",
)
STATUS = gauge(
    "pm2_process_status",
    "1 for the status that the process has, 0 for the others that PM2 knows.",
    (*_APP, "status"),
    source="PM2 pm2_env.status",
)
GIVEN_UP = gauge(
    "pm2_process_given_up",
    "Whether PM2 has given up on the process (1): it died max_restarts times in a row and will not be started again. It is "
    'errored or, beside a restart delay, "waiting restart" for good.',
    _APP,
    source="PM2 pm2_env.status, created_at",
)
RESTARTS = counter(
    "pm2_process_restarts_total",
    "Restarts of every kind, those by hand too, since the process was added or `pm2 reset`.",
    _APP,
    source="PM2 pm2_env.restart_time",
)
UNSTABLE = gauge(
    "pm2_process_unstable_restarts",
    "Restarts in a row that PM2 calls unstable: the process died within min_uptime. At max_restarts PM2 gives up.",
    _APP,
    source="PM2 pm2_env.unstable_restarts",
)
START = gauge(
    "pm2_process_start_time_seconds",
    "When the process was last started, as Unix time; only while it runs.",
    _APP,
    source="PM2 pm2_env.pm_uptime",
)
CREATED = gauge(
    "pm2_process_created_timestamp_seconds",
    "When the process was added to PM2's list or `pm2 reset`, as Unix time.",
    _APP,
    source="PM2 pm2_env.created_at",
)
CPU = gauge(
    "pm2_process_cpu_ratio",
    "CPU use of the main process since anybody last asked PM2, 1 is one core: with several readers it is noise, "
    "and pm2_process_cpu_seconds_total is not. Only while it runs.",
    _APP,
    source="PM2 monit.cpu",
)
MAX_MEMORY = gauge(
    "pm2_process_max_memory_restart_bytes",
    "Memory above which PM2 restarts the process.",
    _APP,
    source="PM2 pm2_env.max_memory_restart",
)
LATENCY = summary(
    "pm2_process_event_loop_latency_seconds",
    "Latency of the event loop, by quantile, as the app measures it; what it measures below zero is 0.",
    (*_APP, "quantile"),
    source="PM2 pm2_env.axm_monitor Event Loop Latency",
)
HEAP_USED = gauge("pm2_process_heap_used_bytes", "V8 heap in use.", _APP, source="PM2 pm2_env.axm_monitor Used Heap Size")
HEAP_TOTAL = gauge("pm2_process_heap_total_bytes", "V8 heap allocated.", _APP, source="PM2 pm2_env.axm_monitor Heap Size")
HANDLES = gauge(
    "pm2_process_active_handles",
    "Handles that keep the event loop alive.",
    _APP,
    source="PM2 pm2_env.axm_monitor Active handles",
)
REQUESTS = gauge(
    "pm2_process_active_requests",
    "Requests of the event loop under way.",
    _APP,
    source="PM2 pm2_env.axm_monitor Active requests",
)
HTTP_RATE = gauge(
    "pm2_process_http_requests_per_second",
    "HTTP requests that the app serves, as it measures them.",
    _APP,
    source="PM2 pm2_env.axm_monitor HTTP",
)
HTTP_LATENCY = summary(
    "pm2_process_http_latency_seconds",
    "Latency of the HTTP requests that the app serves, by quantile, as it measures them.",
    (*_APP, "quantile"),
    source="PM2 pm2_env.axm_monitor HTTP Mean Latency, HTTP P95 Latency",
)
CUSTOM = gauge(
    "pm2_process_custom_metric",
    "What the app publishes itself; in seconds, bytes, ratio or requests_per_second where its unit can be turned into one.",
    (*_APP, "metric", "unit"),
    source="PM2 pm2_env.axm_monitor",
)
CUSTOM_DROPPED = gauge(
    "pm2_custom_metrics_dropped",
    "Metrics published by apps that were left out, as they were more than pm2.custom_metrics for one process.",
    source="PM2 pm2_env.axm_monitor",
)
LOG_BYTES = gauge(
    "pm2_log_file_bytes",
    "Size of the process's log file, by stream (out, err); instances that share a file show it each.",
    (*_APP, "stream"),
    source="stat of PM2 pm2_env.pm_out_log_path, pm_err_log_path",
)
DUMP = gauge(
    "pm2_dump_timestamp_seconds",
    "When the list that `pm2 resurrect` starts was saved, as Unix time.",
    source="stat of dump.pm2",
)
EXPECTED = gauge(
    "pm2_app_expected",
    "Whether the configuration expects the app to run (1) or not (0).",
    ("name",),
    source="configuration, pm2.apps.NAME.expected",
)
DESIRED = gauge(
    "pm2_app_instances_desired",
    "How many instances of the app the configuration wants.",
    ("name",),
    source="configuration, pm2.apps.NAME.instances",
)
DESCS: tuple[Desc, ...] = (
    *(UP, DOWN_REASON, DAEMON_INFO, DAEMON_START, PROCESSES, UNDECODABLE, INFO, MODULE, STATUS, GIVEN_UP, RESTARTS),
    *(
        UNSTABLE,
        START,
        CREATED,
        CPU,
        MAX_MEMORY,
        LATENCY,
        HEAP_USED,
        HEAP_TOTAL,
        HANDLES,
        REQUESTS,
        HTTP_RATE,
        HTTP_LATENCY,
        CUSTOM,
    ),
    *(CUSTOM_DROPPED, LOG_BYTES, DUMP, EXPECTED, DESIRED),
)


class AppOptions(Strict, frozen=True, kw_only=True):
    """What is expected of one app."""

    expected: bool = True
    """Whether it is to run: an app that is expected and does not run is an alert. Default true."""
    instances: int | None = None
    """How many instances are wanted; default: no particular number."""

    def __post_init__(self) -> None:
        """Hold the rule that a number of instances is a number of things."""
        if self.instances is not None and self.instances < 0:
            raise ValueError("instances must not be negative")


class PM2Options(Strict, frozen=True, kw_only=True):
    """The PM2 whose processes are watched (`pm2_*`). One exporter watches one PM2 home."""

    home: str = ""
    """PM2's home folder, where rpc.sock is; default: the environment variable PM2_HOME, else ~/.pm2."""
    timeout: Duration = default(Duration(5))
    """How long PM2 may take to answer; never beyond the scrape's deadline. Default 5s."""
    max_reply: Size = default(Size(32 * 1024 * 1024))
    """The largest answer that is read; PM2 sends some 6 kB a process. Default 32MiB."""
    command: tuple[str, ...] = ()
    """A program and its arguments that print what `pm2 jlist` prints, for where rpc.sock cannot be reached; default: none.

    It is run without a shell at each scrape and killed after `timeout`. It never starts a PM2 daemon: PM2_LOG_FILE_PATH is
    set to a path that makes PM2 fail where none runs. What does not hand the environment on must be told to, as in
    [sudo, -n, -u, deploy, env, PM2_LOG_FILE_PATH=/dev/null/pm2-is-not-running, timeout, "5", pm2, jlist] or
    [docker, exec, -e, PM2_LOG_FILE_PATH=/dev/null/pm2-is-not-running, web, timeout, "5", pm2, jlist].
    """
    files: bool = True
    """Whether PM2's files (logs, dump) are on this machine, at the paths that PM2 says, to be looked at; default true."""
    custom_metrics: int = 50
    """How many metrics of its own one process may publish; the first by name are taken. Default 50."""
    apps: dict[str, AppOptions] = default({})
    """What is expected of apps, by name; default: nothing. Each shows as pm2_app_expected and pm2_app_instances_desired."""

    def __post_init__(self) -> None:
        """Hold the rules that a command cannot start a daemon and that numbers make sense."""
        if "\0" in self.home:
            raise ValueError("home must not hold a null character")
        if self.command:
            check(self.command)
        if self.timeout <= 0:
            raise ValueError("timeout must be longer than 0")
        if self.max_reply <= 0:
            raise ValueError("max_reply must be more than 0")
        if self.custom_metrics < 0:
            raise ValueError("custom_metrics must not be negative")
        if "" in self.apps:
            raise ValueError("apps: a name must not be empty")


def home(options: PM2Options, environ: Mapping[str, str]) -> Path:
    """Return the PM2 home that is watched."""
    wanted = options.home or environ.get("PM2_HOME") or "~/.pm2"
    return Path(os.path.expanduser(wanted)).absolute()  # noqa: PTH111 -- Path's raises where there is no home


def source(options: PM2Options, environ: Mapping[str, str]) -> Source:
    """Return where the process list comes from, shared by all who ask at the same moment."""
    asked: Source = Reader(home(options, environ), max_reply=options.max_reply)
    if options.command:
        environ = {**environ, "PM2_HOME": str(home(options, environ))}
        asked = Command(options.command, environ=environ, max_reply=options.max_reply)
    return Shared(asked, longest=options.timeout)


class Seen(NamedTuple):
    """One look at PM2 and its files."""

    listing: Listing | None
    """None where PM2 could not be asked."""
    reason: Reason | None
    log_bytes: Mapping[str, int]
    """The sizes of the log files that could be looked at in time, by path."""
    dumped: float | None
    """Unix time in seconds of the last `pm2 save`; None where there is none, or it could not be looked at."""


class PM2Collector:
    """Asks PM2, and looks at its files, at each scrape; remembers only what it last logged."""

    descs = DESCS

    def __init__(self, options: PM2Options, source: Source, *, environ: Mapping[str, str] | None = None) -> None:
        """Ask `source`; `environ` (default: this process's) says where PM2's home is if the options do not."""
        self._options = options
        self._source = source
        self._dump = str(home(options, os.environ if environ is None else environ) / "dump.pm2")
        self._files = _Files()
        self._logged: Reason | None = None

    async def read(self, within: float) -> Seen:
        """Ask PM2 and look at its files; a failure is part of what is seen."""
        deadline = time.monotonic() + within
        listing: Listing | None = None
        reason: Reason | None = None
        try:
            listing = await self._source.listing(within)
        except PM2Error as error:
            reason = error.reason
            if reason is not self._logged:
                log.warning("PM2 cannot be asked", extra={"reason": str(reason), "error": str(error)})
        else:
            if self._logged is not None:
                log.info("PM2 answers again")
        self._logged = reason
        if not self._options.files:
            return Seen(listing, reason, {}, None)
        logs = {path for process in listing.processes for path in (process.out_log, process.err_log)} if listing else set()
        found = await self._files.look([self._dump, *sorted(logs - {""})], deadline - time.monotonic())
        dump = found.pop(self._dump, None)
        return Seen(listing, reason, {path: file.size for path, file in found.items()}, dump.modified if dump else None)

    def metrics(self, seen: Seen) -> Iterable[Metric]:
        """Say what was seen."""
        apps = self._options.apps.items()
        yield single(UP, int(seen.listing is not None))
        yield Metric(DOWN_REASON, [((str(reason),), int(reason is seen.reason)) for reason in Reason])
        yield single(DUMP, seen.dumped)
        yield Metric(EXPECTED, [((name,), int(app.expected)) for name, app in apps])
        yield Metric(DESIRED, [((name,), app.instances) for name, app in apps])
        if seen.listing is not None:
            yield from _daemon(seen.listing)
            yield from _processes(seen.listing.processes)
            yield from _published(seen.listing.processes, self._options.custom_metrics)
            yield Metric(LOG_BYTES, list(_logs(seen.listing.processes, seen.log_bytes)))


def _daemon(listing: Listing) -> Iterable[Metric]:
    counts: dict[str, int] = dict.fromkeys(_STATUSES, 0)
    for process in listing.processes:
        status = _status(process)
        counts[status] = counts.get(status, 0) + 1
    yield Metric(PROCESSES, [((status,), count) for status, count in counts.items()])
    yield single(UNDECODABLE, listing.undecodable)
    if (daemon := listing.daemon) is not None:
        yield Metric(DAEMON_INFO, [((daemon.pm2_version, daemon.node_version, daemon.user), 1)])
        yield single(DAEMON_START, daemon.started_at)


def _status(process: Process) -> str:
    return process.status or "unknown"


def _known(text: str) -> str:
    return "" if text == "N/A" else text


def _processes(processes: Iterable[Process]) -> Iterable[Metric]:
    info: list[Row] = []
    module: list[Row] = []
    status: list[Row] = []
    given_up: list[Row] = []
    restarts: list[Row] = []
    unstable: list[Row] = []
    started: list[Row] = []
    created: list[Row] = []
    cpu: list[Row] = []
    max_memory: list[Row] = []
    for process in processes:
        app = process.name, str(process.pm_id)
        facts = (
            process.namespace or "default",
            process.exec_mode.removesuffix("_mode"),
            _known(process.version),
            process.interpreter,
            _known(process.node_version),
            process.user,
        )
        info.append(((*app, *facts), 1))
        module.append((app, int(process.is_module)))
        now = _status(process)
        name, pm_id = app
        status += [((name, pm_id, state), 1 if state == now else 0) for state in _STATUSES]
        if now not in _STATUSES:
            status.append(((name, pm_id, now), 1))
        given_up.append((app, int(process.is_given_up)))
        restarts.append((app, process.restart_time))
        unstable.append((app, process.unstable_restarts))
        started.append((app, process.started_at if process.is_running else None))
        created.append((app, process.created_at))
        cpu.append((app, round(process.cpu / 100, 6) if process.is_running and process.cpu is not None else None))
        max_memory.append((app, process.max_memory_restart))
    yield Metric(INFO, info)
    yield Metric(MODULE, module)
    yield Metric(STATUS, status)
    yield Metric(GIVEN_UP, given_up)
    yield Metric(RESTARTS, restarts)
    yield Metric(UNSTABLE, unstable)
    yield Metric(START, started)
    yield Metric(CREATED, created)
    yield Metric(CPU, cpu)
    yield Metric(MAX_MEMORY, max_memory)


# Plain text, for an enum's members are slow to hash, and there is a sample for each of them and each process.
_STATUSES = tuple([str(status) for status in Status])


class _Standard(NamedTuple):
    """What one of the figures is that PM2's own library publishes."""

    desc: Desc | None
    """None where it only repeats others."""
    unit: str
    """Where the figure has none."""
    base: str
    quantile: str = ""


_STANDARD = {
    "Used Heap Size": _Standard(HEAP_USED, "MiB", "bytes"),
    "Heap Size": _Standard(HEAP_TOTAL, "MiB", "bytes"),
    "Heap Usage": _Standard(None, "%", "ratio"),
    "Event Loop Latency": _Standard(LATENCY, "ms", "seconds", "0.5"),
    "Event Loop Latency p95": _Standard(LATENCY, "ms", "seconds", "0.95"),
    "Active handles": _Standard(HANDLES, "", ""),
    "Active requests": _Standard(REQUESTS, "", ""),
    "HTTP": _Standard(HTTP_RATE, "req/min", "requests_per_second"),
    # Called the mean, but of the type internal/http/builtin/latency/p50, and measured so.
    "HTTP Mean Latency": _Standard(HTTP_LATENCY, "ms", "seconds", "0.5"),
    "HTTP P95 Latency": _Standard(HTTP_LATENCY, "ms", "seconds", "0.95"),
}

_UNITS = {
    unit: (factor, base)
    for base, units in {
        "seconds": {
            "ns": 1e-9,
            "us": 1e-6,
            "µs": 1e-6,
            "μs": 1e-6,
            "ms": 1e-3,
            "s": 1.0,
            "sec": 1.0,
            "min": 60.0,
            "h": 3600.0,
        },
        "bytes": {
            "B": 1.0,
            "kB": 1e3,
            "KB": 1e3,
            "MB": 1e6,
            "GB": 1e9,
            "TB": 1e12,
            "KiB": 2.0**10,
            "MiB": 2.0**20,
            "GiB": 2.0**30,
            "TiB": 2.0**40,
        },
        "ratio": {"%": 0.01},
        "requests_per_second": {"req/s": 1.0, "req/sec": 1.0, "req/min": 1 / 60},
    }.items()
    for unit, factor in units.items()
}


def _in_base_unit(value: float, unit: str) -> tuple[float | None, str]:
    factor, base = _UNITS.get(unit, (1.0, unit))
    value *= factor
    return value if math.isfinite(value) else None, base


def _published(processes: Iterable[Process], most: int) -> Iterable[Metric]:
    """Yield what the apps that run publish; what one published before it ended means nothing any more."""
    rows: dict[str, tuple[Desc, list[Row]]] = {
        found.desc.name: (found.desc, []) for found in _STANDARD.values() if found.desc is not None
    }
    custom: list[Row] = []
    dropped = 0
    for process in processes:
        if not process.is_running:
            continue
        app = process.name, str(process.pm_id)
        own: list[Monitor] = []
        for monitor in process.monitors:
            known = _STANDARD.get(monitor.name)
            value, base = _in_base_unit(monitor.value, monitor.unit or known.unit) if known else (None, "")
            if known is None or base != known.base:
                own.append(monitor)
            elif known.desc is LATENCY:
                rows[LATENCY.name][1].append(((*app, known.quantile), None if value is None else max(value, 0.0)))
            elif known.desc is not None:
                rows[known.desc.name][1].append(((*app, known.quantile) if known.quantile else app, value))
        own.sort(key=lambda monitor: monitor.name)
        dropped += max(0, len(own) - most)
        for monitor in own[:most]:
            value, base = _in_base_unit(monitor.value, monitor.unit)
            custom.append(((*app, monitor.name, base), value))
    for desc, found in rows.values():
        yield Metric(desc, found)
    yield Metric(CUSTOM, custom)
    yield single(CUSTOM_DROPPED, dropped)


def _logs(processes: Iterable[Process], sizes: Mapping[str, int]) -> Iterable[Row]:
    for process in processes:
        for stream, path in (("out", process.out_log), ("err", process.err_log)):
            yield (process.name, str(process.pm_id), stream), sizes.get(path)


class _File(NamedTuple):
    size: int
    modified: float


_LOOKED_WITHIN = 1.0
"""Seconds; a look at a few hundred files on a local disk takes milliseconds."""


class _Look(NamedTuple):
    """One look under way."""

    found: dict[str, _File]
    begun: float
    done: asyncio.Event


class _Files:
    """Looks at files in a thread, one look at a time: a log file on a dead network share can make stat(2) hang for good."""

    def __init__(
        self, stat_of: Callable[[str], os.stat_result] = os.stat, thread: Callable[..., threading.Thread] = threading.Thread
    ) -> None:
        self._stat_of, self._thread = stat_of, thread
        self._look: _Look | None = None

    async def look(self, paths: Sequence[str], within: float) -> dict[str, _File]:
        """Return the regular files among `paths` that could be looked at in time; none while an earlier look hangs."""
        now = time.monotonic()
        look = self._look
        if look is None or look.done.is_set():
            try:
                look = self._look = self._begin(paths, now)
            except RuntimeError:  # no thread can be had; what PM2 says is worth no less for that
                return {}
        left = min(within, look.begun + _LOOKED_WITHIN - now)
        if left <= 0:
            return {}
        with suppress(TimeoutError):
            async with asyncio.timeout(left):
                await look.done.wait()
        return look.found.copy()

    def _begin(self, paths: Sequence[str], now: float) -> _Look:
        loop = asyncio.get_running_loop()
        look = _Look({}, now, asyncio.Event())

        def run() -> None:
            try:
                self._stat_each(paths, look.found, until=now + _LOOKED_WITHIN)
            finally:
                with suppress(RuntimeError):  # the loop may be closed by now
                    loop.call_soon_threadsafe(look.done.set)

        self._thread(target=run, name="PM2's files", daemon=True).start()
        return look

    def _stat_each(self, paths: Iterable[str], found: dict[str, _File], *, until: float) -> None:
        for path in paths:
            if time.monotonic() > until:
                return
            with suppress(OSError, ValueError):
                seen = self._stat_of(path)
                if stat.S_ISREG(seen.st_mode):
                    found[path] = _File(seen.st_size, seen.st_mtime)
