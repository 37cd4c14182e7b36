"""Odd arguments, results, exceptions, inputs and outputs cost one call or one run, never more."""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from desk import Desk, Wait, open_desk, square

import asyncrt
from asyncrt.errors import (
    CallTimeoutError,
    ConfigError,
    RemoteError,
    RunCancelledError,
    SerializationError,
)
from asyncrt.events import CallReturned

pytestmark = pytest.mark.anyio


@pytest.fixture
async def executor() -> AsyncIterator[asyncrt.Executor]:
    async with asyncio.timeout(60), asyncrt.Executor(max_workers=2) as executor:
        yield executor
        assert await executor.map(square, range(5)) == [0, 1, 4, 9, 16]  # it is as good as new


# -- what is raised --------------------------------------------------------------------------------


async def test_an_exception_that_cannot_be_changed_is_raised_as_it_is(
    executor: asyncrt.Executor,
) -> None:
    class SealedError(Exception):
        def __setattr__(self, name: str, value: object) -> None:
            raise TypeError("sealed")

    def fail() -> None:
        raise SealedError("as it is")

    with pytest.raises(Exception, match="as it is") as caught:
        await executor.submit(fail)
    assert type(caught.value).__qualname__ == SealedError.__qualname__


async def test_a_frozen_dataclass_as_exception_is_told(executor: asyncrt.Executor) -> None:
    @dataclass(frozen=True)
    class FrozenError(Exception):
        code: int

    def fail() -> None:
        raise FrozenError(3)

    with pytest.raises(RemoteError, match="FrozenError"):
        await executor.submit(fail)


async def test_an_exception_with_notes_of_its_own_kind_is_raised(
    executor: asyncrt.Executor,
) -> None:
    class NotedError(Exception):
        __notes__: Any = ("a tuple",)

        def add_note(self, note: str, /) -> None:
            raise RuntimeError("no notes")

    def fail() -> None:
        raise NotedError("noted")

    with pytest.raises(Exception, match="noted"):
        await executor.submit(fail)


# -- what cannot be pickled, or loaded -------------------------------------------------------------


class Odd:
    """Raises something when it is pickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


class SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Nameless:
    def __repr__(self) -> str:
        raise RuntimeError("no name")


@pytest.mark.parametrize(
    "argument",
    [
        Odd(SilentError()),
        Odd(asyncio.CancelledError()),
        Odd(GeneratorExit()),
        {Nameless(): Odd(ValueError("inside"))},
    ],
    ids=["silent", "cancelled", "generator exit", "nameless key"],
)
async def test_an_argument_that_raises_anything_fails_its_call_only(
    executor: asyncrt.Executor, argument: Any
) -> None:
    results = await executor.map(str, [1, argument, 2], return_exceptions=True)
    assert (results[0], results[2]) == ("1", "2")
    assert isinstance(results[1], SerializationError)


@pytest.mark.parametrize("kind", ["CancelledError", "GeneratorExit", "SystemExit"])
async def test_a_result_that_raises_anything_when_it_is_loaded_fails_its_call_only(
    executor: asyncrt.Executor, kind: str
) -> None:
    def make(number: int) -> Any:
        class Loud:
            def __reduce__(self) -> Any:
                source = f"raise __import__('asyncio').{kind}('loud')"
                source = source if kind == "CancelledError" else f"raise {kind}('loud')"
                return exec, (source,)

        return Loud() if number == 1 else number

    results = await executor.map(make, range(3), return_exceptions=True)
    assert (results[0], results[2]) == (0, 2)
    assert isinstance(results[1], SerializationError)
    assert "loud" in str(results[1])


# -- what inputs do --------------------------------------------------------------------------------


class OwnExit(BaseException):
    """Not an Exception."""


async def test_an_input_that_awaits_something_cancelled_ends_its_run_only(
    executor: asyncrt.Executor,
) -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1
        task = asyncio.ensure_future(asyncio.Event().wait())
        task.cancel()
        await task

    other = executor.submit(square, 3)
    with pytest.raises(RunCancelledError, match="input of run") as caught:
        await executor.map(square, numbers())
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert await other == 9


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_an_input_that_raises_no_exception_ends_its_run_only(
    executor: asyncrt.Executor, kind: str
) -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise OwnExit("of mine")

    async def numbers_async() -> AsyncIterator[int]:
        yield 1
        raise OwnExit("of mine")

    other = executor.submit(square, 3)
    with pytest.raises(OwnExit, match="of mine"):
        await executor.map(square, numbers() if kind == "sync" else numbers_async())
    assert await other == 9


async def test_a_blocking_iter_does_not_block_the_loop(executor: asyncrt.Executor) -> None:
    began, go_on = threading.Event(), threading.Event()

    class Slow:
        def __iter__(self) -> Iterator[int]:
            began.set()
            go_on.wait()
            return iter([1, 2])

    run = executor.map(square, Slow())
    await asyncio.to_thread(began.wait)
    go_on.set()
    assert await run == [1, 4]


async def test_an_input_too_long_for_a_length_is_taken_bit_by_bit(
    executor: asyncrt.Executor,
) -> None:
    async with executor.map(square, range(10**30)) as run:
        async for result in run:
            if result == 100:
                break


async def test_who_awaits_a_run_whose_input_was_cut_is_told() -> None:
    async def numbers() -> AsyncIterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    async with asyncio.timeout(60):
        async with asyncrt.Executor(max_workers=1) as executor:
            endless = executor.map(square, numbers(), max_in_flight=4)
            waiting = asyncio.ensure_future(_list(endless))
            sized = executor.map(square, range(100), max_in_flight=4)
            async for event in endless.events():
                if isinstance(event, CallReturned) and event.index >= 10:
                    break
        with pytest.raises(RunCancelledError, match="before its input had ended"):
            await waiting
        assert await sized == [number**2 for number in range(100)]


async def _list(run: asyncrt.Run[int]) -> list[int]:
    return await run


async def test_work_that_is_submitted_while_the_executor_waits_is_waited_for() -> None:
    async def pipeline(executor: asyncrt.Executor, desk: Desk) -> int:
        first = await executor.submit(Wait(desk), 3)
        return await executor.submit(square, first)

    async with asyncio.timeout(60), open_desk() as desk:
        async with asyncrt.Executor(max_workers=1) as executor:
            task = asyncio.ensure_future(pipeline(executor, desk))
            await desk.arrived(3)
            asyncio.get_running_loop().call_soon(desk.release)
        assert await task == 81


# -- output ----------------------------------------------------------------------------------------


class Ascii(io.StringIO):
    encoding = "ascii"

    def write(self, text: str) -> int:
        return super().write(text.encode("ascii").decode())


@pytest.mark.parametrize("kind", ["ascii", "closed", "none"])
async def test_output_that_cannot_be_shown_does_no_harm(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stream: Any = {"ascii": Ascii(), "closed": io.StringIO(), "none": None}[kind]
    if kind == "closed":
        stream.close()

    def say(number: int) -> int:
        print("h\N{LATIN SMALL LETTER E WITH ACUTE}llo")
        return number

    async with asyncio.timeout(60), asyncrt.Executor(max_workers=1) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            run = executor.map(say, range(3))
            assert await run == [0, 1, 2]
        assert "h\N{LATIN SMALL LETTER E WITH ACUTE}llo" in run.calls[0].logs()
        assert await executor.submit(square, 2) == 4
    if kind == "ascii":
        assert stream.getvalue() == "h\\xe9llo\n" * 3


async def test_a_call_that_closes_its_output_returns_all_the_same(
    executor: asyncrt.Executor,
) -> None:
    def close() -> int:
        os.close(1)
        print("into the void", end="")
        return 3

    assert await executor.with_options(isolation="call").submit(close) == 3


# -- processes -------------------------------------------------------------------------------------


async def test_a_process_in_a_session_of_its_own_ends_with_the_worker() -> None:
    def start() -> int:
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        return subprocess.Popen(command, start_new_session=True).pid

    async with asyncio.timeout(60):
        async with asyncrt.Executor(max_workers=1) as executor:
            pid = await executor.submit(start)
            assert psutil.pid_exists(pid)
        assert not psutil.pid_exists(pid)


async def test_a_call_that_leaves_its_process_group_is_killed_all_the_same(
    executor: asyncrt.Executor,
) -> None:
    def leave(number: int) -> None:
        import time

        os.setpgid(0, os.getpgid(os.getppid()))
        time.sleep(600)

    with pytest.raises(CallTimeoutError):
        await executor.map(leave, [1], timeout=0.5)


async def test_a_process_that_was_forked_from_the_client_does_not_keep_workers() -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    async with asyncio.timeout(60):
        async with asyncrt.Executor(max_workers=1) as executor:
            await executor.submit(square, 2)
            process = context.Process(target=receiver.recv, daemon=True)
            process.start()
            workers = [each for each in psutil.Process().children() if each.pid != process.pid]
            assert workers
        assert not any(each.is_running() for each in workers)
        assert process.is_alive()
    sender.send(None)
    process.join()


# -- use -------------------------------------------------------------------------------------------


async def test_use_from_another_event_loop_is_refused(executor: asyncrt.Executor) -> None:
    async def use() -> None:
        executor.submit(square, 2)

    with pytest.raises(RuntimeError, match="another event loop"):
        await asyncio.to_thread(asyncio.run, use())


@pytest.mark.parametrize("env", [{"A=B": "c"}, {"": "c"}, {"A": "b\0"}, {"A\0": "b"}])
def test_variables_that_cannot_be_are_refused(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="cannot be a variable"):
        asyncrt.Executor(env=env)


async def test_a_chunksize_beyond_what_a_worker_takes_is_cut(executor: asyncrt.Executor) -> None:
    assert await executor.map(square, range(20_000), chunksize=20_000) == [
        number**2 for number in range(20_000)
    ]
