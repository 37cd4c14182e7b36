"""How calls fail, and when they are tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

import asyncrt
from asyncrt.errors import (
    CallExitedError,
    CallTimeoutError,
    OutOfMemoryError,
    RemoteError,
    RunDeadlineError,
    WorkerCrashedError,
)
from asyncrt.testing.conformancebase import ConformanceBase, Ran, absolute, until_started
from asyncrt.testing.scriptedcalls import takes


def _fails_until(attempt: int) -> Any:
    def flaky(number: int) -> tuple[int, int]:
        import asyncrt  # noqa: PLC0415 - it travels by value: what it needs comes with it

        now = asyncrt.current_call().attempt
        if now < attempt:
            raise ConnectionError(f"attempt {now} of {number}")
        return number, now

    return flaky


class FailureConformance(ConformanceBase):
    """Exceptions, deaths, limits, retries."""

    async def test_users_exception_is_raised_as_it_is_with_a_note_where_it_comes_from(self) -> None:
        class CustomError(Exception):
            def __init__(self, code: int, text: str) -> None:
                super().__init__(code, text)
                self.code = code

        def fails(number: int) -> None:
            raise CustomError(number, "deliberately")

        async with self.open() as executor:
            run = executor.map(fails, [42])
            with pytest.raises(CustomError, match="deliberately") as caught:
                await run
        assert caught.value.code == 42
        note = "\n".join(caught.value.__notes__)
        assert f"call 0 of run {run.id}, attempt 1" in note
        assert "in fails" in note

    async def test_first_failure_is_raised_at_once_and_cancels_the_rest(self) -> None:
        def seconds(number: int) -> float:
            return 3600 if number else 0

        def invert(number: int) -> int:
            return 1 // number

        async with self.open() as executor:
            run = executor.map(
                takes(seconds, invert),
                [1, 0, 2, 3],
                chunksize=1,
            )
            with pytest.raises(ZeroDivisionError):
                await run
            assert [call.status for call in run.calls] == [
                "cancelled",
                "failed",
                *["cancelled"] * 2,
            ]
            assert [failure.index for failure in run.failures] == [1]
            async with run:
                pass  # left when no worker runs any of it
            assert await executor.submit(abs, -1) == 1

    async def test_results_of_before_a_failure_stay_on_the_run(self) -> None:
        async with self.open(max_workers=1) as executor:
            run = executor.map(lambda number: 1 // number, [1, 1, 0], chunksize=1)
            with pytest.raises(ZeroDivisionError):
                await run
            assert [call.outcome for call in run.calls[:2]] == [asyncrt.Success(1)] * 2

    async def test_failures_are_values_if_asked_for(self) -> None:
        async with self.open() as executor:
            run = executor.map(lambda number: 6 // number, [1, 0, 3], return_exceptions=True)
            results = await run
        assert results[0::2] == [6, 2]
        assert isinstance(results[1], ZeroDivisionError)
        assert [failure.index for failure in run.failures] == [1]
        assert run.state == "succeeded"

    async def test_exception_that_cannot_be_pickled_is_told_as_text(self) -> None:
        def fails(_: int) -> None:
            import threading  # noqa: PLC0415 - it travels by value

            error = ValueError("with a lock")
            error.lock = threading.Lock()  # type: ignore[attr-defined]
            raise error

        async with self.open() as executor:
            with pytest.raises(RemoteError, match="with a lock") as caught:
                await executor.submit(fails, 1)
        assert caught.value.type_name == "ValueError"
        assert "lock" in caught.value.reason

    async def test_exception_that_cannot_be_rebuilt_is_told_as_text(self) -> None:
        class KeywordError(Exception):
            def __init__(self, *, code: int) -> None:
                super().__init__(f"code {code}")

        def fails(_: int) -> None:
            raise KeywordError(code=3)

        async with self.open() as executor:
            with pytest.raises(RemoteError, match="code 3") as caught:
                await executor.submit(fails, 1)
        assert caught.value.type_name.endswith("KeywordError")

    @pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
    async def test_exit_by_exception_fails_the_call_and_spares_the_program(
        self, kind: type[BaseException]
    ) -> None:
        def leaves(_: int) -> None:
            raise kind(3)

        async with self.open() as executor:
            with pytest.raises(CallExitedError) as caught:
                await executor.submit(leaves, 1)
            assert await executor.submit(abs, -1) == 1
        assert caught.value.type_name == kind.__name__

    async def test_stop_iteration_does_not_end_the_consumer_silently(self) -> None:
        def stops(_: int) -> None:
            raise StopIteration

        async with self.open() as executor:
            with pytest.raises(RemoteError, match="StopIteration"):
                [result async for result in executor.map(stops, range(2))]

    async def test_call_that_exits_its_process_tells_the_code(self) -> None:
        self.needs("isolates_processes")

        def leaves(code: int) -> None:
            import os  # noqa: PLC0415 - it travels by value

            os._exit(code)

        async with self.open() as executor:
            with pytest.raises(WorkerCrashedError) as caught:
                await executor.submit(leaves, 7)
            assert await executor.submit(abs, -1) == 1
        assert (caught.value.exit_code, caught.value.signal) == (7, None)
        assert len(self.backend.workers) == 1

    async def test_segfault_costs_one_call_and_tells_the_signal(self) -> None:
        self.needs("isolates_processes")

        def crashes(number: int) -> int:
            import ctypes  # noqa: PLC0415 - it travels by value

            return number if number else ctypes.string_at(0)[0]

        async with self.open(max_workers=1) as executor:
            results: list[Any] = await executor.map(
                crashes, [1, 2, 0, 3, 4], chunksize=5, return_exceptions=True
            )
        assert results[:2] + results[3:] == [1, 2, 3, 4]
        assert isinstance(results[2], WorkerCrashedError)
        assert results[2].signal == 11

    async def test_call_that_forks_returns_once(self) -> None:
        self.needs("isolates_processes")

        def forks(number: int) -> tuple[int, int]:
            import os  # noqa: PLC0415 - it travels by value
            import warnings  # noqa: PLC0415

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pid = os.fork()
            if not pid:
                os._exit(5)
            return number, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        async with self.open() as executor:
            assert await executor.map(forks, range(4)) == [(number, 5) for number in range(4)]

    async def test_endless_loop_is_killed_by_its_timeout(self) -> None:
        self.needs("kills")

        def loops(_: int) -> None:
            while True:
                pass

        async with self.open(timeout=0.2) as executor:
            with pytest.raises(CallTimeoutError) as caught:
                await executor.submit(loops, 1)
            assert await executor.submit(abs, -1) == 1
        assert caught.value.timeout == 0.2

    async def test_timeout_fails_the_slow_call_of_a_chunk_only(self) -> None:
        slow = takes(lambda number: 3600 if number == 2 else 0, absolute)
        async with self.open(max_workers=1) as executor:
            run = executor.map(slow, range(5), chunksize=5, timeout=0.5, return_exceptions=True)
            results: list[Any] = await run
        assert results[:2] + results[3:] == [0, 1, 3, 4]
        assert isinstance(results[2], CallTimeoutError)
        assert results[2].timeout == 0.5

    async def test_timeout_holds_for_each_attempt(self) -> None:
        def seconds(_: int) -> float:
            import asyncrt  # noqa: PLC0415 - it travels by value

            return 3600 if asyncrt.current_call().attempt < 3 else 0

        async with self.open() as executor:
            run = executor.map(
                takes(seconds, absolute),
                [-5],
                timeout=0.3,
                retries=asyncrt.Retry(attempts=3, delay=0),
            )
            assert await run == [5]
        assert run.calls[0].attempts == 3
        assert run.stats.retried == 2

    async def test_call_over_the_memory_limit_is_told_as_that(self) -> None:
        self.needs("limits_memory")

        def hoards(mebibytes: int) -> int:
            import time  # noqa: PLC0415 - it travels by value

            held = [b"x" * (1 << 20) for _ in range(mebibytes)]
            if mebibytes > 64:
                time.sleep(3600)  # where memory is watched, not enforced, it must last until seen
            return len(held)

        async with self.open(max_workers=1, memory="64Mi") as executor:
            with pytest.raises(OutOfMemoryError) as caught:
                await executor.submit(hoards, 200)
            assert await executor.submit(hoards, 1) == 1
        assert caught.value.limit_bytes == 64 << 20

    async def test_failed_call_is_tried_again_and_its_attempts_are_counted(self) -> None:
        retry = asyncrt.Retry(attempts=4, delay=0)
        async with self.open() as executor:
            run = executor.map(_fails_until(3), range(3), retries=retry)
            assert await run == [(number, 3) for number in range(3)]
        assert [call.attempts for call in run.calls] == [3, 3, 3]
        assert run.stats.retried == 6
        assert run.failures == ()

    async def test_last_attempts_error_is_raised_when_all_have_failed(self) -> None:
        async with self.open(retries=asyncrt.Retry(attempts=2, delay=0)) as executor:
            run = executor.map(_fails_until(9), [0])
            with pytest.raises(ConnectionError, match="attempt 2 of 0"):
                await run
        assert [failure.attempts for failure in run.failures] == [2]

    async def test_only_errors_that_are_worth_it_are_tried_again(self, tmp_path: Path) -> None:
        self.needs("shares_files")
        ran = Ran(tmp_path)
        retry = asyncrt.Retry(attempts=5, on=(ConnectionError,), delay=0)
        async with self.open() as executor:
            run = executor.map(ran.counting(lambda number: 1 // number), [0], retries=retry)
            with pytest.raises(ZeroDivisionError):
                await run
        assert ran.numbers() == [0]

    async def test_run_past_its_deadline_keeps_what_was_done(self) -> None:
        slow = takes(lambda number: 3600 if number else 0, absolute)
        async with self.open() as executor:
            await executor.submit(abs, 1)  # a worker is there
            deadline = anyio.current_time() + 1.0
            run = executor.map(slow, [0, 1], chunksize=1, deadline=deadline)
            with pytest.raises(RunDeadlineError):
                await run
            assert [call.status for call in run.calls] == ["succeeded", "cancelled"]
            async with run:
                pass
            assert await executor.submit(abs, -1) == 1

    async def test_process_is_reused_unless_each_call_shall_have_its_own(self) -> None:
        self.needs("isolates_processes")

        def pid(_: int) -> int:
            import os  # noqa: PLC0415 - it travels by value

            return os.getpid()

        async with self.open(max_workers=1) as executor:
            assert len(set(await executor.map(pid, range(6)))) == 1
            assert len(set(await executor.map(pid, range(6), isolation="call"))) == 6

    async def test_failure_says_which_call_it_was_while_others_run(self) -> None:
        async with self.open() as executor:
            run = executor.map(
                takes(3600, absolute), range(2), timeout=0.4, return_exceptions=True, chunksize=1
            )
            await until_started(run)
            results: list[Any] = await run
        assert [type(error) for error in results] == [CallTimeoutError] * 2
        assert [error.index for error in results] == [0, 1]
        assert all(error.run_id == run.id and error.worker for error in results)
