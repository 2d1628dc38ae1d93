"""The wire format: bytes to messages and back."""

import contextlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.pm2 import wire

if TYPE_CHECKING:
    from collections.abc import Sequence

arguments = st.lists(st.binary(max_size=300), max_size=wire.MAX_ARGUMENTS)


@given(messages=st.lists(arguments, max_size=6), cuts=st.lists(st.integers(1, 700), max_size=20))
def test_messages_survive_any_cut(messages: "Sequence[Sequence[bytes]]", cuts: "Sequence[int]") -> None:
    """What is encoded comes back whole and in order, however the stream is cut."""
    stream = b"".join([wire.encode(*message) for message in messages])
    decoder, found, at = wire.Decoder(10_000), [], 0
    for cut in [*cuts, len(stream)]:
        found += decoder.feed(stream[at : at + cut])
        at += cut
    assert found == [tuple(message) for message in messages]
    assert decoder.pending == 0


@given(data=st.binary(max_size=400))
def test_any_bytes_are_messages_or_an_error(data: bytes) -> None:
    """Arbitrary bytes give messages, a wait for more, or WireError, and nothing else."""
    with contextlib.suppress(wire.WireError):
        list(wire.Decoder(200).feed(data))


def test_too_large_is_said_before_it_is_read() -> None:
    """The announced length is enough to refuse a message: none of it is waited for."""
    with pytest.raises(wire.TooLargeError, match="larger than 1000"):
        list(wire.Decoder(1000).feed(b"\x11\x7f\xff\xff\xff"))


def test_the_limit_holds_for_the_sum_of_the_arguments() -> None:
    """Many small arguments cannot add up to more than the limit."""
    with pytest.raises(wire.TooLargeError):
        list(wire.Decoder(100).feed(wire.encode(b"x" * 60, b"x" * 60)))


def test_another_protocol_is_told_apart() -> None:
    """An HTTP answer is no AMP, and is not taken for a large message."""
    with pytest.raises(wire.WireError, match="0x48") as caught:
        list(wire.Decoder(100).feed(b"HTTP/1.1 200 OK\r\n"))
    assert not isinstance(caught.value, wire.TooLargeError)


def test_sixteen_arguments_are_refused() -> None:
    """The count of arguments has four bits."""
    with pytest.raises(wire.WireError, match="at most 15"):
        wire.encode(*[b""] * 16)


def test_arguments_carry_their_prefix() -> None:
    """JSON and text are told apart by a prefix, as in PM2's own frames."""
    message = wire.encode(wire.json_argument({"a": 1}), wire.text_argument("é"))
    assert message == b'\x12\x00\x00\x00\x09j:{"a":1}\x00\x00\x00\x04s:\xc3\xa9'
