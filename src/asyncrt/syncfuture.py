"""Futures of the sync face, and the thread that runs what was attached to them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import os
import queue
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from asyncrt.errors import AsyncrtError, ExecutorClosedError
from asyncrt.spill import Deferred

if TYPE_CHECKING:
    from asyncrt.options import Settings
    from asyncrt.serialize import PackedFunction
    from asyncrt.synccore import Core, SubmitJob
    from asyncrt.syncreduce import ReduceJob

R = TypeVar("R")
_Callback = Callable[[concurrent.futures.Future[Any]], object]

# Where the standard library logs what a callback raised.
_futures_logger: Final = logging.getLogger("concurrent.futures")

# The states of a future, as the standard library names them.
PENDING: Final = "PENDING"
RUNNING: Final = "RUNNING"
CANCELLED: Final = "CANCELLED"
_UNSETTLED: Final = frozenset((PENDING, RUNNING))


class BrokenExecutorError(AsyncrtError, BrokenProcessPool):
    """No worker can be started, or the initializer raised: make a new executor.

    Is a ``concurrent.futures.BrokenExecutor``; what broke it is its ``__cause__``.
    """


class Profile:
    """How calls are to be run: the options of an executor or of a view of it.

    Attributes:
        settings: As they were asked for.
        run_settings: As runs get them: bounds and failures are dealt with on this side.
        shape: Of the workers.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        call = replace(settings.call, return_exceptions=True, max_in_flight=None)
        self.run_settings = replace(settings, call=call)
        self.shape = settings.pool.shape()


@dataclass(slots=True, eq=False)
class Task:
    """What a future waits for, on its way to the event loop."""

    function: PackedFunction
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]]
    profile: Profile


class Future(concurrent.futures.Future[R]):
    """The result of a call, to come. Is a ``concurrent.futures.Future``.

    Made by ``Executor.submit``. It runs (``running()``) when a worker says so; until then it can be
    cancelled, and what began in that moment is killed. Callbacks run in a thread of their own,
    never in the one that talks to the workers, so they may block.
    """

    def __init__(self, core: Core | None = None, task: Task | None = None) -> None:
        super().__init__()
        self._core = core
        self._task = task
        self._place: tuple[SubmitJob | ReduceJob, int] | None = None

    def result(self, timeout: float | None = None) -> R:
        """Return what the call returned; wait for it if need be.

        Args:
            timeout: Seconds to wait; ``None``: no limit. It limits the waiting, not the call: that
                is the ``timeout`` of ``with_options``.

        Raises:
            TimeoutError: It was not done by then. The call goes on.
            CancelledError: The call was cancelled.
            Exception: What the call raised.
        """
        try:
            if self._state in _UNSETTLED:
                self._before_waiting("result()", timeout)
            value: R = loaded(super().result(timeout))
            return value
        finally:
            del self  # of the cycle: exception, traceback, this frame

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the call raised, ``None`` if it returned; wait for it if need be.

        Args:
            timeout: Seconds to wait; ``None``: no limit.

        Raises:
            TimeoutError: It was not done by then. The call goes on.
            CancelledError: The call was cancelled.
        """
        if self._state in _UNSETTLED:
            self._before_waiting("exception()", timeout)
        return super().exception(timeout)

    def _before_waiting(self, what: str, timeout: float | None) -> None:
        if self._core is not None:
            check_process(self._core.pid)
        if timeout is None or timeout > 0:
            warn_if_in_loop(
                what, "await asyncio.wrap_future(future), or use asyncrt.Executor", stacklevel=4
            )

    def cancel(self) -> bool:
        """Give the call up unless it is known to run or has ended.

        Returns:
            Whether it is cancelled.
        """
        if self._core is not None and self._state in _UNSETTLED:
            check_process(self._core.pid)
        if not super().cancel():
            return False
        if self._core is not None and self._state == CANCELLED:
            self._core.post(functools.partial(self._core.forget, self))
        return True

    def add_done_callback(self, fn: _Callback) -> None:
        """Call something with this future when it is done; at once if it is done already.

        What it raises is logged. Callbacks run in the order in which they were added.
        """
        if self._core is not None:
            self._core.callbacks.prepare()
            fn = functools.partial(self._core.callbacks.call, fn)
        super().add_done_callback(fn)

    # -- from the event loop ----------------------------------------------------------------------

    def take_task(self) -> Task | None:
        """Return what there is to do, once; ``None`` if it was cancelled before."""
        task, self._task = self._task, None
        if self._state != PENDING:
            self.note_cancelled()
            return None
        return task

    def note_started(self) -> None:
        """Learn that it runs."""
        if self._state == PENDING:
            self.set_running_or_notify_cancel()

    def note_cancelled(self) -> None:
        """Tell those who wait for several futures that this one was cancelled, once."""
        if self._state == CANCELLED:
            self.set_running_or_notify_cancel()

    def settle(self, value: Any, error: BaseException | None) -> None:
        """Set the outcome, unless it was cancelled."""
        self._place = None
        state = self._state
        if state == RUNNING or (
            state in (PENDING, CANCELLED) and self.set_running_or_notify_cancel()
        ):
            if error is None:
                self.set_result(value)
            else:
                self.set_exception(error)


class Callbacks:
    """Runs callbacks that would run in the event loop in a thread of their own, in order."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.loop_thread: int | None = None  # its identity, known when the loop runs

    def prepare(self) -> None:
        """Have the thread. Not when it is needed: none can be started while the program exits."""
        if self._thread is not None:
            return
        with self._lock, contextlib.suppress(RuntimeError):  # it exits already
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="asyncrt-callbacks", daemon=True)
                thread.start()
                self._thread = thread

    def call(self, fn: _Callback, future: concurrent.futures.Future[Any]) -> None:
        """Call back, here or (in the event loop's thread) in the other thread."""
        if threading.get_ident() != self.loop_thread:
            fn(future)
            return
        if self._thread is None:
            _call_back(fn, future)
        else:
            self._queue.put(functools.partial(_call_back, fn, future))

    def _run(self) -> None:
        while (callback := self._queue.get()) is not None:
            callback()
            del callback  # it holds a future and its result

    def end(self) -> None:
        """Let the thread end when it has run what is queued."""
        self.loop_thread = None  # another thread may get this identity
        if self._thread is not None:
            self._queue.put(None)

    def join(self, timeout: float | None) -> None:
        """Wait for the thread's end, unless this is the thread."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)


def _call_back(fn: _Callback, future: concurrent.futures.Future[Any]) -> None:
    try:
        fn(future)
    except BaseException:  # noqa: ASYNC103 - the user's own; the next one must be called
        _futures_logger.exception("exception calling callback for %r", future)


def loaded(value: Any) -> Any:
    """Return a result, also one that was not loaded yet (see ``spill_dir``)."""
    return value.load() if isinstance(value, Deferred) else value


def check_process(pid: int) -> None:
    """Refuse to go on in a fork of the process that has the executor.

    Raises:
        ExecutorClosedError: This is another process.
    """
    if os.getpid() != pid:
        raise ExecutorClosedError(
            "this executor belongs to the process that this one was forked from: "
            "make a new asyncrt.sync.Executor in this process"
        )


def warn_if_in_loop(what: str, instead: str, *, stacklevel: int) -> None:
    """Warn who is about to block a running event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    warnings.warn(
        f"{what} blocks the event loop that runs in this thread: {instead}",
        RuntimeWarning,
        stacklevel=stacklevel,
    )
