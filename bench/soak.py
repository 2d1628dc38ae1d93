"""Scrape pm2-exporter a thousand times through an hour's worth of PM2 events, and report its memory and descriptors.

An hour's worth is a bad hour of an estate: one crash each three seconds and ten log lines a second, pressed into the
minutes that the scrapes take. Prints figures and judges nothing.

    .venv/bin/python -m bench.soak [--scrapes 1000] [--crashes 1200] [--lines 36000] [--seconds 120]
"""

import argparse
import sys
import time
from collections.abc import Sequence

import psutil

from bench.contenders import CONTENDERS, lacks, started
from bench.estate import HERE, estate, exit_on_signals
from bench.findings import OURS, quantile, total
from bench.measure import Scraper, memory_mib, page, timed

APPS = 20
RESTLESS = 4
CRASH_SECONDS = 0.01
"""What PM2 and bash need to bring a crashed script up again; the pace of the crashes reckons with it."""


def events(*, crashes: int, lines: int, seconds: float) -> list[dict[str, object]]:
    """Return the apps that make so many crashes and log lines in so many seconds."""
    every = max(0.05, RESTLESS * seconds / crashes - CRASH_SECONDS)
    restless = [
        {
            "name": f"restless-{number}",
            "script": str(HERE / "apps" / "restless.sh"),
            "interpreter": "bash",
            "max_restarts": 10**6,
            "env": {"EVERY_SECONDS": f"{every:.3f}"},
        }
        for number in range(RESTLESS)
    ]
    chatty: dict[str, object] = {
        "name": "chatty",
        "script": str(HERE / "apps" / "chatty.js"),
        "env": {"LINES_PER_SECOND": f"{lines / seconds:.0f}"},
    }
    return [*restless, chatty]


def state(process: psutil.Process, scrapes: int, text: str) -> str:
    """Return one line of figures."""
    now, peak = memory_mib(process.pid)
    exits = total(text, "pm2_process_exits_total")
    return f"{scrapes:7} {now:9.1f} {peak:9.1f} {process.num_fds():5} {process.num_threads():8} {exits:8.0f}"


def main(argv: Sequence[str]) -> int:
    """Soak, and print what became of memory and descriptors."""
    parser = argparse.ArgumentParser(
        prog="bench/soak.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scrapes", type=int, default=1000)
    parser.add_argument("--crashes", type=int, default=1200)
    parser.add_argument("--lines", type=int, default=36000)
    parser.add_argument("--seconds", type=float, default=120, help="how long the scrapes are spread over")
    options = parser.parse_args(argv)
    exit_on_signals()
    ours = next(one for one in CONTENDERS if one.name == OURS)
    with estate() as on:
        on.pm2.grow(APPS)
        with started(ours, on) as one:
            scraper, latencies = Scraper(one.urls[0]), []
            for _ in range(50):
                scraper.body()
            print("scrapes   RSS MiB  peak MiB   fds  threads    exits")
            fault = lacks(one, APPS)
            print(state(one.process, 0, page(one.urls[0])), fault, flush=True)
            on.pm2.start(events(crashes=options.crashes, lines=options.lines, seconds=options.seconds))
            interval, due = options.seconds / options.scrapes, time.monotonic()
            for count in range(1, options.scrapes + 1):
                time.sleep(max(0.0, due - time.monotonic()))
                latencies.append(timed(scraper.body))
                due += interval
                if count % max(1, options.scrapes // 10) == 0:
                    print(state(one.process, count, page(one.urls[0])), flush=True)
            on.pm2.delete([str(app["name"]) for app in events(crashes=1, lines=1, seconds=1)])
            time.sleep(5)
            print(state(one.process, options.scrapes, page(one.urls[0])), "5 s after the last event")
            scraper.close()
    good = [ms for ms in latencies if ms is not None]
    print(
        f"{len(latencies)} scrapes, {len(latencies) - len(good)} failed; "
        f"p50 {quantile(good, 0.5):.1f} ms, p99 {quantile(good, 0.99):.1f} ms"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
