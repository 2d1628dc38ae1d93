"""The backend keeps its contract: what monitoring and people rely on."""

import signal
import socket
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.estate.conftest import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.conftest import Mongod
    from tests.integration.estate.conftest import Server

    Start = Callable[..., Server]

DRILLS = ("crash", "reject", "exit", "hang", "leak", "burn", "unhealthy", "slow", "fill-log", "recover")
JSON = {"Content-Type": "application/json"}


def test_health_says_how_the_process_is(backend: "Server") -> None:
    """Health is status, timestamp, uptime, memory and version, in types a probe can assert on."""
    reply = backend.ask("GET", "/api/health")
    told = reply.json()
    assert reply.status_code == 200
    assert set(told) == {"status", "timestamp", "uptime", "memory", "version"}
    assert told["status"] == "healthy"
    assert datetime.fromisoformat(told["timestamp"]).utcoffset() == timedelta(0)
    assert told["uptime"] > 0
    assert told["memory"]["rss"] > told["memory"]["heapUsed"] > 0
    assert told["version"] == "1.0.0"


def test_head_is_get_without_a_body(backend: "Server") -> None:
    """A probe may use HEAD."""
    reply = backend.ask("HEAD", "/api/health")
    assert (reply.status_code, reply.content) == (200, b"")
    assert int(reply.headers["Content-Length"]) > 0


def test_ready_without_mongodb(backend: "Server") -> None:
    """Where no MongoDB is configured the app serves from memory, so it is ready and says what is missing."""
    reply = backend.ask("GET", "/api/ready")
    assert reply.status_code == 200
    assert reply.json()["checks"] == {
        "mongodb": {"configured": False, "connected": False, "status": "not configured"},
        "api_keys": {"openai": False, "elevenlabs": False, "pexels": False},
    }


def test_keys_are_told_as_booleans_and_never_shown(node: "Start", tmp_path: Path) -> None:
    """Ready says which keys there are, from the environment or a file, and no page or log line shows one."""
    (tmp_path / "key").write_text("from-a-file\n")
    backend = node("backend", {"OPENAI_API_KEY": "from-the-env", "PEXELS_API_KEY_FILE": str(tmp_path / "key")})
    ready = backend.ask("GET", "/api/ready")
    assert ready.json()["checks"]["api_keys"] == {"openai": True, "elevenlabs": False, "pexels": True}
    seen = ready.text + backend.ask("GET", "/api/health").text + backend.printed()
    assert "from-" not in seen


def test_not_ready_while_mongodb_cannot_be_reached(node: "Start", driver: Path) -> None:
    """A configured MongoDB that refuses connections makes 503, within the ping's deadline, without the address."""
    uri = "mongodb://someone:hush@127.0.0.1:1/words"
    backend = node("backend", {"MONGODB_URI": uri, "NODE_PATH": str(driver)})
    ready = backend.ask("GET", "/api/ready")
    assert ready.status_code == 503
    assert ready.json()["checks"]["mongodb"]["connected"] is False
    assert ready.json()["checks"]["mongodb"]["status"] in {"unreachable", "timeout"}
    assert backend.ask("GET", "/api/lists").status_code == 503
    assert backend.ask("GET", "/api/health").status_code == 200
    assert "hush" not in ready.text + backend.printed()


@pytest.mark.parametrize(("uri", "status"), [("mongodb://127.0.0.1:1", "driver missing"), ("nonsense", "invalid address")])
def test_ready_names_what_is_wrong_with_the_set_up(node: "Start", driver: Path, uri: str, status: str) -> None:
    """A missing driver and an address that is none are told apart from a database that is down."""
    path = {} if status == "driver missing" else {"NODE_PATH": str(driver)}
    ready = node("backend", {"MONGODB_URI": uri, **path}).ask("GET", "/api/ready")
    assert ready.status_code == 503
    assert ready.json()["checks"]["mongodb"]["status"] == status


async def test_words_live_in_mongodb(node: "Start", driver: Path, mongod: "Mongod") -> None:
    """What one process stored, the next one has; a frozen MongoDB makes 503 in time, and it heals by itself."""
    environ = {"MONGODB_URI": mongod.uri + "wordpecker", "NODE_PATH": str(driver)}
    first = node("backend", environ)
    ready = first.ask("GET", "/api/ready").json()
    assert ready["checks"]["mongodb"]["status"] == "connected"
    assert ready["checks"]["mongodb"]["ping_ms"] > 0
    learn(first)
    first.close()
    second = node("backend", environ)
    assert [(each["name"], each["words"]) for each in second.ask("GET", "/api/lists").json()] == [("Birds", 2)]
    mongod.signal(signal.SIGSTOP)
    assert second.ask("GET", "/api/ready").json()["checks"]["mongodb"]["status"] == "timeout"
    assert second.ask("GET", "/api/lists").status_code == 503
    mongod.signal(signal.SIGCONT)
    until(lambda: second.ask("GET", "/api/ready").status_code == 200)
    assert second.ask("GET", "/api/lists").status_code == 200


def test_words_live_in_memory(backend: "Server") -> None:
    """Without MongoDB the same calls give the same answers."""
    assert backend.ask("GET", "/api/lists").json()[0]["words"] == 4
    learn(backend)


def learn(backend: "Server") -> None:
    """Walk through a list's life: made, filled, learned, with a changed meaning; leave a list of two words."""
    made = backend.ask("POST", "/api/lists", json={"name": "Birds"})
    assert made.status_code == 201
    page = f"/api/lists/{made.json()['id']}"
    for word, meaning in (("pico", "beek"), ("pluma", "feather"), ("pico", "beak"), ("$name", "$$ROOT")):
        assert backend.ask("POST", f"{page}/words", json={"word": word, "meaning": meaning}).status_code == 201
    words = {each["word"]: each for each in backend.ask("GET", page).json()["words"]}
    assert words["pico"] == {"word": "pico", "meaning": "beak", "box": 0}
    assert words["$name"]["meaning"] == "$$ROOT"
    for expected in (1, 2, 3, 4, 5, 5):
        told = backend.ask("POST", f"{page}/answers", json={"word": "pico", "correct": True}).json()
        assert told["box"] == expected
    assert backend.ask("GET", f"{page}/next").json()["word"] == "pluma"
    assert backend.ask("POST", f"{page}/answers", json={"word": "pico", "correct": False}).json()["box"] == 0
    assert backend.ask("POST", f"{page}/answers", json={"word": "none", "correct": True}).status_code == 404
    assert backend.ask("DELETE", page).status_code == 204
    assert backend.ask("DELETE", page).status_code == 404
    last = f"/api/lists/{backend.ask('POST', '/api/lists', json={'name': 'Birds'}).json()['id']}"
    for word in ("ala", "nido"):
        backend.ask("POST", f"{last}/words", json={"word": word, "meaning": "?"})


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/", {}, 404),
        ("GET", "/api/lists/../../package.json", {}, 404),
        ("PUT", "/api/lists", {}, 405),
        ("POST", "/api/lists", {"data": "name=x"}, 415),
        ("POST", "/api/lists", {"data": "{", "headers": JSON}, 400),
        ("POST", "/api/lists", {"data": "null", "headers": JSON}, 400),
        ("POST", "/api/lists", {"json": {"name": " "}}, 400),
        ("POST", "/api/lists", {"json": {"name": {"$ne": ""}}}, 400),
        ("POST", "/api/lists", {"json": {"name": "x" * 201}}, 400),
        ("POST", "/api/lists", {"json": {"name": "x" * 20_000}}, 413),
        ("GET", "/api/lists/00000000-0000-0000-0000-000000000000", {}, 404),
    ],
)
def test_refusals(backend: "Server", method: str, path: str, options: dict[str, object], status: int) -> None:
    """What is wrong with a request is said in JSON with the fitting status."""
    reply = backend.ask(method, path, **options)
    assert reply.status_code == status
    assert list(reply.json()) == ["error"]
    assert backend.ask("GET", "/api/health").status_code == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /api/health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", b"431"),
        (b"GET /api/health HTTP/1.1\r\nHost: x\r\nBad header\x00: 1\r\n\r\n", b"400"),
        (
            b"POST /api/lists HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"400",
        ),
        (b"POST /api/lists HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"GET http://169.254.169.254/api/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"404"),
        (
            b"GET /api/health HTTP/1.1\r\nHost: x\r\nHost: y\r\nOrigin: http://evil.example\r\nConnection: close\r\n\r\n",
            b"200",
        ),
        (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03", b"400"),
    ],
    ids=["large header", "broken header", "smuggled", "negative length", "foreign address", "two hosts", "TLS"],
)
def test_hostile_requests(backend: "Server", sent: bytes, status: bytes) -> None:
    """No header makes it fall, echo what was sent, or let a foreign page read the answer."""
    reply = backend.raw(sent)
    assert reply.split()[1] == status
    assert b"access-control" not in reply.lower()
    assert b"evil" not in reply
    assert backend.ask("GET", "/api/health").status_code == 200


@pytest.mark.parametrize("name", [*(f"/{drill}" for drill in DRILLS), ""])
def test_drills_do_not_exist_unless_asked_for(backend: "Server", name: str) -> None:
    """Without WORDPECKER_DRILL=1 no drill can be found, whatever the method."""
    assert {backend.ask(method, f"/drill{name}").status_code for method in ("GET", "POST")} == {404}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_it_finishes_what_it_has_begun(backend: "Server", sent: signal.Signals) -> None:
    """After SIGINT the request in hand is answered, new ones are refused, and the process ends with 0."""
    with socket.create_connection(("127.0.0.1", backend.port), timeout=10) as connection:
        head = "POST /api/lists HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 13\r\n"
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100")  # the request is in hand now
        backend.process.send_signal(sent)
        until(lambda: "finishing the requests in hand" in backend.printed())
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", backend.port), timeout=10)
        connection.sendall(b'{"name": "x"}')
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 201")
        assert b"Connection: close" in answer
    assert backend.process.wait(10) == 0
