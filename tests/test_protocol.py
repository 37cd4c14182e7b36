"""The wire format: what goes in comes out, at any split, within limits, and nothing else raises."""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrt.errors import ProtocolError
from asyncrt.worker.protocol import (
    BEFORE_AUTHENTICATION,
    HEAD,
    MORE,
    PIECE_BYTES,
    VERSION,
    Buffer,
    Decoder,
    Frame,
    Kind,
    Limits,
    Outbox,
    allocate_anonymous,
    encode_head,
)

Message = tuple[int, dict[str, Any], list[bytes]]
NUMBERS = {
    "version": 1,
    "kind": 1,
    "flags": 2,
    "stream": 4,
    "header_bytes": 4,
    "body_bytes": 8,
}

headers = st.dictionaries(
    st.text(max_size=8),
    st.one_of(st.integers(), st.text(max_size=8), st.none(), st.lists(st.integers(), max_size=3)),
    max_size=4,
)
kinds = st.integers(0, 255).filter(lambda kind: kind != Kind.PIECE)
messages = st.lists(
    st.tuples(kinds, headers, st.lists(st.binary(max_size=90), max_size=4)), max_size=8
)


def wire(messages: Sequence[Message], *, piece_bytes: int = PIECE_BYTES) -> bytes:
    """Return what an outbox writes for messages that are all there from the start."""
    outbox = Outbox(piece_bytes=piece_bytes)
    for message in messages:
        outbox.put(*message)
    return drain(outbox)


def drain(outbox: Outbox) -> bytes:
    taken = bytearray()
    while outbox:
        taken += b"".join(outbox.take())
    assert outbox.take() == []
    return bytes(taken)


def plain(frames: Sequence[Frame | Message]) -> list[tuple[int, str, bytes]]:
    """Return frames in a form, and an order, in which they can be compared."""
    found = []
    for kind, header, body in frames:
        whole = b"".join(body) if isinstance(body, list) else bytes(body)
        found.append((int(kind), json.dumps(header, sort_keys=True), whole))
    return sorted(found)


class Allocator:
    """Counts what a decoder makes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, size: int) -> Buffer:
        self.sizes.append(size)
        return bytearray(size)


def read_through_buffer(decoder: Decoder, data: bytes, sizes: Callable[[], int]) -> list[Frame]:
    """Do what a socket does: write somewhat into ``get_buffer`` and say how much."""
    frames: list[Frame] = []
    while data:
        target = decoder.get_buffer()
        assert len(target) > 0
        size = max(1, min(len(target), len(data), sizes()))
        target[:size] = data[:size]
        frames += decoder.received(size)
        data = data[size:]
    return frames


@given(messages, st.integers(1, 64), st.data())
def test_frames_come_out_as_they_went_in_at_any_split(
    sent: list[Message], piece_bytes: int, data: st.DataObject
) -> None:
    stream = wire(sent, piece_bytes=piece_bytes)
    decoder = Decoder(Limits())
    frames: list[Frame] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        frames += decoder.feed(stream[:size])
        stream = stream[size:]
    assert plain(frames) == plain(sent)


@given(messages, st.integers(1, 64), st.integers(32, 200), st.data())
def test_frames_come_out_as_they_went_in_through_a_buffer_of_any_size(
    sent: list[Message], piece_bytes: int, buffer_bytes: int, data: st.DataObject
) -> None:
    decoder = Decoder(Limits(), buffer_bytes=buffer_bytes)
    stream = wire(sent, piece_bytes=piece_bytes)
    frames = read_through_buffer(decoder, stream, lambda: data.draw(st.integers(1, 300)))
    assert plain(frames) == plain(sent)


@given(messages)
def test_small_frames_keep_their_order(sent: list[Message]) -> None:
    frames = Decoder(Limits()).feed(wire(sent))
    assert [(f.kind, f.header, bytes(f.body)) for f in frames] == [
        (kind, header, b"".join(body)) for kind, header, body in sent
    ]


def test_unknown_kinds_and_flags_pass_through() -> None:
    unknown = HEAD.pack(VERSION, 250, 0x8000, 9, 7, 2) + b'{"a":1}' + b"xy"
    (frame,) = Decoder(Limits()).feed(unknown)
    assert (frame.kind, frame.header, bytes(frame.body)) == (250, {"a": 1}, b"xy")


@pytest.mark.parametrize("size", [3, PIECE_BYTES, PIECE_BYTES + 1])
def test_a_body_of_any_size_is_writable_by_its_receiver(size: int) -> None:
    (frame,) = Decoder(Limits()).feed(wire([(Kind.CALLS, {}, [bytes(size)])]))
    memoryview(frame.body)[:1] = b"x"
    assert bytes(memoryview(frame.body)[:2]) == b"x\0"


# -- large bodies ---------------------------------------------------------------------------------


def test_a_small_frame_waits_for_no_more_than_one_piece() -> None:
    outbox = Outbox()
    large = bytes(5 * PIECE_BYTES)
    outbox.put(Kind.RESULT, {}, [large])
    first = b"".join(outbox.take()) + b"".join(outbox.take())
    assert len(first) < PIECE_BYTES + 3 * HEAD.size
    outbox.put(Kind.HEARTBEAT, {"time": 1})
    assert b"".join(outbox.take()) == encode_head(Kind.HEARTBEAT, {"time": 1}, 0)
    decoder = Decoder(Limits())
    frames = decoder.feed(first)
    frames += decoder.feed(encode_head(Kind.HEARTBEAT, {"time": 1}, 0))
    assert [frame.kind for frame in frames] == [Kind.HEARTBEAT]
    assert plain(decoder.feed(drain(outbox))) == [(Kind.RESULT, "{}", large)]


def test_large_bodies_take_turns() -> None:
    outbox = Outbox(piece_bytes=4)
    for number in range(3):
        outbox.put(Kind.RESULT, {"n": number}, [bytes([number]) * 12])
    streams = []
    while outbox:
        head = HEAD.unpack_from(b"".join(outbox.take()))
        if head[1] == Kind.PIECE:
            streams.append(head[3])
    assert streams == [1, 2, 3] * 3


def test_more_large_bodies_than_may_be_open_wait_for_their_turn() -> None:
    outbox = Outbox(piece_bytes=4, streams_at_once=2)
    for number in range(5):
        outbox.put(Kind.RESULT, {"n": number}, [bytes(9)])
    decoder = Decoder(Limits(open_streams=2))
    frames = decoder.feed(drain(outbox))
    assert sorted(frame.header["n"] for frame in frames) == [0, 1, 2, 3, 4]


def test_large_bodies_leave_in_views_of_the_object_itself() -> None:
    body = bytes(3 * PIECE_BYTES)
    outbox = Outbox()
    outbox.put(Kind.CALLS, {}, [b"head", body])
    views = []
    while outbox:
        views += [part for part in outbox.take() if isinstance(part, memoryview)]
    assert {id(view.obj) for view in views if len(view) > 4} == {id(body)}


def test_large_bodies_are_received_in_their_own_memory() -> None:
    decoder = Decoder(Limits())
    stream = wire([(Kind.CALLS, {}, [bytes(2 * PIECE_BYTES)])])
    start = 2 * HEAD.size
    assert decoder.feed(stream[: start + 100]) == []
    assert len(decoder.get_buffer()) == PIECE_BYTES - 100, "the socket reads into the body"
    (frame,) = decoder.feed(stream[start + 100 :])
    assert isinstance(frame.body, mmap.mmap)
    frame.body.close()  # raises if the decoder still held a view of it


def test_stream_numbers_start_again_after_the_last() -> None:
    outbox = Outbox(piece_bytes=1)
    outbox._next_stream = 0xFFFFFFFF
    for number in range(2):
        outbox.put(Kind.RESULT, {"n": number}, [b"ab"])
    stream = drain(outbox)
    assert len(Decoder(Limits()).feed(stream)) == 2
    assert HEAD.unpack_from(stream)[3] == 0xFFFFFFFF


# -- limits ---------------------------------------------------------------------------------------


def head(**fields: int) -> bytes:
    values = {"version": VERSION, "kind": 6, "flags": 0, "stream": 0, "header_bytes": 0}
    return HEAD.pack(*{**values, "body_bytes": 0, **fields}.values())


SMALL = Limits(header_bytes=100, body_bytes=1000, open_streams=2)
OPEN = head(flags=MORE, stream=1, body_bytes=10)
BROKEN = {
    "another version": head(version=VERSION + 1),
    "a long header": head(header_bytes=101),
    "a long header of an unknown kind": head(kind=200, header_bytes=101),
    "a long body in pieces": head(flags=MORE, stream=1, body_bytes=1001),
    "a long body in one": head(body_bytes=1001),
    "too many streams": b"".join(head(flags=MORE, stream=n, body_bytes=9) for n in (1, 2, 3)),
    "a stream opened twice": OPEN + OPEN,
    "a stream of nothing": head(flags=MORE, stream=1),
    "a piece of an unknown stream": head(kind=Kind.PIECE, stream=1, body_bytes=5),
    "a piece of nothing": OPEN + head(kind=Kind.PIECE, stream=1),
    "a piece with a header": OPEN
    + head(kind=Kind.PIECE, stream=1, header_bytes=2, body_bytes=5)
    + b"{}",
    "a piece past the end": OPEN + head(kind=Kind.PIECE, stream=1, body_bytes=11),
    "a header that is no JSON": head(header_bytes=3) + b"{a}",
    "a header that is no text": head(header_bytes=3) + b"\xff\xfe\xfd",
    "a header that is no object": head(header_bytes=3) + b"[1]",
    "a header that nests too deep": head(header_bytes=90_000) + b"[" * 90_000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_a_rule_is_a_protocol_error_before_it_is_allocated(name: str) -> None:
    allocator = Allocator()
    limits = SMALL._replace(header_bytes=90_000) if "deep" in name else SMALL
    decoder = Decoder(limits, allocate=allocator, buffer_bytes=64)
    with pytest.raises(ProtocolError):
        decoder.feed(BROKEN[name])
    assert sum(allocator.sizes) <= 20


def test_a_body_in_one_is_never_longer_than_a_piece() -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        Decoder(Limits()).feed(head(body_bytes=PIECE_BYTES + 1))
    assert Decoder(Limits()).feed(head(body_bytes=PIECE_BYTES)) == []


def test_a_piece_is_never_longer_than_a_piece() -> None:
    decoder = Decoder(Limits())
    decoder.feed(head(flags=MORE, stream=1, body_bytes=1 << 30))
    with pytest.raises(ProtocolError, match="unexpected piece"):
        decoder.feed(head(kind=Kind.PIECE, stream=1, body_bytes=PIECE_BYTES + 1))


def test_memory_that_cannot_be_had_is_a_protocol_error() -> None:
    def allocate(size: int) -> Buffer:
        raise OSError(12, "Cannot allocate memory")

    with pytest.raises(ProtocolError, match="memory"):
        Decoder(Limits(), allocate=allocate).feed(OPEN)


@pytest.mark.parametrize(
    "data",
    [head(header_bytes=4097), head(body_bytes=1), head(flags=MORE, stream=1, body_bytes=1)],
    ids=["a long header", "a body", "a body in pieces"],
)
def test_before_the_challenge_is_met_only_small_frames_pass(data: bytes) -> None:
    allocator = Allocator()
    with pytest.raises(ProtocolError):
        Decoder(BEFORE_AUTHENTICATION, allocate=allocator).feed(data)
    assert allocator.sizes == []


def test_anonymous_memory_costs_nothing_until_it_is_written() -> None:
    with allocate_anonymous(1 << 30) as memory:
        assert len(memory) == 1 << 30
        assert memory[-1] == 0


# -- fuzz -----------------------------------------------------------------------------------------

FUZZ_LIMITS = Limits(header_bytes=200, body_bytes=500, open_streams=3)


def fuzz(data: bytes, sizes: Callable[[], int]) -> None:
    allocator = Allocator()
    decoder = Decoder(FUZZ_LIMITS, allocate=allocator, buffer_bytes=64)
    frames: list[Frame] = []
    with contextlib.suppress(ProtocolError):
        frames = read_through_buffer(decoder, data, sizes)
    assert all(0 < size <= FUZZ_LIMITS.body_bytes for size in allocator.sizes)
    finished = sum(len(frame.body) > 0 for frame in frames)
    assert len(allocator.sizes) <= len(data) // HEAD.size + 1
    assert len(decoder._streams) <= FUZZ_LIMITS.open_streams
    assert len(decoder._buffer) <= HEAD.size * 2 + 200 + 500
    assert finished <= len(data) // HEAD.size


@given(st.binary(max_size=400), st.data())
def test_arbitrary_bytes_raise_nothing_but_a_protocol_error(
    data: bytes, draws: st.DataObject
) -> None:
    fuzz(data, lambda: draws.draw(st.integers(1, 100)))


plausible_heads = st.builds(
    head,
    version=st.sampled_from([VERSION, VERSION, VERSION, VERSION, 0]),
    kind=st.sampled_from([*Kind, 0, 255]),
    flags=st.sampled_from([0, MORE, MORE, 0xFFFF]),
    stream=st.integers(0, 4),
    header_bytes=st.sampled_from([0, 0, 2, 200, 201, 2**32 - 1]),
    body_bytes=st.sampled_from([0, 1, 8, 64, 500, 501, 2**63]),
)


@settings(max_examples=300)
@given(
    st.lists(st.one_of(plausible_heads, st.just(b"{}"), st.binary(max_size=70)), max_size=12),
    st.integers(1, 100),
)
def test_plausible_heads_in_any_order_raise_nothing_but_a_protocol_error(
    parts: list[bytes], size: int
) -> None:
    fuzz(b"".join(parts), lambda: size)


@settings(max_examples=300)
@given(messages, st.integers(1, 64), st.data())
def test_mutated_streams_raise_nothing_but_a_protocol_error(
    sent: list[Message], piece_bytes: int, data: st.DataObject
) -> None:
    stream = bytearray(wire(sent, piece_bytes=piece_bytes))
    for _ in range(data.draw(st.integers(1, 4)) if stream else 0):
        at = data.draw(st.integers(0, len(stream) - 1))
        stream[at] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(stream)))
    fuzz(bytes(stream[:end]), lambda: data.draw(st.integers(1, 200)))
