"""The command line of pm2-exporter: flags and file to a running exporter.

Exit codes: 0 done, 1 the configuration is wrong or the address is taken, 2 the flags are wrong.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from exporter import VERSION
from exporter.collectors import COLLECTORS
from exporter.config import Config
from exporter.exposition import Format
from exporter.grammar import ConfigError, load
from exporter.logs import FORMATS, LEVELS, configure
from exporter.scrape import budget
from exporter.server import Exporter, Settings
from exporter.webconfig import WebGate

log = logging.getLogger("exporter")

DEFAULT_ADDRESS = "127.0.0.1:9209"
KEEPALIVE = 330.0
"""Seconds after which an idle connection is closed; Prometheus keeps its own for five minutes."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of every flag, in the spelling that Prometheus's exporters use."""
    flags = argparse.ArgumentParser(
        "pm2-exporter",
        description="Prometheus exporter of PM2: its apps and their process trees, this host, MongoDB, HTTP probes.",
        allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = flags.add_argument
    add(
        "--config.file", dest="config_file", metavar="PATH", type=_path, help="exporter.yml; without it every default holds"
    )
    add("--config.check", dest="config_check", action="store_true", help="check the configuration files and exit")
    add("--once", action="store_true", help="print one scrape to standard output and exit")
    add(
        "--web.listen-address",
        dest="listen",
        metavar="HOST:PORT",
        action="append",
        type=address,
        help=f"where to listen; repeatable; :PORT means every interface (default {DEFAULT_ADDRESS})",
    )
    add(
        "--web.config.file",
        dest="web_config_file",
        metavar="PATH",
        type=_path,
        help="exporter-toolkit's web config file: TLS, client certificates, basic auth, headers",
    )
    add(
        "--web.telemetry-path",
        dest="telemetry_path",
        metavar="PATH",
        type=_telemetry_path,
        default="/metrics",
        help="where the metrics are served (default /metrics)",
    )
    add(
        "--web.max-requests",
        dest="max_requests",
        metavar="N",
        type=_count,
        default=40,
        help="scrapes and probes answered at the same time; 0 means no limit (default 40)",
    )
    add(
        "--web.disable-exporter-metrics",
        dest="exporter_metrics",
        action="store_false",
        help="leave out the metrics about the exporter's own process",
    )
    for name in COLLECTORS:
        add(
            f"--collector.{name}",
            dest=f"collector_{name}",
            action=_OnOff,
            help=f"switch the {name} collector on or off; this wins over the file (on by default)",
        )
    add(
        "--collector.disable-defaults",
        dest="collector_default",
        action="store_false",
        help="switch off every collector that is not named by a flag or in the file",
    )
    add(
        "--log.level", dest="log_level", choices=LEVELS, default="info", help="the least severe level logged (default info)"
    )
    add("--log.format", dest="log_format", choices=FORMATS, default="logfmt", help="how log lines look (default logfmt)")
    add("--version", action="version", version=f"pm2-exporter {VERSION}")
    return flags


class _OnOff(argparse.Action):
    """`--collector.NAME` and `--no-collector.NAME`."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:  # noqa: A002 -- argparse's word
        both = [*option_strings, *(option.replace("--", "--no-", 1) for option in option_strings)]
        super().__init__(both, dest, nargs=0, help=help)

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 -- argparse's signature
        namespace: argparse.Namespace,
        values: object,  # noqa: ARG002
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, not (option_string or "").startswith("--no-"))


def address(text: str) -> tuple[str | None, int]:
    """Read HOST:PORT, :PORT or [IPV6]:PORT; raise argparse.ArgumentTypeError for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:  # noqa: PLR2004 -- the highest port
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as {DEFAULT_ADDRESS} or :9209")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise argparse.ArgumentTypeError(f"{text!r}: an IPv6 address goes in brackets, such as [::1]:9209")
    return host.strip("[]") or None, int(port)


def _written(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("a path is needed")
    return Path(text)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


_PATH = re.compile(r"/|(/[\w~-][\w.~-]*)+/?")


def _telemetry_path(text: str) -> str:
    if not _PATH.fullmatch(text) or text.startswith(("/-/", "/probe")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a path such as /metrics, or is taken")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    flags = parser().parse_args(argv)
    configure(level=flags.log_level, form=flags.log_format)
    try:
        gate = WebGate(flags.web_config_file, os.environ)
        read = _reader(flags.config_file)
        if flags.config_check:
            read()
            print("pm2-exporter: the configuration is valid")  # noqa: T201 -- what was asked for
            return 0
        exporter = Exporter(read, _settings(flags))
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(
                _once(exporter) if flags.once else _serve(exporter, gate, flags.listen or [address(DEFAULT_ADDRESS)])
            )
    except (ConfigError, OSError) as error:
        print(f"pm2-exporter: {error}", file=sys.stderr)  # noqa: T201 -- before any server runs
        return 1
    return 0


def _reader(path: Path | None) -> Callable[[], Config]:
    return (lambda: load(path, Config, environ=os.environ)) if path else Config


def _settings(flags: argparse.Namespace) -> Settings:
    named = {name: getattr(flags, f"collector_{name}") for name in COLLECTORS}
    return Settings(
        telemetry_path=flags.telemetry_path,
        max_requests=flags.max_requests,
        exporter_metrics=flags.exporter_metrics,
        collectors={name: on for name, on in named.items() if on is not None},
        collector_default=flags.collector_default,
    )


async def _once(exporter: Exporter) -> None:
    await exporter.start(background=False)
    try:
        page = await exporter.page(exporter.collectors, budget(None), Format.TEXT)
        sys.stdout.buffer.write(page)
        sys.stdout.buffer.flush()
    finally:
        await exporter.stop()


async def _serve(exporter: Exporter, gate: WebGate, addresses: Sequence[tuple[str | None, int]]) -> None:
    _raise_descriptor_limit()
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    hung_up = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, hung_up.set)
    logging.getLogger("aiohttp.server").addFilter(_is_our_fault)
    runner = web.AppRunner(
        exporter.app([gate.middleware]), access_log=None, shutdown_timeout=0.5, keepalive_timeout=KEEPALIVE
    )
    await runner.setup()
    try:
        await exporter.start()
        reloads = loop.create_task(_reload_whenever(hung_up, exporter), name="reload on SIGHUP")
        for host, port in addresses:
            try:
                await web.TCPSite(runner, host, port, ssl_context=gate.context).start()
            except OSError as error:
                raise OSError(f"cannot listen on {_written(host or '', port)}: {error.strerror or error}") from None
        for host, port, *_ in runner.addresses:
            log.info(
                "listening", extra={"address": _written(host, port), "tls": gate.context is not None, "version": VERSION}
            )
        gc.collect()
        gc.freeze()
        await ended.wait()
        log.info("stopping")
        reloads.cancel()
    finally:
        await runner.cleanup()
        await exporter.stop()


async def _reload_whenever(hung_up: asyncio.Event, exporter: Exporter) -> None:
    """Reload after each SIGHUP; any number of them that arrive during a reload ask for one more."""
    while True:
        await hung_up.wait()
        hung_up.clear()
        with contextlib.suppress(Exception):  # it has been logged
            await exporter.reload()


def _is_our_fault(record: logging.LogRecord) -> bool:
    """Keep out of the log what strangers send that is no HTTP: it may fill the disk, or hold a credential."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def _raise_descriptor_limit() -> None:
    """Use as many file descriptors as this user may, as Go programs do: slow clients should not cost scrapes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
