"""What a run does from its first call to its last. Each docstring quotes the sentence it tests."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import psutil
import pytest
from desk import (
    Desk,
    RefusedError,
    RefuseOdd,
    Wait,
    keywords,
    look_around,
    open_desk,
    refuse,
    refuse_odd,
    say,
    square,
    succeed_on_attempt,
    variable,
)

import asyncrt
from asyncrt import Executor, Failure, Retry, Success
from asyncrt.errors import (
    CallTimeoutError,
    ConfigError,
    ExecutorClosedError,
    NestedExecutorError,
    RunCancelledError,
    RunDeadlineError,
    SerializationError,
    WorkerCrashedError,
)
from asyncrt.events import CallQueued, CallReturned, CallSent, CallStarted, RunEnded

pytestmark = pytest.mark.anyio


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with open_desk() as desk:
        yield desk


@pytest.fixture
async def executor() -> AsyncIterator[Executor]:
    async with Executor(max_workers=2, echo=False) as executor:
        yield executor


class Pulled:
    """An input without a size that knows how far it was pulled."""

    def __init__(self) -> None:
        self.count = 0
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[int]:
        try:
            for number in itertools.count():
                self.count += 1
                yield number
        finally:
            self.closed.set()


async def until(run: asyncrt.Run[Any], kind: type, count: int = 1) -> None:
    """Wait until a run has had so many events of a kind."""
    async for event in run.events():
        count -= isinstance(event, kind)
        if not count:
            return


def processes() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


# -- beginning -------------------------------------------------------------------------------------


async def test_calls_start_when_map_is_called(executor: Executor, desk: Desk) -> None:
    """Calls start when `map` is called."""
    run = executor.map(Wait(desk), range(2))
    await desk.arrived(0, 1)
    desk.release()
    assert await run == [0, 1]


async def test_a_submitted_call_starts_when_submit_is_called(
    executor: Executor, desk: Desk
) -> None:
    """Calls start when `map` is called."""
    call = executor.submit(Wait(desk), 3)
    await desk.arrived(3)
    desk.release()
    assert await call == 9


async def test_sized_inputs_are_accepted_whole(executor: Executor) -> None:
    """Sized inputs are accepted whole."""
    numbers = list(range(1000))
    run = executor.map(square, numbers)
    numbers.clear()
    assert run.stats.queued == len(run.calls) == 1000
    assert await run == [number * number for number in range(1000)]


async def test_an_empty_input_is_a_run_that_has_ended(executor: Executor) -> None:
    """Sized inputs are accepted whole."""
    run = executor.map(square, [])
    assert run.done()
    assert await run == []
    assert [result async for result in executor.map(square, iter(()))] == []


async def test_iterators_are_pulled_as_results_are_consumed(executor: Executor) -> None:
    """Iterators and async iterables are pulled as results are consumed, in bounded memory."""
    source = Pulled()
    taken = 0
    async with executor.map(square, iter(source), max_in_flight=10) as run:
        async for result in run:
            assert result == taken**2
            taken += 1
            assert source.count <= taken + 10
            assert len(run.calls) <= 10 + 2048
            if taken == 3000:
                break
    assert source.count >= 3000


async def test_async_iterables_are_pulled_as_results_are_consumed(executor: Executor) -> None:
    """Iterators and async iterables are pulled as results are consumed, in bounded memory."""
    pulled = 0

    async def numbers() -> AsyncIterator[int]:
        nonlocal pulled
        for number in itertools.count():
            pulled += 1
            yield number
            await anyio.lowlevel.checkpoint()

    taken = 0
    async with executor.map(square, numbers(), max_in_flight=10) as run:
        async for result in run:
            assert result == taken**2
            taken += 1
            assert pulled <= taken + 10
            if taken == 300:
                break


async def test_an_awaited_run_pulls_its_whole_input(executor: Executor) -> None:
    """Iterators and async iterables are pulled as results are consumed, in bounded memory."""
    source = itertools.islice(iter(Pulled()), 3000)
    assert await executor.map(square, source, max_in_flight=10) == [n * n for n in range(3000)]


async def test_a_blocking_iterator_is_pulled_in_a_thread(executor: Executor) -> None:
    """...a blocking iterator in a thread."""
    items: queue.Queue[int | None] = queue.Queue()
    run = executor.map(square, iter(items.get, None))
    results = aiter(run)
    for number in (2, 3):
        items.put(number)
        assert await anext(results) == number**2  # while the iterator blocks
    items.put(None)
    assert await anext(results, None) is None


async def test_itertools_count_is_a_legal_input(executor: Executor) -> None:
    """`itertools.count()` is a legal input."""
    async with executor.map(square, itertools.count()) as run:
        assert [await anext(results) for results in [aiter(run)] * 1] == [0]
        assert [await anext(run) for _ in range(3)] == [1, 4, 9]


async def test_several_inputs_may_be_mixed(executor: Executor) -> None:
    """Iterators and async iterables are pulled as results are consumed, in bounded memory."""

    async def numbers() -> AsyncIterator[int]:
        for number in range(3):
            yield number

    assert await executor.map(pow, numbers(), [2, 3, 4, 5]) == [0, 1, 16]


# -- ending ----------------------------------------------------------------------------------------


async def test_leaving_the_run_cancels_its_unfinished_calls(executor: Executor, desk: Desk) -> None:
    """Leaving `async with run` cancels its unfinished calls."""
    async with executor.map(Wait(desk), range(100)) as run:
        await desk.arrived(0, 1)
    await desk.killed(0, 1)
    assert run.state == "cancelled"
    assert run.stats.cancelled == 100
    assert await executor.map(square, range(3)) == [0, 1, 4]
    assert sorted(desk.seen) == ["0", "1"]


async def test_leaving_a_finished_run_changes_nothing(executor: Executor) -> None:
    """Leaving `async with run` cancels its unfinished calls."""
    async with executor.map(square, range(3)) as run:
        await run
    assert (run.state, await run) == ("succeeded", [0, 1, 4])


async def test_leaving_a_run_by_an_exception_cancels_it_and_raises_that(
    executor: Executor, desk: Desk
) -> None:
    """Leaving `async with run` cancels its unfinished calls."""
    with pytest.raises(RefusedError, match="body"):  # noqa: PT012 - what leaves the block is tested
        async with executor.map(Wait(desk), [7]):
            await desk.arrived(7)
            raise RefusedError("body")
    await desk.killed(7)


async def test_cancelling_who_awaits_a_run_cancels_the_run(executor: Executor, desk: Desk) -> None:
    """Cancelling `await run` or a waiting `__anext__` cancels the run."""
    run = executor.map(Wait(desk), range(2))
    task = asyncio.ensure_future(run)
    await desk.arrived(0, 1)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    await desk.killed(0, 1)
    assert run.state == "cancelled"
    with pytest.raises(RunCancelledError):
        await run


async def test_cancelling_who_waits_for_the_next_result_cancels_the_run(
    executor: Executor, desk: Desk
) -> None:
    """Cancelling `await run` or a waiting `__anext__` cancels the run."""
    run = executor.map(Wait(desk), range(2))
    results = aiter(run)
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(anext, results)
            await desk.arrived(0, 1)
            scope.cancel()
    await desk.killed(0, 1)
    assert run.state == "cancelled"
    with pytest.raises(RunCancelledError):
        await anext(results)


async def test_shield_protects_a_run_that_several_wait_for(executor: Executor, desk: Desk) -> None:
    """...cancels the run (`asyncio.shield` for several waiters)."""
    run = executor.map(Wait(desk), range(2))
    first, second = (asyncio.ensure_future(asyncio.shield(run)) for _ in range(2))
    await desk.arrived(0, 1)
    first.cancel()
    await asyncio.wait({first})
    desk.release()
    assert await second == [0, 1]


async def test_an_awaited_run_caches_its_list(executor: Executor, desk: Desk) -> None:
    """`await run` caches its list and may be repeated."""
    run = executor.map(Wait(desk), range(3))
    desk.release()
    first = await run
    first.append(99)
    assert await run == [0, 1, 4]
    assert sorted(desk.seen) == ["0", "1", "2"]


async def test_a_failed_run_raises_its_failure_each_time(executor: Executor) -> None:
    """`await run` caches its list and may be repeated."""
    run = executor.map(refuse, [5])
    for _ in range(2):
        with pytest.raises(RefusedError, match="5"):
            await run


async def test_a_run_is_iterated_once(executor: Executor) -> None:
    """A Run is iterated once."""
    run = executor.map(square, range(3))
    assert [result async for result in run] == [0, 1, 4]
    with pytest.raises(RuntimeError, match="iterated once"):
        aiter(run)
    with pytest.raises(RuntimeError, match="iterated once"):
        await anext(run.as_completed())


async def test_iterating_and_awaiting_one_run_is_an_error(executor: Executor) -> None:
    """...mixing both is an error."""
    run = executor.map(square, range(3))
    aiter(run)
    with pytest.raises(RuntimeError, match="cannot be awaited as well"):
        await run
    run = executor.map(square, range(3))
    await run
    with pytest.raises(RuntimeError, match="this run is awaited"):
        aiter(run)
    with pytest.raises(RuntimeError, match="async for"):
        await anext(run)


async def test_a_bare_break_stops_pulling(executor: Executor) -> None:
    """A bare `break` stops pulling input."""
    source = Pulled()
    run = executor.map(square, iter(source), max_in_flight=5)
    async for _ in run:
        break
    await until(run, CallReturned, 6)
    await executor.map(square, range(50))
    assert source.count == 6


async def test_leaving_the_executor_waits_for_the_calls_that_started(desk: Desk) -> None:
    """Leaving the executor normally waits for the calls that started..."""
    executor = await asyncrt.connect(max_workers=2, echo=False)
    run = executor.map(Wait(desk), range(3))
    await desk.arrived(0, 1)
    async with anyio.create_task_group() as group:
        group.start_soon(executor.aclose)
        await anyio.wait_all_tasks_blocked()
        assert not run.done()
        desk.release()
    assert await run == [0, 1, 4]
    assert processes() == []


@pytest.mark.parametrize("sized", [True, False])
async def test_leaving_the_executor_drops_input_that_was_not_pulled(*, sized: bool) -> None:
    """...and drops input not yet pulled."""
    source = range(1000) if sized else iter(Pulled())
    async with Executor(max_workers=1, echo=False) as executor:
        run = executor.map(square, source, max_in_flight=5)
        await until(run, CallReturned, 5)
    assert run.state == "succeeded"
    # Input with a size was accepted whole.
    assert await run == [number**2 for number in range(1000 if sized else 5)]


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_leaving_the_executor_does_not_wait_for_an_input_that_never_answers(
    kind: str,
) -> None:
    """...and drops input not yet pulled."""
    release = threading.Event()

    def blocking() -> Iterator[int]:
        yield 3
        release.wait()

    async def sleeping() -> AsyncIterator[int]:
        yield 3
        await anyio.sleep_forever()

    async with Executor(max_workers=1, echo=False) as executor:
        run = executor.map(square, blocking() if kind == "sync" else sleeping())
        await until(run, CallReturned)
    assert await run == [9]
    release.set()
    for thread in threading.enumerate():
        if thread.name == "asyncrt input":
            await asyncio.to_thread(thread.join)


async def test_results_come_in_input_order_unless_told_otherwise(
    executor: Executor, desk: Desk
) -> None:
    """`ordered=True` is the default."""
    run = executor.map(Wait(desk, 0), range(5))
    first = asyncio.ensure_future(anext(aiter(run)))
    await until(run, CallReturned, 4)
    assert not first.done()
    desk.release()
    assert [await first, *[result async for result in _rest(run)]] == [0, 1, 4, 9, 16]


async def _rest(run: asyncrt.Run[Any]) -> AsyncIterator[Any]:
    while True:
        try:
            yield await anext(run)
        except StopAsyncIteration:
            return


async def test_unordered_results_come_as_they_are_there(executor: Executor, desk: Desk) -> None:
    """`ordered=True` is the default."""
    run = executor.map(Wait(desk, 0), range(5), ordered=False)
    results = aiter(run)
    assert sorted([await anext(results) for _ in range(4)]) == [1, 4, 9, 16]
    desk.release()
    assert [await anext(results), await anext(results, None)] == [0, None]


async def test_calls_come_as_they_complete_whatever_the_order(
    executor: Executor, desk: Desk
) -> None:
    """`ordered=True` is the default."""
    run = executor.map(Wait(desk, 0), range(3))
    calls = run.as_completed()
    indexes = [(await anext(calls)).index for _ in range(2)]
    desk.release()
    last = await anext(calls)
    assert (sorted(indexes), last.index, await last) == ([1, 2], 0, 0)
    assert await anext(calls, None) is None


async def test_calls_are_a_bounded_window_for_unsized_input(executor: Executor) -> None:
    """`run.calls` is a bounded window for unsized input."""
    most = 0
    async with executor.map(square, itertools.count()) as run:
        async for result in run:
            most = max(most, len(run.calls))
            if result >= 10_000**2:
                break
        assert run.calls[0].index > 8000
        assert 1000 <= most <= 1000 + 2048
        delivered = asyncrt.Call(run, 0)
        assert delivered.status == "succeeded"
        await delivered.cancel()  # changes nothing, for whichever call
        with pytest.raises(RuntimeError, match="was delivered and is not kept"):
            await delivered
        assert await anext(run) == 10_001**2


# -- submit and options ----------------------------------------------------------------------------


async def test_submit_takes_the_functions_own_arguments_only(executor: Executor) -> None:
    """`submit` takes the function's own arguments only: options through `with_options`."""
    result = await executor.submit(keywords, 1, timeout="mine", retries=2, fn=3, name=4)
    assert result == ((1,), {"timeout": "mine", "retries": 2, "fn": 3, "name": 4})


async def test_submit_gets_options_through_a_view(executor: Executor) -> None:
    """`submit` takes the function's own arguments only: options through `with_options`."""
    patient = executor.with_options(retries=Retry(attempts=3, delay=0))
    call = patient.submit(succeed_on_attempt, 3)
    assert (await call, call.attempts) == (3, 3)
    with pytest.raises(RefusedError, match="1"):
        await executor.submit(succeed_on_attempt, 3)


async def test_a_view_shares_the_pool_and_its_max_workers_when_the_shape_is_the_same(
    desk: Desk,
) -> None:
    """...shares the pool (and its total `max_workers`) when the pod shape is the same,"""
    async with Executor(max_workers=1, echo=False) as executor:
        first = executor.submit(Wait(desk), 1)
        await desk.arrived(1)
        view = executor.with_options(timeout=60.0, max_workers=5)
        second = view.submit(Wait(desk), 2)
        await anyio.wait_all_tasks_blocked()
        assert (first.status, second.status) == ("sent", "queued")
        desk.release()
        assert (await first, await second) == (1, 4)
        workers = {
            event.worker
            for call in (first, second)
            async for event in call.run.events()
            if isinstance(event, CallSent)
        }
        assert len(workers) == 1


async def test_a_view_has_its_own_pool_when_the_shape_is_another(desk: Desk) -> None:
    """...has its own when not"""
    async with Executor(max_workers=1, echo=False) as executor:
        first = executor.submit(Wait(desk), 1)
        await desk.arrived(1)
        view = executor.with_options(env={"ASYNCRT_TEST": "there"})
        assert await view.submit(variable, "ASYNCRT_TEST") == "there"
        assert first.status == "sent"
        desk.release()
        await first
        assert await executor.submit(variable, "ASYNCRT_TEST") is None
    assert processes() == []


@pytest.mark.parametrize(
    ("option", "value"),
    [("min_workers", 1), ("idle_timeout", 5), ("echo", True)],
)
async def test_a_view_of_shared_workers_cannot_change_their_pool(option: str, value: Any) -> None:
    changed: dict[str, Any] = {option: value}
    async with Executor(max_workers=2, echo=False) as executor:
        with pytest.raises(ConfigError, match=f"{option}={value!r}: these workers are shared"):
            executor.with_options(**changed)
        own = executor.with_options(env={"ASYNCRT_TEST": "own"}, **changed)
        assert await own.submit(variable, "ASYNCRT_TEST") == "own"
        other = executor.with_options(env={"ASYNCRT_TEST": "own"}, idle_timeout=9.0)
        with pytest.raises(ConfigError, match="these workers are shared"):
            other.submit(square, 2)


async def test_a_call_cannot_open_an_executor(executor: Executor) -> None:
    async def nested() -> int:
        import asyncrt

        async with asyncrt.Executor() as inner:
            return await inner.submit(abs, -1)

    with pytest.raises(NestedExecutorError, match=r"call 0 of run .* cannot open an executor"):
        await executor.submit(nested)


async def test_an_executor_cannot_travel(executor: Executor) -> None:
    with pytest.raises(SerializationError, match=r"'executor'.*return what is to be done") as error:
        executor.submit(lambda: executor.submit(abs, -1))
    assert isinstance(error.value.__cause__, NestedExecutorError)


async def test_a_view_never_closes_anything(executor: Executor) -> None:
    """...and never closes anything."""
    async with executor.with_options(timeout=60.0) as view:
        assert await view.submit(square, 2) == 4
    await view.aclose()
    await view.aclose(cancel=True)
    assert await view.submit(square, 3) == 9
    assert await executor.submit(square, 4) == 16
    await executor.aclose()
    with pytest.raises(ExecutorClosedError):
        view.submit(square, 5)


# -- failures --------------------------------------------------------------------------------------


async def test_the_first_failure_is_raised_when_it_happens_and_cancels_the_rest(
    executor: Executor, desk: Desk
) -> None:
    """The first failure is raised, when it happens, as the user's own exception type, and cancels
    what has not finished; completed results stay on the run.
    """
    run = executor.map(RefuseOdd(desk, 0, 1), [0, 2, 1, 4], chunksize=1)
    await desk.arrived(0, 1)
    assert await run.calls[1] == 2
    desk.release(1)
    with pytest.raises(RefusedError) as caught:
        await run
    assert (type(caught.value), caught.value.args) == (RefusedError, (1,))
    await desk.killed(0)
    assert run.state == "failed"
    assert [call.status for call in run.calls] == ["cancelled", "succeeded", "failed", "cancelled"]
    assert run.calls[1].outcome == Success(2)
    assert run.failures == (Failure(2, caught.value, 1),)
    assert run.calls[2].outcome == run.failures[0]
    stats = run.stats
    assert (stats.succeeded, stats.failed, stats.cancelled, stats.pending) == (1, 1, 2, 0)


async def test_a_failure_is_raised_while_earlier_results_are_waited_for(
    executor: Executor, desk: Desk
) -> None:
    """The first failure is raised, when it happens..."""
    run = executor.map(RefuseOdd(desk, 0, 1), [0, 1])
    first = asyncio.ensure_future(anext(aiter(run)))
    await desk.arrived(0, 1)
    desk.release(1)
    with pytest.raises(RefusedError):
        await first
    await desk.killed(0)


async def test_the_executor_goes_on_after_a_failure(executor: Executor) -> None:
    """...cancels what has not finished"""
    for _ in range(5):
        async with executor.map(refuse_odd, range(2000)) as run:
            with pytest.raises(RefusedError):
                await run
    assert await executor.map(square, range(3)) == [0, 1, 4]


async def test_a_failure_says_where_it_comes_from(executor: Executor) -> None:
    """...the user's own exception, type and all, with a note"""
    run = executor.map(refuse, [5])
    with pytest.raises(RefusedError) as caught:
        await run
    (note,) = caught.value.__notes__
    assert note.startswith(f"asyncrt: call 0 of run {run.id}, attempt 1, on local-")
    assert "raise RefusedError(number)" in note


async def test_failures_are_returned_in_place_if_asked_for(executor: Executor) -> None:
    """`return_exceptions=True` lets all go on and returns failures in place."""
    run = executor.map(refuse_odd, range(4), return_exceptions=True)
    zero, one, two, three = await run
    assert (zero, two) == (0, 2)
    assert [type(error) for error in (one, three)] == [RefusedError, RefusedError]
    assert run.state == "succeeded"
    assert sorted(failure.index for failure in run.failures) == [1, 3]
    results = executor.map(refuse_odd, range(4), return_exceptions=True)
    assert [repr(result) async for result in results] == list(map(repr, (zero, one, two, three)))


async def test_no_group_is_ever_around_one_error(desk: Desk) -> None:
    """Never an ExceptionGroup around one error."""
    with pytest.raises(RefusedError):  # noqa: PT012 - what leaves the block is tested
        async with Executor(max_workers=2, echo=False) as executor:  # noqa: SIM117 - one inside the other
            async with executor.map(refuse, range(10)) as run:
                await run
    with pytest.raises(RefusedError, match="body"):  # noqa: PT012 - what leaves the block is tested
        async with Executor(max_workers=2, echo=False) as executor:
            executor.map(Wait(desk), range(2))
            await desk.arrived(0, 1)
            raise RefusedError("body")


async def test_a_call_is_cancelled_by_itself(executor: Executor, desk: Desk) -> None:
    """awaitable; cancel(), logs(), index, attempts"""
    run = executor.map(Wait(desk), range(4), return_exceptions=True)
    await desk.arrived(0, 1)
    await run.calls[0].cancel()
    await desk.killed(0)
    await run.calls[3].cancel()
    desk.release()
    results = await run
    assert results[1:3] == [1, 4]
    assert [type(results[index]) for index in (0, 3)] == [RunCancelledError] * 2
    assert [call.status for call in run.calls] == [
        "cancelled", "succeeded", "succeeded", "cancelled",
    ]  # fmt: skip
    with pytest.raises(RunCancelledError):
        await run.calls[0]
    assert sorted(desk.seen) == ["0", "1", "2"]


async def test_cancelling_who_awaits_a_call_cancels_the_call(
    executor: Executor, desk: Desk
) -> None:
    """awaitable; cancel(), logs(), index, attempts"""
    call = executor.submit(Wait(desk), 1)
    task = asyncio.ensure_future(call)
    await desk.arrived(1)
    task.cancel()
    await asyncio.wait({task})
    await desk.killed(1)
    assert call.status == "cancelled"


async def test_cancelling_a_run_returns_when_no_worker_runs_any_of_it(
    executor: Executor, desk: Desk
) -> None:
    """async def cancel(self)"""
    run = executor.map(Wait(desk), range(10))
    await desk.arrived(0, 1)
    waiting = asyncio.ensure_future(run)
    await anyio.wait_all_tasks_blocked()
    await run.cancel()
    await desk.killed(0, 1)
    with pytest.raises(RunCancelledError):
        await waiting
    await run.cancel()
    assert await executor.map(square, range(2)) == [0, 1]


async def test_a_run_that_is_not_done_at_its_deadline_is_cancelled(
    executor: Executor, desk: Desk
) -> None:
    """`deadline` (run)"""
    await executor.submit(square, 1)
    run = executor.map(Wait(desk, 1), [0, 1], deadline=anyio.current_time() + 1.0)
    await run.calls[0]
    await desk.arrived(1)
    with pytest.raises(RunDeadlineError):
        await run
    await desk.killed(1)
    assert run.calls[0].outcome == Success(0)


# -- leaving ---------------------------------------------------------------------------------------


async def test_leaving_by_an_exception_kills_what_runs_remotely(desk: Desk) -> None:
    """Leaving by an exception, a cancellation or Ctrl-C cancels remote work: children are killed"""
    run: asyncrt.Run[int] | None = None
    with pytest.raises(RefusedError):  # noqa: PT012 - what leaves the block is tested
        async with Executor(max_workers=2, echo=False) as executor:
            run = executor.map(Wait(desk), range(2))
            await desk.arrived(0, 1)
            raise RefusedError
    await desk.killed(0, 1)
    assert processes() == []
    assert run is not None
    assert run.state == "cancelled"
    with pytest.raises(RunCancelledError, match="the executor was closed"):
        await run


async def test_leaving_by_a_cancellation_kills_what_runs_remotely(desk: Desk) -> None:
    """Leaving by an exception, a cancellation or Ctrl-C cancels remote work: children are killed"""
    with anyio.CancelScope() as scope:
        async with Executor(max_workers=2, echo=False) as executor:
            executor.map(Wait(desk), range(2))
            await desk.arrived(0, 1)
            scope.cancel()
            await anyio.sleep_forever()
    await desk.killed(0, 1)
    assert processes() == []


async def test_who_waits_elsewhere_is_told_when_the_executor_is_closed(desk: Desk) -> None:
    """Leaving by an exception, a cancellation or Ctrl-C cancels remote work"""
    executor = await asyncrt.connect(max_workers=1, echo=False)
    waiting = asyncio.ensure_future(executor.map(Wait(desk), [1]))
    await desk.arrived(1)
    await executor.aclose(cancel=True)
    with pytest.raises(RunCancelledError, match="the executor was closed"):
        await waiting
    await executor.aclose()
    with pytest.raises(ExecutorClosedError):
        executor.map(square, [1])


async def test_asyncio_timeout_around_a_map_works(executor: Executor, desk: Desk) -> None:
    """`asyncio.timeout` around a map works"""
    run = executor.map(Wait(desk), range(2))
    await desk.arrived(0, 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await run
    await desk.killed(0, 1)
    assert run.state == "cancelled"


# -- connect ---------------------------------------------------------------------------------------


async def test_an_executor_may_be_opened_in_one_task_and_closed_in_another() -> None:
    """`connect()` hosts the task group in one task of its own"""
    executor = await asyncio.create_task(asyncrt.connect(max_workers=1, echo=False))
    assert await asyncio.ensure_future(executor.submit(square, 3)) == 9
    await asyncio.create_task(executor.aclose())
    assert processes() == []


class BrokenBackend:
    """A backend with a bug."""

    name = "broken"

    @asynccontextmanager
    async def open_pool(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        if self.name:
            raise ZeroDivisionError("a bug")
        yield


async def test_a_crash_of_the_host_is_raised_by_the_next_call() -> None:
    """...its crash is raised by the next call."""
    executor = await asyncrt.connect(backend=BrokenBackend())
    run = executor.map(square, range(3))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        await run
    with pytest.raises(ZeroDivisionError, match="a bug"):
        executor.map(square, range(3))
    await executor.aclose()


async def test_an_executor_is_opened_once_and_used_only_while_it_is_open() -> None:
    """ExecutorClosedError: used before it was opened or after it was closed"""
    executor = Executor(max_workers=1)
    with pytest.raises(ExecutorClosedError, match="is not open"):
        executor.submit(square, 1)
    async with executor:
        with pytest.raises(ExecutorClosedError, match="make a new one"):
            await executor.__aenter__()
    with pytest.raises(ExecutorClosedError, match="is closed"):
        executor.submit(square, 1)


# -- speed and order of work -----------------------------------------------------------------------


async def test_a_long_call_never_holds_up_short_ones(executor: Executor, desk: Desk) -> None:
    """`chunksize="auto"` coalesces short calls, never delays a long one (prefetched calls can be
    revoked).
    """
    run = executor.map(Wait(desk, 700), range(2000), ordered=False)
    results = aiter(run)
    found = {await anext(results) for _ in range(1999)}
    assert found == {number**2 for number in range(2000) if number != 700}
    desk.release()
    assert await anext(results) == 700**2


async def test_short_calls_are_coalesced(executor: Executor) -> None:
    """...the chunk is the unit of dispatch, events of its calls are derived when somebody reads."""
    run = executor.map(square, range(5000))
    await run
    events = [event async for event in run.events()]
    for kind in (CallQueued, CallSent, CallStarted, CallReturned):
        assert {e.index for e in events if isinstance(e, kind)} == set(range(5000))
    times = {event.time for event in events if isinstance(event, CallSent)}
    assert len(times) < 2500
    assert isinstance(events[-1], RunEnded)


# -- inside ----------------------------------------------------------------------------------------


async def test_a_call_knows_itself_and_its_scratch_directory_is_removed(executor: Executor) -> None:
    """`asyncrt.current_call()` gives run, index, attempt, deadline and a scratch dir."""
    call = executor.with_options(timeout=60.0).submit(look_around)
    run_id, index, attempt, limited, scratch = await call
    assert (run_id, index, attempt, limited) == (call.run.id, 0, 1, True)
    assert not os.path.exists(scratch)  # noqa: ASYNC240 - one look, in a test


async def test_a_call_keeps_what_it_printed(executor: Executor) -> None:
    """awaitable; cancel(), logs(), index, attempts"""
    run = executor.map(say, range(3))
    await run
    assert [call.logs() for call in run.calls] == ["number 0\n", "number 1\n", "number 2\n"]


async def test_errors_keep_their_facts_and_survive_pickle(executor: Executor, desk: Desk) -> None:
    """Errors keep their facts as attributes and survive pickle."""
    call = executor.with_options(timeout=0.5).submit(Wait(desk), 1)
    with pytest.raises(CallTimeoutError) as caught:
        await call
    await desk.killed(1)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.timeout, copy.run_id, copy.index, copy.attempt) == (0.5, call.run.id, 0, 1)
    with pytest.raises(WorkerCrashedError) as crashed:
        await executor.submit(lambda: os._exit(3))  # coverage replaces the function itself
    copy = pickle.loads(pickle.dumps(crashed.value))
    assert (copy.exit_code, copy.signal) == (3, None)
