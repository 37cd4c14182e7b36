"""The process that runs calls, in this process: what becomes of a call, whatever its code does."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import pytest
from raw_client import SECONDS, Report, pack_arguments, payload_of

from asyncrt.worker.channel import Channel, SharedMemory
from asyncrt.worker.child import BOARD_BYTES, Child
from asyncrt.worker.payload import decode
from asyncrt.worker.protocol import Kind
from asyncrt.worker.records import iterate_records, unpack_raised
from asyncrt.worker.tokens import Tokens

MIB = 1 << 20


class Harness:
    """A child on a thread of this process, and the parent's ends of what connects them."""

    def __init__(self) -> None:
        mine, its = socket.socketpair()
        mine.settimeout(SECONDS)
        self.channel = Channel(mine)
        self.tokens = Tokens()
        self.board = SharedMemory(BOARD_BYTES)
        its_board = SharedMemory(BOARD_BYTES, os.dup(self.board.fd))
        self._its = Channel(its)
        self.child = Child(self._its, self.tokens.child_fd, its_board)
        self._thread = threading.Thread(target=self.child.serve)
        self._thread.start()
        self.frames: list[dict[str, Any]] = []
        self.exceptions: dict[int, bytes] = {}

    def run(self, function: Any, *arguments: Any, packed: bool = False, **header: Any) -> Report:
        """Run a chunk.

        Args:
            packed: Whether the function is given as bytes already.
        """
        name = f"f{len(self.frames)}"
        body = [function] if packed else payload_of((function, {}))
        self.channel.send(Kind.FUNCTION, {"function": name, "forget": []}, body)
        return self.run_named(name, *arguments, **header)

    def run_named(self, name: str, *arguments: Any, **header: Any) -> Report:
        full = {
            "chunk": 1,
            "run": "r",
            "function": name,
            "count": len(arguments),
            "indexes": 0,
            "attempt": 1,
            "style": "one",
            **header,
        }
        self.tokens.offer(len(arguments))
        self.channel.send(Kind.CALLS, full, pack_arguments(arguments))
        return self.report(len(arguments))

    def report(self, count: int) -> Report:
        report = Report(count)
        while True:
            received = self.channel.receive()
            assert received is not None
            for frame, _ in received:
                self.frames.append(frame.header)
                self._take(report, frame.header, memoryview(frame.body))
                if frame.header.get("done"):
                    return report

    def _take(self, report: Report, header: dict[str, Any], body: memoryview) -> None:
        first, count = header["first"], header["count"]
        report.add(range(first, first + count), body, iterate_records(body, count))
        for position, record in enumerate(iterate_records(body, count), first):
            if position in report.raised:
                self.exceptions[position] = bytes(unpack_raised(body[record[3] : record[4]])[1])

    def exception(self, position: int = 0) -> Any:
        """Return the exception itself, as it was sent."""
        packed = memoryview(self.exceptions[position])
        return decode(packed, 0, len(packed))

    def close(self) -> None:
        self.channel.close()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "the child did not end when the parent hung up"
        self._its.close()
        self.tokens.close()


@pytest.fixture
def harness() -> Iterator[Harness]:
    made = Harness()
    yield made
    made.close()


def only_failure(harness: Harness, function: Any, argument: Any = None) -> dict[str, Any]:
    """Run one call that fails, and one after it that shows that the child goes on."""
    report = harness.run(function, argument)
    assert list(report.raised) == [0]
    assert harness.run(lambda x: x, 1).values == {0: 1}
    facts: dict[str, Any] = report.raised[0]
    return facts


# -- outcomes -------------------------------------------------------------------------------------


def test_values_of_all_sizes_arrive_in_order(harness: Harness) -> None:
    sizes = [0, 10, 70_000, 10, 3 * MIB, 10, *[60_000] * 20]
    report = harness.run(lambda size: bytes([size % 251]) * size, *sizes)
    assert report.values == {n: bytes([s % 251]) * s for n, s in enumerate(sizes)}
    firsts = [header["first"] for header in harness.frames]
    assert firsts == sorted(firsts)
    assert len(firsts) > 4, "large ones are not gathered on the board"


def test_a_coroutine_function_is_run_to_its_end(harness: Harness) -> None:
    async def double(x: int) -> int:
        import asyncio

        await asyncio.sleep(0)
        return 2 * x

    assert harness.run(double, 1, 2).values == {0: 2, 1: 4}


def test_an_exception_arrives_as_itself_with_its_text_and_the_users_frames(
    harness: Harness,
) -> None:
    def outer(x: Any) -> Any:
        return inner(x)

    def inner(x: Any) -> Any:
        raise LookupError("odd", x)

    facts = only_failure(harness, outer, 7)
    assert facts["type"] == "LookupError"
    assert facts["text"] == "('odd', 7)"
    assert "reason" not in facts
    assert "exit" not in facts
    frames = [line for line in facts["traceback"].splitlines() if line.startswith("  File")]
    assert [frame.split("in ")[-1] for frame in frames] == ["outer", "inner"]
    error = harness.exception()
    assert type(error) is LookupError
    assert error.args == ("odd", 7)
    assert error.__traceback__ is None


def test_the_cause_of_an_exception_is_in_its_traceback(harness: Harness) -> None:
    def fail(_: Any) -> None:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error

    facts = only_failure(harness, fail)
    assert "KeyError: 'first'" in facts["traceback"]
    assert "ValueError: second" in facts["traceback"]


@pytest.mark.parametrize("kind", ["generator", "async generator"])
def test_generators_are_refused_with_the_way_out(harness: Harness, kind: str) -> None:
    if kind == "generator":

        def function(_: Any) -> Any:
            yield 1
    else:

        async def function(_: Any) -> Any:
            yield 1

    facts = only_failure(harness, function)
    assert facts["type"] == "asyncrt.errors.SerializationError"
    assert "return a list" in facts["text"]


def test_a_result_that_cannot_be_pickled_is_told_with_its_type_and_the_reason(
    harness: Harness,
) -> None:
    facts = only_failure(harness, lambda _: [threading.Lock()])
    assert facts["type"] == "asyncrt.errors.SerializationError"
    assert "the call succeeded" in facts["text"]
    assert "list" in facts["text"]
    assert "lock" in facts["text"]


def test_a_result_that_only_cloudpickle_takes_arrives(harness: Harness) -> None:
    (made,) = harness.run(lambda x: lambda y: x + y, 3).values.values()
    assert made(4) == 7


class WithTwo(Exception):  # noqa: N818 - a user's name
    """The usual mistake: pickle calls it with one argument."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


class Renamed(Exception):  # noqa: N818 - a user's name
    def __reduce__(self) -> Any:
        return ValueError, ("another",)


class Silent(Exception):  # noqa: N818 - a user's name
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Leaving(Exception):  # noqa: N818 - a user's name
    def __str__(self) -> str:
        raise SystemExit(3)


class Hostile(Exception):  # noqa: N818 - a user's name
    def __reduce__(self) -> Any:
        raise Silent


class Exiting(Exception):  # noqa: N818 - a user's name
    def __reduce__(self) -> Any:
        raise SystemExit(3)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (WithTwo("a", "b"), "TypeError: "),
        (Renamed("x"), "pickle changes its type"),
        (Hostile("x"), "<str() raised RuntimeError>"),
        (Exiting("x"), "SystemExit: 3"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_exception_that_does_not_survive_pickle_arrives_as_text_with_the_reason(
    error: Exception, reason: str
) -> None:
    from asyncrt.worker.child import describe_error

    facts, pickled = unpack_raised(memoryview(describe_error(error)))
    assert facts["type"].endswith(type(error).__qualname__)
    assert facts["text"] == str(error)
    assert reason in facts["reason"]
    assert not pickled


def raising(error: Callable[[], BaseException]) -> Callable[[Any], None]:
    """Return a function that raises what is made in it."""

    def fail(_: Any) -> None:
        raise error()

    return fail


@pytest.mark.parametrize("error", [Silent, Leaving])
def test_an_exception_whose_text_fails_arrives_all_the_same(
    harness: Harness, error: type[Exception]
) -> None:
    facts = only_failure(harness, raising(error))
    assert facts["text"].startswith("<str() raised ")
    assert type(harness.exception()) is error


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_is_no_exception_is_told_as_an_exit(
    harness: Harness, error: type[BaseException]
) -> None:
    facts = only_failure(harness, raising(error))
    assert facts["exit"] is True
    assert facts["type"] == error.__name__


class BadResult:
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


@pytest.mark.parametrize("error", [Silent, SystemExit, ZeroDivisionError])
def test_whatever_the_reduction_of_a_result_raises_fails_that_call_only(
    harness: Harness, error: type[BaseException]
) -> None:
    facts = only_failure(harness, lambda _: BadResult(error))
    assert facts["type"] == "asyncrt.errors.SerializationError"
    assert error.__name__ in facts["text"]


# -- what cannot be loaded ------------------------------------------------------------------------


def explode(name: str) -> None:
    raise {"Silent": Silent, "SystemExit": SystemExit, "ImportError": ImportError}[name]


class Explosive:
    """Cannot be loaded."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        return explode, (self.name,)


@pytest.mark.parametrize("name", ["Silent", "SystemExit", "ImportError"])
def test_a_function_that_cannot_be_loaded_fails_each_call_with_the_reason(
    harness: Harness, name: str
) -> None:
    report = harness.run(Explosive(name), 1, 2)
    assert [report.raised[n]["type"] for n in (0, 1)] == ["asyncrt.errors.SerializationError"] * 2
    assert "the function cannot be loaded here" in report.raised[0]["text"]
    assert name in report.raised[0]["text"]
    assert harness.run(lambda x: x, 1).values == {0: 1}


def test_a_function_that_is_no_pickle_fails_its_calls(harness: Harness) -> None:
    report = harness.run(b"\x80nonsense", 1, packed=True)
    assert "cannot be loaded" in report.raised[0]["text"]


@pytest.mark.parametrize("name", ["Silent", "ImportError"])
def test_arguments_that_cannot_be_loaded_fail_their_call_only(harness: Harness, name: str) -> None:
    report = harness.run(lambda x: x, 1, Explosive(name), 3)
    assert report.values == {0: 1, 2: 3}
    assert "the arguments cannot be loaded here" in report.raised[1]["text"]
    assert name in report.raised[1]["text"]


def test_a_function_is_kept_until_it_is_forgotten(harness: Harness) -> None:
    harness.run(lambda x: x + 1, 1)
    assert harness.run_named("f0", 5).values == {0: 6}
    packed = b"".join(payload_of((lambda x: -x, {})))
    harness.channel.send(Kind.FUNCTION, {"function": "f0", "forget": ["f0"]}, [packed])
    assert harness.run_named("f0", 5).values == {0: -5}


def test_functions_that_were_loaded_before_are_used_as_they_are(harness: Harness) -> None:
    harness.child.preload({"ready": (lambda x, y: x + y, {"y": 10})})
    assert harness.run_named("ready", 5).values == {0: 15}


# -- chunks ---------------------------------------------------------------------------------------


def test_calls_that_were_taken_back_are_not_run(harness: Harness) -> None:
    began, go_on = threading.Event(), threading.Event()
    ran: list[int] = []

    def note(x: int) -> int:
        ran.append(x)
        began.set()
        go_on.wait()
        return x

    harness.child.preload({"note": (note, {})})
    harness.tokens.offer(3)
    body = pack_arguments([0, 1, 2])
    header = {"chunk": 1, "run": "r", "function": "note", "count": 3, "indexes": 0}
    harness.channel.send(Kind.CALLS, {**header, "attempt": 1, "style": "one"}, body)
    began.wait()
    assert harness.tokens.take_back() == 2
    go_on.set()
    assert harness.report(3).values == {0: 0}
    assert ran == [0]


def test_the_board_holds_what_was_not_sent(harness: Harness) -> None:
    count = []
    board = harness.board
    harness.child.preload({"look": (lambda _: count.append(bytes(board[8:16])), {})})
    harness.run_named("look", *range(3))
    assert [int.from_bytes(written, "little") for written in count] == [0, 1, 2]
    harness.channel.send(Kind.QUIT, {})
    harness._thread.join(SECONDS)
    assert bytes(board[8:16]) == bytes(8), "all was sent"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_large_body_is_gone_when_its_chunk_is_done(harness: Harness) -> None:
    def shared() -> list[str]:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return [link for link in links if os.path.islink(link) and "memfd" in os.readlink(link)]

    harness.run(lambda x: x, 1)
    before = len(shared())
    assert harness.run(len, bytes(5 * MIB)).values == {0: 5 * MIB}
    assert len(shared()) == before


def test_a_child_ends_when_it_is_told_to(harness: Harness) -> None:
    harness.channel.send(Kind.QUIT, {})
    harness._thread.join(SECONDS)
    assert not harness._thread.is_alive()


def test_the_standard_pickler_is_used_where_it_works(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("cloudpickle was asked")

    monkeypatch.setattr(cloudpickle, "Pickler", refuse)
    harness.child.preload({"f": (pickle.loads, {})})
    # An object with a reduction of its own, which the standard library takes.
    packed = pickle.dumps(pickle.dumps(range(3)))
    body = [len(packed).to_bytes(8, "little"), packed]
    harness.tokens.offer(1)
    header = {"chunk": 1, "run": "r", "function": "f", "count": 1, "indexes": 0}
    harness.channel.send(Kind.CALLS, {**header, "attempt": 1, "style": "one"}, body)
    assert harness.report(1).values == {0: range(3)}
