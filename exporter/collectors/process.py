"""What each app's whole process tree uses: CPU, memory, descriptors, threads, I/O, context switches.

An app is a (name, pm_id) of PM2's list; its tree is PM2's child and all below it, so that an npm wrapper or a shell script
is measured with what it started. A process below another app's root is that app's.

The counters tell what the app's processes used since the exporter first looked, and go on when PM2 restarts the app: they
never run backwards, whatever ends. They start at 0 with the exporter, as it cannot know how far its predecessor counted: to
Prometheus, a counter that falls was reset to 0, so whatever else it came back with would count as used within one interval,
hours of CPU time perhaps, and raise alerts. `Ledger` says how the dead are counted.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from exporter.exposition import Desc, Metric, Row, counter, gauge
from exporter.grammar import Strict
from exporter.pm2.client import Source
from exporter.pm2.process import Listing
from exporter.proc import TICKS_PER_SECOND, Proc, Stat, Usage, trees

_APP = ("name", "pm_id")
_SINCE = "Counts from the exporter's first look, and goes on when PM2 restarts the app."

CPU = counter(
    "pm2_process_cpu_seconds_total",
    "CPU time that the app's process tree used, by mode (user, system), with children that lived and died between two "
    f"scrapes, where their parent waited for them. {_SINCE}",
    (*_APP, "mode"),
    source="/proc/PID/stat utime, stime, cutime, cstime",
)
RESIDENT = gauge(
    "pm2_process_resident_memory_bytes",
    "Resident memory of the app's process tree; memory that processes share counts in each of them.",
    _APP,
    source="/proc/PID/status VmRSS",
)
VIRTUAL = gauge(
    "pm2_process_virtual_memory_bytes", "Virtual memory of the app's process tree.", _APP, source="/proc/PID/stat vsize"
)
SWAP = gauge(
    "pm2_process_swap_bytes",
    "Memory of the app's process tree that is swapped out.",
    _APP,
    source="/proc/PID/status VmSwap",
)
OPEN_FDS = gauge(
    "pm2_process_open_fds",
    "Open file descriptors of the one process of the app's tree that is closest to its limit (pm2_process_max_fds is that "
    "limit): a limit holds for one process, so a sum over the tree would tell nothing of it.",
    _APP,
    source="/proc/PID/fd",
)
MAX_FDS = gauge(
    "pm2_process_max_fds",
    "Most file descriptors that the process counted in pm2_process_open_fds may have open (its soft limit).",
    _APP,
    source="/proc/PID/limits Max open files",
)
TREE_OPEN_FDS = gauge(
    "pm2_process_tree_open_fds", "Open file descriptors of all processes of the app's tree.", _APP, source="/proc/PID/fd"
)
THREADS = gauge("pm2_process_threads", "Threads of the app's process tree.", _APP, source="/proc/PID/stat num_threads")
SWITCHES = counter(
    "pm2_process_context_switches_total",
    "Context switches of the main thread (Node's event loop) of each process of the app's tree, by kind (voluntary, "
    f"involuntary). {_SINCE}",
    (*_APP, "kind"),
    source="/proc/PID/status voluntary_ctxt_switches, nonvoluntary_ctxt_switches",
)
READ = counter(
    "pm2_process_read_bytes_total",
    f"Bytes that the app's process tree had read from storage. {_SINCE} Missing where a process's I/O may not be seen.",
    _APP,
    source="/proc/PID/io read_bytes",
)
WRITTEN = counter(
    "pm2_process_written_bytes_total",
    f"Bytes that the app's process tree had written to storage. {_SINCE} Missing where a process's I/O may not be seen.",
    _APP,
    source="/proc/PID/io write_bytes",
)
PROCESSES = gauge(
    "pm2_process_tree_processes",
    "Processes of the app's tree, itself among them, zombies not; 0 when it is not running.",
    _APP,
    source="/proc/PID/stat ppid, state",
)
DESCS: tuple[Desc, ...] = (
    CPU,
    RESIDENT,
    VIRTUAL,
    SWAP,
    OPEN_FDS,
    MAX_FDS,
    TREE_OPEN_FDS,
    THREADS,
    SWITCHES,
    READ,
    WRITTEN,
    PROCESSES,
)


class ProcessOptions(Strict, frozen=True, kw_only=True):
    """Usage of each app's process tree. There is nothing to set.

    PM2's pids must mean the same processes here: where PM2 is asked in another container, this collector is to be off.
    """


App = tuple[str, str]
"""Name and pm_id, as the labels say them."""

Counts = tuple[int, int, int, int, int, int]
"""CPU ticks in user and system mode, voluntary and involuntary context switches, bytes read and written."""

_ZERO: Counts = (0, 0, 0, 0, 0, 0)


class Reading(NamedTuple):
    """The counts of one process at one look."""

    app: App
    ppid: int
    start: int
    own: Counts
    """What only this process used."""
    mixed: Counts
    """Where the kernel adds what reaped descendants used: cutime and cstime, and all of the I/O."""
    sees_io: bool = True


class Ledger:
    """The running totals of every app. Pure: readings in, totals out.

    When a process ends and is waited for, the kernel adds all it ever used to its parent's `mixed` counts; when it is not
    (its parent died first, or ignores SIGCHLD), that is lost. So what a process is seen to use counts at once; when it is
    gone, that much is owed, and the `mixed` counts add only what they grew by beyond what is owed. Therefore:

    * totals never shrink, and never exceed what was used: nothing counts twice;
    * where every child is waited for, nothing is missing, short-lived children included, at the latest one look later;
    * where one is not, what it used after the last look is missing; and what it had used before may once hide as much of
      what its relatives' short-lived children used (for I/O: of what its relatives used) between these looks.

    A parent may be read just before it waits for a child that is then found gone; so an unpaid debt stands one more look.
    """

    def __init__(self) -> None:
        """Start with nothing seen; the first look is where every count starts."""
        self.totals: dict[App, Counts] = {}
        self._readings: dict[int, Reading] = {}
        self._unpaid: dict[App, Counts] = {}
        self._first: int | None = None

    def post(self, readings: Mapping[int, Reading], *, table: Mapping[int, Stat], apps: Collection[App]) -> None:
        """Add one look: the `readings` of all processes in the apps' trees, the `table` of all there are, and all apps."""
        if self._first is None:
            self._first = max((stat.start for stat in table.values()), default=0)
        own: dict[App, Counts] = {}
        mixed: dict[App, Counts] = {}
        posted: dict[int, Reading] = {}
        for pid, now in readings.items():
            then = self._before(pid, now)
            own[now.app] = _sum(own.get(now.app, _ZERO), _growth(then.own, now.own))
            grown = _growth(then.mixed, now.mixed)
            if not (then.sees_io and now.sees_io):
                grown = (*grown[:4], 0, 0)
            mixed[now.app] = _sum(mixed.get(now.app, _ZERO), grown)
            # What was seen of the I/O before it was hidden stays known, for it has been counted.
            posted[pid] = now if now.sees_io else now._replace(mixed=(*now.mixed[:4], *then.mixed[4:]))
        owed = self._owed(readings, table)
        unpaid, self._unpaid = self._unpaid, {}
        self.totals = {app: self.totals.get(app, _ZERO) for app in apps if app in self.totals or app in own}
        for app, used in own.items():
            due = _sum(unpaid.get(app, _ZERO), owed.get(app, _ZERO))
            self.totals[app] = _sum(self.totals[app], _sum(used, _growth(due, mixed[app])))
            if app in owed:
                self._unpaid[app] = _least(_growth(mixed[app], due), owed[app])
        self._readings = posted

    def _before(self, pid: int, now: Reading) -> Reading:
        """Return what a process had used by the last look; nothing if it is new, all if it is older than the first look."""
        then = self._readings.get(pid)
        if then is not None and then.start == now.start:
            return then
        is_new = self._first is not None and now.start > self._first
        return Reading(now.app, now.ppid, now.start, _ZERO, _ZERO) if is_new else now

    def _owed(self, readings: Mapping[int, Reading], table: Mapping[int, Stat]) -> dict[App, Counts]:
        """Return what had been counted of processes that are gone, and may have gone into an ancestor's counts since."""
        before = self._readings
        stayed = {pid for pid, then in before.items() if pid in readings and readings[pid].start == then.start}
        owed: dict[App, Counts] = {}
        for pid, then in before.items():
            has_left_alive = pid in table and table[pid].start == then.start
            if pid in stayed or has_left_alive:
                continue
            heir = self._heir(then, stayed)
            if heir:
                app = readings[heir].app
                owed[app] = _sum(owed.get(app, _ZERO), _sum(then.own, then.mixed))
        return owed

    def _heir(self, gone: Reading, stayed: Collection[int]) -> int:
        """Return the nearest ancestor still there, which waited for `gone`, or for one that did; 0 if there is none."""
        at = gone.ppid
        for _ in self._readings:
            if at in stayed:
                return at
            if at not in self._readings:
                break
            at = self._readings[at].ppid
        return 0


def _sum(a: Counts, b: Counts) -> Counts:
    if b is _ZERO:
        return a
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5])


def _growth(then: Counts, now: Counts) -> Counts:
    if now == then:
        return _ZERO
    user, system, voluntary, involuntary, read, written = [b - a if b > a else 0 for a, b in zip(then, now, strict=True)]
    return (user, system, voluntary, involuntary, read, written)


def _least(a: Counts, b: Counts) -> Counts:
    user, system, voluntary, involuntary, read, written = [min(pair) for pair in zip(a, b, strict=True)]
    return (user, system, voluntary, involuntary, read, written)


class Tree(NamedTuple):
    """One app at one look; None is "not seen"."""

    app: App
    totals: Counts | None = None
    sees_io: bool = True
    """Whether the I/O of every process could be read."""
    processes: int | None = None
    resident: int | None = None
    virtual: int | None = None
    swapped: int | None = None
    threads: int | None = None
    open_fds: int | None = None
    max_fds: int | None = None
    tree_open_fds: int | None = None


class UnseenError(Exception):
    """PM2 has running processes, and /proc none of them."""


def look(
    listing: Listing, table: Mapping[int, Stat], usage: Callable[[int], Usage | None], ledger: Ledger
) -> tuple[Tree, ...]:
    """Return every app of the list, as the table of processes and the usage of those in its tree tell, and post it."""
    apps: dict[App, int] = {}
    for process in listing.processes:
        apps.setdefault((process.name, str(process.pm_id)), process.pid)
    roots = {pid: app for app, pid in apps.items() if pid > 0}
    daemon = listing.daemon
    # PM2's processes are its children; one that is not has only the number in common, in another pid namespace. Is that
    # namespace hidden from ours, the daemon has no pid here at all. A command does not tell of a daemon, and is believed.
    rooted = trees(table, [pid for pid in roots if pid in table and (daemon is None or daemon.pid == table[pid].ppid)])
    found: dict[App, Tree] = {}
    readings: dict[int, Reading] = {}
    left = dict(table)
    for root, pids in rooted.items():
        app = roots[root]
        members: list[tuple[Stat, Usage]] = []
        for pid in pids:
            used = usage(pid)
            if used is None:
                del left[pid]
                continue
            members.append((table[pid], used))
            readings[pid] = _reading(app, table[pid], used)
        if root in readings:
            found[app] = _tree(app, members)
    ledger.post(readings, table=left, apps=apps)
    if roots and not ledger.totals and (daemon is None or daemon.pid not in table):
        raise UnseenError(
            f"none of PM2's {len(roots)} running processes can be seen in /proc: it is mounted with hidepid, "
            "or PM2 runs in another pid namespace"
        )
    return tuple(
        [
            found.get(app, Tree(app, processes=None if pid > 0 else 0))._replace(totals=ledger.totals.get(app))
            for app, pid in apps.items()
        ]
    )


class ProcessCollector:
    """Reads the list from PM2 and, meanwhile, what can be read from /proc without it, once for all apps."""

    descs = DESCS

    def __init__(self, options: ProcessOptions, source: Source, proc: Path = Path("/proc")) -> None:
        """Look into `proc` for the processes that `source` lists."""
        self._options = options
        self._source = source
        self._proc = Proc(proc)
        self._ledger = Ledger()
        self._roots: tuple[int, ...] = ()
        self._strangers: dict[int, tuple[int, Stat]] = {}
        self._lock = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="process collector")

    async def read(self, within: float) -> tuple[Tree, ...]:
        """Return every app that PM2 lists; raise PM2Error, TimeoutError, UnseenError or OSError."""
        async with asyncio.timeout(within), self._lock:
            # A little less than all the time, so that it is PM2's silence that is told of, not ours.
            asked = asyncio.create_task(self._source.listing(within * 0.95), name="PM2's list for the process collector")
            asked.add_done_callback(lambda done: done.cancelled() or done.exception())
            try:
                await asyncio.sleep(0)  # the question goes out before /proc is read
                pids = self._proc.pids()
                table = await self._table(pids)
                used = await self._usage(table, self._roots, {})
                listing = await asked
            finally:
                asked.cancel()
            self._roots = tuple([process.pid for process in listing.processes if process.pid > 0])
            used = await self._usage(table, self._roots, used)
            self._strangers = {pid: (pids[pid], stat) for pid, stat in table.items() if pid not in used}
            return look(listing, table, used.get, self._ledger)

    async def _table(self, pids: Mapping[int, int]) -> dict[int, Stat]:
        """Return all processes; those that were in no app's tree at the last look as they were then.

        They cannot get into one but by becoming an app's root: a process moves only from its parent to one further up.
        """
        table = {pid: stat for pid, (inode, stat) in self._strangers.items() if pids.get(pid) == inode}
        others = [pid for pid in pids if pid not in table]
        for at in range(0, len(others), _AT_ONCE):
            table |= self._proc.stats(others[at : at + _AT_ONCE])
            await asyncio.sleep(0)
        return table

    async def _usage(
        self, table: dict[int, Stat], roots: Iterable[int], used: Mapping[int, Usage | None]
    ) -> dict[int, Usage | None]:
        """Return what the processes in the trees of `roots` use, with what is known; look again at who was a stranger.

        The kernel answers at once, but for /proc/PID/io of a process that is stuck while it begins another program:
        whatever sleeps uninterruptibly is therefore asked in a thread.
        """
        used = dict(used)
        wanted = [pid for pids in trees(table, roots).values() for pid in pids if pid not in used]
        table |= self._proc.stats([pid for pid in wanted if pid in self._strangers])
        for number, pid in enumerate(wanted):
            if table[pid].state == b"D":
                used[pid] = await asyncio.get_running_loop().run_in_executor(self._thread, self._proc.usage, pid)
            else:
                used[pid] = self._proc.usage(pid)
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return used

    def metrics(self, seen: Iterable[Tree]) -> Iterable[Metric]:
        """Yield the metrics of every app."""
        seen = tuple(seen)
        counted = [(tree, tree.totals) for tree in seen if tree.totals is not None]
        cpu: list[Row] = []
        switches: list[Row] = []
        for tree, totals in counted:
            cpu.append(((*tree.app, "user"), totals[0] / TICKS_PER_SECOND))
            cpu.append(((*tree.app, "system"), totals[1] / TICKS_PER_SECOND))
            switches.append(((*tree.app, "voluntary"), totals[2]))
            switches.append(((*tree.app, "involuntary"), totals[3]))
        yield Metric(CPU, cpu)
        yield Metric(RESIDENT, [(tree.app, tree.resident) for tree in seen])
        yield Metric(VIRTUAL, [(tree.app, tree.virtual) for tree in seen])
        yield Metric(SWAP, [(tree.app, tree.swapped) for tree in seen])
        yield Metric(OPEN_FDS, [(tree.app, tree.open_fds) for tree in seen])
        yield Metric(MAX_FDS, [(tree.app, tree.max_fds) for tree in seen])
        yield Metric(TREE_OPEN_FDS, [(tree.app, tree.tree_open_fds) for tree in seen])
        yield Metric(THREADS, [(tree.app, tree.threads) for tree in seen])
        yield Metric(SWITCHES, switches)
        yield Metric(READ, [(tree.app, totals[4]) for tree, totals in counted if tree.sees_io])
        yield Metric(WRITTEN, [(tree.app, totals[5]) for tree, totals in counted if tree.sees_io])
        yield Metric(PROCESSES, [(tree.app, tree.processes) for tree in seen])


_AT_ONCE = 32
"""Processes that are looked at before others get their turn; they take about half a millisecond."""


def _reading(app: App, stat: Stat, usage: Usage) -> Reading:
    return Reading(
        app,
        stat.ppid,
        stat.start,
        (stat.user, stat.system, usage.voluntary, usage.involuntary, 0, 0),
        (stat.reaped_user, stat.reaped_system, 0, 0, usage.read or 0, usage.written or 0),
        usage.read is not None,
    )


def _tree(app: App, members: Sequence[tuple[Stat, Usage]]) -> Tree:
    """Add up a tree's processes; where one's share cannot be seen, the sum cannot be told."""
    processes = resident = virtual = swapped = threads = open_in_all = 0
    sees_io = sees_fds = True
    closest: tuple[int, int] | None = None
    for stat, usage in members:
        sees_io &= usage.read is not None
        if stat.is_zombie:
            continue
        processes += 1
        resident += usage.resident
        virtual += stat.virtual
        swapped += usage.swapped
        threads += stat.threads
        if usage.open_fds is None:
            sees_fds = False
            continue
        open_in_all += usage.open_fds
        if usage.max_fds and (closest is None or usage.open_fds / usage.max_fds > closest[0] / closest[1]):
            closest = (usage.open_fds, usage.max_fds)
    open_fds, max_fds = closest or (None, None)
    return Tree(
        app,
        sees_io=sees_io,
        processes=processes,
        resident=resident,
        virtual=virtual,
        swapped=swapped,
        threads=threads,
        open_fds=open_fds,
        max_fds=max_fds,
        tree_open_fds=open_in_all if sees_fds else None,
    )
