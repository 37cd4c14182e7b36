"""Where arguments come from: sized inputs as they are, all others pulled as there is room."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asyncrt.sources import Feed, as_sequences

pytestmark = pytest.mark.anyio


class Taker:
    """Takes what a feed pulls, and lets a test wait for the n-th item."""

    def __init__(self, *inputs: Any, room: int) -> None:
        self.items: list[Any] = []
        self.batches = 0
        self.feed = Feed(inputs, room=room, take=self.take)
        self._waiting: list[tuple[int, asyncio.Event]] = []

    def take(self, batch: list[Any]) -> None:
        self.items += batch
        self.batches += 1
        for count, event in self._waiting:
            if len(self.items) >= count:
                event.set()

    async def has(self, count: int) -> None:
        event = asyncio.Event()
        self._waiting.append((count, event))
        if len(self.items) < count:
            await event.wait()


def input_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "asyncrt input"]


class Generator:
    """A sync or async generator that tells how far it was pulled, and whether it was closed."""

    def __init__(self, items: Any, *, then: Callable[[], Any] | None = None) -> None:
        self.pulled = 0
        self.closed = threading.Event()
        self._items = items
        self._then = then

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self._items:
                self.pulled += 1
                yield item
            if self._then is not None:
                self._then()
        finally:
            self.closed.set()

    def sync(self) -> Iterator[Any]:
        return iter(self)

    async def asynchronous(self) -> AsyncIterator[Any]:
        try:
            for item in self._items:
                self.pulled += 1
                yield item
                await anyio.lowlevel.checkpoint()
            if self._then is not None:
                await self._then()
        finally:
            self.closed.set()


class Blocked:
    """What an input does that never answers; a test knows when it has begun."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.release = threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        self.release.wait()


class AsyncView:
    """An async iterable that is not a generator: it has no ``aclose``."""

    def __init__(self, count: int) -> None:
        self._numbers = iter(range(count))

    def __aiter__(self) -> AsyncView:
        return self

    async def __anext__(self) -> int:
        await anyio.lowlevel.checkpoint()
        for number in self._numbers:
            return number
        raise StopAsyncIteration


def kinds() -> list[str]:
    return ["sync", "asynchronous"]


# -- sized inputs ----------------------------------------------------------------------------------


def test_sized_inputs_are_taken_whole_and_cannot_change_afterwards() -> None:
    names = ["a", "b"]
    sequences = as_sequences([names, range(2), (1, 2), {"x": 1, "y": 2}, {7}])
    names.append("c")
    assert sequences == [["a", "b"], range(2), (1, 2), ["x", "y"], [7]]


def test_ranges_and_tuples_are_not_copied() -> None:
    numbers = range(10**12)
    sequences = as_sequences([numbers])
    assert sequences is not None
    assert sequences[0] is numbers


async def test_one_input_without_a_size_makes_the_whole_input_one_without() -> None:
    assert as_sequences([[1, 2], iter([1])]) is None
    assert as_sequences([Generator(()).asynchronous()]) is None


def test_no_input_at_all_is_refused() -> None:
    with pytest.raises(TypeError, match="at least one iterable"):
        as_sequences([])


@pytest.mark.parametrize("value", [3, None, len])
def test_what_is_not_iterable_is_refused_by_its_type(value: object) -> None:
    with pytest.raises(TypeError, match=f"not {type(value).__name__}"):
        as_sequences([value])


# -- pulling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", kinds())
async def test_all_items_come_in_order_and_the_input_is_closed(kind: str) -> None:
    source = Generator(range(500))
    taker = Taker(getattr(source, kind)(), room=1000)
    await taker.feed.run()
    assert taker.items == list(range(500))
    assert source.closed.is_set()
    assert input_threads() == []


@pytest.mark.parametrize("kind", kinds())
async def test_no_more_is_pulled_than_there_is_room_for(kind: str) -> None:
    source = Generator(itertools.count())
    taker = Taker(getattr(source, kind)(), room=3)
    async with anyio.create_task_group() as group:
        group.start_soon(taker.feed.run)
        await taker.has(3)
        await anyio.wait_all_tasks_blocked()
        assert (taker.items, source.pulled) == ([0, 1, 2], 3)
        taker.feed.set_room(2)
        await taker.has(5)
        await anyio.wait_all_tasks_blocked()
        assert (taker.items, source.pulled) == ([0, 1, 2, 3, 4], 5)
        taker.feed.stop()
    assert source.pulled == 5
    assert source.closed.is_set()
    assert input_threads() == []


@pytest.mark.parametrize("kind", kinds())
async def test_nothing_is_pulled_without_room(kind: str) -> None:
    source = Generator(itertools.count())
    taker = Taker(getattr(source, kind)(), room=0)
    async with anyio.create_task_group() as group:
        group.start_soon(taker.feed.run)
        await anyio.wait_all_tasks_blocked()
        taker.feed.set_room(1)
        await taker.has(1)
        assert source.pulled == 1
        taker.feed.stop()
    assert taker.items == [0]


async def test_an_input_that_blocks_does_not_block_the_loop() -> None:
    items: queue.Queue[int | None] = queue.Queue()
    taker = Taker(iter(items.get, None), room=10)
    async with anyio.create_task_group() as group:
        group.start_soon(taker.feed.run)
        for number in range(3):
            await anyio.wait_all_tasks_blocked()  # the loop goes round while the input blocks
            assert len(taker.items) == number
            items.put(number)
            await taker.has(number + 1)
        items.put(None)
    assert taker.items == [0, 1, 2]


async def test_an_item_is_handed_on_before_the_next_one_is_there() -> None:
    sender, receiver = anyio.create_memory_object_stream[int](0)
    taker = Taker(receiver, room=10)
    async with anyio.create_task_group() as group, sender:
        group.start_soon(taker.feed.run)
        for number in range(3):
            await sender.send(number)
            await taker.has(number + 1)
        taker.feed.stop()
    receiver.close()
    assert taker.items == [0, 1, 2]


async def test_items_that_come_at_once_are_handed_on_together() -> None:
    async def numbers() -> AsyncIterator[int]:
        for number in range(50):
            yield number  # without ever waiting

    taker = Taker(numbers(), room=1000)
    await taker.feed.run()
    assert taker.items == list(range(50))
    assert taker.batches == 1


async def test_several_inputs_give_tuples_up_to_the_shortest() -> None:
    taker = Taker(itertools.count(), iter("abc"), room=10)
    await taker.feed.run()
    assert taker.items == [(0, "a"), (1, "b"), (2, "c")]


async def test_sync_and_async_inputs_may_be_mixed() -> None:
    source = Generator(range(10))
    taker = Taker(source.asynchronous(), [10, 20, 30], iter("abc"), room=10)
    await taker.feed.run()
    assert taker.items == [(0, 10, "a"), (1, 20, "b"), (2, 30, "c")]
    assert source.closed.is_set()


async def test_an_async_input_that_is_no_generator_needs_no_closing() -> None:
    taker = Taker(AsyncView(3), room=10)
    await taker.feed.run()
    assert taker.items == [0, 1, 2]


# -- ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", kinds())
async def test_an_exception_of_the_input_is_raised_after_what_came_before_it(kind: str) -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise ZeroDivisionError("in the input")

    source = Generator(items())
    taker = Taker(getattr(source, kind)(), room=10)
    with pytest.raises(ZeroDivisionError, match="in the input"):
        await taker.feed.run()
    assert taker.items == [1, 2]
    assert source.closed.is_set()
    assert input_threads() == []


async def test_one_input_that_fails_closes_the_others() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    source = Generator(itertools.count())
    taker = Taker(source.asynchronous(), broken(), room=10)
    with pytest.raises(ZeroDivisionError):
        await taker.feed.run()
    assert taker.items == [(0, 1)]
    assert source.closed.is_set()


async def test_an_async_input_that_never_answers_is_closed_by_stop() -> None:
    source = Generator([1], then=anyio.sleep_forever)
    taker = Taker(source.asynchronous(), room=10)
    async with anyio.create_task_group() as group:
        group.start_soon(taker.feed.run)
        await taker.has(1)
        taker.feed.stop()
    assert source.closed.is_set()


async def test_a_sync_input_that_never_answers_is_left_behind_by_stop_and_closed_when_it_does() -> (
    None
):
    blocked = Blocked()
    source = Generator([1], then=blocked)
    taker = Taker(source.sync(), room=10)
    async with anyio.create_task_group() as group:
        group.start_soon(taker.feed.run)
        await taker.has(1)
        await asyncio.to_thread(blocked.begun.wait)
        taker.feed.stop()
    (thread,) = input_threads()
    assert thread.daemon
    assert not source.closed.is_set()
    blocked.release.set()
    await asyncio.to_thread(thread.join)
    assert source.closed.is_set()
    assert taker.items == [1]


@pytest.mark.parametrize("kind", kinds())
async def test_cancelling_the_feed_closes_the_input(kind: str) -> None:
    source = Generator(itertools.count())
    taker = Taker(getattr(source, kind)(), room=2)
    async with anyio.create_task_group() as group:
        group.start_soon(taker.feed.run)
        await taker.has(2)
        group.cancel_scope.cancel()
    assert source.closed.is_set()
    assert input_threads() == []


@pytest.mark.parametrize("kind", kinds())
async def test_stopping_before_the_beginning_pulls_nothing(kind: str) -> None:
    source = Generator(itertools.count())
    generator = getattr(source, kind)()
    taker = Taker(generator, room=2)
    taker.feed.stop()
    await taker.feed.run()
    assert (taker.items, source.pulled) == ([], 0)


def test_an_input_may_outlive_its_loop() -> None:
    blocked = Blocked()
    source = Generator([1], then=blocked)

    async def main() -> None:
        taker = Taker(source.sync(), room=10)
        task = asyncio.create_task(taker.feed.run())
        await taker.has(1)
        await asyncio.to_thread(blocked.begun.wait)
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(main())
    (thread,) = input_threads()
    blocked.release.set()
    thread.join()
    assert source.closed.is_set()
