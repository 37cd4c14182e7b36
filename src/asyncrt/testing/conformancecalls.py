"""What can be called, and with what."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest

from asyncrt.errors import SerializationError
from asyncrt.testing.conformancebase import ConformanceBase, Ran, absolute
from asyncrt.testing.scriptedcalls import takes


class CallConformance(ConformanceBase):
    """Functions, arguments, results."""

    async def test_map_returns_a_list_in_input_order(self) -> None:
        async with self.open() as executor:
            assert await executor.map(lambda number: number**2, range(100)) == [
                number**2 for number in range(100)
            ]

    async def test_map_over_several_inputs_ends_with_the_shortest(self) -> None:
        async with self.open() as executor:
            run = executor.map(lambda a, b, c: (a, b, c), range(3), "abcd", [True] * 5)
            assert await run == [(0, "a", True), (1, "b", True), (2, "c", True)]

    async def test_starmap_spreads_each_item(self) -> None:
        async with self.open() as executor:
            assert await executor.starmap(pow, [(2, 5), (3, 2), (10, 3)]) == [32, 9, 1000]

    async def test_kwargs_reach_every_call(self) -> None:
        async with self.open() as executor:
            assert await executor.map(int, ["11", "101"], kwargs={"base": 2}) == [3, 5]

    async def test_submit_passes_all_arguments_on(self) -> None:
        def collect(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
            return args, kwargs

        async with self.open() as executor:
            call = executor.submit(collect, 1, "two", timeout=3, name="four")
            assert await call == ((1, "two"), {"timeout": 3, "name": "four"})

    async def test_async_function_is_awaited_in_the_worker(self) -> None:
        async def double(number: int) -> int:
            import asyncio  # noqa: PLC0415 - it travels by value: what it needs comes with it

            await asyncio.sleep(0)
            return 2 * number

        async with self.open() as executor:
            assert await executor.map(double, range(5)) == [0, 2, 4, 6, 8]

    async def test_closure_travels_with_its_variables(self) -> None:
        factor = 7

        def scale(number: int) -> int:
            return factor * number

        async with self.open() as executor:
            assert await executor.map(scale, [1, 2]) == [7, 14]

    async def test_partial_is_called_with_its_own_arguments_first(self) -> None:
        async with self.open() as executor:
            assert await executor.map(functools.partial(pow, 2), range(4)) == [1, 2, 4, 8]

    async def test_callable_object_and_bound_method_keep_their_state(self) -> None:
        class Adder:
            def __init__(self, amount: int) -> None:
                self.amount = amount

            def __call__(self, number: int) -> int:
                return number + self.amount

            def twice(self, number: int) -> int:
                return number + 2 * self.amount

        async with self.open() as executor:
            assert await executor.map(Adder(10), [1, 2]) == [11, 12]
            assert await executor.map(Adder(10).twice, [1, 2]) == [21, 22]

    async def test_generator_function_is_refused_before_anything_starts(self) -> None:
        def yields(number: int) -> Any:
            yield number

        async with self.open() as executor:
            with pytest.raises(TypeError, match="generator function"):
                executor.map(yields, range(3))
        assert self.backend.workers == []

    async def test_function_that_cannot_be_pickled_names_the_object_inside(self) -> None:
        lock = threading.Lock()

        def locked(number: int) -> int:
            with lock:
                return number

        async with self.open() as executor:
            with pytest.raises(SerializationError, match="lock"):
                executor.map(locked, range(3))
        assert self.backend.workers == []

    async def test_argument_that_cannot_be_pickled_fails_its_call_only(self) -> None:
        inputs = [1, {"handle": threading.Lock()}, 3]
        async with self.open() as executor:
            results: list[Any] = await executor.map(repr, inputs, return_exceptions=True)
        assert results[0] == "1"
        assert results[2] == "3"
        assert isinstance(results[1], SerializationError)
        assert "handle" in results[1].path
        assert results[1].index == 1

    async def test_result_that_cannot_be_pickled_fails_its_call_only(self) -> None:
        def lock_if_odd(number: int) -> Any:
            import threading  # noqa: PLC0415 - it travels by value

            return threading.Lock() if number % 2 else number

        async with self.open() as executor:
            results = await executor.map(lock_if_odd, range(3), return_exceptions=True)
        assert results[::2] == [0, 2]
        assert isinstance(results[1], SerializationError)
        assert "lock" in str(results[1])

    async def test_bytes_of_5_mb_travel_both_ways(self) -> None:
        data = bytes(range(256)) * 20_000
        async with self.open() as executor:
            assert await executor.submit(lambda given: given[::-1], data) == data[::-1]

    async def test_arrays_of_5_mb_travel_both_ways(self) -> None:
        numpy = pytest.importorskip("numpy")
        array = numpy.arange(640_000, dtype="f8")
        async with self.open() as executor:
            results = await executor.map(lambda given: given * 2, [array, array + 1])
        assert numpy.array_equal(results[0], array * 2)
        assert numpy.array_equal(results[1], (array + 1) * 2)

    async def test_result_larger_than_any_inline_limit_comes_home(self) -> None:
        async with self.open() as executor:
            run = executor.map(lambda mebibytes: b"x" * (mebibytes << 20), [0, 24, 1])
            assert [len(result) for result in await run] == [0, 24 << 20, 1 << 20]

    async def test_two_executors_at_once_do_not_mix(self) -> None:
        async with self.open() as first, self.open() as second:
            one = first.map(lambda number: ("first", number), range(50))
            two = second.map(lambda number: ("second", number), range(50))
            assert await two == [("second", number) for number in range(50)]
            assert await one == [("first", number) for number in range(50)]

    async def test_two_runs_of_one_executor_take_turns(self) -> None:
        async with self.open(max_workers=1) as executor:
            long = executor.map(takes(0.01, absolute), range(500), chunksize=1)
            assert await executor.map(str, range(3)) == ["0", "1", "2"]
            assert not long.done()
            await long.cancel()

    async def test_with_options_shares_the_workers_of_the_same_shape(self) -> None:
        async with self.open(max_workers=1) as executor:
            await executor.submit(abs, -1)
            view = executor.with_options(retries=2, name="view")
            assert await view.submit(abs, -2) == 2
        assert len(self.backend.workers) == 1

    async def test_with_options_of_another_shape_has_workers_of_its_own(self) -> None:
        async with self.open(max_workers=1) as executor:
            await executor.submit(abs, -1)
            env = {**self.executor_options().get("env", {}), "ANOTHER": "shape"}
            assert await executor.with_options(env=env).submit(abs, -2) == 2
        assert len(self.backend.workers) == 2

    @pytest.mark.parametrize("chunksize", [1, 7, 1000, "auto"])
    async def test_chunks_of_any_size_run_each_call_once(
        self, chunksize: Any, tmp_path: Any
    ) -> None:
        self.needs("shares_files")
        ran = Ran(tmp_path)
        async with self.open() as executor:
            run = executor.map(
                ran.counting(lambda number: -number), range(300), chunksize=chunksize
            )
            assert await run == [-number for number in range(300)]
        assert sorted(ran.numbers()) == list(range(300))

    async def test_chunk_stays_together_on_one_worker(self) -> None:
        async with self.open() as executor:
            run = executor.map(abs, range(40), chunksize=10)
            await run
            workers: dict[int, str] = {}
            async for event in run.events():
                worker = getattr(event, "worker", None)
                if worker is not None and hasattr(event, "index"):
                    workers[event.index] = worker
        for first in range(0, 40, 10):
            assert len({workers[index] for index in range(first, first + 10)}) == 1

    async def test_several_slots_run_calls_at_once(self) -> None:
        slow_first = takes(lambda number: 0 if number else 3600, absolute)
        async with self.open(max_workers=1, slots=2) as executor:
            run = executor.map(slow_first, [0, 1], chunksize=1)
            assert await run.calls[1] == 1
            await run.cancel()
        assert len(self.backend.workers) == 1
