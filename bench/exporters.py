"""Compare pm2-exporter with what one would otherwise run, at several numbers of PM2 apps, in one run on one machine.

script/bench            the whole comparison; writes bench/results/, docs/performance.md and its picture
script/bench --quick    a smoke test of a minute: 10 apps, 20 scrapes; writes to .state/bench/quick
script/bench --render   writes the page and the picture anew from bench/results/
"""

import argparse
import contextlib
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

from bench import findings, plot
from bench.contenders import CONTENDERS, Contender, Running, lacks, npm_version, started
from bench.estate import ROOT, TOOLS, Estate, Pm2, estate, exit_on_signals, mongod, which
from bench.measure import (
    Meter,
    ScrapeFailed,
    Scraper,
    complaints,
    cost,
    cpu_seconds,
    memory_mib,
    paced,
    page,
    run_command,
    timed,
    tree_cpu_seconds,
)

RESULTS = ROOT / "bench" / "results" / "exporters.json"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "images" / "performance.svg"
QUICK = TOOLS / "quick"


class Settings(msgspec.Struct, frozen=True):
    """How long and how often; the defaults are the whole comparison's."""

    sizes: tuple[int, ...] = (10, 100, 200)
    scrapes: int = 200
    """Paced scrapes of ours, and at most of each peer."""
    interval: float = 0.1
    """Seconds from one scrape to the next."""
    warm_up: int = 20
    burst: int = 100
    """Scrapes without a pause in between."""
    peer_seconds: float = 12.0
    """No peer is scraped for longer; slow ones get fewer scrapes."""
    burst_seconds: float = 4.0
    jlist_runs: int = 30
    idle_seconds: float = 15.0
    """Length of each of the two idle stretches, before and after the scrapes."""
    settle_seconds: float = 5.0


QUICK_SETTINGS = Settings(
    sizes=(10,),
    scrapes=20,
    warm_up=3,
    burst=20,
    peer_seconds=3,
    burst_seconds=2,
    jlist_runs=5,
    idle_seconds=2,
    settle_seconds=2,
)

QUIET_LOAD = 0.3
"""Load average above which a machine is called busy."""

BEGAN = time.monotonic()


def say(text: str) -> None:
    """Print what is going on, with the seconds since the start."""
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


class Idle:
    """What every process costs while nobody asks: CPU seconds a second, over the idle stretches taken so far."""

    def __init__(self, running: Sequence[Running], daemon: int) -> None:
        self._running, self._daemon = running, daemon
        self._spent: dict[str, float] = {one.contender.name: 0.0 for one in running}
        self._daemon_spent = self._wall = 0.0

    def measure(self, seconds: float) -> None:
        """Let nothing happen for some seconds, and add them up."""
        before = {one.contender.name: tree_cpu_seconds(one.process.pid) for one in self._running}
        daemon, start = cpu_seconds([self._daemon]), time.monotonic()
        time.sleep(seconds)
        for one in self._running:
            self._spent[one.contender.name] += tree_cpu_seconds(one.process.pid) - before[one.contender.name]
        self._daemon_spent += cpu_seconds([self._daemon]) - daemon
        self._wall += time.monotonic() - start

    def rate(self, contender: str) -> float:
        """Return a contender's CPU seconds a second."""
        return self._spent.get(contender, 0.0) / self._wall

    def daemon_rate(self) -> float:
        """Return the daemon's CPU seconds a second."""
        return self._daemon_spent / self._wall


class Scraped(msgspec.Struct):
    """A contender's raw figures, before the idle share is known."""

    runs: tuple[tuple[list[float], int, int, tuple[float, float, float]], ...]
    rss: tuple[float, float]


def scrape(one: Running, daemon: int, settings: Settings) -> Scraped:
    """Warm up, then scrape at a pace, then in a burst."""
    scrapers = [Scraper(url) for url in one.urls]
    asks = [scraper.body for scraper in scrapers]
    ours = one.contender.name == findings.OURS
    at_most = settings.scrapes * settings.interval * 3 if ours else settings.peer_seconds
    try:
        paced(asks, count=settings.warm_up, interval=settings.interval, at_most=at_most / 4)
        runs = []
        for count, interval, seconds in (
            (settings.scrapes, settings.interval, at_most),
            (settings.burst, 0.0, settings.burst_seconds),
        ):
            meter = Meter(one.process.pid, daemon)
            latencies, scrapes, failed = paced(asks, count=count, interval=interval, at_most=seconds)
            runs.append((latencies, scrapes, failed, meter.stop()))
        return Scraped(tuple(runs), memory_mib(one.process.pid))
    finally:
        for scraper in scrapers:
            scraper.close()


def reading(one: Running, scraped: Scraped, fault: str, idle: Idle) -> findings.Reading:
    """Put one contender's figures together."""
    rate, daemon_rate, asks = idle.rate(one.contender.name), idle.daemon_rate(), one.contender.asks_pm2
    costs = [
        cost(latencies, scrapes, failed, spent=(own, daemon if asks else 0.0), idle=(rate * wall, daemon_rate * wall))
        for latencies, scrapes, failed, (own, daemon, wall) in scraped.runs
    ]
    pages = [page(url) for url in one.urls]
    counts = [findings.count_series(text) for text in pages]
    said = max((complaints(text, which("promtool")) for text in pages), key=len)
    if one.contender.name == findings.OURS:
        for line in said:
            say(f"promtool: {line}")
    return findings.Reading(
        contender=one.contender.name,
        version=one.contender.version(),
        fault=fault,
        paced=costs[0],
        burst=costs[1],
        idle_cpu_ms=rate * 1000,
        rss_mib=scraped.rss[0],
        peak_rss_mib=scraped.rss[1],
        series=sum(series for series, _ in counts),
        families=max(families for _, families in counts),
        complaints=len(said),
        wire_bytes=sum(len(Scraper(url).body()) for url in one.urls),
    )


def jlist(pm2: Pm2, idle: Idle, settings: Settings) -> tuple[findings.Reading, int]:
    """Measure the command `pm2 jlist`; also returns how many bytes it prints."""
    argv, spent, peaks = pm2.command("jlist"), [], []

    def ask() -> None:
        _, cpu, peak = run_command(argv, pm2.env)
        spent.append(cpu / 1000)
        peaks.append(peak)

    ask()
    spent.clear()
    daemon, start = cpu_seconds([pm2.daemon().pid]), time.monotonic()
    runs = [timed(ask) for _ in range(settings.jlist_runs)]
    wall = time.monotonic() - start
    used = cpu_seconds([pm2.daemon().pid]) - daemon
    latencies = [ms for ms in runs if ms is not None]
    seen = cost(
        latencies, len(runs), len(runs) - len(latencies), spent=(sum(spent), used), idle=(0.0, idle.daemon_rate() * wall)
    )
    size = len(subprocess.run(argv, env=pm2.env, check=True, capture_output=True, timeout=60).stdout)  # noqa: S603 -- our own argv
    figures = findings.Reading(
        contender=findings.JLIST,
        version=npm_version("pm2"),
        fault="a command, run without a pause in between",
        paced=seen,
        burst=seen,
        rss_mib=max(peaks),
        peak_rss_mib=max(peaks),
    )
    return figures, size


def collectors(one: Running) -> dict[str, float]:
    """Return how long each of our collectors takes, in milliseconds, as the exporter says itself."""
    pages = []
    for _ in range(15):
        pages.append(findings.values(page(one.urls[0]), "pm2_exporter_collector_duration_seconds", "collector"))
        time.sleep(0.1)
    return {name: round(statistics.median(seen[name] for seen in pages if name in seen) * 1000, 3) for name in pages[-1]}


def compare(on: Estate, apps: int, settings: Settings) -> findings.Round:
    """Measure every contender at one number of apps."""
    say(f"{apps} apps: starting them")
    on.pm2.grow(apps)
    daemon = on.pm2.daemon().pid
    absent: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        up = []
        for contender in CONTENDERS:
            try:
                up.append(stack.enter_context(started(contender, on)))
            except (ScrapeFailed, FileNotFoundError) as failure:
                absent[contender.name] = str(failure)
                say(f"{apps} apps: {contender.name} is left out: {failure}")
        time.sleep(settings.settle_seconds)
        idle = Idle(up, daemon)
        say(f"{apps} apps: idling")
        idle.measure(settings.idle_seconds)
        scraped: dict[str, Scraped] = {}
        faults: dict[str, str] = {}
        for one in up:
            name = one.contender.name
            say(f"{apps} apps: scraping {name}")
            faults[name] = lacks(one, apps)
            scraped[name] = scrape(one, daemon, settings)
            latencies = scraped[name].runs[0][0]
            median, slow = (findings.quantile(latencies, share) for share in (0.5, 0.99))
            say(f"{apps} apps: {name}: p50 {median:.1f} ms, p99 {slow:.1f} ms {faults[name]}")
        say(f"{apps} apps: idling again")
        idle.measure(settings.idle_seconds)
        say(f"{apps} apps: running pm2 jlist")
        command, size = jlist(on.pm2, idle, settings)
        readings = [reading(one, scraped[one.contender.name], faults[one.contender.name], idle) for one in up]
        ours = next((one for one in up if one.contender.name == findings.OURS), None)
        spent = collectors(ours) if ours else {}
    by_name = {one.contender: one for one in readings}
    in_order = [by_name.get(one.name, _absent(one, absent)) for one in CONTENDERS]
    return findings.Round(
        apps=apps,
        reply_bytes=size,
        daemon_idle_cpu_ms=idle.daemon_rate() * 1000,
        readings=(*in_order, command),
        collectors_ms=spent,
    )


def _absent(contender: Contender, why: dict[str, str]) -> findings.Reading:
    return findings.Reading(contender=contender.name, version="", fault=why.get(contender.name, "left out"))


def machine(load: float) -> dict[str, str]:
    """Return what it is measured on, as a reader would ask for it."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "Date": time.strftime("%Y-%m-%d", time.gmtime()),
        "CPU": f"{os.cpu_count()} of {cpu[1] if cpu else platform.machine()}",
        "Memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "Load average before the start": f"{load:.2f}",
        "Kernel": platform.release(),
        "Python": platform.python_version(),
        "Node": _first_line("node", "--version"),
        "PM2": npm_version("pm2"),
        "MongoDB": _first_line(mongod(), "--version").removeprefix("db version v"),
    }


def _first_line(*argv: str) -> str:
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30)  # noqa: S603 -- our own argv
    return done.stdout.splitlines()[0]


def run(settings: Settings) -> findings.Run:
    """Run the whole comparison."""
    load = os.getloadavg()[0]
    if load > QUIET_LOAD:
        say(f"load average {load:.2f}: this machine is busy with something else, and every figure will suffer")
    about = machine(load)
    with estate() as on:
        rounds = tuple(compare(on, apps, settings) for apps in settings.sizes)
        say("taking everything down")
    for one in rounds[-1].readings:
        about.setdefault(one.contender, one.version)
    shown = {
        "Paced scrapes": settings.scrapes,
        "Seconds from one scrape to the next": settings.interval,
        "Burst scrapes": settings.burst,
        "Seconds a peer is scraped at most": settings.peer_seconds,
        "Seconds idled": settings.idle_seconds * 2,
    }
    return findings.Run(machine=about, settings=shown, rounds=rounds)


def publish(seen: findings.Run, *, results: Path, to: Path, picture: Path) -> None:
    """Write the results, the page and the picture."""
    for path in (results, to, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    results.write_bytes(_lines(seen))
    to.write_text(findings.fill(PAGE.read_text(), findings.blocks(seen)))
    plot.draw(seen, picture)
    say(f"wrote {results}, {to} and {picture}")


def _lines(seen: findings.Run) -> bytes:
    # One line a latency would drown the rest, one line in all could not be compared: each inner list takes one line.
    text = msgspec.json.format(msgspec.json.encode(seen), indent=1).decode()
    return re.sub(r"\[[\d.,\s]*\]", lambda found: "".join(found[0].split()).replace(",", ", "), text).encode() + b"\n"


def main(argv: Sequence[str]) -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(
        prog="script/bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="10 apps and 20 scrapes; publishes nothing")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the page and the picture anew")
    options = parser.parse_args(argv)
    if options.render:
        seen = msgspec.json.decode(RESULTS.read_bytes(), type=findings.Run)
        publish(seen, results=RESULTS, to=PAGE, picture=PICTURE)
        return 0
    exit_on_signals()
    seen = run(QUICK_SETTINGS if options.quick else Settings())
    if options.quick:
        publish(
            seen,
            results=QUICK / "exporters.json",
            to=QUICK / "performance.md",
            picture=QUICK / "images" / "performance.svg",
        )
        for one in seen.rounds:
            print(findings.round_block(one))
    else:
        publish(seen, results=RESULTS, to=PAGE, picture=PICTURE)
        print(findings.peers_block(seen))
    for judged in findings.judge(seen):
        verdict = {True: "reached", False: "NOT REACHED", None: "not measured"}[judged.reached]
        print(f"{verdict:12} {judged.target}: {judged.measured} (wanted: {judged.wanted})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
