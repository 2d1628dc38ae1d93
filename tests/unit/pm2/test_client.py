"""Asking PM2's daemon: what goes wrong is told apart, in time, and asking together asks once."""

import asyncio
import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from exporter.pm2 import wire
from exporter.pm2.client import PM2Error, Reader, Reason, Shared
from exporter.pm2.process import Listing, Process

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.pm2.conftest import Serve

ROW = {"name": "web", "pm_id": 0, "pid": 7, "pm2_env": {"status": "online"}}
LIST = b"j:" + json.dumps({"args": [[ROW]]}, separators=(",", ":")).encode()
REPORT = b'j:{"args":[{"pm2_version":"7.0.4","node_version":"20.0.0","user":"deploy","started_at":1795503750206}]}'


async def requests(reader: asyncio.StreamReader, count: int = 2) -> list[tuple[bytes, ...]]:
    """Read that many calls."""
    decoder = wire.Decoder(100_000)
    found: list[tuple[bytes, ...]] = []
    while len(found) < count:
        data = await reader.read(65536)
        if not data:
            raise ConnectionResetError
        found += decoder.feed(data)
    return found


async def reason_of(home: Path, *, within: float = 5.0, max_reply: int = 1_000_000) -> Reason:
    """Return why the daemon of `home` could not be asked."""
    with pytest.raises(PM2Error) as caught:
        await Reader(home, max_reply=max_reply).listing(within)
    return caught.value.reason


async def test_answers_may_come_in_any_order(serve: "Serve") -> None:
    """Answers are matched by their id, cut as they may be, and the kernel says who gave them."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, second = await requests(reader)
        assert b"getMonitorData" in first[0]
        stream = wire.encode(REPORT, second[1]) + wire.encode(LIST, first[1])
        for at in range(0, len(stream), 7):
            writer.write(stream[at : at + 7])
            await writer.drain()

    async with serve(talk) as home:
        listing = await Reader(home).listing(5)
    assert [process.name for process in listing.processes] == ["web"]
    assert listing.daemon is not None
    assert (listing.daemon.pm2_version, listing.daemon.started_at) == ("7.0.4", 1795503750.206)
    assert (listing.daemon.pid, listing.daemon.uid) == (os.getpid(), os.getuid())


async def test_a_daemon_is_asked_about_itself_once(serve: "Serve") -> None:
    """While the kernel says that the same process answers, only its processes are asked for, and what it said holds."""
    asked: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = wire.Decoder(100_000)
        while data := await reader.read(65536):
            for request, identity in decoder.feed(data):
                asked.append(request)
                writer.write(wire.encode(LIST if b"getMonitorData" in request else REPORT, identity))

    async with serve(talk) as home:
        reader = Reader(home)
        daemons = [(await reader.listing(5)).daemon for _ in range(3)]
    assert [b"getReport" in request for request in asked] == [False, True, False, False]
    assert daemons == [daemons[0]] * 3
    assert daemons[0] is not None
    assert daemons[0].pm2_version == "7.0.4"


async def test_no_socket(homes: "Callable[[], Path]") -> None:
    """An empty home, and a home that is not there, have no socket."""
    home = homes()
    assert await reason_of(home) is Reason.NO_SOCKET
    assert await reason_of(home / "missing") is Reason.NO_SOCKET


async def test_a_stale_socket_is_a_crash(homes: "Callable[[], Path]") -> None:
    """A socket that nobody listens on was left by a daemon that crashed."""
    home = homes()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(home / "rpc.sock"))
    assert await reason_of(home) is Reason.REFUSED


async def test_a_path_too_long_is_said(tmp_path: Path) -> None:
    """A home whose socket's path the kernel cannot take is an error of its own, and says why."""
    home = tmp_path / ("x" * 120)
    assert await reason_of(home) is Reason.UNREACHABLE


async def test_silence_is_a_timeout(serve: "Serve") -> None:
    """A daemon that accepts and says nothing costs no more than the time given."""

    async def talk(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await requests(reader)
        await reader.read()

    async with serve(talk) as home:
        assert await reason_of(home, within=0.05) is Reason.TIMEOUT


async def test_a_full_backlog_is_a_timeout(homes: "Callable[[], Path]") -> None:
    """A daemon frozen for so long that the kernel queues no more connections is frozen, not gone."""
    home = homes()
    with socket.socket(socket.AF_UNIX) as frozen:
        frozen.bind(str(home / "rpc.sock"))
        frozen.listen(0)
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(str(home / "rpc.sock"))
            assert await reason_of(home, within=0.05) is Reason.TIMEOUT


@pytest.mark.parametrize("sent", [b"", LIST[:20]], ids=["nothing", "half-an-answer"])
async def test_hanging_up_is_told_apart(serve: "Serve", sent: bytes) -> None:
    """A daemon that ends before its answer is complete has hung up."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await requests(reader)
        writer.write(wire.encode(LIST, b"s:0")[: len(sent)])

    async with serve(talk) as home:
        assert await reason_of(home) is Reason.DISCONNECTED


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x00" * 50,
        wire.encode(),
        wire.encode(LIST),
        wire.encode(LIST, b"s:7"),
        wire.encode(b"s:hello", b"s:0"),
        wire.encode(LIST, b"s:0") * 2,
        wire.encode(b"j:[]", b"s:0") + wire.encode(REPORT, b"s:1"),
        wire.encode(b"j:{", b"s:0") + wire.encode(REPORT, b"s:1"),
    ],
    ids=["http", "zeros", "no-argument", "no-id", "foreign-id", "no-json", "repeated", "no-list", "half-json"],
)
async def test_nonsense_is_told_apart(serve: "Serve", said: bytes) -> None:
    """Whatever does not speak the protocol, or does not answer the question, is nonsense."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await requests(reader)
        writer.write(said)
        await reader.read()

    async with serve(talk) as home:
        assert await reason_of(home) is Reason.NONSENSE


@pytest.mark.parametrize("report", [b'j:{"error":"method does not exist"}', b'j:{"args":[[]]}', b"j:{"])
async def test_no_report_hides_no_process(serve: "Serve", report: bytes) -> None:
    """A daemon that cannot tell of itself is known by its pid alone, and its processes all the same."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await requests(reader)
        writer.write(wire.encode(LIST, b"s:0") + wire.encode(report, b"s:1"))
        await reader.read()

    async with serve(talk) as home:
        listing = await Reader(home).listing(5)
    assert [process.name for process in listing.processes] == ["web"]
    assert listing.daemon is not None
    assert (listing.daemon.pm2_version, listing.daemon.pid) == ("", os.getpid())


async def test_an_endless_answer_is_cut(serve: "Serve") -> None:
    """An answer that says it is larger than allowed is refused before it is read."""
    written = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await requests(reader)
        writer.write(b"\x12\x7f\xff\xff\xff")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()
            written += 65536

    async with serve(talk) as home:
        assert await reason_of(home, max_reply=10_000) is Reason.TOO_LARGE
    assert written < 10_000_000


async def test_a_rejected_call_is_told_apart(serve: "Serve") -> None:
    """A daemon that answers a reading call with an error is up, and does not do as PM2 does."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await requests(reader)
        writer.write(wire.encode(b'j:{"error":"no"}', b"s:0") + wire.encode(b'j:{"error":"no"}', b"s:1"))
        await reader.read()

    async with serve(talk) as home:
        with pytest.raises(PM2Error, match="^no$") as caught:
            await Reader(home).listing(5)
        assert caught.value.reason is Reason.REJECTED


async def test_no_descriptor_is_left(serve: "Serve") -> None:
    """However an attempt ends, its socket is closed."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await requests(reader)
        writer.write(b"HTTP")

    async with serve(talk) as home:
        await reason_of(home)
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 -- a count
        for _ in range(50):
            await reason_of(home)
        await asyncio.sleep(0)
        assert len(os.listdir("/proc/self/fd")) <= before + 2  # noqa: PTH208 -- the stand-in's own ends may still close


class Slow:
    """A source that answers when told to, and counts how often it was asked."""

    def __init__(self) -> None:
        """Answer nothing yet."""
        self.asked = 0
        self.cancelled = 0
        self.answer: asyncio.Future[Listing] = asyncio.get_running_loop().create_future()

    async def listing(self, within: float) -> Listing:
        """Wait for the answer, for at most `within` seconds."""
        self.asked += 1
        try:
            async with asyncio.timeout(within):
                return await asyncio.shield(self.answer)
        except TimeoutError:
            raise PM2Error(Reason.TIMEOUT, "late") from None
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


LISTING = Listing(processes=(Process(name="web", pm_id=0),))


async def turns() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_asking_together_asks_once() -> None:
    """Who asks while a question is under way gets its answer; who asks later asks anew."""
    source = Slow()
    shared = Shared(source)
    both = [asyncio.create_task(shared.listing(5)) for _ in range(2)]
    await turns()
    source.answer.set_result(LISTING)
    assert await asyncio.gather(*both) == [LISTING, LISTING]
    assert source.asked == 1
    await shared.listing(5)
    assert source.asked == 2


async def test_one_who_leaves_takes_nothing_from_the_others() -> None:
    """Cancelling one who waits, even the one who asked first, leaves the question under way for the others."""
    source = Slow()
    shared = Shared(source)
    first, second = [asyncio.create_task(shared.listing(5)) for _ in range(2)]
    await turns()
    first.cancel()
    await turns()
    source.answer.set_result(LISTING)
    assert await second == LISTING
    assert first.cancelled()
    assert (source.asked, source.cancelled) == (1, 0)


async def test_a_question_nobody_waits_for_is_given_up() -> None:
    """When all have left, the question is cancelled, and the next one asks anew."""
    source = Slow()
    shared = Shared(source)
    both = [asyncio.create_task(shared.listing(5)) for _ in range(2)]
    await turns()
    for task in both:
        task.cancel()
    third = asyncio.create_task(shared.listing(5))
    await turns()
    assert source.cancelled == 1
    source.answer.set_result(LISTING)
    assert await third == LISTING
    assert source.asked == 2


async def test_everybody_hears_of_a_failure() -> None:
    """A failure reaches all who wait, and is not remembered."""
    source = Slow()
    shared = Shared(source)
    both = [asyncio.create_task(shared.listing(5)) for _ in range(2)]
    await turns()
    source.answer.set_exception(PM2Error(Reason.REFUSED, "gone"))
    for task in both:
        with pytest.raises(PM2Error, match="gone"):
            await task
    source.answer = asyncio.get_running_loop().create_future()
    source.answer.set_result(LISTING)
    assert await shared.listing(5) == LISTING


async def test_each_has_its_own_deadline() -> None:
    """One who has less time than the one who asked leaves in its own time; one who has more asks again."""
    source = Slow()
    shared = Shared(source)
    patient = asyncio.create_task(shared.listing(5))
    await turns()
    with pytest.raises(PM2Error) as caught:
        await shared.listing(0.01)
    assert caught.value.reason is Reason.TIMEOUT
    assert not patient.done()
    source.answer.set_result(LISTING)
    assert await patient == LISTING

    source = Slow()
    shared = Shared(source)
    hasty = asyncio.create_task(shared.listing(0.01))
    patient = asyncio.create_task(shared.listing(5))
    with pytest.raises(PM2Error):
        await hasty
    await turns()
    source.answer.set_result(LISTING)
    assert await patient == LISTING
    assert source.asked == 2


async def test_nobody_waits_longer_than_the_source_may_take() -> None:
    """The longest time given to the source holds for everyone who asks, whatever time they have."""
    shared = Shared(Slow(), longest=0.01)
    for asked in await asyncio.gather(*(shared.listing(60) for _ in range(3)), return_exceptions=True):
        assert isinstance(asked, PM2Error)
        assert asked.reason is Reason.TIMEOUT
