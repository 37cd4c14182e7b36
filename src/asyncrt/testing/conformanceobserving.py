"""What can be seen of a run: events, counts, output, and the call from inside."""

from __future__ import annotations

from typing import Any

import pytest

import asyncrt
from asyncrt.events import (
    CallCancelled,
    CallFailed,
    CallQueued,
    CallReturned,
    CallSent,
    CallStarted,
    RunEnded,
)
from asyncrt.testing.conformancebase import ConformanceBase, absolute, events_of, until_started
from asyncrt.testing.scriptedcalls import takes


class ObservingConformance(ConformanceBase):
    """Events, stats, status, logs, ``current_call``."""

    async def test_each_call_is_queued_sent_started_and_returned_in_this_order(self) -> None:
        async with self.open() as executor:
            run = executor.map(abs, range(30))
            await run
            for index in range(30):
                kinds = [type(event) for event in await events_of(run, index)]
                kept = [kind for kind in kinds if kind in (CallQueued, CallStarted, CallReturned)]
                assert kept == [CallQueued, CallStarted, CallReturned]
                assert kinds.index(CallSent) == 1

    async def test_end_of_the_run_is_its_last_event(self) -> None:
        async with self.open() as executor:
            run = executor.map(abs, range(10))
            events = [event async for event in run.events()]
        assert isinstance(events[-1], RunEnded)
        assert events[-1].state == "succeeded"
        assert sum(isinstance(event, RunEnded) for event in events) == 1

    async def test_start_of_a_long_call_is_seen_before_its_end(self) -> None:
        async with self.open() as executor:
            run = executor.map(takes(3600, absolute), range(1))
            await until_started(run)
            assert run.calls[0].status == "sent"
            assert run.stats.succeeded == 0
            await run.cancel()
            kinds = [type(event) for event in await events_of(run, 0)]
        assert kinds == [CallQueued, CallSent, CallStarted, CallCancelled]

    async def test_failed_attempts_are_events_with_error_and_delay(self) -> None:
        async with self.open(retries=asyncrt.Retry(attempts=2, delay=0)) as executor:
            run = executor.map(lambda number: 1 // number, [0], return_exceptions=True)
            await run
            failed = [event for event in await events_of(run, 0) if isinstance(event, CallFailed)]
        assert [event.attempt for event in failed] == [1, 2]
        assert failed[0].delay is not None
        assert failed[1].delay is None
        assert all(isinstance(event.error, ZeroDivisionError) for event in failed)

    async def test_times_of_a_call_are_in_order_on_the_clients_clock(self) -> None:
        async with self.open() as executor:
            run = executor.map(takes(0.1, absolute), [1])
            await run
            queued, sent, started, returned = await events_of(run, 0)
        assert queued.time <= sent.time
        assert started.time <= returned.time
        assert returned.time - started.time >= 0.099

    async def test_stats_add_up(self) -> None:
        async with self.open() as executor:
            run = executor.map(
                lambda number: 1 // (number % 10), range(1, 51), return_exceptions=True
            )
            await run
        stats = run.stats
        assert (stats.queued, stats.succeeded, stats.failed) == (50, 45, 5)
        assert (stats.cancelled, stats.pending, stats.sent, stats.retried) == (0, 0, 0, 0)
        assert stats.ended is not None
        assert stats.ended >= stats.began

    async def test_status_is_a_line_for_people(self) -> None:
        async with self.open() as executor:
            run = executor.map(lambda number: 1 // number, [0, 1, 1], return_exceptions=True)
            assert run.status.startswith("running: 0/3 succeeded")
            await run
        assert run.status == "succeeded: 2/3 succeeded, 1 failed"
        assert run.id in repr(run)

    async def test_call_tells_its_status_outcome_and_attempts(self) -> None:
        async with self.open() as executor:
            run = executor.map(lambda number: 1 // number, [1, 0], return_exceptions=True)
            assert run.calls[0].outcome is None
            await run
            first, second = run.calls
        assert (first.index, first.status, first.attempts) == (0, "succeeded", 1)
        assert first.outcome == asyncrt.Success(1)
        assert (second.index, second.status, second.attempts) == (1, "failed", 1)
        assert isinstance(second.outcome, asyncrt.Failure)
        assert isinstance(second.outcome.error, ZeroDivisionError)
        with pytest.raises(ZeroDivisionError):
            await second

    async def test_what_a_call_prints_is_kept_as_its_own(self) -> None:
        self.needs("has_logs")

        def talks(number: int) -> None:
            import sys  # noqa: PLC0415 - it travels by value

            sys.stdout.write(f"out {number}\nno newline")
            sys.stderr.write(f"err {number}\n")

        async with self.open() as executor:
            run = executor.map(talks, range(20))
            await run
            for index, call in enumerate(run.calls):
                printed = call.logs()
                assert f"out {index}\nno newline" in printed
                assert f"err {index}\n" in printed
                assert printed.count("out") == 1

    async def test_error_carries_the_last_lines_that_its_call_printed(self) -> None:
        self.needs("has_logs")

        def talks_and_fails(number: int) -> None:
            import sys  # noqa: PLC0415 - it travels by value

            sys.stdout.write("about to fail\n")
            raise ValueError(number)

        async with self.open() as executor:
            with pytest.raises(ValueError, match="3") as caught:
                await executor.submit(talks_and_fails, 3)
        assert "about to fail" in "\n".join(caught.value.__notes__)

    async def test_current_call_tells_who_it_is(self) -> None:
        def who(_: str) -> tuple[Any, ...]:
            import asyncrt  # noqa: PLC0415 - it travels by value

            call = asyncrt.current_call()
            return call.run_id, call.index, call.attempt, call.deadline is None

        async with self.open() as executor:
            run = executor.map(who, "abc")
            assert await run == [(run.id, index, 1, True) for index in range(3)]

    async def test_scratch_directory_is_there_during_the_call_only(self) -> None:
        def writes(number: int) -> str:
            import asyncrt  # noqa: PLC0415 - it travels by value

            scratch = asyncrt.current_call().scratch()
            (scratch / "file").write_text(str(number))
            return str(scratch) if (scratch / "file").read_text() == str(number) else ""

        def exists(path: str) -> bool:
            from pathlib import Path  # noqa: PLC0415 - it travels by value

            return Path(path).exists()

        async with self.open(max_workers=1) as executor:
            paths = await executor.map(writes, range(5))
            assert len(set(paths)) == 5
            assert all(paths)
            assert await executor.map(exists, paths) == [False] * 5

    async def test_name_of_a_run_is_in_its_id(self) -> None:
        async with self.open() as executor:
            run = executor.map(abs, [1], name="my sums")
            assert run.id.startswith("my-sums-")
            await run
