"""The subscription: always drained, gone before it is a burden, back by itself; on real sockets, with a stand-in daemon."""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from exporter.pm2.events import WANTED
from exporter.pm2.subscriber import Down, Patience, Subscriber
from exporter.pm2.wire import encode

if TYPE_CHECKING:
    from tests.unit.events.conftest import Bus

QUICK = Patience(min_backoff=0.01, max_backoff=0.05)


def open_files() -> int:
    """Return how many descriptors are open."""
    return len(list(Path("/proc/self/fd").iterdir()))


class Ear:
    """A subscriber and what it heard."""

    def __init__(self, path: Path, patience: Patience = QUICK) -> None:
        self.heard: list[dict[str, Any]] = []
        self.began = 0
        self.subscriber = Subscriber(path, wanted=WANTED, began=self.begin, hear=self.hear, patience=patience)

    def begin(self) -> None:
        """Note a new connection."""
        self.began += 1

    def hear(self, _: str, payload: bytes) -> float:
        """Keep a message."""
        self.heard.append(json.loads(payload))
        return float(self.heard[-1].get("at", 0)) / 1000

    def is_connected(self) -> bool:
        """Tell whether the subscription stands."""
        return self.subscriber.down is None

    async def run(self) -> None:
        """Subscribe, until cancelled."""
        await self.subscriber.run()


async def test_what_is_wanted_is_heard_and_the_rest_is_counted(bus: "Bus", running: Callable, eventually: Callable) -> None:
    """Wanted messages arrive in order; the apps' output is passed over."""
    ear = Ear(bus.path)
    async with running(ear):
        await eventually(lambda: bus.writers)
        for number in range(100):
            bus.send("log:out", {"data": "x" * 10_000})
            bus.exit(number)
        await eventually(lambda: len(ear.heard) == 100)
    assert [heard["process"]["pm_uptime"] for heard in ear.heard] == list(range(100))
    assert (ear.subscriber.sieve.received, ear.subscriber.sieve.unwanted) == (200, 100)


async def test_it_comes_back_after_each_kind_of_end(bus: "Bus", running: Callable, eventually: Callable) -> None:
    """A hang-up, a crash and a new daemon at the same path are each survived, and each new connection is announced."""
    ear = Ear(bus.path)
    async with running(ear):
        await eventually(lambda: bus.writers)
        bus.hang_up()
        await eventually(lambda: ear.subscriber.connections == 2 and bus.writers)
        bus.close(unlink=False)
        await eventually(lambda: ear.subscriber.down is Down.REFUSED)
        bus.path.unlink()
        await eventually(lambda: ear.subscriber.down is Down.NO_SOCKET)
        await bus.open()
        await eventually(lambda: bus.writers)
        bus.exit(1)
        await eventually(lambda: ear.heard)
    assert ear.subscriber.ended == {Down.CLOSED: 2}
    assert ear.began == ear.subscriber.connections == 3


async def test_a_half_heard_message_does_not_spoil_the_next_connection(
    bus: "Bus", running: Callable, eventually: Callable
) -> None:
    """What a daemon did not finish is forgotten with its connection."""
    ear = Ear(bus.path)
    async with running(ear):
        await eventually(lambda: bus.writers)
        bus.send_raw(encode(b"s:process:event", b"j:{}")[:-3])
        await asyncio.sleep(0)
        bus.hang_up()
        await eventually(lambda: bus.writers)
        bus.exit(1)
        await eventually(lambda: ear.heard)
    assert ear.subscriber.ended == {Down.CLOSED: 1}


async def test_nonsense_is_hung_up_on(bus: "Bus", running: Callable, eventually: Callable) -> None:
    """Whoever does not speak PM2's protocol is left alone, for a while."""
    ear = Ear(bus.path)
    async with running(ear):
        await eventually(lambda: bus.writers)
        bus.send_raw(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await eventually(lambda: ear.subscriber.ended[Down.NONSENSE] == 1)
        await eventually(ear.is_connected)


async def test_a_socket_that_was_replaced_is_followed(bus: "Bus", running: Callable, eventually: Callable) -> None:
    """A new daemon's socket is found although the old daemon never hangs up."""
    ear = Ear(bus.path, Patience(min_backoff=0.01, max_backoff=0.05, glance=0.05))
    async with running(ear):
        await eventually(lambda: bus.writers)
        old, bus.writers = list(bus.writers), []
        await bus.open()
        await eventually(lambda: bus.writers)
        assert ear.subscriber.ended == {Down.REPLACED: 1}
        for writer in old:
            writer.close()


async def test_a_held_up_reader_hangs_up_on_a_backlog(home: Path, running: Callable, eventually: Callable) -> None:
    """After a stall, a full socket is not drained but left, so that the daemon can drop what it kept."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(home / "pub.sock"))
    listener.listen()
    listener.settimeout(0)
    ear = Ear(home / "pub.sock", Patience(min_backoff=0.01, max_backoff=0.05, max_lag=0.6))
    async with running(ear):
        await eventually(ear.is_connected)
        daemon, _ = listener.accept()
        daemon.settimeout(0)
        frame = encode(b"s:log:out", b"j:" + b'"' + b"x" * 30_000 + b'"')
        with suppress(BlockingIOError):
            while True:
                daemon.send(frame)
        time.sleep(1.5)  # noqa: ASYNC251 -- the event loop that stands still is what is tested
        await eventually(lambda: ear.subscriber.ended[Down.BEHIND] == 1)
        await eventually(ear.is_connected)
        daemon.close()
    listener.close()


async def test_a_held_up_reader_without_a_backlog_misses_nothing(
    bus: "Bus", running: Callable, eventually: Callable
) -> None:
    """A stall during which little was said costs nothing."""
    ear = Ear(bus.path, Patience(min_backoff=0.01, max_backoff=0.05, max_lag=0.6))
    async with running(ear):
        await eventually(lambda: bus.writers)
        await eventually(ear.is_connected)
        bus.send("process:event", {"event": "exit", "process": {"name": "app", "pm_id": 0}})
        time.sleep(1.5)  # noqa: ASYNC251 -- the event loop that stands still is what is tested
        await eventually(lambda: ear.heard)
    assert not ear.subscriber.ended


async def test_a_reader_that_lags_behind_the_daemon_hangs_up(bus: "Bus", running: Callable, eventually: Callable) -> None:
    """What arrives ever later than it was said means that the daemon keeps ever more."""
    ear = Ear(bus.path)
    async with running(ear):
        await eventually(lambda: bus.writers)
        bus.exit(1)
        await eventually(lambda: ear.heard)
        bus.exit(2, at=time.time() - 60)
        await eventually(lambda: ear.subscriber.ended[Down.BEHIND] == 1)


async def test_a_daemon_with_another_clock_is_heard(bus: "Bus", running: Callable, eventually: Callable) -> None:
    """A constant difference between the clocks is no lag."""
    ear = Ear(bus.path)
    async with running(ear):
        await eventually(lambda: bus.writers)
        for number in range(10):
            bus.exit(number, at=time.time() - 86_400)
        await eventually(lambda: len(ear.heard) == 10)
    assert not ear.subscriber.ended


@pytest.mark.parametrize(
    ("name", "down"), [("missing/pub.sock", Down.NO_SOCKET), ("x" * 200, Down.UNREACHABLE), ("file", Down.REFUSED)]
)
async def test_what_is_no_socket_is_said(
    home: Path, running: Callable, eventually: Callable, name: str, down: Down
) -> None:
    """Each reason why nobody can be heard is told apart."""
    (home / "file").touch()
    if name.startswith("x"):
        (home / name).touch()
    ear = Ear(home / name)
    async with running(ear):
        await eventually(lambda: ear.subscriber.down is down)
    assert ear.subscriber.connections == 0


async def test_a_daemon_that_accepts_nobody_is_no_connection(home: Path, running: Callable, eventually: Callable) -> None:
    """Where as many wait already as the kernel keeps, that is said; it is no connection, and no end of one."""
    path = home / "pub.sock"
    ear = Ear(path)
    with socket.socket(socket.AF_UNIX) as frozen, socket.socket(socket.AF_UNIX) as waiting:
        frozen.bind(str(path))
        frozen.listen(0)
        waiting.connect(str(path))
        before = open_files()
        async with running(ear):
            await eventually(lambda: ear.subscriber.down is Down.TIMEOUT)
            await asyncio.sleep(0.1)
            assert open_files() == before
    assert (ear.began, ear.subscriber.connections, ear.subscriber.ended) == (0, 0, {})


async def test_an_end_by_cancelling_leaves_nothing_open(bus: "Bus", running: Callable, eventually: Callable) -> None:
    """After the end there is no connection, no timer and no task."""
    before = open_files()
    ear = Ear(bus.path)
    async with running(ear):
        await eventually(lambda: bus.writers)
        await eventually(ear.is_connected)
    bus.hang_up()
    await eventually(lambda: open_files() <= before)
    assert ear.subscriber.down is Down.NOT_STARTED
    assert len(asyncio.all_tasks()) == 1


async def test_backing_off_is_bounded(home: Path, running: Callable, eventually: Callable) -> None:
    """Attempts go on for ever, with pauses that grow to their limit and no further."""
    ear = Ear(home / "pub.sock", Patience(min_backoff=0.001, max_backoff=0.01))
    async with running(ear):
        await eventually(lambda: ear.subscriber.down is Down.NO_SOCKET)
        made = asyncio.Event()

        async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            made.set()
            writer.close()

        server = await asyncio.start_unix_server(accept, home / "pub.sock")
        await asyncio.wait_for(made.wait(), 10)
        await eventually(lambda: ear.subscriber.ended[Down.CLOSED] > 5)
        server.close()
