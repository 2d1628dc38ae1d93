"""Every drill does what it says, so that what monitoring sees of it can be trusted."""

import signal
from typing import TYPE_CHECKING

import psutil
import pytest
import requests

from tests.integration.estate.conftest import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.estate.conftest import Server

    Start = Callable[..., Server]


def drill(server: "Server", text: str) -> dict[str, object]:
    """Ask for a drill; return what it says it does."""
    reply = server.ask("POST", f"/drill/{text}")
    assert reply.status_code == 202, reply.text
    told: dict[str, object] = reply.json()
    assert told["drill"] == text.partition("?")[0]
    assert told["pid"] == server.process.pid
    return told


def test_crash(drilled: "Server") -> None:
    """An uncaught exception ends the process with its stack in the log, after the caller was told."""
    drill(drilled, "crash")
    assert drilled.process.wait(10) == 1
    assert "Error: drill: crash" in drilled.printed()


def test_reject(drilled: "Server") -> None:
    """An unhandled rejection ends plain Node."""
    drill(drilled, "reject")
    assert drilled.process.wait(10) == 1


@pytest.mark.parametrize(("query", "code"), [("", 1), ("?code=0", 0), ("?code=7", 7)])
def test_exit(drilled: "Server", query: str, code: int) -> None:
    """It exits with the code that was asked for."""
    drill(drilled, f"exit{query}")
    assert drilled.process.wait(10) == code


def test_hang_forever(drilled: "Server") -> None:
    """The process lives, answers nothing, burns no CPU and ignores SIGINT: only SIGKILL ends it."""
    assert drill(drilled, "hang")["seconds"] == "forever"
    process = psutil.Process(drilled.process.pid)
    with pytest.raises(requests.Timeout):
        drilled.session.get(f"{drilled.url}/api/health", timeout=1)
    drilled.process.send_signal(signal.SIGINT)
    before = sum(process.cpu_times()[:2])
    with pytest.raises(requests.Timeout):
        drilled.session.get(f"{drilled.url}/api/health", timeout=1)
    assert sum(process.cpu_times()[:2]) - before < 0.5
    assert drilled.process.poll() is None


def test_hang_for_a_while(drilled: "Server") -> None:
    """A hang with an end ends."""
    drill(drilled, "hang?seconds=0.5")
    assert drilled.ask("GET", "/api/health").status_code == 200


def test_leak_and_recover(drilled: "Server") -> None:
    """Resident memory grows by what was asked, up to the limit given, and is let go by recover."""
    process = psutil.Process(drilled.process.pid)
    before = process.memory_info().rss
    drill(drilled, "leak?mb=40&upto=80")
    until(lambda: process.memory_info().rss - before > 75 << 20)
    drill(drilled, "recover")
    assert drilled.ask("GET", "/api/health").status_code == 200


def test_burn(drilled: "Server") -> None:
    """CPU time passes in the process while it goes on answering, until recover."""
    process = psutil.Process(drilled.process.pid)
    before = sum(process.cpu_times()[:2])
    drill(drilled, "burn?seconds=60&threads=2")
    until(lambda: sum(process.cpu_times()[:2]) - before > 1)
    assert drilled.ask("GET", "/api/health").json()["status"] == "healthy"
    threads = process.num_threads()
    drill(drilled, "recover")
    until(lambda: process.num_threads() < threads)


def test_unhealthy_and_recover(drilled: "Server") -> None:
    """Health says unhealthy with 503, the app itself goes on, and recover heals it."""
    drill(drilled, "unhealthy")
    sick = drilled.ask("GET", "/api/health")
    assert (sick.status_code, sick.json()["status"]) == (503, "unhealthy")
    assert drilled.ask("GET", "/api/lists").status_code == 200
    drill(drilled, "recover")
    well = drilled.ask("GET", "/api/health")
    assert (well.status_code, well.json()["status"]) == (200, "healthy")


def test_slow_and_recover(drilled: "Server") -> None:
    """Every page of the API is late by what was asked, until recover."""
    drill(drilled, "slow?ms=400")
    assert drilled.ask("GET", "/api/health").elapsed.total_seconds() >= 0.4
    drill(drilled, "recover")
    with drilled.session.get(f"{drilled.url}/api/health", timeout=10) as reply:
        assert reply.status_code == 200


def test_fill_log(drilled: "Server") -> None:
    """As many bytes as were asked for arrive on stdout, in lines, however slowly they are read."""
    drill(drilled, "fill-log?mb=3")
    until(lambda: drilled.log.stat().st_size > 2.99 * (1 << 20))
    lines = [line for line in drilled.printed().splitlines() if "filling the log" in line]
    assert all(len(line) < 1100 for line in lines)
    assert 2.9 < sum(len(line) + 1 for line in lines) / (1 << 20) <= 3


def test_crash_after_start(node: "Start") -> None:
    """With WORDPECKER_DRILL_CRASH_AFTER_MS every start ends in a crash, for drills of crash loops."""
    server = node("backend", {"WORDPECKER_DRILL": "1", "WORDPECKER_DRILL_CRASH_AFTER_MS": "100"})
    assert server.process.wait(10) == 1


def test_crash_after_start_needs_the_flag(node: "Start") -> None:
    """Without WORDPECKER_DRILL=1 that setting does nothing."""
    server = node("backend", {"WORDPECKER_DRILL_CRASH_AFTER_MS": "1"})
    assert server.ask("GET", "/api/health").status_code == 200
    assert server.process.poll() is None


@pytest.mark.parametrize(
    "text",
    [
        "hang?seconds=x",
        "hang?seconds=-1",
        "leak?mb=",
        "leak?mb=1e9",
        "exit?code=256",
        "burn?seconds=NaN",
        "slow?ms=Infinity",
    ],
)
def test_wrong_parameters_start_nothing(drilled: "Server", text: str) -> None:
    """A parameter that is no number, or out of bounds, is refused before anything happens."""
    reply = drilled.ask("POST", f"/drill/{text}")
    assert reply.status_code == 400
    assert "must be a number from 0 to" in reply.json()["error"]
    assert drilled.ask("GET", "/api/health").status_code == 200


def test_drills_are_listed_and_only_post_starts_one(drilled: "Server") -> None:
    """GET lists and never acts; an unknown drill is named as such; a web page may not start one."""
    assert "crash" in drilled.ask("GET", "/drill").json()["drills"]
    assert drilled.ask("GET", "/drill/crash").status_code == 405
    assert drilled.ask("POST", "/drill/constructor").status_code == 404
    assert drilled.ask("POST", "/drill/crash", headers={"Origin": "http://evil.example"}).status_code == 403
    assert drilled.ask("GET", "/api/health").status_code == 200
