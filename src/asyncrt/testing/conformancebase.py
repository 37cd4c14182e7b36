"""What the conformance tests have in common: hooks and flags."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

import asyncrt
from asyncrt.backends.base import Backend
from asyncrt.events import CallEvent, CallStarted
from asyncrt.testing.interposed import InterposedBackend

absolute: Callable[[int], int] = abs  # to the type checker, `abs` alone may return anything


class ConformanceBase:
    """Hooks and flags.

    Functions under test are lambdas or nested, so that they travel by value.

    Attributes:
        isolates_processes: A call that ends its process, or breaks it, costs that call only.
        kills: A call that does not cooperate can be ended.
        limits_memory: ``memory`` holds.
        has_logs: What calls print comes home.
        shares_files: Calls see the files of the test.
        backend: The backend of the test that runs, with hooks to break its connections.
    """

    isolates_processes: ClassVar[bool] = True
    kills: ClassVar[bool] = True
    limits_memory: ClassVar[bool] = True
    has_logs: ClassVar[bool] = True
    shares_files: ClassVar[bool] = True

    backend: InterposedBackend
    _open = 0
    _tasks_before: AbstractSet[asyncio.Task[Any]] = frozenset()
    _tasks_left: Sequence[str] = ()

    def make_backend(self) -> Backend:
        """Return the backend to test."""
        raise NotImplementedError

    def executor_options(self) -> dict[str, Any]:
        """Return options that every executor of the tests needs."""
        return {}

    def leftovers(self) -> list[str]:
        """Return what is left after a test: processes, files, pods, by names for people.

        It waits (bounded) for what was told to end and is about to.
        """
        return []

    def kill_one_worker(self) -> None:
        """Kill a worker that is connected, as an outside force would."""
        self.backend.connected[0].inner.kill()

    def cut_one_connection(self) -> None:
        """Cut the connection of a worker that has one."""
        self.backend.connected[0].cut_connection()

    @pytest.fixture(autouse=True)
    def nothing_is_left(self) -> Iterator[None]:
        """Make the backend; in the end, look for what the test left."""
        self.backend = InterposedBackend(self.make_backend())
        yield
        assert list(self._tasks_left) == []
        assert self.leftovers() == []

    @asynccontextmanager
    async def open(self, **options: Any) -> AsyncIterator[asyncrt.Executor]:
        """Open an executor on two workers of the backend. It must leave no task behind."""
        if not self._open:
            self._tasks_before = asyncio.all_tasks()
        self._open += 1
        merged = {"max_workers": 2, "echo": False, **self.executor_options(), **options}
        try:
            async with asyncrt.Executor(
                config=asyncrt.Config(), backend=self.backend, **merged
            ) as executor:
                yield executor
        finally:
            self._open -= 1
            if not self._open:
                left = asyncio.all_tasks() - self._tasks_before
                self._tasks_left = sorted(task.get_name() for task in left)

    def needs(self, flag: str) -> None:
        """Skip a test that asks for what this backend cannot do."""
        if not getattr(self, flag):
            pytest.skip(f"{type(self).__name__}: {flag} = False")


class Ran:
    """Counts in a file how often calls began."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "ran"
        self._path.touch()

    def counting(self, fn: Callable[[int], Any]) -> Callable[[int], Any]:
        """Return a function that notes its argument, then does what another one does."""
        path = str(self._path)

        def noted(number: int) -> Any:
            import os  # noqa: PLC0415 - it travels by value: what it needs comes with it

            fd = os.open(path, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(fd, f"{number}\n".encode())
            finally:
                os.close(fd)
            return fn(number)

        return noted

    def numbers(self) -> list[int]:
        """Return the arguments of the calls that began, in order."""
        return [int(line) for line in self._path.read_text().split()]


async def until_started(run: asyncrt.Run[Any], index: int = 0, attempt: int = 1) -> None:
    """Wait until a call is reported to be running."""
    async for event in run.events():
        if isinstance(event, CallStarted) and (event.index, event.attempt) == (index, attempt):
            return
    raise AssertionError(f"the run ended before attempt {attempt} of call {index} was seen to run")


async def events_of(run: asyncrt.Run[Any], index: int) -> list[CallEvent]:
    """Return all events of one call of a run that has ended."""
    return [
        event
        async for event in run.events()
        if isinstance(event, CallEvent) and event.index == index
    ]
