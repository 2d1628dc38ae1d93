"""The page: nothing foreign can break it, and both formats are as their parsers want them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from exporter.exposition import (
    LABEL_VALUE_MAX,
    Desc,
    Format,
    Kind,
    LabelTexts,
    Metric,
    accepts_gzip,
    counter,
    gauge,
    negotiate,
    render,
    single,
    summary,
    untyped,
)

UP = gauge("up_now", 'Whether "it" is up\\down,\nor not.')
SIZE = gauge("size_bytes", "Sizes.", ("name", "pm_id"))
SEEN = counter("seen_total", "Things seen.", ("name",))
ODD = untyped("odd", "Odd.")


def test_text_page() -> None:
    """The text format, to the letter: escapes, order, kinds, and no family without samples."""
    page = render(
        [
            single(UP, 1),
            Metric(SIZE, [(("a", "0"), 1.5), (('b"\\\n', "1"), None), (('b"\\\n', "2"), 3)]),
            Metric(SEEN, []),
            single(ODD, math.inf),
        ],
        Format.TEXT,
        account=None,
    )
    assert page.decode() == (
        '# HELP up_now Whether "it" is up\\\\down,\\nor not.\n# TYPE up_now gauge\nup_now 1\n'
        "# HELP size_bytes Sizes.\n# TYPE size_bytes gauge\n"
        'size_bytes{name="a",pm_id="0"} 1.5\nsize_bytes{name="b\\"\\\\\\n",pm_id="2"} 3\n'
        "# HELP odd Odd.\n# TYPE odd untyped\nodd +Inf\n"
    )


def test_openmetrics_page() -> None:
    """The OpenMetrics format: counters are named without _total in their head, untyped is unknown, EOF ends it."""
    page = render([Metric(SEEN, [(("a",), 2)]), single(ODD, math.nan)], Format.OPENMETRICS, account=None)
    assert page.decode() == (
        '# HELP seen Things seen.\n# TYPE seen counter\nseen_total{name="a"} 2\n'
        "# HELP odd Odd.\n# TYPE odd unknown\nodd NaN\n# EOF\n"
    )


def test_repeated_series_and_wrong_values_are_dropped_and_counted() -> None:
    """A series appears once, a value is a number; what had to go is counted by reason."""
    page = render(
        [
            Metric(SIZE, [(("a", "0"), 1), (("a", "0"), 2), (("b", "0"), "7"), (("c", "0"), 10**400)]),
            Metric(SIZE, [(("a", "0"), 3)]),
        ],
        Format.TEXT,
    ).decode()
    assert page.count("size_bytes{") == 1
    assert 'size_bytes{name="a",pm_id="0"} 1\n' in page
    assert 'pm2_exporter_samples_dropped{reason="duplicate"} 2\n' in page
    assert 'pm2_exporter_samples_dropped{reason="invalid"} 2\n' in page


def test_one_family_from_two_collectors_has_one_head() -> None:
    """Rows of one name are kept together, whoever sent them."""
    page = render([Metric(SEEN, [(("a",), 1)]), single(UP, 1), Metric(SEEN, [(("b",), 1)])], Format.TEXT).decode()
    assert page.count("# TYPE seen_total") == 1
    assert 'seen_total{name="a"} 1\nseen_total{name="b"} 1\n' in page


def test_long_label_values_are_cut() -> None:
    """A label value is bounded."""
    page = render([Metric(SEEN, [(("x" * 100_000,), 1)])], Format.TEXT, account=None)
    assert len(page) < LABEL_VALUE_MAX + 200


NAMES = st.text() | st.sampled_from(["\ud800", "\udfff", "\x00", "\n", '"', "\\", "\u2028", "a\rb", '"} 1\nforged{x="'])
VALUES = st.floats() | st.integers() | st.none() | st.booleans() | st.text(max_size=3)


@given(st.lists(st.tuples(st.tuples(NAMES, NAMES), VALUES), max_size=8), st.sampled_from(Format))
def test_nothing_foreign_breaks_a_page(rows: list, to: Format) -> None:
    """Whatever labels and values come in, both parsers read the page, no series repeats and no line is forged."""
    page = render([Metric(SIZE, rows)], to).decode()
    parse = parse_openmetrics if to is Format.OPENMETRICS else parse_text
    families = list(parse(page))
    assert {family.name for family in families} <= {"size_bytes", "pm2_exporter_samples_dropped"}
    samples = [sample for family in families for sample in family.samples if family.name == "size_bytes"]
    series = [tuple(sorted(sample.labels.items())) for sample in samples]
    assert len(series) == len(set(series))
    dropped = {s.labels["reason"]: s.value for f in families for s in f.samples if f.name == "pm2_exporter_samples_dropped"}
    assert len(samples) + sum(dropped.values()) == sum(value is not None for _, value in rows)


def test_kind_and_name_agree() -> None:
    """Counters, and only they, end in _total."""
    with pytest.raises(ValueError, match="counters, and only they"):
        Desc("seen", Kind.COUNTER, "x")
    with pytest.raises(ValueError, match="counters, and only they"):
        Desc("seen_total", Kind.GAUGE, "x")
    with pytest.raises(ValueError, match="summaries, and only they"):
        Desc("lag_seconds", Kind.GAUGE, "x", ("quantile",))


def test_summary_of_quantiles_alone() -> None:
    """Quantiles that a source computed are a summary in both formats, without sum and count."""
    lag = summary("lag_seconds", "Lag.", ("name", "quantile"))
    metric = Metric(lag, [(("a", "0.5"), 0.1), (("a", "0.95"), 0.2)])
    for to, parse in [(Format.TEXT, parse_text), (Format.OPENMETRICS, parse_openmetrics)]:
        (family,) = parse(render([metric], to, account=None).decode())
        assert (family.type, [sample.value for sample in family.samples]) == ("summary", [0.1, 0.2])


PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (PROMETHEUS_2, Format.OPENMETRICS),
        (PROMETHEUS_3, Format.OPENMETRICS),
        ("", Format.TEXT),
        ("*/*", Format.TEXT),
        ("text/html,application/xhtml+xml,*/*;q=0.8", Format.TEXT),
        ("application/openmetrics-text", Format.OPENMETRICS),
        ("application/openmetrics-text;version=0.0.1", Format.TEXT),
        ("application/openmetrics-text;version=2.0.0", Format.TEXT),
        ("application/openmetrics-text; version=abc", Format.TEXT),
        ("application/openmetrics-text;q=0.1,text/plain;q=0.9", Format.TEXT),
        ("application/openmetrics-text;q=0", Format.TEXT),
        ("application/openmetrics-text;q=nan,text/plain;q=0.1", Format.TEXT),
        ("application/json", Format.TEXT),
        (";;;,,,=;q=", Format.TEXT),
    ],
)
def test_negotiation(accept: str, expected: Format) -> None:
    """The client's favourite among the two formats on offer is served; text where it names neither."""
    assert negotiate(accept) is expected


@given(st.text())
def test_negotiation_never_fails(header: str) -> None:
    """No header makes negotiation fail."""
    assert negotiate(header) in Format
    assert accepts_gzip(header) in (True, False)


@pytest.mark.parametrize(
    ("header", "expected"),
    [("gzip", True), ("deflate, GZIP;q=0.5", True), ("gzip;q=0", False), ("*", True), ("identity", False), ("", False)],
)
def test_gzip_is_used_where_it_is_wanted(header: str, expected: bool) -> None:  # noqa: FBT001 -- a table's column
    """Compression is the client's choice."""
    assert accepts_gzip(header) is expected


@given(st.lists(st.lists(st.tuples(st.tuples(NAMES, NAMES), st.integers(0, 9)), max_size=5), max_size=6))
def test_remembered_label_sets_change_no_page(pages: list) -> None:
    """A page is the same whatever was written before it."""
    known = LabelTexts()
    for rows in pages:
        metrics = [Metric(SIZE, rows), Metric(SEEN, [((name,), value) for (name, _), value in rows])]
        assert render(metrics, Format.TEXT, known=known) == render(metrics, Format.TEXT)


def test_remembered_label_sets_do_not_pile_up() -> None:
    """Names that come and go leave nothing behind."""
    known = LabelTexts()
    for number in range(20_000):
        render([Metric(SEEN, [((f"name {number}",), 1)])], Format.TEXT, known=known)
    assert len(known.of(SEEN.labels)) < 1100
