"""Targets, what of them may be shown, and where a probe may go."""

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from exporter.probe.reach import guarded, is_metadata, meant, normalise, redirected, shown

TARGETS = {
    "example.com": "http://example.com/",
    "localhost:3000/api/health": "http://localhost:3000/api/health",
    "https://example.com:443": "https://example.com/",
    "HTTP://Example.COM/A": "http://example.com/A",
    "[::1]:3000/x": "http://[::1]:3000/x",
    "127.1": "http://127.1/",
    "münchen.example/ü": "http://xn--mnchen-3ya.example/%C3%BC",
    "example.com?u=http://x": "http://example.com/?u=http://x",
    "example.com/a%2Fb?c=%2Fd+e#f": "http://example.com/a%2Fb?c=%2Fd+e",
    "example.com/\r\nX: y": "http://example.com/X:%20y",
    "user:p%40ss@example.com": "http://user:p%40ss@example.com/",
    "api_1.internal.": "http://api_1.internal./",
}


@pytest.mark.parametrize("target", TARGETS)
def test_targets(target: str) -> None:
    """A target without a scheme means http://; the rest stays as it was written, as far as a URL can hold it."""
    assert str(normalise(target)) == TARGETS[target]


NO_TARGETS = {
    "": "names no valid host",
    "http://": "names no valid host",
    "/etc/passwd": "names no valid host",
    "ftp://example.com": "only http:// and https:// can be probed, not ftp://",
    "file:///etc/passwd": "only http:// and https:// can be probed, not file://",
    "http://exa mple/": "names no valid host",
    "http://[::1": "not a URL",
    "http://h:99999": "not a URL",
    "http://h:0": "port must be from 1 to 65535",
    "http://h\x00/": "names no valid host",
    "http://[fe80::1%25eth0]/": "names no valid host",
    "http://%31%32/": "names no valid host",
    "http://a<b/": "names no valid host",
    "http://h\\@e/": "not a URL",
    "javascript:alert(1)": "not a URL",
    "gopher://h:70/_x": "only http:// and https://",
}


@pytest.mark.parametrize("target", NO_TARGETS)
def test_no_targets(target: str) -> None:
    """What is no HTTP URL is refused, with a rule that does not quote it, for it may hold credentials."""
    with pytest.raises(ValueError, match=NO_TARGETS[target]) as wrong:
        normalise(target)
    assert len(target) < 3 or target not in str(wrong.value)


@given(st.text(max_size=60) | st.from_regex(r"(https?://)?[!-~]{0,40}", fullmatch=True))
def test_any_target(target: str) -> None:
    """Any text is an HTTP URL that cannot forge a line of a request, or a ValueError."""
    try:
        url = normalise(target)
    except ValueError:
        return
    assert url.scheme in ("http", "https")
    line = f"{url.host_port_subcomponent}{url.raw_path_qs}"
    assert line.isascii()
    assert line.isprintable()
    assert " " not in line
    assert normalise(str(url)) == url


@given(st.text(max_size=40))
def test_any_redirect(location: str) -> None:
    """Any Location header leads to an HTTP URL without credentials, or is a ValueError."""
    try:
        url = redirected(URL("http://example.com/a/b?c"), location)
    except ValueError:
        return
    assert url.scheme in ("http", "https")
    assert url.user is None
    assert url.host_port_subcomponent


REDIRECTS = {
    "/x": "https://example.com/x",
    "x?y=%2F": "https://example.com/a/x?y=%2F",
    "//other.example/": "https://other.example/",
    "http://u:p@other.example": "http://other.example/",
    "?z": "https://example.com/a/b?z",
}


@pytest.mark.parametrize("location", REDIRECTS)
def test_redirects(location: str) -> None:
    """A Location header is read relative to where it came from, and credentials in it are not taken up."""
    assert str(redirected(URL("https://example.com/a/b"), location)) == REDIRECTS[location]


def test_shown() -> None:
    """Credentials and query strings are never shown."""
    assert shown(normalise("user:secret@example.com/a?token=secret")) == "http://example.com/a?…"
    assert shown(normalise("example.com/a")) == "http://example.com/a"


METADATA = [
    "169.254.169.254",
    "169.254.170.2",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fe80::a9fe:a9fe",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
]


@pytest.mark.parametrize("address", METADATA)
def test_metadata(address: str) -> None:
    """Metadata services are refused, in whatever clothes their address comes."""
    assert guarded(URL("http://innocent.example/"), ip_address(address), None)


def test_metadata_by_name() -> None:
    """A metadata service is refused by name too, whatever the name leads to."""
    assert is_metadata(URL("http://metadata.google.internal./"), ip_address("192.0.2.1"))


INWARD = [
    ("93.184.215.14", "10.0.0.1", True),
    ("93.184.215.14", "127.0.0.1", True),
    ("93.184.215.14", "::1", True),
    ("93.184.215.14", "0.0.0.0", True),  # noqa: S104 -- where a redirect leads, not where anything listens
    ("93.184.215.14", "::ffff:127.0.0.1", True),
    ("10.0.0.1", "127.0.0.1", True),
    ("93.184.215.14", "1.1.1.1", False),
    ("10.0.0.1", "192.168.1.1", False),
    ("10.0.0.1", "1.1.1.1", False),
    ("127.0.0.1", "127.0.0.2", False),
    ("::1", "127.0.0.1", False),
    ("127.0.0.1", "1.1.1.1", False),
]


@pytest.mark.parametrize(("before", "address", "refused"), INWARD)
def test_redirects_inward(before: str, address: str, refused: bool) -> None:  # noqa: FBT001 -- a column of the table
    """A redirect may lead outwards or stay, never from a public address to a private one, or from there to loopback."""
    assert bool(guarded(URL("http://h/"), ip_address(address), ip_address(before))) is refused


def test_first_hop_is_free() -> None:
    """Where a target itself leads is its writer's choice."""
    for address in ("127.0.0.1", "10.0.0.1", "1.1.1.1"):
        assert guarded(URL("http://h/"), ip_address(address), None) == ""


def test_unspecified_means_loopback() -> None:
    """The addresses that say nothing lead to this machine."""
    assert meant(ip_address("0.0.0.0")).is_loopback  # noqa: S104 -- the same
    assert meant(ip_address("::")).is_loopback
