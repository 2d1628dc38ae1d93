"""The benchmark's arithmetic and its page: a wrong sum or a verdict turned round would be believed by everyone."""

import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import findings
from bench.findings import BLACKBOX, JLIST, NODE, OURS, PM2_METRICS, PROCESS, PROCESS_LEAN, Cost, Reading, Round, Run

PAGE = Path(__file__).parents[3] / "docs" / "performance.md"
milliseconds = st.floats(0, 1e6)


def costing(own: float, daemon: float = 0.0, *latencies: float) -> Cost:
    """Make the cost of a run of ten scrapes."""
    return Cost(scrapes=10, failed=0, own_cpu_ms=own, daemon_cpu_ms=daemon, latencies_ms=latencies or (5.0,))


def of(contender: str, paced: Cost, rss: float = 50.0) -> Reading:
    """Make a contender's reading."""
    return Reading(contender=contender, version="1", paced=paced, burst=paced, rss_mib=rss, peak_rss_mib=rss, series=3)


def around(apps: int, ours: Reading, *peers: Reading) -> Round:
    """Make a round whose peers cost 80 ms together (70 lean) unless they are given."""
    peers = peers or (
        of(PM2_METRICS, costing(8, 6)),
        of(PROCESS, costing(60)),
        of(PROCESS_LEAN, costing(50)),
        of(NODE, costing(4)),
        of(BLACKBOX, costing(2)),
        of(JLIST, costing(140, 6)),
    )
    return Round(apps=apps, reply_bytes=5_000 * apps, daemon_idle_cpu_ms=1.0, readings=(ours, *peers))


def run(*rounds: Round) -> Run:
    """Make a run."""
    return Run(machine={"CPU": "2 of them"}, settings={"Paced scrapes": 200.0}, rounds=rounds)


def verdicts(seen: Run) -> list[bool | None]:
    """Return what was reached, in the order of the targets."""
    return [one.reached for one in findings.judge(seen)]


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ((3.0,), 0.5, 3.0),
        ((1.0, 2.0), 0.5, 1.0),
        ((3.0, 1.0, 2.0), 0.5, 2.0),
        (tuple(float(n) for n in range(1, 101)), 0.99, 99.0),
        (tuple(float(n) for n in range(1, 201)), 0.99, 198.0),
        ((1.0, 2.0), 0.0, 1.0),
        ((1.0, 2.0), 1.0, 2.0),
    ],
)
def test_quantile_is_the_nearest_rank(values: tuple[float, ...], share: float, expected: float) -> None:
    """A quantile is a latency that was measured, not one between two."""
    assert findings.quantile(values, share) == expected


def test_quantile_of_nothing_is_no_number() -> None:
    """No scrape, no latency."""
    assert math.isnan(findings.quantile((), 0.5))


@given(st.lists(milliseconds, min_size=1), st.floats(0, 1))
def test_quantile_is_the_smallest_that_enough_values_keep_to(values: list[float], share: float) -> None:
    """At least the share of the values is at most the quantile, and no smaller value has that."""
    found = findings.quantile(values, share)
    enough = share * len(values)
    assert sum(value <= found for value in values) >= enough
    assert found == min(values) or sum(value < found for value in values) < enough


def test_the_peers_sum_holds_each_peer_once_and_neither_jlist_nor_the_lean_reading() -> None:
    """The sum is pm2-metrics with its daemon's share, process-exporter, node_exporter and the three probes."""
    seen = around(100, of(OURS, costing(4, 5)))
    assert findings.cpu_ms(seen, findings.PEERS) == pytest.approx(8 + 6 + 60 + 4 + 2)
    assert findings.cpu_ms(seen, findings.LEAN_PEERS) == pytest.approx(8 + 6 + 50 + 4 + 2)


def test_a_missing_peer_makes_no_smaller_sum() -> None:
    """Where a peer did not run there is no sum, and no verdict on it."""
    seen = around(
        100, of(OURS, costing(4, 5)), of(NODE, costing(4)), Reading(contender=PROCESS, version="", fault="did not start")
    )
    assert findings.cpu_ms(seen, findings.PEERS) is None
    assert verdicts(run(seen))[0] is None


def test_all_targets_reached() -> None:
    """A run within every bound is reached in every line."""
    rounds = [around(apps, of(OURS, costing(1 + apps * 0.04, apps * 0.05, 8.0, 9.0))) for apps in (10, 100, 200)]
    assert verdicts(run(*rounds)) == [True] * 5


@pytest.mark.parametrize(
    ("ours", "missed"),
    [
        (of(OURS, costing(5.1, 5.0)), 0),
        (of(OURS, costing(4, 5, 20.1)), 1),
        (of(OURS, costing(4, 5, *[5.0] * 98, 10.1, 10.1)), 2),
        (of(OURS, costing(4, 5), rss=64.1), 3),
    ],
)
def test_each_target_is_missed_alone(ours: Reading, missed: int) -> None:
    """A figure just beyond its bound is not reached, and costs no other target."""
    found = verdicts(run(around(100, ours)))[:4]
    assert found == [place != missed for place in range(4)]


def test_an_eighth_of_the_peers_sum_is_still_reached() -> None:
    """The bounds belong to what is reached."""
    assert verdicts(run(around(100, of(OURS, costing(4, 6, *[10.0] * 98, 20.0, 20.0), rss=64.0))))[:4] == [True] * 4


@pytest.mark.parametrize(("at_200", "linear"), [(18.0, True), (21.4, True), (21.6, False), (36.0, False)])
def test_growth_is_judged_by_what_one_more_app_costs(at_200: float, *, linear: bool) -> None:
    """From 10 to 100 apps one costs 0.1 ms here; beyond, at most a quarter more."""
    costs = {10: 0.0, 100: 9.0, 200: at_200}
    seen = run(*(around(apps, of(OURS, costing(cost))) for apps, cost in costs.items()))
    assert verdicts(seen)[4] is linear


def test_nothing_is_judged_that_was_not_measured() -> None:
    """A short run, and one without ours, has no verdicts."""
    absent = Reading(contender=OURS, version="", fault="did not start")
    assert verdicts(run(around(10, of(OURS, costing(1))))) == [None] * 5
    assert verdicts(run(around(100, absent))) == [None] * 5


def test_what_is_not_reached_is_shown_as_not_reached() -> None:
    """The page hides no missed target."""
    text = findings.targets_block(run(around(100, of(OURS, costing(50, 5, 30.0), rss=90.0))))
    assert text.count("**not reached**") == 3
    assert "90.0 MiB" in text


def test_an_absent_contender_is_in_the_table_with_its_reason() -> None:
    """Who did not run is said, and why."""
    text = findings.round_block(
        around(10, of(OURS, costing(1)), Reading(contender=PROCESS, version="", fault="did not start"))
    )
    assert "| process-exporter | - | - |" in text
    assert "did not start" in text


@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_categories=("Cc", "Zl", "Zp", "Cs"))), min_size=2, max_size=2), max_size=5
    )
)
def test_a_cell_breaks_no_table(rows: list[list[str]]) -> None:
    """Every row has as many columns as the head, whatever a cell holds."""
    lines = findings.table(("a", "b"), rows).split("\n")
    assert len(lines) == len(rows) + 2
    assert {line.replace("\\|", "").count("|") for line in lines} == {3}


def test_a_page_is_counted() -> None:
    """Series are the lines with a value, families those with a type."""
    page = '# HELP a A.\n# TYPE a gauge\na{x="1"} 1\na{x="2"} 2\n\n# TYPE b counter\nb_total 3\n'
    assert findings.count_series(page) == (3, 2)


def test_values_are_read_by_one_label() -> None:
    """The collectors' own durations are found by the collector's name."""
    page = '# TYPE d gauge\nd{collector="pm2"} 0.004\nd{x="y",collector="http"} 1e-3\ndd{collector="no"} 1\n'
    assert findings.values(page, "d", "collector") == {"pm2": 0.004, "http": 0.001}


def test_a_total_is_of_one_metric_and_all_its_series() -> None:
    """Series that share a label's value are all counted, a longer name is not."""
    assert findings.total('e{name="a",cause="x"} 1\ne{name="a",cause="y"} 2\nee{name="a"} 4\n', "e") == 3.0


def test_filling_twice_changes_nothing() -> None:
    """The page is made anew from itself, and prose stays."""
    once = findings.fill("before\n<!-- bench:a -->\nold\n<!-- /bench:a -->\nafter\n", {"a": "new"})
    assert once == "before\n<!-- bench:a -->\nnew\n<!-- /bench:a -->\nafter\n"
    assert findings.fill(once, {"a": "new"}) == once


@pytest.mark.parametrize("page", ["", "<!-- bench:a -->", "<!-- /bench:a -->"])
def test_a_page_without_markers_is_refused(page: str) -> None:
    """Figures are never dropped in silence."""
    with pytest.raises(ValueError, match="no markers"):
        findings.fill(page, {"a": "new"})


def test_the_committed_page_has_a_place_for_every_part() -> None:
    """docs/performance.md and the harness agree on the parts."""
    parts = findings.blocks(run(around(100, of(OURS, costing(4, 5)))))
    filled = findings.fill(PAGE.read_text(), parts)
    assert all(part in filled for part in parts.values())


def test_the_results_survive_their_file() -> None:
    """What is written is what is read back for rendering."""
    seen = run(around(100, of(OURS, costing(4, 5))))
    assert msgspec.json.decode(msgspec.json.encode(seen), type=Run) == seen
