"""Frames, descriptors and shared memory between the worker's own processes."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from asyncrt.worker.channel import INLINE_BYTES, Channel, SharedMemory, close_descriptors, share
from asyncrt.worker.protocol import Frame, Kind

Received = list[tuple[Frame, list[int]]]


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    before = open_descriptors()
    ends = tuple(Channel(sock) for sock in socket.socketpair())
    yield ends[0], ends[1]
    for end in ends:
        end.close()
    assert open_descriptors() == before, "descriptors are left"


def open_descriptors() -> set[str]:
    return {name for name in os.listdir("/dev/fd") if os.path.exists(f"/dev/fd/{name}")}


def received_by(channel: Channel) -> Received:
    found = channel.receive()
    assert found is not None
    return found


def test_a_small_frame_arrives_whole(channels: tuple[Channel, Channel]) -> None:
    here, there = channels
    assert here.send(Kind.CALLS, {"chunk": 1, "indexes": [3, 4]}, [b"ab", memoryview(b"cd")])
    ((frame, descriptors),) = received_by(there)
    assert (frame.kind, frame.header["indexes"], bytes(frame.body)) == (Kind.CALLS, [3, 4], b"abcd")
    assert descriptors == []


def test_descriptors_arrive_with_their_frame_and_are_not_inherited_further(
    channels: tuple[Channel, Channel],
) -> None:
    here, there = channels
    reading, writing = os.pipe()
    here.send(Kind.HEARTBEAT, {})
    here.send(Kind.SPAWN, {"child": [0, 1]}, fds=[reading, writing])
    close_descriptors([reading, writing])
    here.send(Kind.KILL, {})
    got: Received = []
    while len(got) < 3:
        got += received_by(there)
    assert [len(descriptors) for _, descriptors in got] == [0, 2, 0]
    reading, writing = got[1][1]
    assert not os.get_inheritable(reading)
    os.write(writing, b"through")
    assert os.read(reading, 10) == b"through"
    close_descriptors([reading, writing])


def test_a_large_body_lies_in_shared_memory_that_both_sides_see(
    channels: tuple[Channel, Channel],
) -> None:
    here, there = channels
    memory = share([b"a" * 10, bytes(INLINE_BYTES)], INLINE_BYTES + 10)
    here.send(Kind.RESULT, {"first": 0}, [memory])
    ((frame, _),) = received_by(there)
    assert isinstance(frame.body, SharedMemory)
    assert frame.body[:11] == b"a" * 10 + b"\0"
    memory[0:1] = b"z"
    assert frame.body[0:1] == b"z", "it was copied"
    del frame


def test_a_large_body_of_ordinary_segments_is_copied_once_and_arrives(
    channels: tuple[Channel, Channel],
) -> None:
    here, there = channels
    body = [os.urandom(INLINE_BYTES), b"", b"tail"]
    here.send(Kind.CALLS, {"chunk": 5}, body)
    ((frame, descriptors),) = received_by(there)
    assert bytes(memoryview(frame.body)) == b"".join(body)
    assert frame.header["chunk"] == 5
    assert descriptors == []
    del frame


def test_shared_memory_and_other_descriptors_travel_together(
    channels: tuple[Channel, Channel],
) -> None:
    here, there = channels
    reading, writing = os.pipe()
    here.send(Kind.TEMPLATE, {}, [bytes(INLINE_BYTES + 1)], [writing])
    close_descriptors([writing])
    ((frame, (writing,)),) = received_by(there)
    assert len(frame.body) == INLINE_BYTES + 1
    os.write(writing, b"x")
    assert os.read(reading, 1) == b"x"
    close_descriptors([reading, writing])
    del frame


def test_what_a_full_socket_does_not_take_is_written_later(
    channels: tuple[Channel, Channel],
) -> None:
    here, there = channels
    here.socket.setblocking(False)
    bodies = [os.urandom(INLINE_BYTES - number) for number in range(30)]
    reading, writing = os.pipe()
    for number, body in enumerate(bodies):
        here.send(Kind.RESULT, {"n": number}, [body], [writing] if number % 7 == 0 else [])
    assert not here.flush()
    assert here.unsent is True
    got: Received = []
    while len(got) < len(bodies):
        got += received_by(there)
        here.flush()
    assert here.flush()
    assert [frame.header["n"] for frame, _ in got] == list(range(30))
    assert [bytes(frame.body) for frame, _ in got] == bodies
    assert [len(fds) for _, fds in got] == [int(number % 7 == 0) for number in range(30)]
    close_descriptors([reading, writing, *(fd for _, fds in got for fd in fds)])


def test_a_blocking_sender_waits_for_a_slow_reader(channels: tuple[Channel, Channel]) -> None:
    here, there = channels
    sent: list[bool] = []
    sender = threading.Thread(
        target=lambda: sent.extend(
            here.send(Kind.RESULT, {"n": n}, [bytes(INLINE_BYTES)]) for n in range(20)
        )
    )
    sender.start()
    got: Received = []
    while len(got) < 20:
        got += received_by(there)
    sender.join()
    assert sent == [True] * 20


def test_the_end_is_told_apart_from_nothing_there(channels: tuple[Channel, Channel]) -> None:
    here, there = channels
    there.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        there.receive()
    here.close()
    assert there.receive() is None
    with pytest.raises(OSError, match="pipe"):
        there.send(Kind.RESULT, {})


def test_a_reset_is_the_end(channels: tuple[Channel, Channel]) -> None:
    here, there = channels
    there.send(Kind.HEARTBEAT, {})
    here.close()  # with unread data: a reset
    assert there.receive() is None


def test_descriptors_that_nobody_took_are_closed_with_the_channel(
    channels: tuple[Channel, Channel],
) -> None:
    here, there = channels
    reading, writing = os.pipe()
    packed_head = b"\x01"  # the beginning of a frame that never ends
    socket.send_fds(here.socket, [packed_head], [writing])
    close_descriptors([writing])
    assert received_by(there) == []
    there.close()
    assert os.read(reading, 1) == b"", "somebody holds the writing end still"
    close_descriptors([reading])


def test_shared_memory_closes_its_descriptor_with_its_last_user() -> None:
    before = open_descriptors()
    memory = SharedMemory(4096)
    again = SharedMemory(4096, os.dup(memory.fd))
    memory[:3] = b"abc"
    del memory
    assert again[:3] == b"abc"
    del again
    assert open_descriptors() == before


def test_shared_memory_is_zeroed_and_private_to_those_who_got_it() -> None:
    memory = SharedMemory(100)
    assert bytes(memory) == bytes(100)
    assert not os.get_inheritable(memory.fd)


def test_shared_memory_without_memfd_is_an_unlinked_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    memory = SharedMemory(100)
    memory[:1] = b"x"
    assert os.fstat(memory.fd).st_nlink == 0
    assert SharedMemory(100, os.dup(memory.fd))[:1] == b"x"


def test_closing_descriptors_goes_on_after_one_that_is_closed_already() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    close_descriptors([reading, writing])
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(writing)


def test_segments_of_any_shape_are_shared_flat() -> None:
    import array

    numbers: Any = memoryview(array.array("i", [1, 2, 3]))
    memory = share([b"", numbers, bytearray(b"x")], 13)
    assert bytes(memory) == numbers.tobytes() + b"x"
    with contextlib.suppress(BufferError):
        memory.close()
