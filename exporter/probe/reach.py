"""Which URLs are targets, and where a probe may go.

A probe makes requests from inside, on behalf of whoever names its target: it must not become a way to what only the inside
may see, above all to the cloud's metadata services, which give out credentials. What is judged is always an address, never
a name, for a name may lead somewhere else a moment later. Pure.
"""

import ipaddress
import re
from typing import Protocol

from yarl import URL

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PLAIN = re.compile(r"[!-~]+")
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}")


def normalise(target: str) -> URL:
    """Return the URL that `target` means; http:// where it names no scheme. Raise ValueError for what is no HTTP URL."""
    scheme = _SCHEME.match(target)
    if scheme and scheme[1].lower() not in ("http", "https"):
        raise ValueError(f"only http:// and https:// can be probed, not {scheme[1]}://")
    text = target if scheme else f"http://{target}"
    try:
        url = URL(text).with_fragment(None)
        host = url.raw_host or ""
        if _PLAIN.fullmatch(text):
            # Kept as it was written: to a server that checks a signature, %2F is not /.
            written = URL(text, encoded=True)
            url = url.with_path(written.raw_path or "/", encoded=True).with_query(None)
            url = URL(f"{url}?{written.raw_query_string}", encoded=True) if written.raw_query_string else url
    except (ValueError, UnicodeError):
        # yarl's own words may quote the target, and with it its credentials.
        raise ValueError("the target is not a URL") from None
    if not _HOST.fullmatch(host) and not _is_ipv6(host):
        raise ValueError("the target names no valid host")
    if not url.port:
        raise ValueError("the target's port must be from 1 to 65535")
    return url


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.IPv6Address(host).scope_id is None
    except ValueError:
        return False


def redirected(url: URL, location: str) -> URL:
    """Return where a Location header leads from `url`; raise ValueError where that is no HTTP URL."""
    if _SCHEME.match(location):
        return normalise(location).with_user(None)
    try:
        there = url.join(URL(location, encoded=bool(_PLAIN.fullmatch(location))))
    except (ValueError, UnicodeError):
        raise ValueError("the Location header is not a URL") from None
    return normalise(str(there)).with_user(None)


def shown(url: URL) -> str:
    """Return a URL as it may be shown: without credentials, and with its query, which may hold a token, only hinted at."""
    bare = url.with_user(None).with_query(None).with_fragment(None)
    return f"{bare}?…" if url.query_string else str(bare)


class Reach(Protocol):
    """Who decides where a probe may go."""

    def __call__(self, url: URL, address: Address, before: Address | None, /) -> str:
        """Return why `address`, to which `url` leads, must not be connected to; empty when it may.

        `before` is the address that redirected here, None for the target itself.
        """
        ...


NEVER = tuple(
    ipaddress.ip_network(network)
    for network in (
        "169.254.0.0/16",  # link-local: the metadata services of AWS, Azure, GCP, OpenStack, DigitalOcean, ECS
        "fe80::/10",
        "100.100.100.200/32",  # Alibaba Cloud
        "168.63.129.16/32",  # Azure's host
        "192.0.0.192/32",  # Oracle Cloud
        "fd00:ec2::/32",  # AWS
        "fd20:ce::254/128",  # GCP
    )
)
"""Networks of cloud metadata services, which give out credentials to whoever asks from the machine."""
NEVER_HOSTS = frozenset({"metadata", "metadata.google.internal", "instance-data"})


def meant(address: Address) -> Address:
    """Return the IPv4 address inside an IPv6 one (mapped, 6to4, NAT64); where 0.0.0.0 and :: lead, which is to loopback."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return meant(inner)
    if address.is_unspecified:
        return ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")  # noqa: PLR2004 -- IPv4
    return address


def is_metadata(url: URL, address: Address) -> bool:
    """Tell whether `address`, to which `url` leads, may be a cloud's metadata service."""
    address = meant(address)
    return (url.raw_host or "").rstrip(".").lower() in NEVER_HOSTS or any(address in network for network in NEVER)


def _depth(address: Address) -> int:
    address = meant(address)
    return 2 if address.is_loopback else 0 if address.is_global else 1


def guarded(url: URL, address: Address, before: Address | None, /) -> str:
    """Let a probe go anywhere but to metadata services, and a redirect not further inside than where it came from.

    Inside means: from a public address to a private one, from a private one to loopback.
    """
    if is_metadata(url, address):
        return f"{address} is, or may be, a cloud metadata service"
    if before is not None and _depth(address) > _depth(before):
        return f"a redirect must not lead further inside, from {before} to {address}"
    return ""
