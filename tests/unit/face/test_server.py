"""Which collectors a request asks for, and how long it may take."""

import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st

from exporter.server import LONGEST, select, time_allowed

KNOWN = ("pm2", "host", "http")


@pytest.mark.parametrize(
    ("collect", "exclude", "chosen"),
    [
        ([], [], KNOWN),
        (["host"], [], ("host",)),
        (["http", "pm2", "http"], [], ("pm2", "http")),
        ([], ["pm2", "pm2"], ("host", "http")),
        ([], list(KNOWN), ()),
    ],
)
def test_selection(collect: list[str], exclude: list[str], chosen: tuple[str, ...]) -> None:
    """Each collector asked for is there once, in the exporter's own order; without a wish, all are."""
    assert select(KNOWN, collect, exclude) == chosen


@pytest.mark.parametrize("name", ["nope", "", "PM2", "pm2 ", "\ud800"])
def test_unknown_collectors_are_refused(name: str) -> None:
    """What is asked for and does not exist is an error that names what exists, in both parameters."""
    for collect, exclude in (([name], []), ([], [name]), (["pm2", name], [])):
        with pytest.raises(ValueError, match="no such collector, or not enabled: .*; enabled: pm2, host, http") as failure:
            select(KNOWN, collect, exclude)
        assert str(failure.value).encode()


def test_both_parameters_are_refused() -> None:
    """collect[] and exclude[] together have no one meaning."""
    with pytest.raises(ValueError, match="cannot be used together"):
        select(KNOWN, ["pm2"], ["host"])


@given(st.one_of(st.floats(), st.integers(), st.sampled_from(["", "abc", "5,5", "1e999", "٣"])))
def test_no_timeout_claimed_is_taken_for_ever(claimed: object) -> None:
    """Whatever a request says of its timeout, it is answered in a positive time of at most two minutes."""
    request = make_mocked_request("GET", "/", headers={"X-Prometheus-Scrape-Timeout-Seconds": str(claimed)})
    assert 0 < time_allowed(request, 10.0) <= LONGEST


@pytest.mark.parametrize(("claimed", "allowed"), [("10", 9.5), ("0.6", 0.3), ("60", 59.5), ("1e9", 120.0)])
def test_timeout_of_the_request(claimed: str, allowed: float) -> None:
    """A request's own timeout holds, less what the answer's way takes."""
    request = make_mocked_request("GET", "/", headers={"X-Prometheus-Scrape-Timeout-Seconds": claimed})
    assert time_allowed(request, 10.0) == pytest.approx(allowed)
    assert time_allowed(make_mocked_request("GET", "/"), 120.0) == pytest.approx(119.5)
