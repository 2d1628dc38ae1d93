"""The HTTP face: /metrics, /probe, /-/healthy, /-/ready, /-/reload and the landing page.

`Exporter` is the whole running program as a value with `start` and `stop`, which the command line and tests embed alike.
"""

import asyncio
import contextlib
import html
import logging
import platform
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import prometheus_client
from aiohttp import hdrs, web
from prometheus_client.metrics_core import Metric as ClientMetric

from exporter import VERSION
from exporter.collectors import http
from exporter.config import Config, build
from exporter.exposition import (
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
)
from exporter.grammar import ConfigError
from exporter.probe.aside import aside
from exporter.scrape import DURATION, SUCCESS, Collector, Outcome, account, budget, scrape

log = logging.getLogger("exporter")

BUILD_INFO = gauge(
    "pm2_exporter_build_info",
    "Which exporter this is; always 1.",
    ("version", "pythonversion"),
    source="the exporter itself",
)
RELOADED = gauge(
    "pm2_exporter_config_last_reload_successful",
    "Whether the last attempt to read the configuration file succeeded; 0 means an older one is still in force.",
    source="the exporter itself",
)
RELOADED_AT = gauge(
    "pm2_exporter_config_last_reload_success_timestamp_seconds",
    "When the configuration in force was read.",
    source="the exporter itself",
)
REQUESTS = counter(
    "pm2_exporter_requests_total",
    "Requests answered on the telemetry path, by status code.",
    ("code",),
    source="the exporter itself",
)
IN_FLIGHT = gauge(
    "pm2_exporter_requests_in_flight",
    "Scrapes and probes being answered, this one included.",
    source="the exporter itself",
)
DESCS = (SUCCESS, DURATION, BUILD_INFO, RELOADED, RELOADED_AT, REQUESTS, IN_FLIGHT)
LONGEST = 120.0
"""Seconds; no request is worked on for longer, whatever timeout it claims: its sender may be gone, and its place taken."""
GZIP_FROM = 1024
"""Bytes; a smaller page is not worth compressing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the flags say and the file does not."""

    telemetry_path: str = "/metrics"
    max_requests: int = 40
    """Scrapes and probes answered at the same time; 0 means no limit."""
    exporter_metrics: bool = True
    """Whether process_*, python_* and the request counters are served too."""
    collectors: dict[str, bool] | None = None
    """Collectors switched on or off by flag, which wins over the file."""
    collector_default: bool = True
    """What holds for a collector that neither a flag nor the file names."""


@dataclass(slots=True)
class _Running:
    """A collector at work; `key` is all that it was made from."""

    key: object
    collector: Collector
    task: asyncio.Task[None] | None


class Exporter:
    """The running exporter."""

    def __init__(self, read_config: Callable[[], Config], settings: Settings) -> None:
        """Take the way to read the configuration, which every reload uses again, and the settings."""
        self._read_config = read_config
        self._settings = settings
        self._running: dict[str, _Running] = {}
        self._reloading = asyncio.Lock()
        self._requests: dict[int, int] = {200: 0}
        self._in_flight = 0
        self._reload_ok = True
        self._reloaded_at = 0.0
        self._failing: dict[str, str] = {}
        self._label_texts = LabelTexts()
        self._ready = False
        self._background = True
        self._own = [
            prometheus_client.ProcessCollector(registry=None),
            prometheus_client.PlatformCollector(registry=None),
            prometheus_client.GCCollector(registry=prometheus_client.CollectorRegistry()),
        ]
        self.config = Config()

    async def start(self, *, background: bool = True) -> None:
        """Read the configuration and start every collector; raise ConfigError when the file is wrong.

        Without `background` work, which is for a single scrape, a collector looks at everything within `read`.
        """
        self._background = background
        await self._apply(self._read_config())
        self._ready = True

    async def stop(self) -> None:
        """Stop every collector."""
        self._ready = False
        for name in tuple(self._running):
            await self._end(self._running.pop(name))

    async def reload(self) -> None:
        """Read the configuration again; when it is wrong, raise ConfigError and leave the old one in force."""
        async with self._reloading:
            try:
                # To read a long file takes seconds, and one on a dead network filesystem never ends.
                config = await aside(self._read_config)
                await self._apply(config)
            except Exception as error:
                self._reload_ok = False
                log.error("configuration not reloaded, the old one stays in force", extra={"error": str(error)})  # noqa: TRY400
                raise
            log.info("configuration reloaded")

    async def _apply(self, config: Config) -> None:
        """Make the running collectors those of `config`; one whose options have not changed goes on undisturbed."""
        wanted = build(config, self._settings.collectors or {}, default=self._settings.collector_default)
        running = {}
        for name, (key, make) in wanted.items():
            old = self._running.get(name)
            running[name] = old if old and old.key == key else _Running(key, make(), None)
        ended = [old for name, old in self._running.items() if running.get(name) is not old]
        self._running, self.config = running, config
        for name, new in running.items():
            if self._background and new.task is None and (run := getattr(new.collector, "run", None)):
                new.task = asyncio.create_task(_keep_running(name, run), name=f"collector {name}")
        self._reload_ok, self._reloaded_at = True, time.time()
        for old in ended:
            await self._end(old)

    @staticmethod
    async def _end(running: _Running) -> None:
        if running.task:
            running.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running.task
        if close := getattr(running.collector, "close", None):
            await close()

    @property
    def collectors(self) -> dict[str, Collector]:
        """The collectors in force, by name."""
        return {name: running.collector for name, running in self._running.items()}

    async def page(self, names: Iterable[str], within: float, to: Format) -> bytes:
        """Scrape the collectors `names` within `within` seconds and render the result."""
        collectors = self.collectors
        outcomes = await scrape({name: collectors[name] for name in names}, within)
        self._log_changes(outcomes)
        return render(self._everything(outcomes), to, known=self._label_texts)

    def _everything(self, outcomes: tuple[Outcome, ...]) -> Iterator[Metric]:
        for outcome in outcomes:
            yield from outcome.metrics
        yield from account(outcomes)
        yield Metric(BUILD_INFO, [((VERSION, platform.python_version()), 1)])
        yield single(RELOADED, int(self._reload_ok))
        yield single(RELOADED_AT, self._reloaded_at)
        if self._settings.exporter_metrics:
            yield Metric(REQUESTS, [((str(code),), count) for code, count in self._requests.items()])
            yield single(IN_FLIGHT, self._in_flight)
            for own in self._own:
                yield from map(_from_client, own.collect())

    def _log_changes(self, outcomes: tuple[Outcome, ...]) -> None:
        """Log a collector's failure when it begins, changes or ends, not at every scrape."""
        for name, seconds, _, error in outcomes:
            if error and self._failing.get(name) != error:
                self._failing[name] = error
                log.warning("collector failed", extra={"collector": name, "seconds": round(seconds, 3), "error": error})
            elif not error and name in self._failing:
                del self._failing[name]
                log.info("collector works again", extra={"collector": name})

    def app(self, middlewares: Iterable[Any] = ()) -> web.Application:
        """Return the web application."""
        app = web.Application(middlewares=list(middlewares), client_max_size=64 * 1024)
        path = self._settings.telemetry_path
        app.router.add_get(path, self._metrics)
        if path != "/":
            app.router.add_get("/", self._landing)
        app.router.add_get("/probe", self._probe)
        app.router.add_get("/-/healthy", self._healthy)
        app.router.add_get("/-/ready", self._is_ready)
        app.router.add_post("/-/reload", self._reload)
        app.router.add_put("/-/reload", self._reload)
        return app

    async def _metrics(self, request: web.Request) -> web.Response:
        response = await self._limited(request, self._answer)
        self._requests[response.status] = self._requests.get(response.status, 0) + 1
        return response

    async def _probe(self, request: web.Request) -> web.Response:
        return await self._limited(request, self._answer_probe)

    async def _limited(
        self, request: web.Request, answer: Callable[[web.Request], Awaitable[web.Response]]
    ) -> web.Response:
        limit = self._settings.max_requests
        if limit and self._in_flight >= limit:
            return web.Response(status=503, text=f"Limit of concurrent requests reached ({limit}), try again later.\n")
        self._in_flight += 1
        try:
            return await answer(request)
        finally:
            self._in_flight -= 1

    async def _answer(self, request: web.Request) -> web.Response:
        try:
            names = select(self._running, request.query.getall("collect[]", []), request.query.getall("exclude[]", []))
        except ValueError as error:
            return web.Response(status=400, text=f"{error}\n")
        to = negotiate(request.headers.get(hdrs.ACCEPT, ""))
        within = time_allowed(request, 10.0)
        return _respond(request, await self.page(names, within, to), to)

    async def _answer_probe(self, request: web.Request) -> web.Response:
        within = time_allowed(request, LONGEST)
        to = negotiate(request.headers.get(hdrs.ACCEPT, ""))
        return _respond(request, *await http.answer_probe(self.config.http, request.query, within, to))

    async def _healthy(self, _: web.Request) -> web.Response:
        return web.Response(text="pm2-exporter is healthy.\n")

    async def _is_ready(self, _: web.Request) -> web.Response:
        if self._ready:
            return web.Response(text="pm2-exporter is ready.\n")
        return web.Response(status=503, text="pm2-exporter is not ready.\n")

    async def _reload(self, _: web.Request) -> web.Response:
        try:
            await self.reload()
        except ConfigError as error:
            return web.Response(status=500, text=f"failed to reload config: {error}\n")
        return web.Response(text="reloaded\n")

    async def _landing(self, _: web.Request) -> web.Response:
        rows = "".join(
            f"<li>{html.escape(name)}{': ' + html.escape(self._failing[name]) if name in self._failing else ''}</li>"
            for name in self._running
        )
        page = _LANDING.format(version=html.escape(VERSION), path=html.escape(self._settings.telemetry_path), rows=rows)
        return web.Response(text=page, content_type="text/html")


async def _keep_running(name: str, run: Callable[[], Awaitable[None]]) -> None:
    """Do a collector's background work; when it fails, say so and begin again a little later."""
    while True:
        try:
            await run()
        except Exception as failure:
            log.exception("background work failed", extra={"collector": name, "failure": type(failure).__name__})
        else:
            return
        await asyncio.sleep(5)


def select(known: Iterable[str], collect: list[str], exclude: list[str]) -> tuple[str, ...]:
    """Return which collectors a request asks for; raise ValueError, worth a 400, when it asks for what cannot be."""
    known = tuple(known)
    if collect and exclude:
        raise ValueError("collect[] and exclude[] cannot be used together")
    for name in (*collect, *exclude):
        if name not in known:
            raise ValueError(f"no such collector, or not enabled: {name!r}; enabled: {', '.join(known)}")
    return tuple(name for name in known if (name in collect if collect else name not in exclude))


def time_allowed(request: web.Request, otherwise: float) -> float:
    """Return the seconds that answering may take; `otherwise` less the offset where the request does not say."""
    return min(budget(request.headers.get("X-Prometheus-Scrape-Timeout-Seconds"), otherwise=otherwise), LONGEST)


def _from_client(metric: ClientMetric) -> Metric:
    """Translate a metric of prometheus_client, which only ever describes this process."""
    kind = {"counter": Kind.COUNTER, "gauge": Kind.GAUGE}.get(metric.type, Kind.UNTYPED)
    name = metric.name + "_total" if kind is Kind.COUNTER else metric.name
    samples = [sample for sample in metric.samples if sample.name == name]
    labels = tuple(samples[0].labels) if samples else ()
    rows = [(tuple([sample.labels[label] for label in labels]), sample.value) for sample in samples]
    return Metric(Desc(name, kind, metric.documentation, labels), rows)


def _respond(request: web.Request, body: bytes, to: Format | str, status: int = 200) -> web.Response:
    headers = {hdrs.CONTENT_TYPE: to.value if isinstance(to, Format) else to, hdrs.VARY: "Accept, Accept-Encoding"}
    if len(body) >= GZIP_FROM and accepts_gzip(request.headers.get(hdrs.ACCEPT_ENCODING, "")):
        squeezer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS | 16)
        body = squeezer.compress(body) + squeezer.flush()
        headers[hdrs.CONTENT_ENCODING] = "gzip"
    return web.Response(status=status, body=body, headers=headers)


_LANDING = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>PM2 Exporter</title>
<style>body {{ font-family: sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }}</style>
</head>
<body>
<h1>PM2 Exporter</h1>
<p>Prometheus metrics of PM2, its apps, this host, MongoDB and HTTP probes. Version {version}.</p>
<ul>
<li><a href="{path}">Metrics</a></li>
<li><a href="/-/healthy">Health</a> and <a href="/-/ready">readiness</a></li>
</ul>
<form action="/probe">
<label>Probe: <input name="target" placeholder="http://127.0.0.1:3000/api/health" size="40"></label>
<label>module: <input name="module" value="http_2xx"></label>
<label><input type="checkbox" name="debug" value="true"> debug</label>
<button>Probe</button>
</form>
<h2>Collectors</h2>
<ul>{rows}</ul>
</body>
</html>
"""
