"""HTTP probes: of the configured targets at every scrape, and of any target allowed on /probe.

Metric names, types and meanings are those of blackbox_exporter; `probe_failed_due_to_json` and `probe_failure_reason` are
this project's own. On /metrics each series says which target, module and app it is of; on /probe, whose caller knows, none
does.
"""

import asyncio
import ipaddress
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, NamedTuple

import msgspec
import yaml
from yarl import URL

from exporter.exposition import Desc, Format, Metric, gauge, render, single
from exporter.grammar import Strict, default, written
from exporter.logs import logfmt
from exporter.probe.http import probe
from exporter.probe.module import ProbeModule
from exporter.probe.reach import NEVER, NEVER_HOSTS, Address, guarded, is_metadata, meant, normalise, shown
from exporter.probe.result import PHASES, ProbeResult, Reason

log = logging.getLogger("exporter")

DEFAULT_MODULE = "http_2xx"
DEFAULT_ALLOW = ("localhost", "127.0.0.0/8", "::1")


# Options


class HttpTarget(Strict, frozen=True, kw_only=True):
    """One endpoint that is probed at every scrape."""

    url: str
    """What is probed; http:// where it names no scheme. Credentials in it are sent, and never shown."""
    module: str = DEFAULT_MODULE
    """How it is probed: a name from `modules` (default http_2xx)."""
    app: str = ""
    """The PM2 app that answers there, by name; the label `app` (default: none)."""
    name: str = ""
    """The label `target` (default: the URL without its credentials and its query, which may hold a token)."""


class HttpOptions(Strict, frozen=True, kw_only=True):
    """What is probed, and how."""

    modules: dict[str, ProbeModule] = default({})
    """Ways to probe, by name, as in blackbox_exporter's file. `http_2xx`, a GET that wants a 2xx, is there already."""
    targets: tuple[HttpTarget, ...] = ()
    """The endpoints probed at every scrape (default: none)."""
    concurrency: Annotated[int, msgspec.Meta(ge=1)] = 20
    """How many of them are probed at the same time (default 20)."""
    allow: tuple[str, ...] = DEFAULT_ALLOW
    """What /probe may reach besides the targets above: names (`api.internal`, `*.example.com`, `example.com:8443`),
    networks (`10.0.0.0/8`) and URL prefixes (`https://example.com/health`); default: this machine's loopback. A network
    admits any name that leads into it. What is listed may also be redirected to by any target. Cloud metadata services are
    refused unless an entry lies within their own networks or is their name.
    """

    def __post_init__(self) -> None:
        """Hold what a field's type cannot say."""
        labels = set()
        for index, target in enumerate(self.targets):
            try:
                url = normalise(target.url)
            except ValueError as error:
                raise ValueError(f"targets[{index}].url: {error}") from None
            if module_of(self, target.module) is None:
                raise ValueError(f"targets[{index}].module: {unknown_module(self, target.module)}")
            label = (target.name or _label(url), target.module)
            if label in labels:
                raise ValueError(
                    f"targets[{index}]: another target is {label[0]!r} with the module {label[1]!r} too; give it a name"
                )
            labels.add(label)
        for index, entry in enumerate(self.allow):
            try:
                Allowed.of((entry,))
            except ValueError as error:
                raise ValueError(f"allow[{index}]: {error}") from None


_HTTP_2XX = ProbeModule()


def module_of(options: HttpOptions, name: str) -> ProbeModule | None:
    """Return the module of that name, None when there is none."""
    return options.modules.get(name) or (_HTTP_2XX if name == DEFAULT_MODULE else None)


def unknown_module(options: HttpOptions, name: str) -> str:
    """Say which modules there are instead."""
    return f"there is no module {name!r}; there are: {', '.join(sorted({DEFAULT_MODULE, *options.modules}))}"


def _label(url: URL) -> str:
    return shown(url.with_query(None))


# Where probes may go


_NAME = re.compile(r"(\*\.)?([A-Za-z0-9_][A-Za-z0-9._-]*)(?::(\d{1,5}))?")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
PORT_MAX = 65535


@dataclass(frozen=True, slots=True)
class Allowed:
    """What `allow` lists."""

    names: frozenset[tuple[str, int | None]]
    """Host names, or ".suffix" for all names below one, each with a port or any."""
    networks: tuple[Network, ...]
    prefixes: tuple[URL, ...]

    @classmethod
    def of(cls, entries: Iterable[str]) -> "Allowed":
        """Read the entries of `allow`; raise ValueError for one that is none of its kinds."""
        names, networks, prefixes = [], [], []
        for entry in entries:
            if "://" in entry:
                prefixes.append(normalise(entry).with_user(None))
                continue
            try:
                networks.append(ipaddress.ip_network(entry.strip("[]")))
                continue
            except ValueError as error:
                if "/" in entry or entry.replace(".", "").isdigit():
                    raise ValueError(f"{entry!r} is no network: {error}") from None
            name = _NAME.fullmatch(entry)
            if not name:
                raise ValueError(f"{entry!r} is no host name, network or URL prefix")
            if name[3] and not 0 < int(name[3]) <= PORT_MAX:
                raise ValueError(f"{entry!r} has no port from 1 to {PORT_MAX}")
            names.append((("." if name[1] else "") + name[2].rstrip(".").lower(), int(name[3]) if name[3] else None))
        return cls(frozenset(names), tuple(networks), tuple(prefixes))

    def by_url(self, url: URL) -> bool:
        """Tell whether `url` is listed, wherever its name leads."""
        host = (url.raw_host or "").rstrip(".").lower()
        below = [host[at:] for at, char in enumerate(host) if char == "."]
        if any((name, port) in self.names for name in (host, *below) for port in (None, url.port)):
            return True
        return any(
            url.origin() == prefix.origin() and f"{url.raw_path}/".startswith(f"{prefix.raw_path.rstrip('/')}/")
            for prefix in self.prefixes
            if ".." not in url.path.split("/")
        )

    def by_address(self, address: Address) -> bool:
        """Tell whether `address` is in a network that is listed."""
        address = meant(address)
        return any(address in network for network in self.networks)

    def metadata(self, url: URL, address: Address) -> bool:
        """Tell whether a metadata service at `address` is listed for itself: a broad network does not list it."""
        if (host := (url.raw_host or "").rstrip(".").lower()) in NEVER_HOSTS:
            return (host, None) in self.names or (host, url.port) in self.names
        address = meant(address)
        return any(address in network and any(_within(network, never) for never in NEVER) for network in self.networks)

    def configured(self, url: URL, address: Address, before: Address | None, /) -> str:
        """Judge as `guarded` does, but for what is listed: for the targets that the configuration names."""
        if is_metadata(url, address):
            return "" if self.metadata(url, address) else guarded(url, address, None)
        return "" if self.by_url(url) or self.by_address(address) else guarded(url, address, before)

    def requested(self, url: URL, address: Address, before: Address | None, /) -> str:
        """Let a probe go only to what is listed: for the targets that a request names."""
        if is_metadata(url, address):
            return "" if self.metadata(url, address) else guarded(url, address, None)
        if self.by_url(url) or self.by_address(address):
            return ""
        leads = f"{url.raw_host}, which leads to {address}," if url.raw_host != str(address) else str(address)
        return f"{leads} is not in the list of what may be probed ({'a redirect leads there' if before else 'http.allow'})"


def _within(network: Network, outer: Network) -> bool:
    return network.version == outer.version and outer.supernet_of(network)  # type: ignore[arg-type]  # same version


# Metrics


_KNOWN = (
    gauge("probe_success", "Displays whether or not the probe was a success.", source="the probe"),
    gauge("probe_duration_seconds", "How long the probe took to complete in seconds.", source="the probe"),
    gauge("probe_dns_lookup_time_seconds", "The time taken for the first name look-up in seconds.", source="the probe"),
    gauge("probe_ip_protocol", "Whether the target was reached over IP version 4 or 6.", source="the probe"),
    gauge("probe_ip_addr_hash", "The hash of the target's address, which tells that it changed.", source="the probe"),
    gauge(
        "probe_http_duration_seconds",
        "Duration of the HTTP request by phase, summed over all redirects.",
        ("phase",),
        source="the probe",
    ),
    gauge("probe_http_status_code", "The status code of the last answer.", source="the probe"),
    gauge("probe_http_version", "The HTTP version of the last answer.", source="the probe"),
    gauge("probe_http_ssl", "Whether the last answer came over TLS.", source="the probe"),
    gauge("probe_http_redirects", "The number of redirects.", source="the probe"),
    gauge(
        "probe_http_content_length",
        "The length of the answer as it declares it; -1 when it does not.",
        source="the answer's Content-Length header",
    ),
    gauge("probe_http_uncompressed_body_length", "The length of the body read, uncompressed.", source="the probe"),
    gauge(
        "probe_http_last_modified_timestamp_seconds",
        "When the answer says that it was last modified.",
        source="the answer's Last-Modified header",
    ),
    gauge("probe_failed_due_to_regex", "Whether the probe failed due to a regular expression.", source="the probe"),
    gauge("probe_failed_due_to_json", "Whether the probe failed due to an assertion on its JSON body.", source="the probe"),
    gauge(
        "probe_failure_reason", "Why the probe failed: 1 for the reason, 0 for all others.", ("reason",), source="the probe"
    ),
    gauge(
        "probe_ssl_earliest_cert_expiry",
        "When the first of the certificates that the server sent expires.",
        source="the TLS session's certificates, notAfter",
    ),
    gauge(
        "probe_ssl_last_chain_expiry_timestamp_seconds",
        "When the verified chain of certificates expires.",
        source="the TLS session's verified chain, notAfter",
    ),
    gauge(
        "probe_ssl_last_chain_info",
        "What the server's certificate says; always 1.",
        ("fingerprint_sha256", "subject", "issuer", "subjectalternative", "serialnumber"),
        source="the TLS session's first certificate",
    ),
    gauge("probe_tls_version_info", "The TLS version used; always 1.", ("version",), source="the TLS session"),
)
PROBE_DESCS: tuple[Desc, ...] = _KNOWN
"""All that /probe can answer with."""
SKIPPED = gauge(
    "pm2_exporter_http_probes_skipped",
    "Targets that were not probed in this scrape, for want of time or of descriptors; nothing is known about them.",
    source="the exporter itself",
)
_LABELS = ("target", "module", "app")
_OF_TARGET = tuple(Desc(desc.name, desc.kind, desc.help, (*_LABELS, *desc.labels), desc.source) for desc in PROBE_DESCS)
DESCS: tuple[Desc, ...] = (*_OF_TARGET, SKIPPED)
"""All that /metrics can show of the configured targets."""


def _values(result: ProbeResult) -> Mapping[str, Iterable[tuple[tuple[str, ...], float | None]]]:
    """Return the label values and the value of every metric that `result` has, by the metric's name. Pure."""
    chain = result.certificates
    values: dict[str, Iterable[tuple[tuple[str, ...], float | None]]] = {
        name: (((), value),)
        for name, value in (
            ("probe_success", int(result.success)),
            ("probe_duration_seconds", result.seconds),
            ("probe_dns_lookup_time_seconds", result.lookup_seconds),
            ("probe_ip_protocol", result.ip_protocol),
            ("probe_ip_addr_hash", result.ip_hash),
            ("probe_http_status_code", result.status),
            ("probe_http_version", result.version),
            ("probe_http_ssl", int(chain is not None)),
            ("probe_http_redirects", result.redirects),
            ("probe_http_content_length", result.content_length),
            ("probe_http_uncompressed_body_length", result.body_length),
            ("probe_http_last_modified_timestamp_seconds", result.last_modified),
            ("probe_failed_due_to_regex", int(result.reason is Reason.REGEX)),
            ("probe_failed_due_to_json", int(result.reason is Reason.JSON)),
        )
    }
    values["probe_http_duration_seconds"] = [((phase,), result.phases[phase]) for phase in PHASES]
    values["probe_failure_reason"] = [((reason.value,), int(result.reason is reason)) for reason in Reason]
    if chain:
        values["probe_ssl_earliest_cert_expiry"] = (((), chain.earliest_expiry),)
        values["probe_ssl_last_chain_expiry_timestamp_seconds"] = (((), chain.chain_expiry),)
        told = (chain.fingerprint, chain.subject, chain.issuer, chain.names, chain.serial)
        values["probe_ssl_last_chain_info"] = ((told, 1),)
        values["probe_tls_version_info"] = (((chain.version,), 1),)
    return values


def probe_metrics(result: ProbeResult) -> Iterator[Metric]:
    """Turn a result into metrics with blackbox_exporter's names and labels. Pure."""
    values = _values(result)
    for desc in PROBE_DESCS:
        if desc.name in values:
            yield Metric(desc, tuple(values[desc.name]))


# The collector


class Watched(NamedTuple):
    """A configured target, read."""

    url: URL
    module: ProbeModule
    labels: tuple[str, str, str]


class HttpCollector:
    """Probes the configured targets side by side."""

    descs = DESCS

    def __init__(self, options: HttpOptions) -> None:
        """Read the targets of `options`."""
        self._concurrency = options.concurrency
        self._reach = Allowed.of(options.allow).configured
        self._targets = []
        for target in options.targets:
            url, module = normalise(target.url), module_of(options, target.module) or _HTTP_2XX
            self._targets.append(Watched(url, module, (target.name or _label(url), target.module, target.app)))

    async def read(self, within: float) -> tuple[tuple[Watched, ProbeResult | None], ...]:
        """Probe every target, but those that not half of their time is left for: they could only seem to time out."""
        gate = asyncio.Semaphore(self._concurrency)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within

        async def one(target: Watched) -> ProbeResult | None:
            async with gate:
                left = deadline - loop.time()
                if left < min(within, target.module.timeout or within) / 2:
                    return None
                try:
                    result = await probe(target.url, target.module, within=left, reach=self._reach)
                except Exception:
                    # What is wrong with one probe must not cost the others theirs.
                    log.exception("probe broke", extra={"target": target.labels[0]})
                    return None
                # A probe that this machine could not make says nothing about the target.
                return None if result.reason is Reason.RESOURCES else result

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(target), name=f"probe {target.labels[0]}") for target in self._targets]
        return tuple((target, task.result()) for target, task in zip(self._targets, tasks, strict=True))

    def metrics(self, seen: tuple[tuple[Watched, ProbeResult | None], ...]) -> Iterator[Metric]:
        """Turn the results into metrics; a target that was not probed has none. Pure."""
        if not seen:
            return
        values = [(target.labels, _values(result)) for target, result in seen if result is not None]
        for desc in _OF_TARGET:
            rows = [((*labels, *own), value) for labels, known in values for own, value in known.get(desc.name, ())]
            yield Metric(desc, rows)
        yield single(SKIPPED, sum(result is None for _, result in seen))


# /probe


class Refused(NamedTuple):
    """Why a request for a probe is turned down."""

    status: int
    """400 when it cannot be understood, 403 when it must not be done."""
    why: str


def authorise(options: HttpOptions, target: str) -> URL | Refused:
    """Return the URL to probe for the `target` of a request, or why not, as far as that can be told without a look-up."""
    if not target:
        return Refused(400, "Target parameter is missing")
    try:
        url = normalise(target)
    except ValueError as error:
        return Refused(400, f"Target parameter is wrong: {error}")
    allowed = Allowed.of(options.allow)
    if _is_configured(options, url) or allowed.by_url(url):
        return url
    try:
        address = ipaddress.ip_address(url.raw_host or "")
    except ValueError:
        # Only a network that is not this machine's own makes it worth looking up whatever name a stranger gives.
        if any(not network.is_loopback for network in allowed.networks):
            return url
        return Refused(403, f"{url.raw_host} is not in the list of what may be probed (http.allow)")
    refusal = allowed.requested(url, address, None)
    return Refused(403, refusal) if refusal else url


def _is_configured(options: HttpOptions, url: URL) -> bool:
    return any(url.with_user(None) == normalise(target.url).with_user(None) for target in options.targets)


_HOSTNAME = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")


async def answer_probe(
    options: HttpOptions, query: Mapping[str, str], within: float, to: Format
) -> tuple[bytes, Format | str, int]:
    """Answer a request for /probe, with the parameters that blackbox_exporter takes: target, module, hostname and debug.

    Returns the page, its content type and the status: 400 for a request that cannot be understood, 403 for a target that
    must not be probed, else 200 whatever the probe found.
    """
    name, host = query.get("module") or DEFAULT_MODULE, query.get("hostname", "")
    module = module_of(options, name)
    url = authorise(options, query.get("target", ""))
    if module is None:
        return _text(f"Unknown module: {unknown_module(options, name)}\n", 400)
    if isinstance(url, Refused):
        return _text(f"{url.why}\n", url.status)
    if host and not _HOSTNAME.fullmatch(host):
        return _text("Hostname parameter is no host name\n", 400)
    if host and any(header.lower() == "host" and value.reveal() != host for header, value in module.http.headers.items()):
        return _text("Hostname parameter contradicts the module's Host header\n", 400)
    allowed = Allowed.of(options.allow)
    reach = allowed.configured if _is_configured(options, url) else allowed.requested
    result = await probe(url, module, within=within, reach=reach, host=host)
    if query.get("debug") == "true":
        return _text(debug_text(url, name, module, result), 200)
    if result.reason is Reason.REFUSED_TARGET and not result.redirects:
        return _text(f"{result.detail}\n", 403)
    return render(probe_metrics(result), to, account=None), to, 200


def _text(text: str, status: int) -> tuple[bytes, str, int]:
    return text.encode("utf-8", "replace"), "text/plain; charset=utf-8", status


def debug_text(url: URL, name: str, module: ProbeModule, result: ProbeResult) -> str:
    """Return what ?debug=true shows: the probe's log, its metrics and its module, with every secret hidden. Pure."""
    metrics = render(probe_metrics(result), Format.TEXT, account=None).decode()
    module_text = yaml.safe_dump(_telling(written(module), written(_HTTP_2XX)) or {"prober": "http"}, sort_keys=False)
    return (
        "Logs for the probe:\n"
        + "".join(f"{line}\n" for line in _log_lines(url, name, result))
        + f"\n\n\nMetrics that would have been returned:\n{metrics}"
        + f"\n\n\nModule configuration:\n{module_text}"
    )


def _log_lines(url: URL, name: str, result: ProbeResult) -> Iterator[str]:
    for event in result.events:
        at = datetime.fromtimestamp(result.began + event.at, UTC).isoformat(timespec="microseconds")
        fields = {
            "ts": at,
            "level": event.level,
            "module": name,
            "target": shown(url),
            "msg": event.message,
            **event.fields,
        }
        yield logfmt(fields)


def _telling(tree: object, default_tree: object) -> object:
    """Return `tree` without what is as it is by default."""
    if not isinstance(tree, dict):
        return tree
    known = default_tree if isinstance(default_tree, dict) else {}
    return {key: _telling(value, known.get(key)) for key, value in tree.items() if key not in known or value != known[key]}
