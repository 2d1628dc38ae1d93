"""Samples to text: the two Prometheus text formats, content negotiation, and the cleaning of foreign strings.

`Desc` says what a metric is; `Metric` is a Desc with this scrape's rows. `render` writes them so that nothing foreign can
break the page: label values are cleaned and bounded, rows that would repeat a series or carry no number are dropped and
counted. Pure: no I/O, no clock.

Sources: the Prometheus exposition formats page (text 0.0.4) and the OpenMetrics 1.0.0 specification.
"""

import math
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple

import msgspec

LABEL_VALUE_MAX = 1024
"""Characters; a longer label value is cut there."""
_EXACT = 2**53
"""The integers below it are floats without loss; larger ones are written as the float that Prometheus would read."""


class Kind(Enum):
    """What a metric is, as its TYPE line says."""

    GAUGE = "gauge"
    COUNTER = "counter"
    SUMMARY = "summary"
    UNTYPED = "untyped"


class Desc(msgspec.Struct, frozen=True):
    """What one metric is: its name, kind, meaning, label names and where its value comes from."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        """Hold the rules that OpenMetrics enforces: _total is for counters only, `quantile` for summaries only."""
        if (self.kind is Kind.COUNTER) != self.name.endswith("_total"):
            raise ValueError(f"{self.name}: counters, and only they, end in _total")
        if (self.kind is Kind.SUMMARY) != ("quantile" in self.labels):
            raise ValueError(f"{self.name}: summaries, and only they, have the label quantile")


def gauge(name: str, help: str, labels: tuple[str, ...] = (), *, source: str = "") -> Desc:  # noqa: A002 -- the field's word
    """Describe a value that goes up and down."""
    return Desc(name, Kind.GAUGE, help, labels, source)


def counter(name: str, help: str, labels: tuple[str, ...] = (), *, source: str = "") -> Desc:  # noqa: A002 -- the same
    """Describe a value that only grows, until its source starts anew."""
    return Desc(name, Kind.COUNTER, help, labels, source)


def summary(name: str, help: str, labels: tuple[str, ...], *, source: str = "") -> Desc:  # noqa: A002 -- the same
    """Describe quantiles that the source itself computed; one of the labels is `quantile`. It has neither sum nor count."""
    return Desc(name, Kind.SUMMARY, help, labels, source)


def untyped(name: str, help: str, labels: tuple[str, ...] = (), *, source: str = "") -> Desc:  # noqa: A002 -- the same
    """Describe a value whose kind the established exporter leaves open."""
    return Desc(name, Kind.UNTYPED, help, labels, source)


Row = tuple[tuple[str, ...], float | int | None]
"""Label values in the order of the Desc's labels, and the value; None means "not seen" and is left out."""


class Metric(NamedTuple):
    """One metric of one scrape."""

    desc: Desc
    rows: Sequence[Row]


def single(desc: Desc, value: float | None) -> Metric:
    """Return the metric of a Desc that has no labels."""
    return Metric(desc, (((), value),))


class Format(Enum):
    """The formats on offer, each with the Content-Type it is served as."""

    TEXT = "text/plain; version=0.0.4; charset=utf-8"
    OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


DROPPED = gauge(
    "pm2_exporter_samples_dropped",
    "Samples of this scrape that were left out: they repeated a series, or their value was no number.",
    ("reason",),
    source="the exporter itself",
)


class LabelTexts:
    """Label sets as they were written on the last pages: most of a page says of the same things what the last one said.

    Bounded by what a page needs: label sets that come and go do not pile up.
    """

    __slots__ = ("_texts",)

    def __init__(self) -> None:
        """Start with none."""
        self._texts: dict[tuple[str, ...], dict[tuple[str, ...], str]] = {}

    def of(self, labels: tuple[str, ...]) -> dict[tuple[str, ...], str]:
        """Return the texts of all label sets with these names, by their values."""
        return self._texts.setdefault(labels, {})

    def forget(self, needed: int) -> None:
        """Start anew when there are many more than the `needed` ones."""
        if sum(map(len, self._texts.values())) > 2 * needed + 1000:
            self._texts.clear()


def render(
    metrics: Iterable[Metric], to: Format, *, account: Desc | None = DROPPED, known: LabelTexts | None = None
) -> bytes:
    """Return the page.

    `account` is the metric that tells how many samples were dropped (None leaves it out). `known`, when the same is given
    for every page, spares writing the same label sets again.
    """
    families: dict[str, tuple[Desc, list[Sequence[Row]]]] = {}
    for desc, rows in metrics:
        families.setdefault(desc.name, (desc, []))[1].append(rows)
    lines: list[str] = []
    dropped = {"duplicate": 0, "invalid": 0}
    known = known or LabelTexts()
    for desc, parts in families.values():
        _write_family(desc, parts, to, lines, dropped, known.of(desc.labels))
    if account is not None:
        rows = [((reason,), count) for reason, count in dropped.items()]
        _write_family(account, [rows], to, lines, dropped, known.of(account.labels))
    known.forget(len(lines))
    lines.append("# EOF\n" if to is Format.OPENMETRICS else "")
    return "\n".join(lines).encode("utf-8")


def _write_family(
    desc: Desc,
    parts: list[Sequence[Row]],
    to: Format,
    lines: list[str],
    dropped: dict[str, int],
    texts: dict[tuple[str, ...], str],
) -> None:
    name, at = desc.name, len(lines)
    known, append = texts.get, lines.append
    seen: set[str] = set()
    for rows in parts:
        for values, value in rows:
            if value is None:
                continue
            text = known(values)
            if text is None:
                text = texts[values] = _labels(desc.labels, values)
            if text in seen:
                dropped["duplicate"] += 1
                continue
            exact = value.__class__ is int and -_EXACT < value < _EXACT
            number = value if exact else _number(value)
            if number is None:
                dropped["invalid"] += 1
                continue
            seen.add(text)
            append(f"{name}{text} {number}")
    if len(lines) > at:
        lines[at:at] = _head(desc, to)


def _head(desc: Desc, to: Format) -> tuple[str, str]:
    name, kind, text = desc.name, desc.kind.value, desc.help.replace("\\", r"\\").replace("\n", r"\n")
    if to is Format.OPENMETRICS:
        text = text.replace('"', r"\"")
        if desc.kind is Kind.COUNTER:
            name = name.removesuffix("_total")
        elif desc.kind is Kind.UNTYPED:
            kind = "unknown"
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"


def _number(value: object) -> str | None:
    if not isinstance(value, float):
        if not isinstance(value, int):
            return None
        try:
            value = float(value)
        except OverflowError:
            return None
    if math.isfinite(value):
        return repr(value)
    if math.isnan(value):
        return "NaN"
    return "+Inf" if value > 0 else "-Inf"


def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    if not names:
        return ""
    pairs = ",".join([f'{name}="{clean(value)}"' for name, value in zip(names, values, strict=True)])
    return f"{{{pairs}}}"


def clean(value: object) -> str:
    r"""Return a label value as both formats take it: bounded, escaped, control characters and lone surrogates replaced.

    Anything that is no text is written as Python writes it; nothing raises.
    """
    text = value if isinstance(value, str) else str(value)
    if len(text) > LABEL_VALUE_MAX:
        text = text[: LABEL_VALUE_MAX - 1] + "…"
    if not text.isprintable():
        text = "".join([char if char.isprintable() or char in "\n\u00a0 " else "\ufffd" for char in text])
    if "\\" in text or '"' in text or "\n" in text:
        text = text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return text


def negotiate(accept: str) -> Format:
    """Return the format that an Accept header (RFC 9110 §12.5.1) likes best; text 0.0.4 where it likes none on offer."""
    best, best_quality = Format.TEXT, 0.0
    for item in accept.split(","):
        media, *rest = (part.strip().lower() for part in item.split(";"))
        parameters = dict(part.partition("=")[::2] for part in rest)
        quality = _quality(parameters.get("q", "1"))
        version = parameters.get("version", "").strip('"')
        if media == "application/openmetrics-text" and version in ("", "1.0.0"):
            offered = Format.OPENMETRICS
        elif media in ("text/plain", "text/*", "*/*") and version in ("", "0.0.4"):
            offered = Format.TEXT
        else:
            continue
        if quality > best_quality:
            best, best_quality = offered, quality
    return best


def accepts_gzip(accept_encoding: str) -> bool:
    """Tell whether an Accept-Encoding header (RFC 9110 §12.5.3) allows gzip."""
    qualities = {}
    for item in accept_encoding.split(","):
        coding, *rest = (part.strip().lower() for part in item.split(";"))
        qualities[coding] = _quality(dict(part.partition("=")[::2] for part in rest).get("q", "1"))
    return qualities.get("gzip", qualities.get("*", 0.0)) > 0


def _quality(text: str) -> float:
    try:
        quality = float(text)
    except ValueError:
        return 0.0
    return quality if 0 <= quality <= 1 else 0.0
