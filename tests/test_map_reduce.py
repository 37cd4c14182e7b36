"""``map_reduce``: one reduction of all results, or a tree of them beside the map."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import pytest
from desk import ReportSum, Wait, open_desk, square
from hypothesis import given
from hypothesis import strategies as st

import asyncrt
from asyncrt.errors import ConfigError, SerializationError
from asyncrt.mapreduce import Tree

pytestmark = pytest.mark.anyio


@pytest.fixture
async def executor() -> AsyncIterator[asyncrt.Executor]:
    async with asyncio.timeout(60), asyncrt.Executor(max_workers=2) as executor:
        yield executor


# -- the tree, pure --------------------------------------------------------------------------------


@given(
    count=st.integers(0, 60),
    fan_in=st.none() | st.integers(2, 7),
    random=st.randoms(),
    data=st.data(),
)
def test_the_tree_keeps_the_order_and_every_value_once(
    count: int, fan_in: int | None, random: Any, data: st.DataObject
) -> None:
    tree = Tree(fan_in)
    values: list[tuple[int, int, list[int]]] = [(0, index, [index]) for index in range(count)]
    random.shuffle(values)
    while values:
        level, position, value = values.pop(data.draw(st.integers(0, len(values) - 1)))
        group = tree.add(level, position, value)
        if group is not None:
            members = tree.take(group)
            assert len(members) == fan_in
            values.append((*group, list(itertools.chain(*members))))
    rest = tree.rest()
    assert list(itertools.chain(*rest)) == list(range(count))
    if fan_in is not None:
        levels = 1
        while fan_in**levels <= count:
            levels += 1
        assert len(rest) <= (fan_in - 1) * levels


# -- what comes out --------------------------------------------------------------------------------


async def test_the_reduction_gets_all_results_in_the_order_of_the_input(
    executor: asyncrt.Executor,
) -> None:
    assert await executor.map_reduce(square, range(5), list) == [0, 1, 4, 9, 16]


async def test_a_tree_reduces_to_the_same(executor: asyncrt.Executor) -> None:
    texts = [str(number) for number in range(100)]
    for fan_in in (2, 3, 10, 100, 1000):
        assert await executor.map_reduce(str, texts, "".join, fan_in=fan_in) == "".join(texts)


async def test_no_call_of_a_tree_gets_more_than_a_few_values_of_each_level(
    executor: asyncrt.Executor,
) -> None:
    def longest_list(seen: list[int]) -> int:
        return max(len(seen), *seen)

    assert await executor.map_reduce(lambda _: 0, range(64), longest_list, fan_in=4) == 4


async def test_input_without_a_size_is_reduced_when_it_ends(executor: asyncrt.Executor) -> None:
    def numbers() -> Iterator[int]:
        yield from range(30)

    async def numbers_async() -> AsyncIterator[int]:
        for number in range(30):
            yield number

    assert await executor.map_reduce(square, numbers(), sum, fan_in=4) == 8555
    assert await executor.map_reduce(square, numbers_async(), sum) == 8555


async def test_no_input_is_a_reduction_of_nothing(executor: asyncrt.Executor) -> None:
    assert await executor.map_reduce(square, [], sum) == 0
    assert await executor.map_reduce(square, iter(()), sum, fan_in=2) == 0


async def test_functions_may_be_async_and_get_shared_keyword_arguments(
    executor: asyncrt.Executor,
) -> None:
    async def power(number: int, exponent: int) -> int:
        return int(number**exponent)

    async def total(numbers: list[int]) -> int:
        return sum(numbers)

    call = executor.map_reduce(power, [1, 2, 3], total, kwargs={"exponent": 3})
    assert await call == 36
    assert await call == 36  # may be repeated
    assert (call.status, call.index, call.run.id[:12]) == ("succeeded", 0, "reduce-test-")


async def test_failures_are_reduced_too_when_they_are_asked_for(executor: asyncrt.Executor) -> None:
    def inverse(number: int) -> float:
        return 1 / number

    def types(results: list[Any]) -> list[str]:
        return [type(result).__name__ for result in results]

    names = await executor.map_reduce(inverse, [1, 0, 2], types, return_exceptions=True)
    assert names == ["float", "ZeroDivisionError", "float"]


# -- as results come -------------------------------------------------------------------------------


async def test_groups_are_reduced_while_the_map_goes_on() -> None:
    async with (
        asyncio.timeout(60),
        open_desk() as desk,
        asyncrt.Executor(max_workers=3) as executor,
    ):
        call = executor.map_reduce(Wait(desk, 4), range(5), ReportSum(desk), fan_in=2)
        reductions = ("reduce 0 1", "reduce 4 9", "reduce 1 13")
        desk.release(*reductions)
        await desk.arrived(4, *reductions)
        assert call.status == "queued"
        desk.release(4, "reduce 14 16")
        assert await call == 30


async def test_reductions_begin_at_the_fraction_that_was_asked_for() -> None:
    async with (
        asyncio.timeout(60),
        open_desk() as desk,
        asyncrt.Executor(max_workers=3) as executor,
    ):
        call = executor.map_reduce(
            Wait(desk, 4), range(5), ReportSum(desk), fan_in=2, spawn_reducer=1.0
        )
        await desk.arrived(4)
        # Other calls come and go: a reduction would have had every occasion to run.
        assert await executor.map(square, range(20)) == [number**2 for number in range(20)]
        assert desk.seen == ["4"]
        desk.release()
        assert await call == 30


# -- what goes wrong -------------------------------------------------------------------------------


async def test_a_failure_of_the_map_is_raised_as_it_is(executor: asyncrt.Executor) -> None:
    with pytest.raises(ZeroDivisionError):
        await executor.map_reduce(lambda number: 1 / number, [1, 0], sum)


@pytest.mark.parametrize("fan_in", [None, 2])
async def test_a_failure_of_a_reduction_is_raised_as_it_is(
    executor: asyncrt.Executor, fan_in: int | None
) -> None:
    def fail(numbers: list[int]) -> int:
        raise LookupError(len(numbers))

    with pytest.raises(LookupError):
        await executor.map_reduce(square, range(9), fail, fan_in=fan_in)


async def test_an_input_that_raises_ends_it(executor: asyncrt.Executor) -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        await executor.map_reduce(square, numbers(), sum)


async def test_a_reduce_function_that_cannot_travel_is_told_before_anything_starts(
    executor: asyncrt.Executor,
) -> None:
    lock = threading.Lock()
    with pytest.raises(SerializationError, match="'lock'"):
        executor.map_reduce(square, [1], lambda numbers: (lock, numbers))


@pytest.mark.parametrize(
    ("option", "value"),
    [("fan_in", 1), ("fan_in", 2.5), ("spawn_reducer", 1.5), ("spawn_reducer", "0.2")],
)
async def test_bad_options_are_refused(executor: asyncrt.Executor, option: str, value: Any) -> None:
    bad: dict[str, Any] = {option: value}
    with pytest.raises(ConfigError, match=option):
        executor.map_reduce(square, [1], sum, **bad)


async def test_an_unknown_option_is_refused(executor: asyncrt.Executor) -> None:
    bad: dict[str, Any] = {"fanin": 3}
    with pytest.raises(ConfigError, match="unknown option 'fanin'"):
        executor.map_reduce(square, [1], sum, **bad)


@pytest.mark.parametrize("how", ["task", "call"])
async def test_cancelling_cancels_the_map(how: str) -> None:
    async with (
        asyncio.timeout(60),
        open_desk() as desk,
        asyncrt.Executor(max_workers=2) as executor,
    ):
        call = executor.map_reduce(Wait(desk), [1, 2, 3], sum)
        await desk.arrived(1)
        if how == "task":
            task = asyncio.ensure_future(_result(call))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await call.cancel()
            with pytest.raises(asyncrt.RunCancelledError):
                await call
        await desk.killed(1)
        assert call.status == "cancelled"
        assert await executor.submit(square, 3) == 9


async def _result(call: asyncrt.Call[int]) -> int:
    return await call


async def test_leaving_the_executor_waits_for_the_reduction() -> None:
    async with asyncio.timeout(60), asyncrt.Executor(max_workers=2) as executor:
        call = executor.map_reduce(square, range(20), sum, fan_in=3)
    assert await call == 2470


async def test_types_of_what_is_reduced(executor: asyncrt.Executor) -> None:
    async def longest(words: Iterable[str]) -> str:
        return max(words, key=len)

    word: str = await executor.map_reduce(str, [1, 22, 333], longest)
    assert word == "333"
