"""Initializers, what breaks a sync executor, and what does not."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import pytest
from desk import refuse, square
from syncdesk import until
from synctasks import STATE, add_one, die, recall, remember

import asyncrt
from asyncrt.errors import (
    ConfigError,
    ExecutorClosedError,
    RunCancelledError,
    WorkerCrashedError,
    WorkerStartError,
)
from asyncrt.sync import BrokenExecutorError, Executor


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(2, echo=False) as executor:
        yield executor


# -- initializers ----------------------------------------------------------------------------------


def test_the_initializer_runs_once_in_each_process() -> None:
    with Executor(1, initializer=remember, initargs=("a", 1), echo=False) as executor:
        assert [executor.submit(recall, "a").result() for _ in range(3)] == [1, 1, 1]
        assert list(executor.map(recall, ["a"] * 5)) == [1] * 5
        assert executor.with_options(retries=2).submit(recall, "a").result() == 1
        alone = executor.with_options(isolation="call")
        assert list(alone.map(recall, ["a"] * 3)) == [1] * 3
        assert executor.submit(add_one, 1).result() == 2
    assert STATE == {}


SCRIPT = """
from asyncrt.sync import Executor

VALUE = None

def remember(value):
    global VALUE, COUNT
    VALUE = value
    COUNT = globals().get("COUNT", 0) + 1

def recall():
    return VALUE, COUNT

def recall_too():
    return VALUE, COUNT

with Executor(1, initializer=remember, initargs=(7,)) as executor:
    print(executor.submit(recall).result(), executor.submit(recall_too).result())
"""


def test_what_the_initializer_of_a_script_sets_is_seen_by_all_its_functions(
    tmp_path: Path,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "error", script], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("(7, 1) (7, 1)\n", "")


def test_an_initializer_that_raises_breaks_the_executor_and_says_why() -> None:
    with Executor(1, initializer=refuse, initargs=(7,), echo=False) as executor:
        results = executor.map(square, range(100))
        with pytest.raises(BrokenExecutorError, match="RefusedError: 7"):
            list(results)
        with pytest.raises(BrokenExecutorError, match="the initializer raised"):
            executor.map(square, [1])


# -- what breaks an executor, and what does not ----------------------------------------------------


def test_a_crash_costs_its_own_call_only(executor: Executor) -> None:
    crashed = executor.submit(die, 3)
    others = [executor.submit(square, number) for number in range(20)]
    with pytest.raises(WorkerCrashedError) as caught:
        crashed.result()
    assert caught.value.exit_code == 3
    assert [future.result() for future in others] == [number**2 for number in range(20)]


def test_workers_that_cannot_be_started_break_the_executor() -> None:
    with Executor(1, runtime="image:1", echo=False) as executor:
        futures = [executor.submit(square, number) for number in range(3)]
        for future in futures:
            with pytest.raises(BrokenExecutorError, match="the local backend runs on this") as info:
                future.result()
            assert isinstance(info.value, BrokenExecutor)
            assert isinstance(info.value.__cause__, ConfigError)
        with pytest.raises(BrokenExecutorError):
            executor.submit(square, 1)
        with pytest.raises(BrokenExecutorError):
            executor.map(square, [1])
        # Only those workers cannot be had.
        assert executor.with_options(runtime=None).submit(square, 3).result() == 9


def test_a_broken_map_tells_who_iterates() -> None:
    with Executor(1, runtime="image:1", echo=False) as executor:
        results = executor.map(square, range(3))
        with pytest.raises(BrokenExecutorError):
            list(results)


def test_an_executor_whose_loop_has_crashed_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    async def crash(self: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(asyncrt.Executor, "_open", crash)
    executor = Executor(1)
    future = executor.submit(square, 1)
    with pytest.raises(BrokenExecutorError) as caught:
        future.result()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(BrokenExecutorError):
        executor.submit(square, 1)
    executor.shutdown()


def test_a_cancelled_run_is_not_a_broken_executor() -> None:
    executor = Executor(1, echo=False)
    future = executor.submit(time.sleep, 60)
    until(future.running)
    core = executor._core
    assert core is not None
    core.abort()
    with pytest.raises(RunCancelledError):
        future.result()
    executor.shutdown()


def test_calls_that_cannot_be_begun_break_the_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    with Executor(1, echo=False) as executor:
        assert executor.submit(square, 2).result() == 4

        def refuse_to_begin(*args: Any, **kwargs: Any) -> Any:
            raise WorkerStartError("nothing starts here")

        monkeypatch.setattr(asyncrt.Executor, "_begin", refuse_to_begin)
        with pytest.raises(BrokenExecutorError, match="nothing starts here"):
            executor.submit(add_one, 1).result()
        with pytest.raises(BrokenExecutorError, match="nothing starts here"):
            executor.submit(square, 1)
    with Executor(1, echo=False) as executor, pytest.raises(BrokenExecutorError):
        list(executor.map(square, [1]))


def test_a_map_of_an_executor_whose_loop_has_crashed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def crash(self: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(asyncrt.Executor, "_open", crash)
    results = Executor(1).map(square, [1])
    with pytest.raises(BrokenExecutorError):
        list(results)


def test_a_thread_that_cannot_be_started_is_told_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse_to_start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Executor(1, echo=False) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse_to_start)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                executor.submit(square, 1)
        assert executor.submit(square, 3).result() == 9


def test_shutting_down_while_map_collects_its_inputs() -> None:
    executor = Executor(1, echo=False)
    assert executor.submit(square, 1).result() == 1

    def inputs() -> Iterator[int]:
        yield 1
        executor.shutdown()

    with pytest.raises(ExecutorClosedError, match="after shutdown"):
        executor.map(square, inputs())


def test_the_initializer_in_this_process() -> None:
    from asyncrt.worker.initializer import Initialized, InitializerError

    before = Initialized(recall, "here", remember, ("here", 3))
    assert (before("here"), before("here")) == (3, 3)
    del STATE["here"]
    for _ in range(2):
        with pytest.raises(InitializerError, match="RefusedError"):
            Initialized(recall, "there", refuse, (1,))("here")
