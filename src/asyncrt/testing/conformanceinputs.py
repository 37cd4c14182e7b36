"""Where inputs come from, and how far ahead they are pulled."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator

import anyio
import pytest

from asyncrt.run import DEFAULT_WINDOW
from asyncrt.testing.conformancebase import ConformanceBase, absolute
from asyncrt.testing.scriptedcalls import takes


class Pulled:
    """Inputs that count how far they were pulled."""

    def __init__(self) -> None:
        self.count = 0
        self.closed = False

    def endless(self) -> Iterator[int]:
        """Yield numbers for ever."""
        try:
            for number in itertools.count():
                self.count += 1
                yield number
        finally:
            self.closed = True

    async def endless_async(self) -> AsyncIterator[int]:
        """Yield numbers for ever."""
        try:
            for number in itertools.count():
                self.count += 1
                yield number
        finally:
            self.closed = True


class InputConformance(ConformanceBase):
    """Sized, lazy, endless, failing inputs; ordered and unordered results."""

    async def test_empty_list_gives_an_empty_list_and_starts_nothing(self) -> None:
        async with self.open() as executor:
            assert await executor.map(abs, []) == []
        assert self.backend.workers == []

    async def test_empty_iterators_give_an_empty_list(self) -> None:
        async def nothing() -> AsyncIterator[int]:
            for number in range(0):
                yield number

        async with self.open() as executor:
            assert await executor.map(abs, iter(())) == []
            assert await executor.map(abs, nothing()) == []
            assert [result async for result in executor.map(abs, iter(()))] == []

    async def test_lazy_inputs_are_taken_to_their_end(self) -> None:
        async def numbers() -> AsyncIterator[int]:
            for number in range(2500):
                yield number

        async with self.open() as executor:
            assert await executor.map(abs, iter(range(2500))) == list(range(2500))
            assert await executor.map(abs, numbers()) == list(range(2500))

    async def test_lazy_inputs_of_both_kinds_are_zipped(self) -> None:
        async def letters() -> AsyncIterator[str]:
            for letter in "abc":
                yield letter

        async with self.open() as executor:
            run = executor.map(lambda letter, number: letter * number, letters(), itertools.count())
            assert await run == ["", "b", "cc"]

    async def test_endless_iterator_is_pulled_no_further_than_the_window(self) -> None:
        pulled = Pulled()
        async with (
            self.open() as executor,
            executor.map(abs, pulled.endless(), max_in_flight=20) as run,
        ):
            async for result in run:
                assert pulled.count <= result + 1 + 20
                if result == 300:
                    break
        assert 300 < pulled.count <= 321

    async def test_endless_async_iterator_is_pulled_no_further_and_closed(self) -> None:
        pulled = Pulled()
        async with (
            self.open() as executor,
            executor.map(abs, pulled.endless_async(), max_in_flight=20) as run,
        ):
            async for result in run:
                assert pulled.count <= result + 1 + 20
                if result == 300:
                    break
        assert 300 < pulled.count <= 321
        assert pulled.closed

    async def test_slow_consumer_holds_the_input_back(self) -> None:
        pulled = Pulled()
        async with self.open() as executor, executor.map(abs, pulled.endless_async()) as run:
            assert await anext(aiter(run)) == 0
            async for _ in run.events():
                if run.stats.succeeded > DEFAULT_WINDOW:  # all that may run ahead has ended
                    break
            assert pulled.count == DEFAULT_WINDOW + 1
            assert len(run.calls) <= DEFAULT_WINDOW + 1

    async def test_sized_input_is_admitted_no_faster_than_max_in_flight(self) -> None:
        async with self.open() as executor:
            run = executor.map(abs, range(200), max_in_flight=5)
            count = 0
            async for _ in run:
                count += 1
                assert run.stats.queued - count <= 5
        assert count == 200

    async def test_outputs_come_before_more_input_is_there(self) -> None:
        answered = anyio.Event()

        async def questions() -> AsyncIterator[str]:
            yield "first"
            await answered.wait()
            yield "second"

        async with self.open() as executor:
            results = []
            async for result in executor.map(str.upper, questions()):
                results.append(result)
                answered.set()
        assert results == ["FIRST", "SECOND"]

    async def test_exception_in_an_iterator_ends_the_run_with_it(self) -> None:
        def broken() -> Iterator[int]:
            yield 1
            raise LookupError("no more")

        async with self.open() as executor:
            run = executor.map(takes(3600, absolute), broken())
            with pytest.raises(LookupError, match="no more"):
                await run
            assert run.state == "failed"
            assert await executor.submit(abs, -1) == 1

    async def test_exception_in_an_async_iterator_ends_the_run_with_it(self) -> None:
        async def broken() -> AsyncIterator[int]:
            yield 1
            raise LookupError("no more")

        async with self.open() as executor:
            run = executor.map(takes(3600, absolute), broken())
            with pytest.raises(LookupError, match="no more"):
                async for _ in run:
                    pass
            assert run.state == "failed"
            assert await executor.submit(abs, -1) == 1

    async def test_ordered_results_wait_for_the_slow_first_one(self) -> None:
        slow_first = takes(lambda number: 0.0 if number else 0.3, absolute)
        async with self.open() as executor:
            run = executor.map(slow_first, range(10), chunksize=1)
            assert [result async for result in run] == list(range(10))

    async def test_unordered_results_overtake_the_slow_first_one(self) -> None:
        slow_first = takes(lambda number: 0.0 if number else 3600, absolute)
        async with self.open() as executor:
            run = executor.map(slow_first, range(10), chunksize=1, ordered=False)
            found = [await anext(aiter(run))]
            while len(found) < 9:
                found.append(await anext(run))
            assert sorted(found) == list(range(1, 10))
            await run.cancel()

    async def test_as_completed_gives_calls_as_they_end_failed_ones_too(self) -> None:
        async with self.open() as executor:
            run = executor.map(lambda number: 10 // number, [0, 1, 2], return_exceptions=True)
            statuses = {call.index: call.status async for call in run.as_completed()}
        assert statuses == {0: "failed", 1: "succeeded", 2: "succeeded"}

    async def test_awaiting_twice_gives_the_same_list_and_mixing_is_an_error(self) -> None:
        async with self.open() as executor:
            run = executor.map(abs, range(3))
            assert await run == [0, 1, 2]
            assert await run == [0, 1, 2]
            with pytest.raises(RuntimeError, match="iterated once"):
                aiter(run)
