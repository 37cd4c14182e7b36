"""An event loop whose clock jumps to the next timer when there is nothing to do."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, TypeVar, TypeVarTuple

import anyio
import anyio.to_thread

R = TypeVar("R")
Args = TypeVarTuple("Args")

_BEGIN: Final = 1000.0  # not zero: a time is never mistaken for "none yet"
_GRACE_SECONDS: Final = 0.002
_POOLED_THREADS: Final = ("AnyIO worker thread", "asyncio_")  # counted by what they do, not by name


class VirtualClockEventLoop(asyncio.SelectorEventLoop):
    """Never waits for a timer: an hour of ``sleep`` takes no time, and its order is exact.

    The clock stands while anything is ready to run, and while a thread works: one of
    ``anyio.to_thread`` (under the default limiter), of ``run_in_executor``, or anything inside
    ``hold_clock()``. Then it jumps to the next timer.

    Its limits: only what is in memory is seen, so code that talks to sockets, pipes or processes
    sees time fly while its peer works. Code that never lets the loop run dry (calls that take no
    time, in an endless run) never sees time pass. Threads that were started otherwise, such as the
    one that pulls a blocking input, get 2 ms of real time before each jump, and no promise. A
    thread that waits for a timer of the loop waits for ever.
    """

    def __init__(self) -> None:
        self._virtual_now = _BEGIN
        self._holds = 0
        self._limiter: anyio.CapacityLimiter | None = None
        self._finding: asyncio.Task[None] | None = None
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        """Return the virtual time, seconds."""
        return self._virtual_now

    def advance(self, seconds: float) -> None:
        """Let time pass. Timers that are due run in the loop's next turn."""
        self._virtual_now += seconds

    @contextlib.contextmanager
    def hold_clock(self) -> Iterator[None]:
        """Let the clock stand, for something that happens in real time."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1

    @property
    def is_held(self) -> bool:
        """Whether the clock stands even if nothing is ready."""
        borrowed = self._limiter.borrowed_tokens if self._limiter is not None else 0
        return bool(self._holds or borrowed)

    def run_forever(self) -> None:
        """Run until stopped. See ``asyncio.AbstractEventLoop``."""
        if self._finding is None:
            self._finding = self.create_task(self._find_limiter())
        super().run_forever()

    async def _find_limiter(self) -> None:
        self._limiter = anyio.to_thread.current_default_thread_limiter()

    def run_in_executor(
        self, executor: Any, func: Callable[[*Args], R], *args: *Args
    ) -> asyncio.Future[R]:
        """Run a function in a thread; the clock stands until it has returned."""
        future = super().run_in_executor(executor, func, *args)
        self._holds += 1
        future.add_done_callback(self._release)
        return future

    def _release(self, _: asyncio.Future[Any]) -> None:
        self._holds -= 1


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualClockEventLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        if self._loop.is_held:
            return super().select(None)  # a thread wakes the loop when it has something to say
        ready = super().select(_GRACE_SECONDS if _has_other_threads() else 0)
        if not ready:
            self._loop.advance(timeout)
        return ready


def _has_other_threads() -> bool:
    return any(
        thread is not threading.current_thread() and not thread.name.startswith(_POOLED_THREADS)
        for thread in threading.enumerate()
    )


def run_in_virtual_time(function: Callable[[*Args], Coroutine[Any, Any, R]], *args: *Args) -> R:
    """Run an async function to its end on a ``VirtualClockEventLoop``; return what it returns."""
    with asyncio.Runner(loop_factory=VirtualClockEventLoop) as runner:
        return runner.run(function(*args))
