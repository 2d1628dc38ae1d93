"""The picture of a run: CPU per scrape, latency and memory, against the number of apps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

from bench import findings

mpl.use("svg")

from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = {
    findings.OURS: "#0072B2",
    findings.PM2_METRICS: "#D55E00",
    findings.PROCESS: "#CC79A7",
    findings.PROCESS_LEAN: "#999999",
    findings.NODE: "#009E73",
    findings.BLACKBOX: "#E69F00",
    findings.JLIST: "#000000",
}
DAEMON = "#56B4E9"


def draw(run: findings.Run, to: Path) -> None:
    """Draw a run into an SVG file; the same run gives the same bytes."""
    with mpl.rc_context(
        {"svg.hashsalt": "performance", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure, (cpu, latency, memory) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
        _cpu(cpu, run.rounds)
        _lines(latency, run.rounds, _p50, "p50 of a scrape; the bar reaches to p99", "ms", reach=_p99)
        latency.set_yscale("log")
        _lines(
            memory,
            run.rounds,
            lambda one: one.rss_mib,
            f"resident memory after the run\ndotted: ours should stay below {findings.RSS_MAX_MIB:g} MiB",
            "MiB",
        )
        memory.axhline(findings.RSS_MAX_MIB, color=COLOURS[findings.OURS], linewidth=0.8, linestyle=":")
        memory.set_ylim(bottom=0)
        handles, labels = latency.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.savefig(to, format=to.suffix[1:], metadata={"Date": None} if to.suffix == ".svg" else {})
        plt.close(figure)


def _p50(one: findings.Reading) -> float:
    return one.paced.p50_ms if one.paced else float("nan")


def _p99(one: findings.Reading) -> float:
    return one.paced.p99_ms if one.paced else float("nan")


def _cpu(axes: "Axes", rounds: Sequence[findings.Round]) -> None:
    labels = []
    for at, of in enumerate(rounds):
        for side, contenders in ((-0.2, (findings.OURS,)), (0.2, findings.PEERS)):
            top = 0.0
            for contender in contenders:
                reading = findings.measured(of, contender)
                if reading is None or reading.paced is None:
                    continue
                for height, colour in (
                    (reading.paced.own_cpu_ms, COLOURS[contender]),
                    (reading.paced.daemon_cpu_ms, DAEMON),
                ):
                    axes.bar(at + side, height, width=0.36, bottom=top, color=colour)
                    top += height
            axes.annotate(f"{top:.1f}", (at + side, top), ha="center", va="bottom")
        labels.append(f"{of.apps} apps")
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel("ms")
    axes.set_title("CPU per scrape: ours (left), the peers' sum (right)\nlight blue is the PM2 daemon's share", fontsize=9)


def _lines(
    axes: "Axes",
    rounds: Sequence[findings.Round],
    value: Callable[[findings.Reading], float],
    title: str,
    unit: str,
    *,
    reach: Callable[[findings.Reading], float] | None = None,
) -> None:
    for contender, colour in COLOURS.items():
        readings = [(of.apps, found) for of in rounds if (found := findings.measured(of, contender))]
        if not readings:
            continue
        xs, ys = [apps for apps, _ in readings], [value(one) for _, one in readings]
        up = (
            None if reach is None else [[0.0] * len(ys), [reach(one) - y for (_, one), y in zip(readings, ys, strict=True)]]
        )
        wide = 2.2 if contender == findings.OURS else 1.1
        axes.errorbar(xs, ys, yerr=up, color=colour, label=contender, marker="o", markersize=3, linewidth=wide, capsize=2)
    axes.set_xticks([of.apps for of in rounds])
    axes.set_xlabel("PM2 apps")
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=9)
