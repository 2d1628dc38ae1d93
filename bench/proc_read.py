"""Measure what one look at the process trees of N apps costs in CPU time, with /proc read directly and with psutil.

    python -m bench.proc_read [apps]

Starts that many idle Node processes, looks at them in both ways, and prints the median CPU time of a look, of its parts and
of each file of /proc/PID. Both ways answer the same questions: parents, CPU, memory, threads, descriptors and their limit,
I/O, context switches (swap is left out of psutil's part: there it costs a read of smaps). psutil is used at its best: one
pass for the parents, process objects kept, `oneshot`.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

import psutil

from exporter.collectors.process import Ledger, ProcessCollector, ProcessOptions, look
from exporter.exposition import Format, render
from exporter.pm2.process import Listing, Process
from exporter.proc import Proc, trees

ROUNDS = 30


def cost(look: Callable[[], object], *, rounds: int = ROUNDS) -> float:
    """Return the median CPU time of this thread for one call, in milliseconds."""
    costs = []
    for _ in range(rounds):
        begin = time.thread_time()
        look()
        costs.append((time.thread_time() - begin) * 1000)
    return statistics.median(costs)


def in_turn(*looks: Callable[[], object]) -> list[float]:
    """Return the median cost of each look, measured in turn, so that a busy moment of the machine meets them all."""
    costs = [[cost(look, rounds=1) for look in looks] for _ in range(ROUNDS)]
    return [statistics.median(one) for one in zip(*costs, strict=True)]


def through_psutil(known: dict[int, psutil.Process], roots: Iterable[int]) -> list[object]:
    """Look at the trees of `roots` through psutil; `known` holds the process objects of earlier looks."""
    below: dict[int, list[int]] = {}
    for pid, ppid in psutil._pslinux.ppid_map().items():  # noqa: SLF001 -- its public way reads every process twice
        below.setdefault(ppid, []).append(pid)
    found: list[object] = []
    for root in roots:
        tree = [root]
        for pid in tree:
            tree += below.get(pid, [])
            process = known.get(pid) or known.setdefault(pid, psutil.Process(pid))
            with process.oneshot():
                found.append(
                    (process.cpu_times(), process.memory_info(), process.num_threads(), process.num_ctx_switches())
                )
                found.append((process.io_counters(), process.num_fds(), process.rlimit(psutil.RLIMIT_NOFILE)[0]))
    return found


def directly(proc: Proc, roots: Iterable[int]) -> list[object]:
    """Look at the trees of `roots` in /proc."""
    table = proc.table()
    return [(table[pid], proc.usage(pid)) for tree in trees(table, roots).values() for pid in tree]


class Fixed:
    """A list that never changes, in PM2's place."""

    def __init__(self, pids: Iterable[int]) -> None:
        self.kept = Listing(
            processes=tuple([Process(name=f"app-{pm_id}", pm_id=pm_id, pid=pid) for pm_id, pid in enumerate(pids)])
        )

    async def listing(self, within: float) -> Listing:
        """Return it at once."""
        del within
        return self.kept


def read(path: str) -> bytes:
    """Return the beginning of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 8192)
    finally:
        os.close(fd)


def main(apps: int) -> None:
    """Print the figures."""
    children = [subprocess.Popen(["node", "-e", "setInterval(() => {}, 1000)"]) for _ in range(apps)]  # noqa: S607 -- the PATH's
    try:
        pids = [child.pid for child in children]
        while any(psutil.Process(pid).num_threads() < 7 for pid in pids):  # noqa: PLR2004 -- a started Node's
            time.sleep(0.1)
        proc, known = Proc(), {}
        listing = Fixed(pids).kept
        collector = ProcessCollector(ProcessOptions(), Fixed(pids))
        through_psutil(known, pids)
        table = proc.table()
        print(f"{apps} apps among {len(table)} processes; median CPU time of {ROUNDS} looks, in ms")
        here, there = in_turn(lambda: directly(proc, pids), lambda: through_psutil(known, pids))
        print(f"  /proc directly  {here:7.2f}\n  psutil          {there:7.2f}  ({there / here:.1f} times)")
        print("of the first:")
        print(f"  one pass over all stat  {cost(proc.table):7.2f}")
        print(f"  trees                   {cost(lambda: trees(table, pids)):7.2f}")
        print(f"  usage of the apps       {cost(lambda: [proc.usage(pid) for pid in pids]):7.2f}")
        ledger = Ledger()
        seen = look(listing, table, proc.usage, ledger)
        print("the collector:")
        print(f"  a look, with its ledger {cost(lambda: look(listing, proc.table(), proc.usage, ledger)):7.2f}")
        print(f"  metrics                 {cost(lambda: list(collector.metrics(seen))):7.2f}")
        print(f"  their text              {cost(lambda: render(list(collector.metrics(seen)), Format.TEXT)):7.2f}")
        print("microseconds a file:")
        for name in ("stat", "status", "statm", "io", "limits", "smaps_rollup"):
            each = cost(lambda name=name: [read(f"/proc/{pid}/{name}") for pid in pids], rounds=5) / apps * 1000
            print(f"  {name:12} {each:7.1f}")
        size, listed = os.stat, os.listdir
        print(f"  fd, size     {cost(lambda: [size(f'/proc/{pid}/fd') for pid in pids]) / apps * 1000:7.1f}")
        print(f"  fd, listed   {cost(lambda: [listed(f'/proc/{pid}/fd') for pid in pids]) / apps * 1000:7.1f}")
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
