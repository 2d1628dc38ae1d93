"""What was found: the figures of one run, the judgement against the targets, and both as Markdown. Pure.

A "scrape" is what one contender is asked for in one scrape interval: one request, except blackbox_exporter's, which is one
request a probe.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

OURS = "pm2-exporter"
PM2_METRICS = "pm2-metrics"
PROCESS = "process-exporter"
PROCESS_LEAN = "process-exporter, lean"
NODE = "node_exporter"
BLACKBOX = "blackbox_exporter"
JLIST = "pm2 jlist"

PEERS = (PM2_METRICS, PROCESS, NODE, BLACKBOX)
"""Who together show about what ours shows; their sum is what ours is held against."""

LEAN_PEERS = (PM2_METRICS, PROCESS_LEAN, NODE, BLACKBOX)
"""The same with process-exporter's two costly readings turned off."""

TARGET_APPS = 100
"""The number of apps the targets are set for."""

CPU_SHARE_MAX = 1 / 8
P50_MAX_MS = 20.0
P99_TO_P50_MAX = 2.0
RSS_MAX_MIB = 64.0
NONE = "-"
"""Stands in a table where there is no figure."""

GROWTH_MAX = 1.25
"""A cost is called linear when one more app costs at most this many times as much on the last stretch as on the first."""


class Cost(msgspec.Struct, frozen=True):
    """What a run of scrapes cost; CPU is for each scrape, with what idling costs taken off."""

    scrapes: int
    failed: int
    own_cpu_ms: float
    daemon_cpu_ms: float
    latencies_ms: tuple[float, ...]

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds of a scrape, in the contender and in the PM2 daemon."""
        return self.own_cpu_ms + self.daemon_cpu_ms

    @property
    def p50_ms(self) -> float:
        """The median latency in milliseconds."""
        return quantile(self.latencies_ms, 0.5)

    @property
    def p99_ms(self) -> float:
        """The latency in milliseconds that 99 of 100 requests keep to."""
        return quantile(self.latencies_ms, 0.99)


class Reading(msgspec.Struct, frozen=True):
    """One contender at one number of apps."""

    contender: str
    version: str
    fault: str = ""
    """Why there are no figures, or what they lack; empty when all is well."""
    paced: Cost | None = None
    burst: Cost | None = None
    idle_cpu_ms: float = 0.0
    """CPU milliseconds a second that it costs when nobody asks."""
    rss_mib: float = 0.0
    peak_rss_mib: float = 0.0
    series: int = 0
    families: int = 0
    complaints: int = 0
    """Lines that `promtool check metrics` had to say."""
    wire_bytes: int = 0
    """Size of one answer as it was sent."""


class Round(msgspec.Struct, frozen=True):
    """Every contender at one number of apps."""

    apps: int
    reply_bytes: int
    """Size of what `pm2 jlist` prints."""
    daemon_idle_cpu_ms: float
    """CPU milliseconds a second of the PM2 daemon when nobody asks."""
    readings: tuple[Reading, ...]
    collectors_ms: dict[str, float] = {}
    """Our exporter's collectors and how long each took, in milliseconds, median of several scrapes."""


class Run(msgspec.Struct, frozen=True):
    """One run of the benchmark: where, how and what."""

    machine: dict[str, str]
    settings: dict[str, float]
    rounds: tuple[Round, ...]


class Judgement(msgspec.Struct, frozen=True):
    """One target: what was wanted, what was measured, whether it was reached; None is not measured."""

    target: str
    wanted: str
    measured: str
    reached: bool | None


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of the values keeps to (nearest rank); NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def count_series(page: str) -> tuple[int, int]:
    """Return how many series and how many families a page in the text format 0.0.4 shows."""
    lines = page.splitlines()
    series = sum(1 for line in lines if line and not line.startswith("#"))
    return series, sum(1 for line in lines if line.startswith("# TYPE "))


def values(page: str, name: str, label: str) -> dict[str, float]:
    """Return the values of one metric by one label, from a page in the text format 0.0.4."""
    found = {}
    for line in page.splitlines():
        if line.startswith(name + "{"):
            labels, _, value = line.removeprefix(name).rpartition(" ")
            _, _, rest = labels.partition(f'{label}="')
            found[rest.partition('"')[0]] = float(value)
    return found


def total(page: str, name: str) -> float:
    """Return the sum of all series of one metric that has labels."""
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(name + "{"))


def measured(of: Round, contender: str) -> Reading | None:
    """Return a contender's reading when it has figures."""
    return next((one for one in of.readings if one.contender == contender and one.paced is not None), None)


def cpu_ms(of: Round, contenders: Iterable[str]) -> float | None:
    """Return the CPU milliseconds, daemon share included, of one scrape of each contender; None when one is missing."""
    total = 0.0
    for contender in contenders:
        reading = measured(of, contender)
        if reading is None or reading.paced is None:
            return None
        total += reading.paced.cpu_ms
    return total


def rss_mib(of: Round, contenders: Iterable[str]) -> float | None:
    """Return the resident memory of some contenders together, in MiB; None when one is missing."""
    readings = [measured(of, contender) for contender in contenders]
    return None if None in readings else sum(one.rss_mib for one in readings if one)


def growth(rounds: Sequence[Round]) -> tuple[float, float] | None:
    """Return what one more app adds to our CPU milliseconds a scrape: on the first stretch, and on the last."""
    points = [(one.apps, cost) for one in rounds if (cost := cpu_ms(one, (OURS,))) is not None]
    if len(points) < 3:  # noqa: PLR2004 -- two stretches have three ends
        return None
    slopes = [(after[1] - before[1]) / (after[0] - before[0]) for before, after in itertools.pairwise(points)]
    return slopes[0], slopes[-1]


def judge(run: Run) -> tuple[Judgement, ...]:
    """Hold the run against the targets."""
    at = next((one for one in run.rounds if one.apps == TARGET_APPS), None)
    ours = measured(at, OURS) if at else None
    paced = ours.paced if ours else None
    cpu, peers = (cpu_ms(at, (OURS,)), cpu_ms(at, PEERS)) if at else (None, None)
    slopes = growth(run.rounds)
    return (
        _judgement(
            "CPU per scrape, with the daemon's share",
            f"at most 1/{1 / CPU_SHARE_MAX:.0f} of the peers' sum",
            (f"{cpu:.1f} ms of {peers:.1f} ms: 1/{peers / cpu:.1f}", cpu <= peers * CPU_SHARE_MAX)
            if cpu and peers
            else None,
        ),
        _judgement(
            "p50 of a scrape",
            f"at most {P50_MAX_MS:g} ms",
            (f"{paced.p50_ms:.1f} ms", paced.p50_ms <= P50_MAX_MS) if paced else None,
        ),
        _judgement(
            "p99 of a scrape",
            f"at most {P99_TO_P50_MAX:g} times p50",
            (
                f"{paced.p99_ms:.1f} ms: {paced.p99_ms / paced.p50_ms:.1f} times",
                paced.p99_ms <= P99_TO_P50_MAX * paced.p50_ms,
            )
            if paced
            else None,
        ),
        _judgement(
            "resident memory after the run",
            f"at most {RSS_MAX_MIB:g} MiB",
            (f"{ours.rss_mib:.1f} MiB, peak {ours.peak_rss_mib:.1f}", ours.rss_mib <= RSS_MAX_MIB) if ours else None,
        ),
        _judgement(
            "CPU per scrape that one more app adds",
            f"on the last stretch at most {GROWTH_MAX:g} times the first",
            (f"{slopes[0]:.3f} ms, then {slopes[1]:.3f} ms", slopes[1] <= GROWTH_MAX * max(slopes[0], 0.0))
            if slopes
            else None,
        ),
    )


def _judgement(target: str, wanted: str, found: tuple[str, bool] | None) -> Judgement:
    measured, reached = found or ("not measured", None)
    return Judgement(target, wanted, measured, reached)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; every column after the first is set to the right."""
    rules = ["---", *["---:"] * (len(head) - 1)]
    lines = [head, rules, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def targets_block(run: Run) -> str:
    """Return the table of targets, and what was missed, in words."""
    words = {True: "reached", False: "**not reached**", None: "not measured"}
    rows = [(one.target, one.wanted, one.measured, words[one.reached]) for one in judge(run)]
    return table((f"At {TARGET_APPS} apps", "Wanted", "Measured", "Verdict"), rows)


def peers_block(run: Run) -> str:
    """Return how our cost stands to the peers' sum at every number of apps."""
    rows = []
    for one in run.rounds:
        ours = cpu_ms(one, (OURS,))
        row = [str(one.apps), _number(ours)]
        for peers in (PEERS, LEAN_PEERS):
            theirs = cpu_ms(one, peers)
            row += [_number(theirs), f"1/{theirs / ours:.1f}" if ours and theirs else NONE]
        rows.append([*row, *(_number(rss_mib(one, who)) for who in ((OURS,), PEERS))])
    head = ("Apps", "CPU, ms", "peers' sum", "is", "lean peers' sum", "is", "RSS, MiB", "peers' sum")
    return table(head, rows)


def round_block(of: Round) -> str:
    """Return the table of all contenders at one number of apps."""
    head = (
        f"{of.apps} apps",
        "p50 / p99, ms",
        "CPU, ms: own + daemon",
        "burst p50 / p99, ms",
        "idle CPU, ms/s",
        "RSS / peak, MiB",
        "series",
        "families",
        "promtool says",
        "scrapes",
        "notes",
    )
    note = (
        f"`pm2 jlist` prints {of.reply_bytes / 1000:.0f} kB here. The PM2 daemon costs {of.daemon_idle_cpu_ms:.1f} ms/s "
        "when nobody asks."
    )
    return f"{table(head, [_row(one) for one in of.readings])}\n\n{note}"


def _row(one: Reading) -> list[str]:
    if one.paced is None or one.burst is None:
        return [one.contender, *[NONE] * 9, one.fault]
    paced, burst, page = one.paced, one.burst, bool(one.series)
    failed = paced.failed + burst.failed
    return [
        one.contender,
        f"{paced.p50_ms:.1f} / {paced.p99_ms:.1f}",
        f"{paced.own_cpu_ms:.1f} + {paced.daemon_cpu_ms:.1f}",
        f"{burst.p50_ms:.1f} / {burst.p99_ms:.1f}",
        f"{one.idle_cpu_ms:.1f}",
        f"{one.rss_mib:.0f} / {one.peak_rss_mib:.0f}",
        str(one.series) if page else NONE,
        str(one.families) if page else NONE,
        str(one.complaints) if page else NONE,
        str(paced.scrapes),
        "; ".join(part for part in (one.fault, f"{failed} failed" if failed else "") if part),
    ]


def collectors_block(run: Run) -> str:
    """Return where the time of one of our scrapes goes, as the exporter says itself."""
    names = sorted({name for one in run.rounds for name in one.collectors_ms})
    if not names:
        return "Not measured."
    rows = [[name, *(_number(one.collectors_ms.get(name)) for one in run.rounds)] for name in names]
    return table(("Collector, ms", *(f"{one.apps} apps" for one in run.rounds)), rows)


def machine_block(run: Run) -> str:
    """Return what it was measured on, and with which settings."""
    rows = [*run.machine.items(), *((name, f"{value:g}") for name, value in run.settings.items())]
    return table(("", ""), [(name, value) for name, value in rows]).replace("---:", "---")


def blocks(run: Run) -> dict[str, str]:
    """Return every generated part of the page by its name."""
    return {
        "targets": targets_block(run),
        "peers": peers_block(run),
        "results": "\n\n".join(round_block(one) for one in run.rounds),
        "collectors": collectors_block(run),
        "machine": machine_block(run),
    }


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Return the page with each part put between its markers.

    Raises ValueError for a part that has no markers.
    """
    for name, part in parts.items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"no markers {begin} ... {end}")
        text = f"{before}{begin}\n{part}\n{end}{after}"
    return text


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"
