"""Map, then reduce on the workers: groups of results as they come, their results in turn."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio

from asyncrt.call import Call
from asyncrt.errorgroups import innermost
from asyncrt.outcome import Failure
from asyncrt.run import Run


class Tree:
    """Collects values by position, and hands out groups of neighbours that are complete.

    Level 0 holds results of the map, by index. A group of ``fan_in`` neighbours of one level
    becomes one value of the next. What is left at the end is fewer than ``fan_in`` of each level.
    """

    def __init__(self, fan_in: int | None) -> None:
        self._fan_in = fan_in
        self._values: dict[tuple[int, int], Any] = {}
        self._complete: dict[tuple[int, int], int] = {}

    def add(self, level: int, position: int, value: Any) -> tuple[int, int] | None:
        """Take a value; return level and position of the group that it completes, if it does."""
        self._values[level, position] = value
        if self._fan_in is None:
            return None
        group = level + 1, position // self._fan_in
        count = self._complete[group] = self._complete.get(group, 0) + 1
        if count < self._fan_in:
            return None
        del self._complete[group]
        return group

    def take(self, group: tuple[int, int]) -> list[Any]:
        """Return the values of a complete group, in order, and let go of them."""
        level, position = group
        assert self._fan_in is not None
        first = position * self._fan_in
        return [self._values.pop((level - 1, first + each)) for each in range(self._fan_in)]

    def rest(self) -> list[Any]:
        """Return what is left, in the order of the input."""

        def first_index(key: tuple[int, int]) -> int:
            level, position = key
            size: int = (self._fan_in or 1) ** level
            return position * size

        return [self._values[key] for key in sorted(self._values, key=first_index)]


class Reduction:
    """Feeds the results of a run to calls that reduce them.

    Args:
        run: The map.
        reduce_group: Reduces a list of values on a worker.
        fan_in: Values that one such call gets; ``None``: there are no such calls.
        fraction: Share of the map's results that must be there before the first of them.
    """

    def __init__(
        self,
        run: Run[Any],
        reduce_group: Callable[[list[Any]], Awaitable[Any]],
        *,
        fan_in: int | None,
        fraction: float,
    ) -> None:
        self._run = run
        self._reduce_group = reduce_group
        self._tree = Tree(fan_in)
        self._fraction = fraction
        self._waiting: list[tuple[int, int]] | None = []  # complete groups, before ``fraction``

    async def last_inputs(self) -> AsyncIterator[list[Any]]:
        """Yield one list: what the last call has to reduce."""
        yield await self._reduce()

    async def _reduce(self) -> list[Any]:
        try:
            async with self._run as run, anyio.create_task_group() as group:
                self._group = group
                done = 0
                async for call in run.as_completed():
                    value = await self._result_of(call)
                    self._take(0, call.index, value)
                    done += 1
                    if self._waiting and done >= self._fraction * (run.total or 0):
                        self._begin()
                self._begin()
        except BaseExceptionGroup as errors:
            raise innermost(errors) from None
        return self._tree.rest()

    @staticmethod
    async def _result_of(call: Call[Any]) -> Any:
        """Return the result of a call that has ended; its error where these count as results."""
        if call.status == "failed":
            outcome = call.outcome
            assert isinstance(outcome, Failure)
            return outcome.error
        return await call

    def _begin(self) -> None:
        """Reduce the groups that are complete, and from now on each when it is."""
        waiting, self._waiting = self._waiting, None
        for complete in waiting or ():
            self._group.start_soon(self._reduce_up, complete)

    def _take(self, level: int, position: int, value: Any) -> None:
        complete = self._tree.add(level, position, value)
        if complete is not None and self._waiting is not None:
            self._waiting.append(complete)
        elif complete is not None:
            self._group.start_soon(self._reduce_up, complete)

    async def _reduce_up(self, complete: tuple[int, int]) -> None:
        self._take(*complete, await self._reduce_group(self._tree.take(complete)))
