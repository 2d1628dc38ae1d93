"""How it is measured: a scraper on one kept connection, and the kernel's clocks of a process's CPU time and memory."""

import contextlib
import gc
import gzip
import http.client
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from bench.findings import Cost

TIMEOUT_SECONDS = 10.0
"""A scrape's time limit: Prometheus's own default."""

PROMETHEUS_HEADERS = {
    "User-Agent": "Prometheus/2.42.0",
    "Accept": "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "Accept-Encoding": "gzip",
    "X-Prometheus-Scrape-Timeout-Seconds": f"{TIMEOUT_SECONDS:g}",
}
"""What Prometheus 2.42 sends with each scrape."""

GIVE_UP_AFTER = 3
"""Failed scrapes in a row, after which a contender is left alone."""


class ScrapeFailed(Exception):  # noqa: N818 -- the outcome of one scrape, counted and not always an error of the run
    """A scrape did not end in a 200 within its time limit."""


class Scraper:
    """Scrapes one URL as Prometheus does, over a connection that is kept."""

    def __init__(self, url: str, *, headers: Mapping[str, str] = PROMETHEUS_HEADERS) -> None:
        parts = urlsplit(url)
        self._path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        self._headers = dict(headers)
        self._connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=TIMEOUT_SECONDS)

    def scrape(self) -> http.client.HTTPResponse:
        """Ask once; the body is left to be read."""
        try:
            self._connection.request("GET", self._path, headers=self._headers)
            response = self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise ScrapeFailed(f"{type(error).__name__}") from error
        return response

    def body(self) -> bytes:
        """Return a scrape's whole body as it came over the wire."""
        response = self.scrape()
        try:
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise ScrapeFailed(f"{type(error).__name__}") from error
        if response.status != http.client.OK:
            raise ScrapeFailed(f"status {response.status}")
        return body

    def close(self) -> None:
        """Hang up; the next scrape connects anew."""
        self._connection.close()


def page(url: str) -> str:
    """Return what a contender shows in the text format 0.0.4."""
    scraper = Scraper(url, headers={"Accept": "text/plain;version=0.0.4"})
    try:
        body = scraper.body()
    finally:
        scraper.close()
    return (gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body).decode()


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the user and system CPU time of whole processes, to the nanosecond; those that are gone count nothing.

    It is the sum of utime and stime in /proc/PID/stat, read from the process's own clock (clock_getcpuclockid(3)), which
    does not round to ticks of 10 ms.
    """
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~pid << 3) | 2)
    return total


def reaped_cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process's children that ended: cutime and cstime in /proc/PID/stat, to a tick."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def tree_cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, its living descendants and its ended children."""
    tree = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return cpu_seconds(tree) + reaped_cpu_seconds(pid)


def memory_mib(pid: int) -> tuple[float, float]:
    """Return the resident memory of a process tree, now and at most: VmRSS and VmHWM in /proc/PID/status."""
    now = peak = 0.0
    for one in [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{one}/status").read_text().splitlines())
        now += int(fields["VmRSS"].split()[0]) / 1024
        peak += int(fields["VmHWM"].split()[0]) / 1024
    return now, peak


class Meter:
    """The CPU clocks of a contender and of the PM2 daemon, over a stretch of time."""

    def __init__(self, pid: int, daemon: int) -> None:
        self._pid, self._daemon = pid, daemon
        self._own, self._theirs, self._at = self._read()

    def _read(self) -> tuple[float, float, float]:
        return tree_cpu_seconds(self._pid), cpu_seconds([self._daemon]), time.monotonic()

    def stop(self) -> tuple[float, float, float]:
        """Return own CPU seconds, the daemon's CPU seconds and the wall seconds since the start."""
        own, theirs, at = self._read()
        return own - self._own, theirs - self._theirs, at - self._at


def timed(ask: Callable[[], object]) -> float | None:
    """Return how many milliseconds one request takes, or None when it fails."""
    start = time.perf_counter()
    try:
        ask()
    except ScrapeFailed:
        return None
    return (time.perf_counter() - start) * 1000


def paced(
    asks: Sequence[Callable[[], object]], *, count: int, interval: float, at_most: float
) -> tuple[list[float], int, int]:
    """Scrape `count` times, one each `interval` seconds, for at most `at_most` seconds.

    One scrape is one request to each of `asks`. Returns the milliseconds of every request that succeeded, the number of
    scrapes and the number of failed requests.
    """
    latencies: list[float] = []
    failed = in_a_row = scrapes = 0
    gc.collect()
    gc.disable()
    due = start = time.monotonic()
    try:
        while scrapes < count and time.monotonic() - start < at_most and in_a_row < GIVE_UP_AFTER:
            time.sleep(max(0.0, due - time.monotonic()))
            for ask in asks:
                took = timed(ask)
                if took is None:
                    failed, in_a_row = failed + 1, in_a_row + 1
                else:
                    in_a_row = 0
                    latencies.append(took)
            scrapes += 1
            due = max(due + interval, time.monotonic())
    finally:
        gc.enable()
    return latencies, scrapes, failed


def run_command(argv: Sequence[str], env: Mapping[str, str]) -> tuple[float, float, float]:
    """Run a command to its end; returns wall milliseconds, CPU milliseconds and peak resident MiB."""
    start = time.perf_counter()
    child = subprocess.Popen(  # noqa: S603 -- our own argv
        argv, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with child:
        assert child.stdout is not None  # noqa: S101 -- asked for above
        child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        wall = (time.perf_counter() - start) * 1000
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise ScrapeFailed(f"exit status {child.returncode}")
    return wall, (usage.ru_utime + usage.ru_stime) * 1000, usage.ru_maxrss / 1024


def complaints(text: str, promtool: str) -> list[str]:
    """Return the lines that `promtool check metrics` has to say about a page."""
    done = subprocess.run(  # noqa: S603 -- our own argv
        [promtool, "check", "metrics"], input=text, text=True, check=False, capture_output=True, timeout=60
    )
    return done.stderr.splitlines()


def cost(
    latencies: Sequence[float], scrapes: int, failed: int, *, spent: tuple[float, float], idle: tuple[float, float]
) -> Cost:
    """Return what a run of scrapes cost: CPU `spent` (own, daemon) less what idling would have cost, for each scrape."""
    own, daemon = (max(0.0, after - before) * 1000 / max(1, scrapes) for after, before in zip(spent, idle, strict=True))
    return Cost(
        scrapes=scrapes,
        failed=failed,
        own_cpu_ms=own,
        daemon_cpu_ms=daemon,
        latencies_ms=tuple(round(ms, 3) for ms in latencies),
    )
