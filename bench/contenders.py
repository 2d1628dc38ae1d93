"""Who is compared: how each exporter is started on an estate, what it is asked, and what its answer must show to count."""

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import quote

import msgspec
import psutil

from bench import findings
from bench.estate import NODE_MODULES, PROBED, ROOT, TOOLS, Estate, clean_env, free_port, running, which
from bench.measure import ScrapeFailed, page

EXPORTER_VENV = TOOLS / "venv" if (TOOLS / "venv" / ".complete").exists() else ROOT / ".venv"
"""As a user installs it, once script/bench has made that; else with the development tools."""

EXPORTER = EXPORTER_VENV / "bin" / "pm2-exporter"

EVERY_NODE_PROCESS = """\
process_names:
  - name: node
    cmdline: ['^node']
"""
"""process-exporter's configuration: without one it watches nothing. PM2's apps are told from the rest by their title."""

BLACKBOX_MODULES = """\
modules:
  http_2xx:
    prober: http
    http:
      preferred_ip_protocol: ip4
"""


class Started(Protocol):
    """Starts the program on a port; returns its argv and its environment."""

    def __call__(self, on: Estate, port: int) -> tuple[list[str], Mapping[str, str]]:
        """Write what configuration it needs; start nothing."""
        ...


@dataclass(frozen=True)
class Contender:
    """One exporter in the comparison."""

    name: str
    command: Started
    shows: Callable[[str, int], str]
    """From a page and the number of apps: what the page lacks; empty when it has everything it is run for."""
    version: Callable[[], str]
    paths: Callable[[Estate], tuple[str, ...]] = field(default=lambda _: ("/metrics",))
    asks_pm2: bool = False
    """Whether it talks to the PM2 daemon; where it does not, the daemon's share is nothing, and is not measured."""


@dataclass(frozen=True)
class Running:
    """A contender that is up."""

    contender: Contender
    process: psutil.Process
    urls: tuple[str, ...]


@contextlib.contextmanager
def started(contender: Contender, on: Estate) -> Iterator[Running]:
    """Run a contender on an estate until the block is left; raises ScrapeFailed when it never answers."""
    port = free_port()
    argv, env = contender.command(on, port)
    log = on.directory / f"{re.sub('[^a-z0-9]+', '-', contender.name)}.log"
    urls = tuple(f"http://127.0.0.1:{port}{path}" for path in contender.paths(on))
    with running(argv, log=log, env=env) as process:
        try:
            _answers(urls, process, within=30)
        except ScrapeFailed as failure:
            last = log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise ScrapeFailed(f"{failure}; it last said: {last}") from failure
        yield Running(contender, process, urls)


def _answers(urls: tuple[str, ...], process: psutil.Process, *, within: float) -> None:
    until = time.monotonic() + within
    for url in urls:
        while True:
            try:
                page(url)
                break
            except ScrapeFailed as failure:
                if time.monotonic() > until or not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                    raise ScrapeFailed(f"never answered: {failure}") from failure
                time.sleep(0.1)


def lacks(one: Running, apps: int) -> str:
    """Return what a running contender's pages lack; empty when they show everything it is run for."""
    return one.contender.shows("\n".join(page(url) for url in one.urls), apps)


def _count(page: str, pattern: str) -> int:
    return len(re.findall(pattern, page, flags=re.MULTILINE))


def ours_config(on: Estate) -> dict[str, object]:
    """Return exporter.yml for an estate: every collector on, three HTTP probes, MongoDB, written as JSON, which is YAML."""
    return {
        "pm2": {"home": str(on.pm2.home)},
        "http": {
            "targets": [
                {"url": url, "module": "http_2xx", "app": f"app-{number:03}"} for number, url in enumerate(on.targets)
            ]
        },
        "mongodb": {"uri": on.mongodb_uri},
        "directory": {"paths": [{"path": str(on.pm2.home / "logs")}]},
    }


def _ours(on: Estate, port: int) -> tuple[list[str], Mapping[str, str]]:
    config = on.directory / "exporter.yml"
    config.write_text(json.dumps(ours_config(on)))
    return [str(EXPORTER), f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"], clean_env()


def _ours_shows(page: str, apps: int) -> str:
    wanted = {
        "PM2 up": (r"^pm2_up 1", 1),
        "every app": (r"^pm2_process_info\{", apps),
        "every app's usage": (r"^pm2_process_resident_memory_bytes\{", apps),
        "every probe's success": (r"^probe_success\{.*\} 1", len(PROBED)),
        "MongoDB up": (r"^mongodb_up(\{.*\})? 1", 1),
        "the host": (r"^node_load1 ", 1),
        "the directory": (r"^pm2_directory_bytes\{", 1),
    }
    return _missing(page, wanted)


def _missing(page: str, wanted: Mapping[str, tuple[str, int]]) -> str:
    missing = [what for what, (pattern, count) in wanted.items() if _count(page, pattern) != count]
    failed = re.findall(r'^pm2_exporter_collector_success\{collector="(.*?)"\} 0', page, flags=re.MULTILINE)
    return "; ".join([f"does not show {what}" for what in missing] + [f"collector {name} failed" for name in failed])


def _pm2_metrics(on: Estate, port: int) -> tuple[list[str], Mapping[str, str]]:
    # It takes its settings as PM2 hands them to a module: JSON in a variable of its own name. PM2_HOME points it at the
    # running daemon; were none there, it would start one of its own, older version.
    settings = json.dumps({"port": port, "host": "127.0.0.1"})
    return ["node", str(NODE_MODULES / "pm2-metrics" / "exporter.js")], clean_env(
        PM2_HOME=str(on.pm2.home), **{"pm2-metrics": settings}
    )


def _process(*flags: str) -> Started:
    def command(on: Estate, port: int) -> tuple[list[str], Mapping[str, str]]:
        config = on.directory / "process-exporter.yml"
        config.write_text(EVERY_NODE_PROCESS)
        argv = [which("prometheus-process-exporter"), f"-config.path={config}", f"-web.listen-address=127.0.0.1:{port}"]
        return [*argv, *flags], clean_env()

    return command


def _process_shows(page: str, apps: int) -> str:
    found = re.search(r'^namedprocess_namegroup_num_procs\{groupname="node"\} (\d+)', page, flags=re.MULTILINE)
    return "" if found and int(found[1]) >= apps else "does not show every app"


def _node(on: Estate, port: int) -> tuple[list[str], Mapping[str, str]]:  # noqa: ARG001 -- the shape of all commands
    return [which("prometheus-node-exporter"), f"--web.listen-address=127.0.0.1:{port}"], clean_env()


def _blackbox(on: Estate, port: int) -> tuple[list[str], Mapping[str, str]]:
    config = on.directory / "blackbox.yml"
    config.write_text(BLACKBOX_MODULES)
    argv = [which("prometheus-blackbox-exporter"), f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
    return argv, clean_env()


def _probes(on: Estate) -> tuple[str, ...]:
    return tuple(f"/probe?module=http_2xx&target={quote(url, safe='')}" for url in on.targets)


def _ours_version() -> str:
    return _output(str(EXPORTER), "--version").split("(")[0].strip().split()[-1]


def npm_version(package: str) -> str:
    """Return the version of a package that script/bench installed from npm."""
    manifest = msgspec.json.decode((NODE_MODULES / package / "package.json").read_bytes(), type=dict[str, object])
    return str(manifest["version"])


def _debian_version(program: str) -> Callable[[], str]:
    def version() -> str:
        found = re.search(r"revision: ([^)]+)", _output(which(program), "--version"))
        return found[1] if found else "unknown"

    return version


def _output(*argv: str) -> str:
    done = subprocess.run(  # noqa: S603 -- our own argv
        argv, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30, env=clean_env()
    )
    return done.stdout


CONTENDERS = (
    Contender(findings.OURS, _ours, _ours_shows, _ours_version, asks_pm2=True),
    Contender(
        findings.PM2_METRICS,
        _pm2_metrics,
        lambda page, apps: _missing(page, {"every app": (r"^pm2_up\{.*\} 1", apps)}),
        lambda: npm_version("pm2-metrics"),
        asks_pm2=True,
    ),
    Contender(findings.PROCESS, _process(), _process_shows, _debian_version("prometheus-process-exporter")),
    Contender(
        findings.PROCESS_LEAN,
        _process("-gather-smaps=false", "-threads=false"),
        _process_shows,
        _debian_version("prometheus-process-exporter"),
    ),
    Contender(
        findings.NODE,
        _node,
        lambda page, _: _missing(page, {"the host": (r"^node_load1 ", 1)}),
        _debian_version("prometheus-node-exporter"),
    ),
    Contender(
        findings.BLACKBOX,
        _blackbox,
        lambda page, _: _missing(page, {"every probe's success": (r"^probe_success 1", len(PROBED))}),
        _debian_version("prometheus-blackbox-exporter"),
        _probes,
    ),
)
"""In the order in which they are measured and shown. `pm2 jlist` is no server, and is measured apart."""
