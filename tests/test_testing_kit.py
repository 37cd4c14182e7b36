from __future__ import annotations

import asyncio
import importlib
import inspect
import itertools
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

import asyncrt
import asyncrt.testing
from asyncrt.errors import (
    CallTimeoutError,
    OutOfMemoryError,
    RunCancelledError,
    StartTimeoutError,
    WorkerCrashedError,
    WorkerLostError,
    WorkerStartError,
)
from asyncrt.options import PoolSettings
from asyncrt.testing import (
    InterposedBackend,
    ScriptedBackend,
    VirtualClockEventLoop,
    run_in_virtual_time,
    takes,
)
from asyncrt.testing.conformancebase import absolute, until_started
from asyncrt.testing.scripted import ScriptedPool, ScriptedWorker
from asyncrt.testing.scriptedcalls import Work
from asyncrt.worker.protocol import Buffer

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualClockEventLoop}


@pytest.fixture
def backend() -> Iterator[ScriptedBackend]:
    backend = ScriptedBackend()
    yield backend
    assert [worker.name for worker in backend.workers if worker.busy or not worker.ended] == []


def executor_on(backend: Any, **options: Any) -> asyncrt.Executor:
    merged = {"max_workers": 2, "echo": False, **options}
    return asyncrt.Executor(config=asyncrt.Config(), backend=backend, **merged)


# -- the clock ------------------------------------------------------------------------------------


def test_hours_of_sleep_pass_at_once_and_in_order() -> None:
    async def main() -> tuple[list[str], float]:
        order = []

        async def wait(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            order.append(name)

        began = anyio.current_time()
        async with anyio.create_task_group() as group:
            group.start_soon(wait, "three hours", 10800)
            group.start_soon(wait, "a minute", 60)
            group.start_soon(wait, "a week", 604800)
        return order, anyio.current_time() - began

    order, took = run_in_virtual_time(main)
    assert order == ["a minute", "three hours", "a week"]
    assert took == pytest.approx(604800)


def test_arguments_and_result_pass_through_virtual_time() -> None:
    async def add(one: int, other: int) -> int:
        return one + other

    assert run_in_virtual_time(add, 1, 2) == 3


async def _opened_after_some_turns(gate: threading.Event) -> None:
    for _ in range(50):
        await anyio.lowlevel.checkpoint()
    gate.set()


async def _time_passed_during(work: Any, gate: threading.Event) -> float:
    """Return what the clock showed when the work ended, beside a timer that waits for an hour."""
    began = anyio.current_time()
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep, 3600)
        group.start_soon(_opened_after_some_turns, gate)
        await work
        took = anyio.current_time() - began
        group.cancel_scope.cancel()
    return took


async def test_clock_stands_while_an_anyio_thread_works() -> None:
    gate = threading.Event()
    assert await _time_passed_during(anyio.to_thread.run_sync(gate.wait), gate) == 0


async def test_clock_stands_while_the_executor_of_the_loop_works() -> None:
    gate = threading.Event()
    assert await _time_passed_during(asyncio.to_thread(gate.wait), gate) == 0


async def test_clock_stands_while_it_is_held_for_a_thread() -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockEventLoop)
    gate = threading.Event()
    done = asyncio.Event()

    def work() -> None:
        gate.wait()
        loop.call_soon_threadsafe(done.set)

    thread = threading.Thread(target=work)
    with loop.hold_clock():
        thread.start()
        assert await _time_passed_during(done.wait(), gate) == 0
    thread.join()
    assert not loop.is_held


# -- calls that last ------------------------------------------------------------------------------


def test_takes_sleeps_really_where_nobody_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert takes(3600, absolute)(-1) == 1
    assert takes(lambda number: number / 2, absolute)(5) == 5
    assert slept == [3600, 2.5]


async def test_takes_lasts_as_long_on_a_scripted_worker(backend: ScriptedBackend) -> None:
    async with executor_on(backend) as executor:
        began = anyio.current_time()
        assert await executor.map(takes(3600, absolute), range(4)) == [0, 1, 2, 3]
        assert anyio.current_time() - began == pytest.approx(7200, abs=10)


async def test_coroutines_of_one_worker_overlap_and_know_who_they_are(
    backend: ScriptedBackend,
) -> None:
    async def who(seconds: float) -> tuple[int, int]:
        before = asyncrt.current_call().index
        await asyncio.sleep(seconds)
        return before, asyncrt.current_call().index

    async with executor_on(backend, max_workers=1, slots=3) as executor:
        began = anyio.current_time()
        assert await executor.map(who, [30, 10, 20], chunksize=1) == [(0, 0), (1, 1), (2, 2)]
        assert anyio.current_time() - began == pytest.approx(30, abs=1)
    with pytest.raises(RuntimeError, match="inside a call only"):
        asyncrt.current_call()


async def test_coroutine_is_cancelled_with_its_call(
    backend: ScriptedBackend, tmp_path: Path
) -> None:
    ended = tmp_path / "ended"

    async def notes_its_end() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            ended.touch()
            raise

    async with executor_on(backend, max_workers=1) as executor:
        call = executor.submit(notes_its_end)
        await until_started(call.run)
        await call.cancel()
        with pytest.raises(RunCancelledError):
            await call
        assert await executor.submit(absolute, -1) == 1
    assert ended.exists()
    assert len(backend.workers) == 1


# -- faults ---------------------------------------------------------------------------------------


async def test_reports_that_were_not_acknowledged_come_again_after_a_cut(
    backend: ScriptedBackend,
) -> None:
    async with executor_on(backend, max_workers=1) as executor:
        run = executor.map(takes(1, absolute), range(20), chunksize=5)
        results = []
        async for result in run:
            results.append(result)
            if result in (3, 9, 16):
                backend.running[0].cut_connection()
    assert results == list(range(20))
    assert [index for _, index in backend.workers[0].ran] == list(range(20))
    assert backend.workers[0].connections == 4


async def test_results_come_home_though_connections_are_refused_for_a_while(
    backend: ScriptedBackend,
) -> None:
    async with executor_on(backend, max_workers=1) as executor:
        call = executor.submit(takes(1, absolute), -1)
        await until_started(call.run)
        backend.refuse_next_connections(10)
        backend.running[0].cut_connection()
        assert await call == 1
    assert len(backend.workers) == 1
    assert len(backend.workers[0].ran) == 1


async def test_reports_that_come_twice_count_once(backend: ScriptedBackend) -> None:
    async with executor_on(backend) as executor:
        await executor.map(absolute, range(2))
        for worker in backend.running:
            worker.repeat_reports = True
        run = executor.map(absolute, range(200))
        assert await run == list(range(200))
        assert run.stats.succeeded == 200


async def test_late_reports_arrive_in_the_end(backend: ScriptedBackend) -> None:
    async with executor_on(backend) as executor:
        await executor.map(absolute, range(2))
        for worker in backend.running:
            worker.report_delay = 25.0
        began = anyio.current_time()
        assert await executor.map(absolute, range(4), chunksize=1) == [0, 1, 2, 3]
        assert anyio.current_time() - began >= 25


async def test_late_report_of_a_cancelled_run_disturbs_nobody(backend: ScriptedBackend) -> None:
    async with executor_on(backend, max_workers=1) as executor:
        await executor.submit(absolute, 1)
        backend.running[0].report_delay = 5.0
        run = executor.map(absolute, range(5))
        async with run:
            pass
        assert run.state == "cancelled"
        assert await executor.map(absolute, [-1, -2]) == [1, 2]


async def test_dead_worker_is_replaced_and_its_calls_run_elsewhere(
    backend: ScriptedBackend,
) -> None:
    async with executor_on(backend) as executor:
        run = executor.map(takes(10, absolute), range(6), chunksize=1)
        await until_started(run)
        backend.running[0].die()
        assert await run == list(range(6))
        assert run.stats.requeued == 1
    assert len(backend.workers) == 3


async def test_worker_that_hangs_is_given_up_after_orphan_timeout(
    backend: ScriptedBackend,
) -> None:
    async with executor_on(
        backend, max_workers=1, heartbeat_interval=5, orphan_timeout=60
    ) as executor:
        began = anyio.current_time()
        run = executor.map(takes(1, absolute), range(3), chunksize=1)
        await until_started(run)
        backend.running[0].hang()
        assert await run == [0, 1, 2]
        assert 60 < anyio.current_time() - began < 150
    assert [worker.ended for worker in backend.workers] == [True, True]


async def test_worker_that_hangs_from_the_start_is_a_start_timeout(
    backend: ScriptedBackend,
) -> None:
    async with executor_on(backend, max_workers=1, start_timeout=30) as executor:
        run = executor.map(absolute, range(3))
        while not backend.workers:
            await anyio.lowlevel.checkpoint()
        backend.workers[0].hang()
        with pytest.raises(StartTimeoutError):
            await run


async def test_few_failing_starts_are_survived(backend: ScriptedBackend) -> None:
    backend.fail_next_starts(2)
    async with executor_on(backend, max_workers=1) as executor:
        assert await executor.map(absolute, range(3)) == [0, 1, 2]


async def test_failing_starts_in_a_row_end_the_run_with_their_error(
    backend: ScriptedBackend,
) -> None:
    backend.fail_next_starts(3, WorkerStartError("out of workers"))
    async with executor_on(backend, max_workers=1) as executor:
        with pytest.raises(WorkerStartError, match="out of workers"):
            await executor.map(absolute, range(3))
        assert await executor.submit(absolute, -1) == 1


async def test_worker_that_does_not_know_the_token_is_not_given_calls() -> None:
    class Stranger(ScriptedBackend):
        @asynccontextmanager
        async def open_pool(
            self, settings: PoolSettings, *, token: bytes
        ) -> AsyncIterator[ScriptedPool]:
            async with super().open_pool(settings, token=token[::-1]) as pool:
                yield pool

    stranger = Stranger()
    async with executor_on(stranger, max_workers=1, start_timeout=20) as executor:
        with pytest.raises(StartTimeoutError):
            await executor.submit(absolute, 1)
    assert stranger.workers[0].connections > 1
    assert all(worker.ran == [] for worker in stranger.workers)


async def test_crashed_call_is_tried_again_by_the_policy(backend: ScriptedBackend) -> None:
    async with executor_on(backend, max_workers=1) as executor:
        run = executor.map(takes(10, absolute), [-1], retries=2)
        await until_started(run)
        backend.running[0].crash_call(signal=11)
        assert await run == [1]
        assert run.stats.retried == 1

        call = executor.submit(takes(10, absolute), -1)
        await until_started(call.run)
        backend.running[0].crash_call(signal=11)
        with pytest.raises(WorkerCrashedError) as caught:
            await call
    assert caught.value.signal == 11
    assert len(backend.workers) == 1


async def test_timeout_is_exact_in_virtual_time(backend: ScriptedBackend) -> None:
    async with executor_on(backend, max_workers=1, timeout=20) as executor:
        await executor.submit(takes(19.9, absolute), 1)
        began = anyio.current_time()
        with pytest.raises(CallTimeoutError):
            await executor.submit(takes(20.1, absolute), 1)
        assert anyio.current_time() - began == pytest.approx(20, abs=0.01)


async def test_call_without_enough_memory_is_not_tried_again(backend: ScriptedBackend) -> None:
    async with executor_on(backend, max_workers=1, memory="1Gi", retries=5) as executor:
        call = executor.submit(takes(10, absolute), -1)
        await until_started(call.run)
        backend.running[0].exhaust_memory()
        with pytest.raises(OutOfMemoryError) as caught:
            await call
    assert caught.value.limit_bytes == 1 << 30
    assert call.attempts == 1


async def test_worker_that_says_goodbye_finishes_its_call_and_gets_no_more(
    backend: ScriptedBackend,
) -> None:
    async with executor_on(backend, max_workers=1) as executor:
        run = executor.map(takes(10, absolute), range(6), chunksize=3)
        await until_started(run)
        first = backend.running[0]
        first.terminate()
        assert await run == list(range(6))
        assert (await first.wait_exit()).expected
    assert [index for _, index in first.ran] == [0]
    assert [index for _, index in backend.workers[1].ran] == [1, 2, 3, 4, 5]
    assert run.calls[1].attempts == 1


async def test_call_that_loses_all_its_workers_fails(backend: ScriptedBackend) -> None:
    async with executor_on(backend, max_workers=1) as executor:
        run = executor.map(takes(3600, absolute), [1])
        for attempt in (1, 2, 3):
            await until_started(run, attempt=attempt)
            backend.running[0].die()
        with pytest.raises(WorkerLostError):
            await run
    assert len(backend.workers) == 3


# -- time -----------------------------------------------------------------------------------------


async def test_idle_workers_end_but_those_that_shall_stay(backend: ScriptedBackend) -> None:
    async with executor_on(backend, min_workers=1, idle_timeout=60) as executor:
        await executor.map(takes(1, absolute), range(2), chunksize=1)
        assert len(backend.running) == 2
        await anyio.sleep(59)
        assert len(backend.running) == 2
        await anyio.sleep(3)
        assert len(backend.running) == 1
        await anyio.sleep(3600)
        assert len(backend.running) == 1


async def test_quiet_connections_live_on(backend: ScriptedBackend) -> None:
    async with executor_on(backend, max_workers=1, idle_timeout=None) as executor:
        await executor.submit(absolute, 1)
        await anyio.sleep(7200)
        assert await executor.submit(absolute, -2) == 2
    assert [worker.connections for worker in backend.workers] == [1]


async def test_worker_that_nobody_connects_to_ends_by_itself(backend: ScriptedBackend) -> None:
    began = anyio.current_time()
    async with backend.open_pool(PoolSettings(orphan_timeout=90), token=b"secret") as pool:
        worker = await pool.start_worker()
        ended = await worker.wait_exit()
        assert anyio.current_time() - began == pytest.approx(90)
    assert (ended.exit_code, ended.expected) == (0, True)


async def test_latency_is_paid_by_each_round_trip() -> None:
    far = ScriptedBackend(latency=0.5)
    async with executor_on(far, max_workers=1) as executor:
        await executor.submit(absolute, 1)
        began = anyio.current_time()
        await executor.submit(absolute, 1)
        assert anyio.current_time() - began == pytest.approx(1.0, abs=0.01)


# -- cancelled anywhere ---------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [*range(40), *range(40, 120, 4)])
async def test_cancelled_at_any_step_an_executor_leaves_nothing(
    steps: int, backend: ScriptedBackend
) -> None:
    async def numbers() -> AsyncIterator[int]:
        for number in itertools.count():
            await anyio.lowlevel.checkpoint()
            yield number

    slow = takes(lambda number: number % 3, absolute)

    async def work() -> None:
        async with executor_on(backend, min_workers=1) as executor:
            await executor.map(slow, range(4))
            async for _ in executor.map(takes(0.1, absolute), numbers(), max_in_flight=5):
                pass

    before = asyncio.all_tasks()
    task = asyncio.create_task(work())
    for _ in range(steps):
        await anyio.lowlevel.checkpoint()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert {left.get_name() for left in asyncio.all_tasks() - before} == set()


# -- the rest of the package ----------------------------------------------------------------------


async def test_interposed_backend_cuts_and_refuses(backend: ScriptedBackend) -> None:
    interposed = InterposedBackend(backend)
    async with executor_on(interposed, max_workers=1) as executor:
        call = executor.submit(takes(10, absolute), -1)
        await until_started(call.run)
        assert [worker.name for worker in interposed.connected] == [backend.workers[0].name]
        interposed.refuse_next_connections(2)
        interposed.connected[0].cut_connection()
        assert interposed.connected == []
        assert await call == 1
    assert interposed.name == "scripted"
    assert [worker.connections for worker in interposed.workers] == [2]


class Forgetful(ScriptedWorker):
    """Does not keep reports until they are acknowledged."""

    def _report(self, kind: int, header: dict[str, Any], body: Sequence[Buffer] = ()) -> None:
        super()._report(kind, header, body)
        self._unacknowledged.clear()


class Stubborn(ScriptedWorker):
    """Does not end what it runs when it is told to."""

    def _cancel(self, chunk: int, positions: list[int] | None) -> None:
        pass


class Mute(ScriptedWorker):
    """Keeps what calls print to itself."""

    def on_printed(self, work: Work, position: int, name: str, text: str) -> None:
        pass


@pytest.mark.parametrize(
    ("worker", "test"),
    [
        (Forgetful, "test_connections_cut_again_and_again_lose_nothing"),
        (Mute, "test_what_a_call_prints_is_kept_as_its_own"),
        (Mute, "test_error_carries_the_last_lines_that_its_call_printed"),
        (Stubborn, "test_cancelled_run_leaves_its_workers_free"),
        (Stubborn, "test_cancelled_call_lets_the_others_go_on"),
    ],
)
async def test_conformance_finds_a_worker_that_breaks_the_rules(
    worker: type[ScriptedWorker], test: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncrt.testing.scripted.ScriptedWorker", worker)
    suite = asyncrt.testing.BackendConformance()
    suite.backend = InterposedBackend(ScriptedBackend())
    method = getattr(suite, test)
    arguments = [tmp_path] if "tmp_path" in inspect.signature(method).parameters else []
    with pytest.raises((AssertionError, TimeoutError)):
        async with asyncio.timeout(1800):  # virtual, and less than the hour that calls take
            await method(*arguments)


def test_everything_in_all_is_there() -> None:
    assert [name for name in asyncrt.testing.__all__ if not hasattr(asyncrt.testing, name)] == []
    with pytest.raises(AttributeError, match="no_such_name"):
        asyncrt.testing.no_such_name  # noqa: B018


def test_example_in_the_documentation_runs() -> None:
    code = str(asyncrt.testing.__doc__).partition("\n\n")[2].partition("\n\n``")[0]
    exec(textwrap.dedent(code), {})  # noqa: S102


def test_conformance_without_pytest_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "asyncrt.testing.conformance", raising=False)
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(ImportError, match=r"needs pytest: pip install 'asyncrt\[test\]'"):
        importlib.import_module("asyncrt.testing.conformance")
