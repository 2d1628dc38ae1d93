"""The ecosystem file under a real PM2: each setting does what its comment says."""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests

from exporter.pm2.client import Reader
from tests.integration.estate.conftest import free_ports

if TYPE_CHECKING:
    from tests.integration.conftest import PM2

BACKEND, FRONTEND = "wordpecker-backend", "wordpecker-frontend"


class Estate:
    """WordPecker under one PM2 daemon."""

    def __init__(self, pm2: "PM2", sources: Path, environ: dict[str, str]) -> None:
        """Start the ecosystem file, with drills allowed."""
        self.pm2 = pm2
        self.backend_port, frontend_port = free_ports(2)
        self.url, self.page = f"http://127.0.0.1:{self.backend_port}", f"http://127.0.0.1:{frontend_port}"
        self.logs = pm2.base / "logs"
        settings = {
            "WORDPECKER_DRILL": "1",
            "WORDPECKER_BACKEND_PORT": str(self.backend_port),
            "WORDPECKER_FRONTEND_PORT": str(frontend_port),
            "WORDPECKER_LOG_DIR": str(self.logs),
        }
        pm2.run("start", str(sources / "ecosystem.config.js"), environ=settings | environ)
        self.session = requests.Session()
        self.session.trust_env = False

    def apps(self, name: str = BACKEND) -> list[dict[str, Any]]:
        """Return PM2's entries of that name."""
        listed: list[dict[str, Any]] = json.loads(self.pm2.run("jlist"))
        return [each for each in listed if each["name"] == name]

    @property
    def app(self) -> dict[str, Any]:
        """Return the entry of the backend's only instance."""
        (entry,) = self.apps()
        return entry

    def drill(self, text: str) -> None:
        """Ask for a drill."""
        reply = self.session.post(f"{self.url}/drill/{text}", timeout=10)
        assert reply.status_code == 202, reply.text

    def replaced(self, pid: int) -> None:
        """Wait until the backend is online as another process than `pid` and answers."""
        self.pm2.until(lambda: self.app["pid"] not in {0, pid} and self.app["pm2_env"]["status"] == "online", within=30)
        assert self.session.get(f"{self.url}/api/health", timeout=10).json()["status"] == "healthy"


@pytest.fixture
def estate(pm2_factory: "Callable[..., PM2]", sources: Path) -> Callable[..., Estate]:
    """Return a function that starts the estate with settings of the daemon and of the ecosystem file."""

    def start(daemon: dict[str, str] | None = None, **environ: str) -> Estate:
        pm2 = pm2_factory()
        pm2.environ.update(daemon or {})
        return Estate(pm2.boot(), sources, environ)

    return start


def test_both_apps_come_online(estate: Callable[..., Estate]) -> None:
    """The file starts a cluster-mode backend and a frontend that shows it, and logs are dated and where they should be."""
    running = estate(SOMEONES_TOKEN="hush", OPENAI_API_KEY="ours")  # noqa: S106 -- a decoy
    assert {each["pm2_env"]["status"] for each in running.apps() + running.apps(FRONTEND)} == {"online"}
    assert running.app["pm2_env"]["exec_mode"] == "cluster_mode"
    assert running.session.get(f"{running.page}/api/health", timeout=10).json()["status"] == "healthy"
    assert running.session.get(f"{running.url}/api/ready", timeout=10).json()["checks"]["api_keys"]["openai"] is True
    line = (running.logs / f"{BACKEND}-out.log").read_text().splitlines()[0]
    assert line[:4].isdigit()
    assert "wordpecker backend 1.0.0 listens on" in line
    assert "hush" not in running.pm2.run("jlist")


@pytest.mark.parametrize("mode", ["cluster", "fork"])
def test_a_crash_and_an_exit_are_repaired(estate: Callable[..., Estate], mode: str) -> None:
    """PM2 restarts an app that ends, in either mode."""
    running = estate(WORDPECKER_EXEC_MODE=mode)
    for drill in ("crash", "exit?code=0"):
        pid = running.app["pid"]
        running.drill(drill)
        running.replaced(pid)
    assert running.app["pm2_env"]["restart_time"] == 2
    assert "Error: drill: crash" in (running.logs / f"{BACKEND}-error.log").read_text()


def test_a_hung_app_can_be_restarted(estate: Callable[..., Estate]) -> None:
    """PM2 does not notice a hang, and its restart gets through one: SIGINT is ignored, kill_timeout ends it."""
    running = estate()
    pid = running.app["pid"]
    running.drill("hang")
    assert running.app["pm2_env"]["status"] == "online"
    running.pm2.run("restart", BACKEND)
    running.replaced(pid)


def test_a_leak_is_ended_at_the_limit(estate: Callable[..., Estate]) -> None:
    """Past max_memory_restart PM2 replaces the app, and recover is not needed: memory starts anew."""
    running = estate({"PM2_WORKER_INTERVAL": "500"}, WORDPECKER_MAX_MEMORY="120M")
    pid = running.app["pid"]
    running.drill("leak?mb=60&upto=300")
    running.replaced(pid)
    assert running.app["pm2_env"]["restart_time"] == 1


def test_what_cannot_start_is_given_up(estate: Callable[..., Estate]) -> None:
    """An app that dies at every start is waited for longer and longer, and PM2 gives up after max_restarts."""
    running = estate(WORDPECKER_DRILL_CRASH_AFTER_MS="20")
    # PM2 overwrites "errored" with "waiting restart" where there is a restart delay; the emptied created_at gives it away.
    running.pm2.until(lambda: running.app["pm2_env"]["created_at"] is None, within=60)
    given_up = running.app
    assert given_up["pm2_env"]["status"] == "waiting restart"
    assert given_up["pm2_env"]["restart_time"] == 9
    assert given_up["pm2_env"]["prev_restart_delay"] > 5000
    assert given_up["pid"] == 0
    listing = asyncio.run(Reader(running.pm2.home).listing(5))
    assert {process.name: process.is_given_up for process in listing.processes}[BACKEND]


def test_it_scales_and_reloads_without_a_gap(estate: Callable[..., Estate]) -> None:
    """Cluster mode: more instances share the port, and a reload loses no request."""
    running = estate()
    running.pm2.run("scale", BACKEND, "2")
    assert [each["pm2_env"]["status"] for each in running.apps()] == ["online", "online"]
    before = {each["pid"] for each in running.apps()}
    failed: list[Exception] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            try:
                requests.get(f"{running.url}/api/health", timeout=10, headers={"Connection": "close"}).raise_for_status()
            except requests.RequestException as error:
                failed.append(error)

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for each in asking:
        each.start()
    running.pm2.run("reload", BACKEND)
    over.set()
    for each in asking:
        each.join()
    assert failed == []
    assert not before & {each["pid"] for each in running.apps()}
