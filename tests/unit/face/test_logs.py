"""One event is one line, in both formats, whatever is in it."""

import json
import logging
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.logs import FORMATS, Lines

FIELD = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|[^\s"]+)')


def line(form: str, message: str = "event", *, level: int = logging.INFO, **fields: object) -> str:
    """Return the line of one event."""
    record = logging.getLogger("x").makeRecord("x", level, __file__, 1, message, (), None, extra=fields)
    return Lines(form).format(record)


def read(form: str, text: str) -> dict[str, str]:
    """Read a line back."""
    if form == "json":
        return {key: str(value) for key, value in json.loads(text).items()}
    found = FIELD.findall(text)
    assert " ".join(f"{key}={value}" for key, value in found) == text, "more than fields is in the line"
    return {key: json.loads(value) if value.startswith('"') else value for key, value in found}


@pytest.mark.parametrize("form", FORMATS)
@given(message=st.text(st.characters(exclude_categories=[])), value=st.text(st.characters(exclude_categories=[])))
def test_no_value_can_forge_a_line_or_a_field(form: str, message: str, value: str) -> None:
    """Any text survives within its field of its line, which any terminal and any file can take."""
    text = line(form, message.replace("%", "%%"), app=value)
    assert len(text.splitlines()) == 1
    assert text.encode()
    fields = read(form, text)
    assert list(fields) == ["ts", "level", "logger", "msg", "app"]
    assert fields["app"] == value
    assert "\x1b" not in text


def test_plain_fields() -> None:
    """What needs no quotes has none; levels are called as Prometheus calls them; times are UTC."""
    text = line("logfmt", level=logging.WARNING, app="web", seconds=1.5, none=None, empty="")
    assert re.fullmatch(
        r'ts=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z level=warn logger=x msg=event app=web seconds=1.5 none=None empty=""',
        text,
    )
    assert json.loads(line("json", seconds=1.5))["seconds"] == 1.5


@pytest.mark.parametrize("form", FORMATS)
def test_tracebacks_stay_in_their_line(form: str) -> None:
    """A failure's traceback is the field `error`."""
    try:
        int("a\nb")
    except ValueError as error:
        record = logging.getLogger("x").makeRecord(
            "x", 40, __file__, 1, "failed", (), (type(error), error, error.__traceback__)
        )
    text = Lines(form).format(record)
    assert len(text.splitlines()) == 1
    assert read(form, text)["error"].endswith("ValueError: invalid literal for int() with base 10: 'a\\nb'")


@pytest.mark.parametrize(("level", "count"), [("debug", 4), ("info", 3), ("warn", 2), ("error", 1)])
def test_levels(level: str, count: int) -> None:
    """What is less severe than the level asked for is left out, whatever the format."""
    for form in FORMATS:
        code = (
            f"import logging; from exporter.logs import configure; configure(level={level!r}, form={form!r});"
            "[getattr(logging.getLogger('exporter'), word)('event') for word in ('debug', 'info', 'warning', 'error')]"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
        assert len(done.stderr.splitlines()) == count
