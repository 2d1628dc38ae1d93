"""The frontend serves its page, whatever becomes of the backend, and nothing else."""

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.estate.conftest import Server

    Start = Callable[..., Server]


@pytest.fixture
def frontend(node: "Start", backend: "Server") -> "Server":
    """Return a frontend in front of a backend."""
    return node("frontend", {"BACKEND_URL": backend.url})


def test_the_page_and_all_it_names_load(frontend: "Server") -> None:
    """The page's own parts are there, typed, and may load nothing from elsewhere."""
    page = frontend.ask("GET", "/")
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    parts = set(re.findall(r'(?:src|href)="(/[^"]+)"', page.text))
    assert {"/page.js", "/style.css", "/icon.svg"} <= parts
    for part in parts:
        reply = frontend.ask("GET", part)
        assert reply.status_code == 200, part
        assert reply.headers["X-Content-Type-Options"] == "nosniff"


def test_it_shows_the_backend(frontend: "Server") -> None:
    """Three reading pages of the backend come through unchanged."""
    assert frontend.ask("GET", "/api/health").json()["status"] == "healthy"
    assert frontend.ask("GET", "/api/ready").json()["status"] == "ready"
    assert frontend.ask("GET", "/api/lists").json()[0]["name"] == "First words in Spanish"


def test_it_stands_when_the_backend_is_down(frontend: "Server", backend: "Server") -> None:
    """A dead backend costs its own pages, with the reason, and nothing else."""
    backend.close()
    assert frontend.ask("GET", "/").status_code == 200
    assert frontend.ask("GET", "/health").json()["status"] == "healthy"
    reply = frontend.ask("GET", "/api/health")
    assert (reply.status_code, reply.json()) == (502, {"error": "the backend cannot be reached"})


def test_it_does_not_wait_for_a_hung_backend(node: "Start", drilled: "Server") -> None:
    """A backend that is silent is given up on."""
    frontend = node("frontend", {"BACKEND_URL": drilled.url})
    drilled.ask("POST", "/drill/hang")
    reply = frontend.ask("GET", "/api/health")
    assert (reply.status_code, reply.json()) == (502, {"error": "the backend is silent"})


@pytest.mark.parametrize(
    "path",
    [
        "/../server.js",
        "/../../package.json",
        "/%2e%2e/server.js",
        "/..%2fserver.js",
        "/..\\server.js",
        "//etc/passwd",
        "/public/../../package.json",
        "/index.html/../../server.js",
        "/index.html%00.js",
        "/etc/passwd",
        "/__proto__",
        "/drill/exit",
        "/api/lists/00000000-0000-0000-0000-000000000000",
        "/api/health/../../drill/exit",
        "http://169.254.169.254/",
        "@evil.example/",
    ],
)
def test_nothing_else_is_served(frontend: "Server", path: str) -> None:
    """No path reaches a file outside public/, nor a page of the backend outside the fixed set."""
    reply = frontend.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert reply.split()[1] in {b"404", b"400"}
    assert b"require(" not in reply
    assert b"root:" not in reply


def test_it_only_reads(frontend: "Server") -> None:
    """Nothing can be changed through the frontend."""
    assert {frontend.ask(method, "/api/lists", json={"name": "x"}).status_code for method in ("POST", "PUT", "DELETE")} == {
        405
    }


def test_the_query_and_headers_of_a_caller_stay_here(frontend: "Server") -> None:
    """A hostile request gets the same answer as any other, or a refusal of its own."""
    large = f"GET / HTTP/1.1\r\nHost: x\r\nX: {'a' * 20_000}\r\n\r\n"
    assert frontend.raw(large.encode()).split()[1] == b"431"
    assert frontend.ask("GET", "/api/health?x=%0d%0aX:1", headers={"X-Forwarded-For": "1.1.1.1"}).status_code == 200
