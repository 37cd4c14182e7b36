"""What the sync face does beyond the standard library, or unlike it. See docs/sync.md."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from desk import RefusedError, refuse_odd, square, succeed_on_attempt, variable
from syncdesk import SyncDesk, open_sync_desk, until
from synctasks import Referable, add_one, wait_and_square

import asyncrt
from asyncrt.errors import (
    CallTimeoutError,
    ConfigError,
    ExecutorClosedError,
    RunDeadlineError,
    SerializationError,
)
from asyncrt.options import CALL_OPTIONS, POOL_OPTIONS
from asyncrt.sync import Executor, Future, MapOptions, Options


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(2, echo=False) as executor:
        yield executor


@pytest.fixture
def desk() -> Iterator[SyncDesk]:
    with open_sync_desk() as desk:
        yield desk


# -- functions and arguments -----------------------------------------------------------------------


def test_lambdas_closures_and_coroutine_functions_run(executor: Executor) -> None:
    offset = 5
    assert executor.submit(lambda number: number + offset, 1).result() == 6
    assert executor.submit(add_one, 1).result() == 2
    assert list(executor.map(add_one, [1, 2])) == [2, 3]


def test_starmap_spreads_its_items(executor: Executor) -> None:
    assert list(executor.starmap(pow, [(2, 5), (3, 2)])) == [32, 9]
    assert list(executor.starmap(pow, iter([(2, 5)]), buffersize=1)) == [32]


def test_shared_keyword_arguments(executor: Executor) -> None:
    assert list(executor.map(int, ["11", "101"], kwargs={"base": 2})) == [3, 5]
    assert list(executor.starmap(int, [("11",)], kwargs={"base": 2})) == [3]


def test_a_function_that_cannot_travel_is_told_at_once(executor: Executor) -> None:
    with pytest.raises(TypeError, match="expected a function"):
        executor.submit(5)  # type: ignore[call-overload]
    lock = threading.Lock()
    with pytest.raises(SerializationError, match="cannot be pickled"):
        executor.submit(lambda: lock)
    with pytest.raises(SerializationError, match="cannot be pickled"):
        executor.map(lambda number: (number, lock), [1])


def test_an_argument_that_cannot_travel_is_told_by_the_future(executor: Executor) -> None:
    with pytest.raises(SerializationError, match="cannot be pickled"):
        executor.submit(square, threading.Lock()).result()
    assert executor.submit(square, 2).result() == 4


def test_map_without_inputs_is_empty_and_refuses_what_is_none(executor: Executor) -> None:
    assert list(executor.map(square)) == []
    with pytest.raises(TypeError, match="not iterable"):
        executor.map(square, 5)  # type: ignore[call-overload]


# -- options ---------------------------------------------------------------------------------------


def test_the_typed_options_are_those_of_the_async_face() -> None:
    """``timeout``, ``chunksize`` and ``max_workers`` are arguments of their own."""
    assert set(MapOptions.__annotations__) == CALL_OPTIONS - {"timeout", "chunksize"}
    assert set(Options.__annotations__) == (CALL_OPTIONS | POOL_OPTIONS) - {"max_workers"}


def test_unknown_options_are_refused_by_the_constructor_and_by_map(executor: Executor) -> None:
    with pytest.raises(ConfigError, match="did you mean 'memory'"):
        Executor(memori="1Gi")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="an option of the workers"):
        executor.map(square, [1], memory="1Gi")  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="timeout"):
        Executor(timeout=-1)


def test_a_backend_that_is_not_there_is_told_by_the_first_call() -> None:
    with pytest.raises(ConfigError, match="not part of this version"):
        Executor(backend="k8s").submit(square, 1)


def test_the_timeout_of_an_attempt_is_an_option_of_the_executor(executor: Executor) -> None:
    hasty = executor.with_options(timeout=0.2)
    with pytest.raises(CallTimeoutError):
        hasty.submit(time.sleep, 60).result()
    with pytest.raises(CallTimeoutError):
        list(hasty.map(time.sleep, [60], timeout=60))


def test_retries_and_failures_in_place(executor: Executor) -> None:
    retries = asyncrt.Retry(attempts=3, delay=0)
    assert list(executor.map(succeed_on_attempt, [1, 3], retries=retries)) == [1, 3]
    assert executor.with_options(retries=retries).submit(succeed_on_attempt, 2).result() == 2
    results: list[Any] = list(executor.map(refuse_odd, range(3), return_exceptions=True))
    assert results[::2] == [0, 2]
    assert isinstance(results[1], RefusedError)


def test_unordered_results_come_as_they_are_done(executor: Executor, desk: SyncDesk) -> None:
    results = executor.map(
        wait_and_square, [desk.port] * 2, [1, 2], ordered=False, return_exceptions=True
    )
    desk.release(2)
    assert next(results) == 4
    desk.release(1)
    assert list(results) == [1]


def test_a_deadline_ends_all_calls_and_breaks_nothing(executor: Executor, desk: SyncDesk) -> None:
    results = executor.map(
        wait_and_square, [desk.port] * 2, [1, 2], deadline=time.monotonic() + 0.3
    )
    with pytest.raises(RunDeadlineError):
        list(results)
    late = executor.with_options(deadline=time.monotonic() - 1).submit(square, 2)
    with pytest.raises(RunDeadlineError):
        late.result()
    assert executor.submit(square, 2).result() == 4


def test_a_view_shares_the_workers_and_closes_nothing(executor: Executor) -> None:
    pid = executor.submit(os.getppid).result()
    with executor.with_options(name="other", max_workers=1) as view:
        assert view.submit(os.getppid).result() is not None
        assert isinstance(view, Executor)
    view.shutdown(cancel_futures=True)
    assert view.submit(square, 2).result() == 4
    with executor.with_options(env={"ASYNCRT_TEST": "1"}) as other:
        assert other.submit(variable, "ASYNCRT_TEST").result() == "1"
        assert other.submit(os.getppid).result() != pid


def test_a_view_keeps_the_executor_that_it_is_a_view_of() -> None:
    view = Executor(1, echo=False).with_options(retries=2)
    assert view.submit(succeed_on_attempt, 2).result() == 2
    view.submit(square, 1)
    del view
    until(lambda: "asyncrt-loop" not in loops_beside_the_fixture())


def loops_beside_the_fixture() -> list[str]:
    names = [thread.name for thread in threading.enumerate() if thread.name == "asyncrt-loop"]
    return names[1:]


def test_arguments_of_process_pools(executor: Executor) -> None:
    del executor
    context = multiprocessing.get_context("spawn")
    with Executor(1, context, max_tasks_per_child=5, echo=False) as fresh:
        assert len(set(fresh.map(lambda _: os.getpid(), range(3)))) == 3
    with pytest.raises(TypeError, match="mp_context"):
        Executor(mp_context="spawn")
    with pytest.raises(ConfigError, match="initializer"):
        Executor(initializer=print, max_tasks_per_child=2)


# -- cancelling ------------------------------------------------------------------------------------


def test_a_call_that_is_cancelled_as_it_begins_is_killed(desk: SyncDesk) -> None:
    with Executor(1, echo=False) as executor:
        future = executor.submit(wait_and_square, desk.port, 1)
        desk.arrived(1)
        if future.cancel():  # no word yet that it runs
            desk.killed(1)
            assert future.cancelled()
        else:
            desk.release()
        assert executor.submit(square, 3).result() == 9


def test_a_call_that_is_cancelled_before_the_executor_is_open_never_runs(desk: SyncDesk) -> None:
    with Executor(1, echo=False) as executor:
        futures = [executor.submit(wait_and_square, desk.port, number) for number in range(5)]
        assert all(future.cancel() for future in futures)
        assert concurrent.futures.wait(futures, timeout=30).not_done == set()
    assert desk.seen == []


def test_cancel_futures_cancels_what_a_map_has_not_begun(desk: SyncDesk) -> None:
    executor = Executor(1, echo=False)
    results = executor.map(wait_and_square, [desk.port] * 9, range(9))
    running = executor.submit(wait_and_square, desk.port, "x")
    desk.arrived(0)
    desk.release(0)
    assert next(results) == 0
    executor.shutdown(wait=False, cancel_futures=True)
    desk.release()
    with pytest.raises(concurrent.futures.CancelledError):
        list(results)
    executor.shutdown()
    assert running.done()
    assert len(desk.seen) < 9


def test_a_map_that_is_dropped_after_it_began_cancels_what_is_left(desk: SyncDesk) -> None:
    with Executor(1, echo=False) as executor:
        results = executor.map(wait_and_square, [desk.port] * 5, range(5))
        desk.release(0)
        assert next(results) == 0
        desk.arrived(1)
        del results
        desk.killed(1)
    assert desk.seen == ["0", "1"]


# -- maps with a buffer ----------------------------------------------------------------------------


def test_a_map_with_a_buffer_takes_endless_input(executor: Executor) -> None:
    results = executor.map(square, itertools.count(), buffersize=10)
    assert list(itertools.islice(results, 100)) == [number**2 for number in range(100)]
    assert list(executor.map(pow, [1, 2, 3], itertools.repeat(2), buffersize=2)) == [1, 4, 9]


@pytest.mark.parametrize("option", ["buffersize", "max_in_flight"])
def test_a_buffer_bounds_how_far_inputs_are_pulled(executor: Executor, option: str) -> None:
    pulled: list[int] = []

    def inputs() -> Iterator[int]:
        for number in range(20):
            pulled.append(number)
            yield number

    options: Any = {option: 3}
    results = executor.map(square, inputs(), **options)
    assert pulled == [0, 1, 2]
    for number in range(10):
        assert next(results) == number**2
        assert len(pulled) <= number + 3
    assert list(results) == [number**2 for number in range(10, 20)]


def test_an_error_of_a_pulled_input_is_raised_by_the_iterator(executor: Executor) -> None:
    def inputs() -> Iterator[int]:
        yield from range(3)
        raise RefusedError

    results = executor.map(square, inputs(), buffersize=2)
    assert next(results) == 0
    with pytest.raises(RefusedError):
        list(results)


def test_a_buffer_must_be_a_positive_number(executor: Executor) -> None:
    with pytest.raises(ValueError, match="buffersize"):
        executor.map(square, [1], buffersize=0)


def test_shutting_down_ends_a_map_that_has_more_input() -> None:
    executor = Executor(1, echo=False)
    results = executor.map(square, itertools.count(), buffersize=3)
    assert next(results) == 0
    executor.shutdown()
    found = []
    with pytest.raises(ExecutorClosedError, match="before map had all"):
        found.extend([next(results), next(results), next(results), next(results)])
    assert executor is not None


def test_a_map_with_a_buffer_keeps_its_executor() -> None:
    results = Executor(1, echo=False).map(square, range(50), buffersize=2)
    assert list(results) == [number**2 for number in range(50)]


# -- callbacks -------------------------------------------------------------------------------------


def test_callbacks_may_block_and_wait_for_other_futures(executor: Executor, desk: SyncDesk) -> None:
    found: list[int] = []
    called = threading.Event()
    later = executor.submit(wait_and_square, desk.port, 2)

    def block(future: Any) -> None:
        found.append(future.result() + later.result() + executor.submit(square, 5).result())
        called.set()

    future = executor.submit(wait_and_square, desk.port, 1)
    future.add_done_callback(block)
    desk.release()
    assert called.wait(30)
    assert found == [1 + 4 + 25]


def test_shutdown_waits_for_callbacks_and_may_be_called_by_one(desk: SyncDesk) -> None:
    called: list[str] = []

    def end(executor: Executor, future: Any) -> None:
        called.append(threading.current_thread().name)
        executor.shutdown()
        called.append("shut down")

    executor = Executor(1, echo=False)
    future = executor.submit(wait_and_square, desk.port, 1)
    future.add_done_callback(functools.partial(end, executor))
    desk.release()
    executor.shutdown()
    assert called == ["asyncrt-callbacks", "shut down"]


def test_what_is_not_an_exception_in_a_callback_does_not_stop_the_others(desk: SyncDesk) -> None:
    def leave(future: Any) -> None:
        raise SystemExit

    called = threading.Event()
    with Executor(1, echo=False) as executor:
        future = executor.submit(wait_and_square, desk.port, 1)
        future.add_done_callback(leave)
        future.add_done_callback(lambda future: called.set())
        desk.release()
        assert called.wait(30)


def test_a_result_lives_as_long_as_its_future(executor: Executor) -> None:
    future = executor.submit(Referable)
    result = weakref.ref(future.result())
    executor.submit(square, 1).result()
    assert result() is not None
    del future
    until(lambda: result() is None)


# -- inside an event loop --------------------------------------------------------------------------


def test_blocking_a_running_loop_warns_and_works(desk: SyncDesk) -> None:
    async def main() -> None:
        executor = Executor(1, echo=False)
        with pytest.warns(RuntimeWarning, match="await asyncio.wrap_future") as caught:
            assert executor.submit(square, 3).result() == 9
        assert Path(caught[0].filename) == Path(__file__)
        with pytest.warns(RuntimeWarning, match=r"exception\(\) blocks the event loop"):
            assert executor.submit(square, 3).exception() is None
        with pytest.warns(RuntimeWarning, match="next result of map") as caught:
            assert list(executor.map(square, [1])) == [1]
        assert Path(caught[0].filename) == Path(__file__)
        executor.submit(wait_and_square, desk.port, 1)
        threading.Timer(0.2, desk.release).start()
        with pytest.warns(RuntimeWarning, match="shutdown") as caught:
            executor.shutdown()
        assert Path(caught[0].filename) == Path(__file__)

    asyncio.run(main())


def test_what_does_not_block_a_loop_does_not_warn(executor: Executor) -> None:
    async def main() -> None:
        future = executor.submit(square, 3)
        assert await asyncio.wrap_future(future) == 9
        assert future.result() == 9
        with pytest.raises(TimeoutError):
            executor.submit(time.sleep, 0.2).result(timeout=0)
        assert await asyncio.to_thread(lambda: list(executor.map(square, [3]))) == [9]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main())


# -- several ---------------------------------------------------------------------------------------


def test_several_executors_at_once() -> None:
    with Executor(1, echo=False) as first, Executor(1, echo=False) as second:
        pairs = zip(first.map(square, range(50)), second.map(square, range(50)), strict=True)
        assert all(one == other for one, other in pairs)
        assert first.submit(os.getppid).result() != second.submit(os.getppid).result()


def test_one_executor_is_opened_by_several_threads() -> None:
    executor = Executor(1, echo=False)
    barrier = threading.Barrier(8)
    found: list[int] = []

    def use(number: int) -> None:
        barrier.wait()
        found.append(executor.submit(square, number).result())

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [thread.name for thread in threading.enumerate()]
    executor.shutdown()
    assert sorted(found) == [number**2 for number in range(8)]
    assert names.count("asyncrt-loop") <= 2


def test_many_more_calls_than_a_run_takes(executor: Executor) -> None:
    futures = [executor.submit(square, number) for number in range(9000)]
    assert [future.result() for future in futures] == [number**2 for number in range(9000)]


def test_runs_of_submitted_calls_end_when_nothing_comes(executor: Executor) -> None:
    assert executor.submit(square, 3).result() == 9
    core = executor._core
    assert core is not None
    until(lambda: not core.jobs)
    assert executor.submit(square, 3).result() == 9


def test_a_future_of_ones_own_is_one_of_the_standard_library() -> None:
    """Future instances should not be created directly except for testing."""
    future: Future[int] = Future()
    future.add_done_callback(lambda future: future.result())
    assert future.set_running_or_notify_cancel()
    future.set_result(3)
    assert future.result() == 3
    cancelled: Future[int] = Future()
    assert cancelled.cancel()


def test_a_module_that_imports_the_sync_face_can_be_loaded_by_a_worker(executor: Executor) -> None:
    def use_inside() -> str:
        import asyncrt.sync

        try:
            asyncrt.sync.Executor()
        except asyncrt.NestedExecutorError as error:
            return str(error)
        return "no error"

    assert "cannot open an executor" in executor.submit(use_inside).result()


def test_the_stand_in_in_workers_has_all_names() -> None:
    from asyncrt import sync
    from asyncrt.worker import nosync

    assert set(sync.__all__) <= set(vars(nosync))


def test_docstring_examples_run() -> None:
    documented = [asyncrt.sync, Executor, Executor.submit, Executor.map, Executor.starmap]
    for value in [*documented, Executor.with_options]:
        _, _, example = (inspect.getdoc(value) or "").partition("Example:\n")
        code = textwrap.dedent(
            "\n".join(
                itertools.takewhile(lambda line: not line or line[0] == " ", example.splitlines())
            )
        )
        assert "assert" in code
        exec(code, {"asyncrt": asyncrt})  # noqa: S102 - our own docstrings


@pytest.mark.parametrize("number", range(2))
def test_the_snippets_of_the_documentation_run(number: int, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "sync.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert len(snippets) == 2
    script = tmp_path / "snippet.py"
    script.write_text(snippets[number])
    done = subprocess.run(
        [sys.executable, "-W", "error", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
