"""An event loop in a thread of its own, with an executor in it: what the blocking face stands on.

It starts with the first call, and ends when it is told to, or at the exit of the interpreter.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio

from asyncrt.errors import ExecutorClosedError
from asyncrt.executor import Executor

if TYPE_CHECKING:
    from asyncrt.config import Config

logger = logging.getLogger(__name__)

_AT_EXIT_SECONDS: Final = 20.0

_threads: weakref.WeakSet[LoopThread] = weakref.WeakSet()
_registering = threading.Lock()
_registered = False
_exiting = False


class LoopThread:
    """Runs an event loop with one executor in it, and what others post to it.

    Args:
        config: See ``Executor``.
        options: See ``Executor``.
    """

    def __init__(self, config: Config | str | Path | None, options: Mapping[str, Any]) -> None:
        self.executor = Executor(config=config, **options)
        self.pid = os.getpid()
        self.callbacks = CallbackThread()
        self._lock = threading.Lock()
        self._inbox: deque[Callable[[], None]] = deque()
        self._awake = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open = False
        self._closed = False
        self._ending: asyncio.Event | None = None
        self._end: Literal["wait", "cancel"] | None = None
        self.failure: BaseException | None = None

    # -- from any thread --------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse new work after the end.

        Raises:
            ExecutorClosedError: It was shut down, the interpreter ends, or this is a fork.
        """
        self.check_process()
        if self._end is not None:
            raise ExecutorClosedError("cannot schedule new futures after shutdown")
        if _exiting:
            raise ExecutorClosedError("cannot schedule new futures after interpreter shutdown")

    def check_process(self) -> None:
        """Refuse use in a process that was forked from the one that has the thread.

        Raises:
            ExecutorClosedError: This is such a process.
        """
        if os.getpid() != self.pid:
            raise ExecutorClosedError(
                f"this executor belongs to process {self.pid}, and threads are not forked: "
                "make a new Executor in the forked process"
            )

    def post(self, action: Callable[[], None]) -> bool:
        """Let the loop do something, in the order of posting; return whether it will.

        Once the thread has ended nothing else touches what was in it: the caller may.
        """
        with self._lock:
            if self._closed:
                return False
            self._inbox.append(action)
            if self._thread is None:
                self._start()
            wake = self._open and not self._awake
            self._awake = self._awake or wake
        if wake:
            self._wake()
        return True

    def end(self, how: Literal["wait", "cancel"]) -> None:
        """End soon: when what was started is done, or at once."""
        if os.getpid() != self.pid:
            return  # the thread is another process's
        with self._lock:
            if self._end == "cancel" or self._end == how:
                return
            self._end = how
            if self._thread is None:
                self._closed = True
                return
        self.post(self._note_end)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the thread has ended; return whether it has. It may call this itself."""
        threads = [thread for thread in (self._thread, self.callbacks.thread) if thread is not None]
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout)
        return not any(thread.is_alive() for thread in threads)

    def soon(self, callback: Callable[[], None]) -> None:
        """Call something later in this turn of the loop. In the thread only."""
        assert self._loop is not None
        self._loop.call_soon(callback)

    def is_current(self) -> bool:
        """Whether this is called in the thread."""
        return threading.current_thread() is self._thread

    @property
    def was_ended(self) -> bool:
        """Whether it was told to end."""
        return self._end is not None

    def _start(self) -> None:
        _register_exit()
        _threads.add(self)
        self._thread = threading.Thread(target=self._run, name="asyncrt loop", daemon=True)
        self._thread.start()

    def _wake(self) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:  # it has just ended, and did what was in the inbox
            return

    # -- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001 - told to whoever uses the executor next
            self.failure = self.failure or error
        finally:
            with self._lock:
                self._closed = True
            self._drain()
            self.callbacks.end()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ending = asyncio.Event()
        try:
            await self.executor._open()
        except Exception as error:  # noqa: BLE001 - told to whoever uses the executor next
            self.failure = error
            return
        with self._lock:
            self._open = True
        self._drain()
        try:
            await self._ending.wait()
        finally:
            await self._close()

    async def _close(self) -> None:
        """Close the executor; being told to cancel ends waiting for what was started."""
        if self._end == "wait":
            async with anyio.create_task_group() as group:
                group.start_soon(self._cancel_when_told, group.cancel_scope)
                await self.executor.aclose()
                group.cancel_scope.cancel()
        await self.executor.aclose(cancel=True)

    async def _cancel_when_told(self, scope: anyio.CancelScope) -> None:
        assert self._ending is not None
        while self._end != "cancel":
            self._ending.clear()
            await self._ending.wait()
        scope.cancel()

    def _note_end(self) -> None:
        if self._ending is not None:
            self._ending.set()

    def _drain(self) -> None:
        self._awake = False
        while self._inbox:
            self._inbox.popleft()()


class CallbackThread:
    """Runs what must not run in the loop's thread, since it may block, in order."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Have the thread. Not when it is needed: no thread starts when the interpreter ends."""
        with self._lock:
            if self.thread is None:
                self.thread = threading.Thread(
                    target=self._run, name="asyncrt callbacks", daemon=True
                )
                self.thread.start()

    def call(self, callback: Callable[[], None]) -> None:
        """Run something soon."""
        self._queue.put(callback)

    def end(self) -> None:
        """End when all that was to be called has been."""
        self._queue.put(None)

    def _run(self) -> None:
        while (callback := self._queue.get()) is not None:
            callback()


def _register_exit() -> None:
    """Arrange for the exit of the interpreter.

    ``atexit`` would be too late: it comes after threads that are no daemons were waited for, and
    anyio's worker threads are none, and end with the loop. ``concurrent.futures`` does the same.
    """
    global _registered  # noqa: PLW0603 - there is one interpreter
    with _registering:
        if not _registered:
            threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
            _registered = True


def _at_exit() -> None:
    """End all loops: wait for those that were shut down, cancel those that nobody closed."""
    global _exiting  # noqa: PLW0603 - see above
    _exiting = True
    mine = [thread for thread in _threads if thread.pid == os.getpid()]
    for thread in mine:
        if not thread.was_ended:
            thread.post(lambda thread=thread: _cancel_at_exit(thread))  # type: ignore[misc]
    for thread in mine:
        thread.join(None if thread._end == "wait" else _AT_EXIT_SECONDS)


def _cancel_at_exit(thread: LoopThread) -> None:
    left = sum(run.stats.pending for run in thread.executor.unfinished())
    if left:
        logger.warning(
            "the program ends, and %s calls are cancelled: nobody closed their executor; "
            "use 'with', or call shutdown()",
            left,
        )
    thread.end("cancel")
