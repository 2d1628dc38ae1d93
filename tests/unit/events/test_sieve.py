"""The bytes of pub.sock to the wanted messages: however the stream is cut, whatever it holds."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.pm2.sieve import TOPIC_MAX, Sieve
from exporter.pm2.wire import MAX_ARGUMENTS, WireError, encode

WANTED = frozenset({"process:event", "log:PM2"})


def frame(topic: str, payload: bytes) -> bytes:
    """Make a message as PM2's bus sends it."""
    return encode(b"s:" + topic.encode(), b"j:" + payload)


MESSAGES = st.lists(
    st.tuples(st.sampled_from(["process:event", "log:PM2", "log:out", "axm:monitor"]), st.binary(max_size=60)), max_size=12
)


@given(MESSAGES, st.data())
def test_the_wanted_messages_come_out_however_the_stream_is_cut(
    messages: list[tuple[str, bytes]], data: st.DataObject
) -> None:
    """What comes out does not depend on how the bytes arrive, and every message is accounted for."""
    stream = b"".join(frame(topic, payload) for topic, payload in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    sieve = Sieve(WANTED, 40)
    found = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += sieve.feed(stream[begin:end])
    fits = [(topic, payload) for topic, payload in messages if topic in WANTED and len(payload) + 2 <= 40]
    assert found == fits
    assert sieve.received == len(messages)
    assert sieve.received == len(found) + sieve.unwanted + sieve.oversized + sieve.malformed
    assert sieve.unwanted == sum(topic not in WANTED for topic, _ in messages)


@given(st.lists(st.lists(st.binary(max_size=10), max_size=MAX_ARGUMENTS), max_size=5))
def test_messages_of_any_shape_are_passed_over(shapes: list[list[bytes]]) -> None:
    """No arguments, many, empty ones: the next message is found all the same."""
    sieve = Sieve(WANTED, 100)
    stream = b"".join(encode(*shape) for shape in shapes) + frame("log:PM2", b"1")
    assert list(sieve.feed(stream))[-1] == ("log:PM2", b"1")
    assert sieve.received == len(shapes) + 1


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_waited_for(stream: bytes) -> None:
    """Nothing but WireError is ever raised."""
    sieve = Sieve(WANTED, 100)
    try:
        for _ in sieve.feed(stream):
            pass
    except WireError:
        assert any(byte >> 4 != 1 for byte in stream)


def test_an_oversized_message_is_skipped_without_being_held() -> None:
    """A message of 64 MiB costs no memory, and the next one is heard."""
    sieve = Sieve(WANTED, 1024)
    size, chunk = 64 * 1024 * 1024, b"x" * 65536
    head = encode(b"s:log:PM2", b"")[:-4].replace(b"\x11", b"\x12")
    tracemalloc.start()
    try:
        assert list(sieve.feed(b"\x12" + head[1:] + size.to_bytes(4, "big"))) == []
        for _ in range(size // len(chunk)):
            assert list(sieve.feed(chunk)) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000
    assert sieve.oversized == 1
    assert list(sieve.feed(frame("log:PM2", b"{}"))) == [("log:PM2", b"{}")]


def test_a_topic_longer_than_any_of_pm2s_is_not_held() -> None:
    """The topic is bounded too."""
    sieve = Sieve(WANTED, 1024)
    assert list(sieve.feed(frame("t" * 10 * TOPIC_MAX, b"{}"))) == []
    assert sieve.unwanted == 1


def test_starting_anew_forgets_half_a_message_and_keeps_the_counts() -> None:
    """A new connection begins with the first byte of a message."""
    sieve = Sieve(WANTED, 1024)
    list(sieve.feed(frame("log:PM2", b"{}") + frame("log:PM2", b"{}")[:9]))
    sieve.start_anew()
    assert list(sieve.feed(frame("log:PM2", b"[]"))) == [("log:PM2", b"[]")]
    assert sieve.received == 2


@pytest.mark.parametrize("payload", [encode(b"s:log:PM2"), encode(b"s:log:PM2", b"s:text"), encode(b"s:log:PM2", b"")])
def test_a_wanted_topic_without_json_is_malformed(payload: bytes) -> None:
    """PM2 sends JSON on each topic that is wanted; anything else is counted."""
    sieve = Sieve(WANTED, 1024)
    assert list(sieve.feed(payload)) == []
    assert sieve.malformed == 1
