"""A slot, as the parent sees it, at the moments that a real process gives by chance only."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from asyncrt.worker.channel import Channel
from asyncrt.worker.protocol import Buffer, Kind
from asyncrt.worker.records import RECORD, Outcome
from asyncrt.worker.slot import BOARD_START, Chunk, Slot, explain_exit
from asyncrt.worker.tokens import take


class Desk:
    """A slot whose server and child are played by the test."""

    def __init__(self) -> None:
        self.delivered: list[tuple[int, int, list[int]]] = []
        self.revoked: list[tuple[int, int]] = []
        self.logs: list[tuple[int, str, bytes]] = []
        self.slot = Slot(0, deliver=self._deliver, give_back=self._give_back, log=self._log)
        server, self._server = socket.socketpair()
        self.server = Channel(server)
        self.slot.spawn(self.server)
        received = Channel(self._server).receive()
        assert received is not None
        ((_, (control, self.tokens, board, self.out, self.err)),) = received
        os.close(board)
        self.child = Channel(socket.socket(fileno=control))

    def _deliver(
        self, chunk: Chunk, first: int, count: int, records: Sequence[Buffer], done: bool
    ) -> None:
        body = b"".join(records)
        outcomes = []
        while body:
            _, _, size, outcome = RECORD.unpack_from(body)
            outcomes.append(outcome)
            body = body[RECORD.size + size :]
        self.delivered.append((first, count, outcomes))

    def _give_back(self, chunk: Chunk, first: int, count: int) -> None:
        self.revoked.append((first, count))

    def _log(self, chunk: Chunk | None, index: int, name: str, text: bytes) -> None:
        self.logs.append((index, name, text))

    def begin(self, count: int) -> Chunk:
        header = {"chunk": 1, "run": "r", "function": "f", "count": count, "indexes": 0}
        chunk = Chunk({**header, "attempt": 1, "style": "one"}, b"")
        self.slot.begin(chunk, b"packed", now=0.0)
        return chunk

    def write_board(self, count: int) -> None:
        """Write outcomes as a child does that has not sent them."""
        records = RECORD.pack(1.0, 2.0, 1, Outcome.SUCCESS) + b"x"
        self.slot.board[BOARD_START : BOARD_START + count * len(records)] = records * count
        self.slot.board[8:16] = count.to_bytes(8, "little")

    def send_board(self, first: int, count: int, **header: Any) -> None:
        records = (RECORD.pack(1.0, 2.0, 1, Outcome.SUCCESS) + b"x") * count
        self.child.send(Kind.RESULT, {"first": first, "count": count, **header}, [records])

    def die(self) -> None:
        self.child.close()
        self.slot.on_exit(-9, lambda code: explain_exit(code, b""))

    def close(self) -> None:
        self.slot.close()
        self.child.close()
        self.server.close()
        self._server.close()
        for fd in (self.tokens, self.out, self.err):
            os.close(fd)


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.close()


def test_all_calls_are_given_back_if_the_child_was_dead_when_it_was_given_them(desk: Desk) -> None:
    desk.child.close()
    with pytest.raises(OSError, match="pipe"):
        desk.begin(5)
    desk.slot.on_exit(-9, lambda code: explain_exit(code, b""))
    assert desk.revoked == [(0, 5)]
    assert sum(count for _, count, _ in desk.delivered) == 0


def test_the_outcomes_on_the_board_of_a_dead_child_are_kept(desk: Desk) -> None:
    desk.begin(5)
    for _ in range(3):
        take(desk.tokens)
    desk.write_board(2)
    desk.die()
    assert desk.delivered == [(0, 3, [Outcome.SUCCESS, Outcome.SUCCESS, Outcome.FAILED])]
    assert desk.revoked == [(3, 2)]


def test_a_child_that_dies_between_sending_its_board_and_clearing_it_is_not_counted_twice(
    desk: Desk,
) -> None:
    desk.begin(5)
    for _ in range(3):
        take(desk.tokens)
    desk.write_board(3)
    desk.send_board(0, 3)
    desk.die()
    assert desk.delivered[0] == (0, 3, [Outcome.SUCCESS] * 3)
    assert sum(count for _, count, _ in desk.delivered) == 3
    assert desk.revoked == [(3, 2)]


def test_what_was_read_from_the_board_is_not_delivered_again_when_it_is_sent(desk: Desk) -> None:
    desk.begin(4)
    for _ in range(3):
        take(desk.tokens)
    desk.write_board(2)
    desk.slot.read_board()
    desk.send_board(0, 3)
    desk.slot.receive()
    assert desk.delivered == [(0, 2, [Outcome.SUCCESS] * 2), (2, 1, [Outcome.SUCCESS])]


def test_a_board_is_not_read_while_the_child_goes_on(desk: Desk) -> None:
    desk.begin(4)
    take(desk.tokens)
    take(desk.tokens)
    desk.write_board(1)
    left = desk.slot.tokens.left
    seen = iter([left(), left() - 1])
    desk.slot.tokens.left = lambda: next(seen)  # type: ignore[method-assign]
    desk.slot.read_board()
    assert desk.delivered == []


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_mark_that_is_cut_in_two_by_a_read_still_tells_calls_apart(desk: Desk, cut: int) -> None:
    mark = f"\0{desk.slot.mark}".encode()
    text = mark + b"7\0first" + mark + b"8\0second"
    os.write(desk.out, text[:cut])
    desk.slot.read_logs()
    os.write(desk.out, text[cut:])
    desk.slot.read_logs()
    found = dict.fromkeys((7, 8), b"")
    for index, name, part in desk.logs:
        assert name == "out"
        found[index] += part
    assert found == {7: b"first", 8: b"second"}


def test_text_that_only_looks_like_the_beginning_of_a_mark_is_text(desk: Desk) -> None:
    os.write(desk.out, b"a\0")
    desk.slot.read_logs()
    os.write(desk.out, b"b\0")
    desk.slot.read_logs()
    os.close(desk.out)
    desk.out = os.dup(desk.err)
    assert desk.slot.read_log(desk.slot.out, "out") is None
    assert b"".join(text for _, _, text in desk.logs) == b"a\0b\0"


def test_the_marks_of_one_stream_do_not_count_for_the_other(desk: Desk) -> None:
    mark = f"\0{desk.slot.mark}".encode()
    os.write(desk.out, mark + b"1\0out")
    os.write(desk.err, mark + b"0\0err")
    desk.slot.read_logs()
    os.write(desk.out, b" goes on")
    desk.slot.read_logs()
    assert desk.logs == [(1, "out", b"out"), (0, "err", b"err"), (1, "out", b" goes on")]


def test_an_exit_is_explained_by_signal_or_code() -> None:
    assert "SIGSEGV" in explain_exit(-signal.SIGSEGV, b"").message
    assert explain_exit(-signal.SIGSEGV, b"").facts["signal"] == signal.SIGSEGV
    assert "signal 250" in explain_exit(-250, b"").message
    assert explain_exit(3, b"last\xff").facts == {"exit_code": 3, "log_tail": "last\ufffd"}
