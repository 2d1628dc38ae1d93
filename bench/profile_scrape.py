"""Show where the time and the memory of one scrape of pm2-exporter go, to tune with. Prints; publishes nothing.

    .venv/bin/python -m bench.profile_scrape [--apps 100] [--scrapes 100] [--top 25]

Four runs of the exporter on one estate: as it is (latency, CPU by thread, the collectors' own durations, resident memory),
under cProfile (functions of the event loop's thread by their own time), under tracemalloc (memory held, by file), and with
every import weighed (resident memory that each package added). The last three slow it down: compare their parts with each
other, not their sums with the first.
"""

import argparse
import contextlib
import dataclasses
import json
import pstats
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from bench.contenders import CONTENDERS, EXPORTER_VENV, Contender, Running, lacks, started
from bench.estate import HERE, ROOT, Estate, estate, exit_on_signals, wait_for
from bench.findings import OURS, quantile, values
from bench.measure import Scraper, cpu_seconds, memory_mib, paced, page

INTERVAL = 0.1
MIB = 2**20


def ours() -> Contender:
    """Return the exporter as it is compared."""
    return next(one for one in CONTENDERS if one.name == OURS)


@contextlib.contextmanager
def profiled(how: str, on: Estate) -> Iterator[tuple[Running, Path]]:
    """Run the exporter under a profiler until the block is left; also gives the file the profile will be in."""
    to = on.directory / f"profile.{how}"
    plain = ours()

    def command(on: Estate, port: int) -> tuple[list[str], Mapping[str, str]]:
        argv, env = plain.command(on, port)
        return [str(EXPORTER_VENV / "bin" / "python"), str(HERE / "profiled.py"), how, str(to), *argv[1:]], env

    with started(dataclasses.replace(plain, command=command), on) as one:
        yield one, to


def scrape(one: Running, count: int) -> list[float]:
    """Scrape so often at a pace; returns the milliseconds each took."""
    scraper = Scraper(one.urls[0])
    try:
        return paced([scraper.body], count=count, interval=INTERVAL, at_most=count * INTERVAL * 10)[0]
    finally:
        scraper.close()


def tell(one: Running, number: signal.Signals, to: Path) -> None:
    """Signal the profiled process, and wait for its file where it writes one."""
    one.process.send_signal(number)
    if number is signal.SIGUSR2:
        wait_for(f"the profile {to.name}", to.exists, within=120)
        time.sleep(1)


def threads_cpu(process: psutil.Process) -> dict[int, float]:
    """Return the CPU seconds of each thread, by its id; the event loop's is the process's."""
    return {one.id: one.user_time + one.system_time for one in process.threads()}


def as_it_is(on: Estate, apps: int, scrapes: int) -> None:
    """Print what the exporter costs without a profiler."""
    with started(ours(), on) as one:
        if fault := lacks(one, apps):
            print(f"!! {fault}")
        print(f"resident when it has started: {memory_mib(one.process.pid)[0]:.1f} MiB")
        scrape(one, 20)
        daemon = on.pm2.daemon().pid
        before, own, theirs = threads_cpu(one.process), cpu_seconds([one.process.pid]), cpu_seconds([daemon])
        latencies = scrape(one, scrapes)
        own, theirs = cpu_seconds([one.process.pid]) - own, cpu_seconds([daemon]) - theirs
        after, (now, peak) = threads_cpu(one.process), memory_mib(one.process.pid)
        pages = [page(one.urls[0]) for _ in range(15)]
    print(f"latency: p50 {quantile(latencies, 0.5):.1f} ms, p99 {quantile(latencies, 0.99):.1f} ms")
    print(f"CPU a scrape, idling not taken off: own {own / scrapes * 1000:.2f} ms, daemon {theirs / scrapes * 1000:.2f} ms")
    print(f"resident after the scrapes: {now:.1f} MiB, peak {peak:.1f} MiB; page {len(pages[0]) / 1000:.0f} kB")
    print("\nCPU a scrape by thread, ms (to 10 ms of the whole)")
    for tid, seconds in sorted(after.items(), key=lambda item: -item[1]):
        spent = (seconds - before.get(tid, 0.0)) / scrapes * 1000
        print(f"  {spent:7.2f}  {'event loop' if tid == one.process.pid else f'thread {tid}'}")
    print("\ncollectors by their own account, ms, median")
    durations = [values(text, "pm2_exporter_collector_duration_seconds", "collector") for text in pages]
    for name in durations[0]:
        print(f"  {statistics.median(seen[name] for seen in durations) * 1000:7.2f}  {name}")


def functions(on: Estate, scrapes: int, top: int) -> None:
    """Print the functions that take the most time of their own."""
    with profiled("cprofile", on) as (one, to):
        scrape(one, 20)
        tell(one, signal.SIGUSR1, to)
        scrape(one, scrapes)
        tell(one, signal.SIGUSR2, to)
        stats = pstats.Stats(str(to))
    print(f"\nevent loop's thread under cProfile, CPU ms a scrape: {'own':>7} {'total':>9} {'calls':>9}")
    # pstats types its table as nothing in particular: (primitive calls, calls, own seconds, cumulative seconds, callers).
    table: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = stats.stats  # type: ignore[attr-defined]
    for place, (_, calls, own, total, _callers) in sorted(table.items(), key=lambda item: -item[1][2])[:top]:
        name = f"{shorten(place[0])}:{place[1]} {place[2]}" if place[1] else place[2]
        print(f"  {own / scrapes * 1000:9.3f} {total / scrapes * 1000:9.3f} {calls / scrapes:9.1f}  {name}")


def memory(on: Estate, scrapes: int, top: int) -> None:
    """Print what holds memory: Python objects by package, and resident memory by import."""
    with profiled("tracemalloc", on) as (one, to):
        scrape(one, min(scrapes, 50))
        tell(one, signal.SIGUSR2, to)
        held: dict[str, int] = json.loads(to.read_text())
    print(f"\nPython objects held under tracemalloc: {sum(held.values()) / MIB:.1f} MiB; by package")
    by_package: dict[str, int] = defaultdict(int)
    for file, size in held.items():
        by_package[package(file)] += size
    show(by_package, top)
    with profiled("imports", on) as (one, to):
        scrape(one, min(scrapes, 50))
        tell(one, signal.SIGUSR2, to)
        added: dict[str, int] = json.loads(to.read_text())
        in_all = memory_mib(one.process.pid)[0]
    print(f"\nresident memory by import: {in_all:.1f} MiB in all; MiB that each package added itself")
    show(added, top)


def show(sizes: Mapping[str, int], top: int) -> None:
    """Print the largest of some sizes, and the rest as one."""
    ranked = sorted(sizes.items(), key=lambda item: -item[1])
    for name, size in ranked[:top]:
        print(f"  {size / MIB:7.2f}  {name}")
    print(f"  {sum(size for _, size in ranked[top:]) / MIB:7.2f}  the other {max(0, len(ranked) - top)}")


def package(file: str) -> str:
    """Return the package a file belongs to; our own files are named one by one."""
    if file.startswith(str(ROOT / "exporter")):
        return str(Path(file).relative_to(ROOT))
    parts = Path(file).parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1]
    return file if file.startswith("<") else f"standard library: {Path(file).stem}"


def shorten(file: str) -> str:
    """Return a file's path without what all have in common."""
    return file.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2]


def main(argv: Sequence[str]) -> int:
    """Profile on an estate of its own."""
    parser = argparse.ArgumentParser(
        prog="bench/profile_scrape.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--apps", type=int, default=100)
    parser.add_argument("--scrapes", type=int, default=100)
    parser.add_argument("--top", type=int, default=25, help="lines of each list")
    options = parser.parse_args(argv)
    exit_on_signals()
    with estate() as on:
        on.pm2.grow(options.apps)
        as_it_is(on, options.apps, options.scrapes)
        functions(on, options.scrapes, options.top)
        memory(on, options.scrapes, options.top)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
