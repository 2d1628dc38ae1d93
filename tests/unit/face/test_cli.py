"""What the flags mean, without a server."""

import argparse

import pytest

from exporter.cli import address, parser
from exporter.collectors import COLLECTORS


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("127.0.0.1:9209", ("127.0.0.1", 9209)),
        (":9209", (None, 9209)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("[::]:9209", ("::", 9209)),
        ("[]:1", (None, 1)),
        ("exporter.internal:80", ("exporter.internal", 80)),
    ],
)
def test_addresses(text: str, meant: tuple[str | None, int]) -> None:
    """HOST:PORT, :PORT for every interface, and IPv6 in brackets."""
    assert address(text) == meant


@pytest.mark.parametrize(
    "text",
    ["", ":", "9209", "host:", "host:65536", "host:-1", "host:+1", "host: 1", "host:٣", "::1:80", "::1", "[::1]", "a:b:1"],
)
def test_what_is_no_address(text: str) -> None:
    """Everything else is refused, above all an IPv6 address whose port cannot be told."""
    with pytest.raises(argparse.ArgumentTypeError, match="is not HOST:PORT|goes in brackets"):
        address(text)


@pytest.mark.parametrize(
    "path", ["metrics", "", "/-/healthy", "/probe", "/{x}", "/a?b", "/a#b", "/a b", "/%6D", "//a", "/..", "/a\nb", '/a"']
)
def test_telemetry_paths_that_cannot_be(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The metrics cannot be served on no path, on a pattern, or where something else is."""
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([f"--web.telemetry-path={path}"])
    assert ended.value.code == 2
    assert "is not a path such as /metrics, or is taken" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/", "/metrics", "/m", "/a/b.c/", "/-", "/a_b-c~1", "/é"])
def test_telemetry_paths(path: str) -> None:
    """The metrics may be served on any plain path, the root too."""
    assert parser().parse_args([f"--web.telemetry-path={path}"]).telemetry_path == path


@pytest.mark.parametrize("name", COLLECTORS)
def test_collector_flags(name: str) -> None:
    """Each collector can be switched on and off, the last flag wins, and without one the file decides."""
    assert getattr(parser().parse_args([]), f"collector_{name}") is None
    for flags, on in (
        ([f"--collector.{name}"], True),
        ([f"--no-collector.{name}"], False),
        ([f"--no-collector.{name}", f"--collector.{name}"], True),
    ):
        assert getattr(parser().parse_args(flags), f"collector_{name}") is on
