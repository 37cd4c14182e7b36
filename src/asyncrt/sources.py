"""Where a run's arguments come from: known as a whole, or pulled while the run goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Final

import anyio
import anyio.lowlevel

_ITEMS_BEFORE_CHECKPOINT: Final = 64
_CLOSE_SECONDS: Final = 5.0
_THREAD_SECONDS: Final = 0.2


def as_sequences(iterables: Sequence[Any]) -> list[Sequence[Any]] | None:
    """Return sized inputs as sequences that do not change; ``None`` if one has no size.

    Raises:
        TypeError: There is no input, or one is not iterable at all.
    """
    if not iterables:
        raise TypeError("map needs at least one iterable of arguments")
    for iterable in iterables:
        if not isinstance(iterable, Iterable | AsyncIterable) and not hasattr(
            iterable, "__getitem__"
        ):
            raise TypeError(f"expected an iterable of arguments, not {type(iterable).__name__}")
    if not all(_has_size(iterable) for iterable in iterables):
        return None
    return [
        iterable if isinstance(iterable, range | tuple) else list(iterable)
        for iterable in iterables
    ]


def _has_size(iterable: Any) -> bool:
    try:
        len(iterable)
    except (TypeError, OverflowError):  # range(10**30) has a length that Python cannot tell
        return False
    return True


class Feed:
    """Pulls arguments from inputs without a size, as long as there is room.

    One input gives its items, several give tuples of one item of each.

    Args:
        room: How many arguments to pull before ``set_room`` says more.
        take: Called in the event loop with each batch of arguments.
    """

    def __init__(
        self, iterables: Sequence[Any], *, room: int, take: Callable[[list[Any]], None]
    ) -> None:
        self._iterables = iterables
        self._take = take
        self._room = room
        self._changed = anyio.Event()
        self._stopped = False
        self._batch: list[Any] = []
        self._loop = asyncio.get_running_loop()
        self._thread: _Puller | None = None
        self._scope = anyio.CancelScope()

    def set_room(self, room: int) -> None:
        """Say how many arguments there is room for now."""
        self._room = room
        if self._thread is not None:
            self._thread.set_room(room)
        elif room > 0:
            self._wake()

    def stop(self) -> None:
        """Pull nothing more."""
        self._stopped = True
        self._scope.cancel()
        if self._thread is not None:
            self._thread.stop()

    async def run(self) -> None:
        """Pull until an input ends or ``stop`` is called, even if an input never answers.

        Raises:
            Exception: Whatever an input raises.
        """
        if self._stopped:
            return
        with self._scope:
            if any(isinstance(iterable, AsyncIterable) for iterable in self._iterables):
                await self._pull_async()
            else:
                await self._pull_in_thread()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _hand_on(self) -> None:
        batch, self._batch = self._batch, []
        if batch and not self._stopped:
            self._room -= len(batch)
            self._take(batch)

    async def _pull_async(self) -> None:
        iterators = [_as_async(iterable) for iterable in self._iterables]
        pulled = 0
        try:
            while True:  # noqa: ASYNC913 - it waits for room, for the input, or every 64 items
                while self._room <= len(self._batch):
                    if self._batch:
                        self._hand_on()
                    else:
                        await self._changed.wait()
                if self._stopped:  # its cancellation comes with the next checkpoint only
                    return
                try:
                    items = [await anext(iterator) for iterator in iterators]
                except StopAsyncIteration:
                    return
                # What comes in one turn of the loop is handed on together, at its end.
                if not self._batch:
                    self._loop.call_soon(self._hand_on)
                self._batch.append(items[0] if len(items) == 1 else tuple(items))
                pulled += 1
                if pulled % _ITEMS_BEFORE_CHECKPOINT == 0:
                    await anyio.lowlevel.checkpoint()
        finally:
            self._hand_on()
            for iterator in iterators:
                close = getattr(iterator, "aclose", None)
                if close is not None:
                    with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
                        await close()

    async def _pull_in_thread(self) -> None:
        """Pull in a thread, since a blocking input must not block the loop.

        A thread that is inside the input's ``next()`` cannot be stopped; it is a daemon, and ends
        when the input lets it. It is waited for a moment, and then left.
        """
        ended = anyio.Event()
        raised: list[BaseException] = []

        def arrived(items: list[Any]) -> None:
            self._batch.extend(items)
            self._hand_on()

        def finished(error: BaseException | None) -> None:
            if error is not None:
                raised.append(error)
            ended.set()

        thread = self._thread = _Puller(
            self._iterables, room=self._room, loop=self._loop, arrived=arrived, finished=finished
        )
        thread.start()
        try:
            await ended.wait()
        finally:
            thread.stop()
            with anyio.move_on_after(_THREAD_SECONDS, shield=True):
                await ended.wait()
                thread.join()  # at once: telling its end was the last thing it did
        if raised:
            raise raised[0]


class _Puller(threading.Thread):
    """Pulls from an iterator that may block."""

    def __init__(
        self,
        iterables: Sequence[Any],
        *,
        room: int,
        loop: asyncio.AbstractEventLoop,
        arrived: Callable[[list[Any]], None],
        finished: Callable[[BaseException | None], None],
    ) -> None:
        super().__init__(name="asyncrt input", daemon=True)
        self._iterables = iterables
        self._loop = loop
        self._arrived = arrived
        self._finished = finished
        self._condition = threading.Condition()
        self._room = room
        self._stopped = False
        self._batch: list[Any] = []

    def set_room(self, room: int) -> None:
        with self._condition:
            self._room = room - len(self._batch)
            self._condition.notify()

    def stop(self) -> None:
        with self._condition:
            self._stopped = True
            self._condition.notify()

    def run(self) -> None:
        error: BaseException | None = None
        try:
            self._pull()
        except BaseException as raised:  # noqa: ASYNC103, BLE001 - handed to the run, which raises
            error = raised
        self._call(self._flush)
        self._call(lambda: self._finished(error))

    def _pull(self) -> None:
        iterables = self._iterables
        inputs = iter(iterables[0]) if len(iterables) == 1 else zip(*iterables, strict=False)
        while True:
            with self._condition:
                while self._room <= 0 and not self._stopped:
                    self._condition.wait()
                if self._stopped:
                    break
            try:
                item = next(inputs)
            except StopIteration:
                return
            with self._condition:
                self._room -= 1
                self._batch.append(item)
                first = len(self._batch) == 1
            if first:
                self._call(self._flush)
        close = getattr(inputs, "close", None)
        if close is not None:
            close()

    def _flush(self) -> None:
        with self._condition:
            batch, self._batch = self._batch, []
        if batch:
            self._arrived(batch)

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed: nobody is interested any more
            self._stopped = True


async def _from_sync(iterable: Iterable[Any]) -> AsyncIterator[Any]:
    for item in iterable:
        yield item


def _as_async(iterable: Any) -> AsyncIterator[Any]:
    """Return an async iterator; a sync input beside an async one is taken not to block."""
    return aiter(iterable) if isinstance(iterable, AsyncIterable) else _from_sync(iterable)
