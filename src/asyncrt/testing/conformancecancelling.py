"""How runs are given up, and that nothing of them stays."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import asyncrt
from asyncrt.errors import ExecutorClosedError, RunCancelledError
from asyncrt.testing.conformancebase import ConformanceBase, Ran, absolute, until_started
from asyncrt.testing.scriptedcalls import takes


class CancellingConformance(ConformanceBase):
    """Cancelled runs, calls, waiters, executors."""

    async def test_cancelled_run_leaves_its_workers_free(self) -> None:
        async with self.open(max_workers=1) as executor:
            run = executor.map(takes(3600, absolute), range(3))
            await until_started(run)
            await run.cancel()
            assert run.state == "cancelled"
            assert [call.status for call in run.calls] == ["cancelled"] * 3
            with pytest.raises(RunCancelledError):
                await run
            assert await executor.submit(abs, -1) == 1
        assert len(self.backend.workers) == 1

    async def test_cancelling_an_ended_run_changes_nothing(self) -> None:
        async with self.open() as executor:
            run = executor.map(abs, [-1])
            assert await run == [1]
            await run.cancel()
            assert run.state == "succeeded"
            assert await run == [1]

    async def test_cancelled_call_lets_the_others_go_on(self) -> None:
        slow = takes(lambda number: 0 if number else 3600, absolute)
        async with self.open(max_workers=1) as executor:
            run = executor.map(slow, range(5), chunksize=1, return_exceptions=True)
            await until_started(run)
            await run.calls[0].cancel()
            results: list[Any] = await run
        assert isinstance(results[0], RunCancelledError)
        assert results[1:] == [1, 2, 3, 4]
        assert run.calls[0].status == "cancelled"

    async def test_cancelled_queued_call_never_runs(self, tmp_path: Path) -> None:
        self.needs("shares_files")
        ran = Ran(tmp_path)
        slow = takes(lambda number: 0 if number else 0.3, ran.counting(absolute))
        async with self.open(max_workers=1) as executor:
            run = executor.map(slow, range(3), chunksize=1, return_exceptions=True)
            await until_started(run)
            await run.calls[1].cancel()
            results: list[Any] = await run
        assert results[0::2] == [0, 2]
        assert isinstance(results[1], RunCancelledError)
        assert ran.numbers() == [0, 2]

    async def test_cancelling_who_awaits_a_call_cancels_it(self) -> None:
        async with self.open(max_workers=1) as executor:
            call = executor.submit(takes(3600, absolute), 1)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await call
            assert call.status == "cancelled"
            assert await executor.submit(abs, -1) == 1

    async def test_cancelling_who_awaits_a_run_cancels_it(self) -> None:
        async with self.open(max_workers=1) as executor:
            run = executor.map(takes(3600, absolute), range(2))

            async def wait() -> list[int]:
                return await run

            waiter = asyncio.create_task(wait())
            await until_started(run)
            waiter.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiter
            assert run.state == "cancelled"
            assert await executor.submit(abs, -1) == 1

    async def test_shielded_run_outlives_who_awaits_it(self) -> None:
        async with self.open() as executor:
            run = executor.map(takes(0.5, absolute), [-1])

            async def wait() -> list[int]:
                return await run

            task = asyncio.create_task(wait())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await asyncio.shield(task)
            assert await task == [1]

    async def test_timeout_around_an_endless_map_ends_it(self) -> None:
        async with self.open() as executor:
            run = executor.map(takes(0.01, absolute), itertools.count())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await run
            assert run.state == "cancelled"
            async with run:
                pass
            assert await executor.map(abs, [-1, -2]) == [1, 2]

    async def test_timeout_around_an_endless_iteration_ends_it(self) -> None:
        async with self.open() as executor:
            run = executor.map(takes(0.01, absolute), itertools.count())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    [result async for result in run]
            assert run.state == "cancelled"
            assert await executor.map(abs, [-1, -2]) == [1, 2]

    async def test_leaving_a_run_cancels_what_has_not_finished(self) -> None:
        slow = takes(lambda number: 3600 if number else 0, absolute)
        async with self.open() as executor:
            async with executor.map(slow, range(5), chunksize=1) as run:
                async for result in run:
                    assert result == 0
                    break
            assert run.state == "cancelled"
            assert run.calls[0].status == "succeeded"
            assert await executor.map(abs, [-1, -2]) == [1, 2]

    async def test_bare_break_stops_the_pulling_and_the_executor_goes_on(self) -> None:
        pulled = 0

        def counted() -> Iterator[int]:
            nonlocal pulled
            for number in itertools.count():
                pulled += 1
                yield number

        async with self.open() as executor:
            async for result in executor.map(abs, counted(), max_in_flight=10):
                if result == 50:
                    break
            assert await executor.map(abs, [-1, -2]) == [1, 2]
        assert pulled <= 61

    async def test_leaving_the_executor_waits_for_what_was_started(self, tmp_path: Path) -> None:
        self.needs("shares_files")
        ran = Ran(tmp_path)
        async with self.open() as executor:
            run = executor.map(takes(0.05, ran.counting(absolute)), range(6), chunksize=1)
        assert await run == list(range(6))
        assert sorted(ran.numbers()) == list(range(6))

    async def test_leaving_the_executor_by_an_exception_kills_what_runs(self) -> None:
        runs: list[asyncrt.Run[int]] = []

        async def fail_inside() -> None:
            async with self.open() as executor:
                runs.append(executor.map(takes(3600, absolute), range(4)))
                await until_started(runs[0])
                raise LookupError("on purpose")

        with pytest.raises(LookupError, match="on purpose"):
            await fail_inside()
        assert runs[0].done()
        assert [call.status for call in runs[0].calls] == ["cancelled"] * 4

    async def test_cancelling_who_opened_the_executor_kills_what_runs(self) -> None:
        began = asyncio.Event()

        async def work() -> None:
            async with self.open() as executor:
                run = executor.map(takes(3600, absolute), range(4))
                await until_started(run)
                began.set()
                await run

        task = asyncio.create_task(work())
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_closed_executor_refuses_calls(self) -> None:
        async with self.open() as executor:
            pass
        with pytest.raises(ExecutorClosedError):
            executor.submit(abs, 1)
