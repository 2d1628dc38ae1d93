"""What is measured on: a real PM2 daemon in a home of its own, its apps, a target of HTTP probes and a real mongod.

Everything listens on loopback, lives in a temporary directory and is ended by pid when the block is left, whatever happens.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOOLS = Path(os.environ.get("BENCH_TOOLS", ROOT / ".state" / "bench"))
"""Where script/bench puts the programs that are compared and measured on."""

NODE_MODULES = TOOLS / "node" / "node_modules"
PM2 = NODE_MODULES / "pm2" / "bin" / "pm2"
PROBED = ("/api/health", "/", "/empty")
"""Paths of the probe target; one HTTP probe each."""

# What an app's environment weighs, PM2 carries twice in every answer, so it is part of the cost: this is a deployed app's,
# and that of the login shell it was started from.
APP_ENV = {
    "NODE_ENV": "production",
    "PORT": "0",
    "LOG_LEVEL": "info",
    "API_BASE_URL": "https://api.bench.example/v1",
    "DATABASE_URL": "mongodb://127.0.0.1:27017/bench",
    "SESSION_TTL_SECONDS": "86400",
    "FEATURE_FLAGS": "search,upload,export,notifications,audit",
    "CORS_ORIGINS": "https://www.bench.example,https://admin.bench.example",
}
SHELL_ENV = {
    "USER": "deploy",
    "LOGNAME": "deploy",
    "SHELL": "/bin/bash",
    "TERM": "xterm-256color",
    "EDITOR": "vim",
    "PAGER": "less",
    "LESS": "-FRX",
    "SSH_CLIENT": "192.0.2.7 53124 22",
    "SSH_CONNECTION": "192.0.2.7 53124 192.0.2.10 22",
    "SSH_TTY": "/dev/pts/0",
    "XDG_SESSION_ID": "42",
    "XDG_SESSION_TYPE": "tty",
    "XDG_RUNTIME_DIR": "/run/user/1000",
    "XDG_DATA_DIRS": "/usr/local/share:/usr/share:/var/lib/snapd/desktop",
    "DBUS_SESSION_BUS_ADDRESS": "unix:path=/run/user/1000/bus",
    "MOTD_SHOWN": "pam",
    "NVM_DIR": "/home/deploy/.nvm",
    "NVM_BIN": "/home/deploy/.nvm/versions/node/v20.20.2/bin",
    "NVM_INC": "/home/deploy/.nvm/versions/node/v20.20.2/include/node",
    "NPM_CONFIG_UPDATE_NOTIFIER": "false",
}


def free_port() -> int:
    """Return a loopback TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def clean_env(**more: str) -> dict[str, str]:
    """Return the environment that every program here gets: the same on every machine, plus `more`."""
    return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": "/nonexistent", **more}


def which(name: str) -> str:
    """Return the path of a program: unpacked by script/bench, or installed."""
    unpacked = TOOLS / "debian" / "usr" / "bin" / name
    found = str(unpacked) if unpacked.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"bench: {name} is missing: script/bench fetches it")
    return found


def mongod() -> str:
    """Return the path of a mongod: $MONGOD, an installed one, or the one script/bench took from its wheel."""
    wheel = TOOLS / "mongo" / "fiftyone" / "db" / "bin" / "mongod"
    found = os.environ.get("MONGOD") or shutil.which("mongod") or (str(wheel) if wheel.exists() else None)
    if found is None:
        raise SystemExit("bench: mongod is missing: script/bench fetches it")
    return found


def wait_for(what: str, holds: Callable[[], bool], within: float) -> None:
    """Poll until `holds()`; exits with a sentence that names `what` after `within` seconds."""
    until = time.monotonic() + within
    while not holds():
        if time.monotonic() > until:
            raise SystemExit(f"bench: {what}: not within {within:.0f} s")
        time.sleep(0.05)


def end(processes: Sequence[psutil.Process], *, patience: float = 3.0) -> None:
    """End these processes: asked first, killed when they have not gone after `patience` seconds."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=patience)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=patience)


@contextlib.contextmanager
def running(argv: Sequence[str], *, log: Path, env: Mapping[str, str]) -> Iterator[psutil.Process]:
    """Run a program for as long as the block lasts; its output goes to `log`."""
    with log.open("ab") as output:
        child = psutil.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(env), start_new_session=True
        )
    try:
        yield child
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            end([*child.children(recursive=True), child])


def exit_on_signals() -> None:
    """Make the first SIGINT, SIGTERM or SIGHUP unwind the stack, and be deaf from then on: all is ended."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def leave(number: int, _frame: FrameType | None) -> None:
        for one in signals:
            signal.signal(one, signal.SIG_IGN)
        sys.exit(128 + number)

    for one in signals:
        signal.signal(one, leave)


class Pm2:
    """A PM2 daemon in a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.apps = 0
        self.env = clean_env(PM2_HOME=str(home), PM2_DISCRETE_MODE="1", PM2_DISABLE_VERSION_CHECK="true", **SHELL_ENV)
        # Without this file PM2 greets, and asks the network for news.
        (home / "touch").touch()

    def command(self, *argv: str) -> list[str]:
        """Return the argv of a pm2 command."""
        return ["node", str(PM2), *argv]

    def daemon(self) -> psutil.Process:
        """Return the daemon's process."""
        return psutil.Process(int((self.home / "pm2.pid").read_text()))

    def processes(self) -> list[dict[str, Any]]:
        """Return what `pm2 jlist` prints."""
        done = subprocess.run(  # noqa: S603 -- our own argv
            self.command("jlist"), env=self.env, check=True, capture_output=True, timeout=60
        )
        listed: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index(b"[") :])
        return listed

    def start(self, apps: Sequence[Mapping[str, object]]) -> None:
        """Start apps as an ecosystem file describes them."""
        ecosystem = self.home / "bench.config.json"
        ecosystem.write_text(json.dumps({"apps": [{"cwd": str(self.home), **app} for app in apps]}))
        self._run("start", str(ecosystem))

    def delete(self, names: Sequence[str]) -> None:
        """Stop apps by name and forget them."""
        self._run("delete", *names)

    def _run(self, *argv: str) -> None:
        subprocess.run(  # noqa: S603 -- our own argv
            self.command(*argv), env=self.env, check=True, stdout=subprocess.DEVNULL, timeout=300
        )

    def grow(self, to: int) -> None:
        """Start apps until there are `to` of them, all online."""
        script = str(HERE / "apps" / "app.js")
        more = [{"name": f"app-{number:03}", "script": script, "env": APP_ENV} for number in range(self.apps, to)]
        if more:
            self.start(more)
        self.apps = to
        wait_for(f"{to} apps online", self._all_online, within=60)

    def _all_online(self) -> bool:
        return [one["pm2_env"]["status"] for one in self.processes()] == ["online"] * self.apps

    def close(self) -> None:
        """Kill the daemon first, so that it restarts nothing, and then its apps."""
        if (self.home / "bench.config.json").exists():
            # A start that was interrupted may have left a daemon that has yet to write down its pid.
            with contextlib.suppress(SystemExit):
                wait_for("the daemon's pid", (self.home / "pm2.pid").exists, within=3)
        with contextlib.suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
            daemon = self.daemon()
            daemon.suspend()
            apps = daemon.children(recursive=True)
            daemon.kill()
            daemon.wait(timeout=5)
            end(apps)


class Estate:
    """The daemon, the probe target and the database, and where to find them."""

    def __init__(self, *, directory: Path, pm2: Pm2, target: int, mongo: int) -> None:
        self.directory = directory
        self.pm2 = pm2
        self.targets = tuple(f"http://127.0.0.1:{target}{path}" for path in PROBED)
        self.mongodb_uri = f"mongodb://127.0.0.1:{mongo}"


@contextlib.contextmanager
def estate() -> Iterator[Estate]:
    """Bring up everything but the apps, and take it down at the end."""
    with contextlib.ExitStack() as stack:
        # PM2's sockets live in its home, and a socket's path is at most 107 bytes long: hence a short directory.
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True)))
        (directory / "mongo").mkdir()
        (directory / "pm2").mkdir()
        env, log = clean_env(), directory / "target.log"
        stack.enter_context(running(["node", str(HERE / "apps" / "target.js")], log=log, env=env))
        port = free_port()
        argv = [mongod(), "--dbpath", str(directory / "mongo"), "--port", str(port), "--bind_ip", "127.0.0.1"]
        argv += ["--nounixsocket", "--wiredTigerCacheSizeGB", "0.25"]
        stack.enter_context(running(argv, log=directory / "mongod.log", env=env))
        wait_for("the probe target's port", lambda: log.read_text().endswith("\n"), within=20)
        wait_for("mongod listening", lambda: listens(port), within=60)
        pm2 = Pm2(directory / "pm2")
        stack.callback(pm2.close)
        yield Estate(directory=directory, pm2=pm2, target=int(log.read_text()), mongo=port)


def listens(port: int) -> bool:
    """Tell whether something accepts connections on a loopback port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
