"""Workers and connections that go away in the middle of the work."""

from __future__ import annotations

from pathlib import Path

import pytest

import asyncrt
from asyncrt.errors import WorkerCrashedError, WorkerLostError
from asyncrt.testing.conformancebase import ConformanceBase, Ran, absolute, until_started
from asyncrt.testing.scriptedcalls import takes

_CALLS = 1000


class FaultConformance(ConformanceBase):
    """A thousand calls and a fault: all right results, or the typed error.

    ``max_in_flight`` keeps the fault in the middle: most calls are still to come when it happens.
    """

    async def test_cut_connection_costs_nothing_and_no_call_runs_twice(
        self, tmp_path: Path
    ) -> None:
        self.needs("shares_files")
        ran = Ran(tmp_path)
        async with self.open() as executor:
            run = executor.map(ran.counting(absolute), range(_CALLS), max_in_flight=100)
            results = []
            async for result in run:
                results.append(result)
                if result == 300:
                    self.cut_one_connection()
        assert results == list(range(_CALLS))
        assert sorted(ran.numbers()) == list(range(_CALLS))
        assert sum(worker.connections for worker in self.backend.workers) == 3

    async def test_connections_cut_again_and_again_lose_nothing(self, tmp_path: Path) -> None:
        self.needs("shares_files")
        ran = Ran(tmp_path)
        async with self.open() as executor:
            run = executor.map(ran.counting(absolute), range(_CALLS), max_in_flight=100)
            results = []
            async for result in run:
                results.append(result)
                if result % 100 == 50:
                    for worker in self.backend.connected:
                        worker.cut_connection()
        assert results == list(range(_CALLS))
        assert sorted(ran.numbers()) == list(range(_CALLS))
        assert len(self.backend.workers) == 2

    async def test_result_that_was_finished_while_nobody_was_connected_comes_home(self) -> None:
        async with self.open(max_workers=1) as executor:
            call = executor.submit(takes(0.3, absolute), -1)
            await until_started(call.run)
            self.backend.refuse_next_connections(6)
            self.cut_one_connection()
            assert await call == 1
        assert call.attempts == 1
        assert [worker.connections for worker in self.backend.workers] == [2]

    async def test_refused_connections_delay_the_start_only(self) -> None:
        self.backend.refuse_next_connections(3)
        async with self.open() as executor:
            assert await executor.map(abs, range(20)) == list(range(20))

    async def test_killed_worker_is_replaced_and_its_calls_run_again(self) -> None:
        async with self.open() as executor:
            run = executor.map(abs, range(_CALLS), max_in_flight=100)
            results = []
            async for result in run:
                results.append(result)
                if result == 300:
                    self.kill_one_worker()
            assert results == list(range(_CALLS))
            assert run.failures == ()

    async def test_idle_worker_that_was_killed_is_replaced(self) -> None:
        async with self.open(max_workers=1) as executor:
            assert await executor.submit(abs, -1) == 1
            self.kill_one_worker()
            assert await executor.map(abs, range(10)) == list(range(10))
        assert len(self.backend.workers) == 2

    async def test_call_whose_worker_was_lost_has_another_attempt_for_free(self) -> None:
        def seconds(_: int) -> float:
            import asyncrt  # noqa: PLC0415 - it travels by value

            return 3600 if asyncrt.current_call().attempt == 1 else 0

        async with self.open(max_workers=1) as executor:
            run = executor.map(takes(seconds, absolute), [-1])
            await until_started(run)
            self.kill_one_worker()
            assert await run == [1]
        assert run.calls[0].attempts == 2
        assert run.stats.requeued == 1

    async def test_call_that_loses_every_worker_fails_as_that(self) -> None:
        async with self.open(max_workers=1) as executor:
            run = executor.map(takes(3600, absolute), [1])
            for attempt in (1, 2, 3):
                await until_started(run, attempt=attempt)
                self.kill_one_worker()
            with pytest.raises(WorkerLostError) as caught:
                await run
            assert caught.value.attempt == 3
            assert await executor.submit(abs, -1) == 1

    async def test_killed_processes_cost_one_attempt_of_one_call_each(self) -> None:
        self.needs("isolates_processes")

        def dies_at_first(number: int) -> int:
            import os  # noqa: PLC0415 - it travels by value
            import signal  # noqa: PLC0415

            import asyncrt  # noqa: PLC0415

            if number % 200 == 100 and asyncrt.current_call().attempt == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return -number

        async with self.open(retries=asyncrt.Retry(attempts=2, delay=0)) as executor:
            run = executor.map(dies_at_first, range(_CALLS))
            assert await run == [-number for number in range(_CALLS)]
        assert [call.index for call in run.calls if call.attempts == 2] == [100, 300, 500, 700, 900]
        assert run.stats.retried == 5
        assert len(self.backend.workers) == 2

    async def test_killed_process_without_retries_fails_the_run_as_that(self) -> None:
        self.needs("isolates_processes")

        def dies(number: int) -> int:
            import os  # noqa: PLC0415 - it travels by value
            import signal  # noqa: PLC0415

            if number == 500:
                os.kill(os.getpid(), signal.SIGKILL)
            return number

        async with self.open() as executor:
            with pytest.raises(WorkerCrashedError) as caught:
                await executor.map(dies, range(_CALLS))
            assert await executor.submit(abs, -1) == 1
        assert caught.value.index == 500
        assert caught.value.signal == 9

    async def test_calls_that_wait_behind_a_slow_one_go_elsewhere(self) -> None:
        slow = takes(lambda number: 3600 if number == 200 else 0, absolute)
        async with self.open() as executor:
            run = executor.map(slow, range(600), ordered=False)
            found = [await anext(aiter(run))]
            while len(found) < 599:
                found.append(await anext(run))
            assert sorted(found) == [number for number in range(600) if number != 200]
            await run.cancel()
