"""What the standard library's documentation says about ``Executor`` and ``Future``, by sentence.

Each test quotes its sentence, and runs with ``ProcessPoolExecutor`` as well: so it is the standard
library's behaviour that is stated, not what is convenient.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import itertools
import logging
import operator
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, CancelledError, wait
from pathlib import Path
from typing import Any

import pytest
from desk import RefusedError, refuse, refuse_odd, square
from syncdesk import SyncDesk, open_sync_desk, until
from synctasks import keywords, wait_and_refuse, wait_and_square

import asyncrt.sync

KINDS: dict[str, Any] = {
    "asyncrt": functools.partial(asyncrt.sync.Executor, echo=False),
    "processes": concurrent.futures.ProcessPoolExecutor,
}


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]


@pytest.fixture(scope="module", params=sorted(KINDS))
def executor(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Give an executor that several tests share: two workers, and nothing runs before or after."""
    with KINDS[request.param](2) as executor:
        yield executor


@pytest.fixture
def desk() -> Iterator[SyncDesk]:
    with open_sync_desk() as desk:
        yield desk


# -- Executor --------------------------------------------------------------------------------------


def test_it_is_an_executor_of_the_standard_library(executor: Any) -> None:
    assert isinstance(executor, concurrent.futures.Executor)


def test_submit_executes_as_fn_args_kwargs(executor: Any) -> None:
    """Schedules the callable, fn, to be executed as fn(*args, **kwargs)."""
    assert executor.submit(keywords, 1, 2, fn=3, self=4).result() == ((1, 2), {"fn": 3, "self": 4})


def test_submit_returns_a_future(executor: Any) -> None:
    """Returns a Future object representing the execution of the callable."""
    future = executor.submit(pow, 323, 1235)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result() == 323**1235


def test_map_is_like_the_builtin(executor: Any) -> None:
    """Similar to map(fn, *iterables)."""
    assert list(executor.map(square, range(10))) == [square(number) for number in range(10)]
    assert list(executor.map(pow, [2, 3], [5, 2])) == [32, 9]


def test_map_ends_with_the_shortest_input(executor: Any) -> None:
    assert list(executor.map(pow, itertools.count(), [1, 2, 3])) == [0, 1, 8]
    same = iter(range(4))
    assert list(executor.map(operator.sub, same, same)) == [-1, -1]
    assert list(executor.map(square, [])) == []


def test_map_collects_its_inputs_at_once(executor: Any) -> None:
    """The iterables are collected immediately rather than lazily."""
    inputs = iter(range(5))
    results = executor.map(square, inputs)
    assert list(inputs) == []
    assert list(results) == [0, 1, 4, 9, 16]


def test_an_error_of_an_input_is_raised_by_map(executor: Any) -> None:
    def inputs() -> Iterator[int]:
        yield 1
        raise RefusedError

    with pytest.raises(RefusedError):
        executor.map(square, inputs())


def test_calls_of_map_run_concurrently(executor: Any, desk: SyncDesk) -> None:
    """The fn is executed asynchronously and several calls to fn may be made concurrently."""
    results = executor.map(wait_and_square, [desk.port] * 2, [1, 2])
    desk.arrived(1, 2)
    desk.release()
    assert list(results) == [1, 4]


def test_map_gives_results_lazily_and_in_order(executor: Any, desk: SyncDesk) -> None:
    results = executor.map(wait_and_square, [desk.port] * 3, [1, 2, 3])
    assert iter(results) is results
    desk.release(2)
    desk.arrived(3)  # so 2 has ended, and 1 has not
    desk.release(1)
    assert next(results) == 1
    assert next(results) == 4
    desk.release(3)
    assert next(results) == 9
    with pytest.raises(StopIteration):
        next(results)


def test_map_times_out_from_the_original_call(executor: Any, desk: SyncDesk) -> None:
    """The returned iterator raises a TimeoutError if __next__() is called and the result isn't available after timeout seconds from the original call to Executor.map()."""  # noqa: E501 - a quotation
    results = executor.map(wait_and_square, [desk.port] * 2, [1, 2], timeout=0.2)
    desk.release(1)
    desk.arrived(1)
    with pytest.raises(TimeoutError):
        list(results)
    desk.release()


def test_map_with_a_timeout_gives_what_is_there_even_afterwards(executor: Any) -> None:
    results = executor.map(square, [1, 2], timeout=0.5)
    executor.submit(square, 3).result()
    assert next(results) == 1


@pytest.mark.parametrize("timeout", [5, 60.0, None])
def test_the_timeout_of_map_can_be_an_int_a_float_or_none(executor: Any, timeout: Any) -> None:
    """Timeout can be an int or a float. If timeout is not specified or None, there is no limit to the wait time."""  # noqa: E501 - a quotation
    assert list(executor.map(square, [3], timeout=timeout)) == [9]


def test_a_failure_of_map_is_raised_when_its_value_is_retrieved(executor: Any) -> None:
    """If a fn call raises an exception, then that exception will be raised when its value is retrieved from the iterator."""  # noqa: E501 - a quotation
    results = executor.map(refuse_odd, [0, 2, 3, 4])
    assert next(results) == 0
    assert next(results) == 2
    with pytest.raises(RefusedError, match="3"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_after_a_failure_of_map_what_is_left_is_cancelled(kind: Any, desk: SyncDesk) -> None:
    with kind(1) as executor:
        results = executor.map(refuse_odd, [1, *range(2, 5)])
        waiting = executor.map(wait_and_square, [desk.port] * 9, range(9))
        with pytest.raises(RefusedError):
            list(results)
        desk.arrived(0)
        desk.release(0)
        assert next(waiting) == 0
        waiting.close()
        desk.release()
    assert len(desk.seen) < 9


@pytest.mark.parametrize("chunksize", [1, 2, 7, 100])
def test_map_takes_a_chunksize(executor: Any, chunksize: int) -> None:
    """The (approximate) size of these chunks can be specified by setting chunksize to a positive integer."""  # noqa: E501 - a quotation
    assert list(executor.map(square, range(20), chunksize=chunksize)) == [n * n for n in range(20)]


def test_a_chunksize_below_one_is_a_value_error(executor: Any) -> None:
    with pytest.raises(ValueError, match="chunksize must be"):
        executor.map(square, range(20), chunksize=0)


def test_submit_and_map_after_shutdown_raise_runtime_error(kind: Any) -> None:
    """Calls to submit() and map() made after shutdown will raise RuntimeError."""
    executor = kind(1)
    assert executor.submit(square, 2).result() == 4
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 2)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.map(square, [2])


def test_an_executor_that_was_never_used_is_shut_down_too(kind: Any) -> None:
    executor = kind(1)
    executor.shutdown()
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 2)


def test_shutdown_waits_for_all_pending_futures(kind: Any, desk: SyncDesk) -> None:
    """If wait is True then this method will not return until all the pending futures are done executing."""  # noqa: E501 - a quotation
    executor = kind(1)
    futures = [executor.submit(wait_and_square, desk.port, number) for number in range(3)]
    desk.arrived(0)
    desk.release()
    executor.shutdown(wait=True)
    assert all(future.done() for future in futures)
    assert [future.result() for future in futures] == [0, 1, 4]
    executor.shutdown()


def test_shutdown_without_waiting_returns_at_once(kind: Any, desk: SyncDesk) -> None:
    """If wait is False then this method will return immediately and the resources associated with the executor will be freed when all pending futures are done executing."""  # noqa: E501 - a quotation
    executor = kind(1)
    future = executor.submit(wait_and_square, desk.port, 3)
    desk.arrived(3)
    executor.shutdown(wait=False)
    assert not future.done()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 2)
    desk.release()
    assert future.result() == 9


def test_shutdown_can_cancel_what_has_not_started(kind: Any, desk: SyncDesk) -> None:
    """If cancel_futures is True, this method will cancel all pending futures that the executor has not started running. Any futures that are completed or running won't be cancelled."""  # noqa: E501 - a quotation
    executor = kind(1)
    done = executor.submit(square, 3)
    done.result()
    futures = [executor.submit(wait_and_square, desk.port, number) for number in range(20)]
    desk.arrived(0)
    until(futures[0].running)
    threading.Timer(0.2, desk.release).start()
    executor.shutdown(cancel_futures=True)
    assert done.result() == 9
    assert futures[0].result() == 0
    assert all(future.done() for future in futures)
    assert sum(future.cancelled() for future in futures) >= 18


def test_with_waits(kind: Any, desk: SyncDesk) -> None:
    """You can avoid having to call this method explicitly if you use the with statement, which will shutdown the Executor (waiting as if Executor.shutdown() were called with wait set to True)."""  # noqa: E501 - a quotation
    with kind(1) as executor:
        future = executor.submit(wait_and_square, desk.port, 2)
        desk.arrived(2)
        desk.release()
    assert future.done()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 2)


def test_with_waits_after_an_exception_too(kind: Any, desk: SyncDesk) -> None:
    executor = kind(1)
    with contextlib.suppress(RefusedError), executor:
        future = executor.submit(wait_and_square, desk.port, 2)
        desk.release()
        raise RefusedError
    assert future.result() == 4


def test_fire_and_forget_in_a_with_block_runs_everything(kind: Any, desk: SyncDesk) -> None:
    desk.release()
    with kind(2) as executor:
        executor.map(wait_and_square, [desk.port] * 5, range(5))
    assert sorted(desk.seen) == list("01234")


# -- Future ----------------------------------------------------------------------------------------


def test_cancel_of_a_running_call_is_false(executor: Any, desk: SyncDesk) -> None:
    """If the call is currently being executed or finished running and cannot be cancelled then the method will return False."""  # noqa: E501 - a quotation
    future = executor.submit(wait_and_square, desk.port, 3)
    desk.arrived(3)
    until(future.running)
    assert not future.cancel()
    assert not future.cancelled()
    desk.release()
    assert future.result() == 9
    assert not future.cancel()
    assert not future.running()


def test_cancel_of_a_pending_call_is_true(kind: Any, desk: SyncDesk) -> None:
    """Otherwise the call will be cancelled and the method will return True."""
    with kind(1) as executor:
        futures = [executor.submit(wait_and_square, desk.port, number) for number in range(9)]
        desk.arrived(0)
        assert futures[8].cancel()
        assert futures[8].cancel()
        assert futures[8].cancelled()
        assert futures[8].done()
        assert not futures[8].running()
        with pytest.raises(CancelledError):
            futures[8].result()
        with pytest.raises(CancelledError):
            futures[8].exception()
        desk.release()
        assert [future.result() for future in futures[:8]] == [n * n for n in range(8)]
    assert "8" not in desk.seen


def test_done_is_false_before_and_true_after(executor: Any, desk: SyncDesk) -> None:
    """Return True if the call was successfully cancelled or finished running."""
    future = executor.submit(wait_and_square, desk.port, 3)
    assert not future.done()
    desk.release()
    future.result()
    assert future.done()
    assert not future.cancelled()


def test_result_raises_timeout_error_and_the_call_goes_on(executor: Any, desk: SyncDesk) -> None:
    """If the call hasn't completed in timeout seconds, then a TimeoutError will be raised."""
    future = executor.submit(wait_and_square, desk.port, 3)
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)
    with pytest.raises(TimeoutError):
        future.exception(timeout=0)
    desk.release()
    assert future.result(timeout=None) == 9


def test_result_raises_what_the_call_raised(executor: Any) -> None:
    """If the call raised an exception, this method will raise the same exception."""
    future = executor.submit(refuse, 5)
    with pytest.raises(RefusedError, match="5"):
        future.result()


def test_exception_returns_what_the_call_raised(executor: Any) -> None:
    """Return the exception raised by the call. If the call completed without raising, None is returned."""  # noqa: E501 - a quotation
    assert isinstance(executor.submit(refuse, 5).exception(), RefusedError)
    assert executor.submit(square, 5).exception() is None


def test_callbacks_are_called_with_the_future_in_order(executor: Any, desk: SyncDesk) -> None:
    """Added callables are called in the order that they were added and are always called in a thread belonging to the process that added them."""  # noqa: E501 - a quotation
    called: list[Any] = []
    all_called = threading.Event()
    future = executor.submit(wait_and_square, desk.port, 3)
    future.add_done_callback(lambda future: called.append((1, future)))
    future.add_done_callback(lambda future: called.append((2, future)))
    future.add_done_callback(lambda future: all_called.set())
    desk.release()
    assert all_called.wait(30)
    assert called == [(1, future), (2, future)]


def test_an_exception_of_a_callback_is_logged_and_ignored(
    executor: Any, desk: SyncDesk, caplog: pytest.LogCaptureFixture
) -> None:
    """If the callable raises an Exception subclass, it will be logged and ignored."""
    called = threading.Event()
    future = executor.submit(wait_and_square, desk.port, 3)
    future.add_done_callback(refuse)
    future.add_done_callback(lambda future: called.set())
    with caplog.at_level(logging.ERROR, logger="concurrent.futures"):
        desk.release()
        assert called.wait(30)
    assert "exception calling callback for <Future" in caplog.text
    assert "RefusedError" in caplog.text
    caplog.clear()
    future.add_done_callback(refuse)
    assert "exception calling callback" in caplog.text


def test_a_callback_of_a_done_future_is_called_immediately(executor: Any) -> None:
    """If the future has already completed or been cancelled, fn will be called immediately."""
    future = executor.submit(square, 3)
    future.result()
    called: list[Any] = []
    future.add_done_callback(lambda future: called.append(threading.current_thread()))
    assert called == [threading.current_thread()]


def test_callbacks_of_a_cancelled_future_are_called(kind: Any, desk: SyncDesk) -> None:
    """Attaches the callable fn to the future. fn will be called, with the future as its only argument, when the future is cancelled or finishes running."""  # noqa: E501 - a quotation
    called: list[Any] = []
    with kind(1) as executor:
        futures = [executor.submit(wait_and_square, desk.port, number) for number in range(9)]
        futures[8].add_done_callback(called.append)
        assert futures[8].cancel()
        assert called == [futures[8]]
        desk.release()


def test_a_callback_may_submit(kind: Any, desk: SyncDesk) -> None:
    second: list[Any] = []
    submitted = threading.Event()
    with kind(1) as executor:

        def go_on(future: Any) -> None:
            second.append(executor.submit(square, future.result()))
            submitted.set()

        executor.submit(wait_and_square, desk.port, 3).add_done_callback(go_on)
        desk.release()
        assert submitted.wait(30)
        assert second[0].result() == 81


# -- module functions ------------------------------------------------------------------------------


def test_wait_returns_all_by_default(executor: Any) -> None:
    futures = [executor.submit(square, number) for number in range(5)]
    done, not_done = wait(futures)
    assert done == set(futures)
    assert not not_done


def test_wait_for_the_first(executor: Any, desk: SyncDesk) -> None:
    """FIRST_COMPLETED: The function will return when any future finishes or is cancelled."""
    futures = [executor.submit(wait_and_square, desk.port, number) for number in (1, 2)]
    desk.release(2)
    done, not_done = wait(futures, return_when=FIRST_COMPLETED)
    assert (done, not_done) == ({futures[1]}, {futures[0]})
    desk.release()
    wait(futures)


def test_wait_is_woken_by_a_cancellation(kind: Any, desk: SyncDesk) -> None:
    with kind(1) as executor:
        futures = [executor.submit(wait_and_square, desk.port, number) for number in range(9)]
        threading.Timer(0.1, futures[8].cancel).start()
        threading.Timer(0.3, desk.release).start()
        done, _ = wait(futures[8:], timeout=30, return_when=FIRST_COMPLETED)
        assert done == {futures[8]}


def test_wait_for_the_first_exception(executor: Any, desk: SyncDesk) -> None:
    """FIRST_EXCEPTION: The function will return when any future finishes by raising an exception."""  # noqa: E501 - a quotation
    futures = [
        executor.submit(wait_and_square, desk.port, 1),
        executor.submit(wait_and_refuse, desk.port, 2),
    ]
    desk.release(2)
    done, not_done = wait(futures, return_when=FIRST_EXCEPTION)
    assert (done, not_done) == ({futures[1]}, {futures[0]})
    desk.release()
    wait(futures)


def test_wait_with_a_timeout(executor: Any, desk: SyncDesk) -> None:
    future = executor.submit(wait_and_square, desk.port, 1)
    assert wait([future], timeout=0.01) == (set(), {future})
    desk.release()
    wait([future])


def test_as_completed_yields_futures_as_they_complete(executor: Any, desk: SyncDesk) -> None:
    futures = {executor.submit(wait_and_square, desk.port, n): n for n in (1, 2)}
    completed = concurrent.futures.as_completed(futures)
    desk.release(2)
    assert futures[next(completed)] == 2
    desk.release(1)
    assert [futures[future] for future in completed] == [1]


def test_as_completed_with_a_timeout(executor: Any, desk: SyncDesk) -> None:
    future = executor.submit(wait_and_square, desk.port, 1)
    with pytest.raises(TimeoutError, match=r"1 \(of 1\) futures unfinished"):
        list(concurrent.futures.as_completed([future], timeout=0.01))
    desk.release()
    wait([future])


def test_a_future_can_be_awaited_in_a_loop(executor: Any) -> None:
    async def main() -> None:
        assert await asyncio.wrap_future(executor.submit(square, 3)) == 9
        with pytest.raises(RefusedError):
            await asyncio.wrap_future(executor.submit(refuse, 3))
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(executor, square, 4) == 16

    asyncio.run(main())


def test_cancelling_who_awaits_cancels_the_future(kind: Any, desk: SyncDesk) -> None:
    async def main() -> None:
        with kind(1) as executor:
            futures = [executor.submit(wait_and_square, desk.port, number) for number in range(9)]
            wrapped = asyncio.wrap_future(futures[8])
            wrapped.cancel()
            with pytest.raises(asyncio.CancelledError):
                await wrapped
            await asyncio.sleep(0)  # the loop tells the future in its next turn
            assert futures[8].cancelled()
            desk.release()
            await asyncio.gather(*map(asyncio.wrap_future, futures[:8]))

    asyncio.run(main())


def test_several_threads_may_submit(executor: Any) -> None:
    found: list[list[int]] = [[] for _ in range(8)]

    def use(number: int) -> None:
        futures = [executor.submit(square, number * 100 + n) for n in range(50)]
        found[number] = [future.result() for future in futures]

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[(number * 100 + n) ** 2 for n in range(50)] for number in range(8)]


def test_a_broken_pool_raises_broken_executor(kind: Any) -> None:
    """Should initializer raise an exception, all currently pending jobs will raise a BrokenProcessPool, as well as any attempt to submit more jobs to the pool."""  # noqa: E501 - a quotation
    with kind(1, initializer=refuse, initargs=(7,)) as executor:
        futures = [executor.submit(square, number) for number in range(3)]
        for future in futures:
            with pytest.raises(concurrent.futures.process.BrokenProcessPool):
                future.result()
        with pytest.raises(concurrent.futures.BrokenExecutor):
            executor.submit(square, 1)


@pytest.mark.parametrize("arguments", [{"max_workers": 0}, {"max_tasks_per_child": 0}])
def test_counts_below_one_are_value_errors(kind: Any, arguments: Any) -> None:
    """If max_workers is less than or equal to 0, then a ValueError will be raised."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        kind(**arguments)


def test_an_initializer_must_be_callable(kind: Any) -> None:
    with pytest.raises(TypeError):
        kind(initializer=5)


def test_the_idioms_of_the_documentation_run_when_the_import_is_changed() -> None:
    example = Path(__file__).parents[1] / "examples" / "idioms.py"
    printed = [
        subprocess.run(
            [sys.executable, "-W", "error", example, *arguments],
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        ).stdout
        for arguments in ([], ["processes"])
    ]
    assert printed[0] == printed[1]
    assert len(printed[0].splitlines()) > 20


def test_waiting_is_not_polling(executor: Any) -> None:
    future = executor.submit(square, 2)
    assert future.result(timeout=30) == 4
    began = time.thread_time()
    with pytest.raises(TimeoutError):
        executor.submit(time.sleep, 0.3).result(timeout=0.2)
    assert time.thread_time() - began < 0.1
