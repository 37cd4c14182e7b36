"""The event loop of a sync executor, in a thread of its own, and what passes between the two.

Whatever callers want is put into an inbox, and one wake-up is on its way while it is not empty. The
loop empties it at once. Calls that were submitted one by one are calls of one ``Run`` for each
function, which is fed as they come: so many short ones travel together. Outcomes are set where they
arrive, with no task between.

A core never refers to the executor that uses it: who drops that closes this.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio

from asyncrt.errorgroups import innermost
from asyncrt.errors import ExecutorClosedError, RunCancelledError, RunDeadlineError
from asyncrt.executor import Executor
from asyncrt.run import SUCCEEDED, Run
from asyncrt.runroles import RunListener
from asyncrt.serialize import FunctionPacker, PackedFunction
from asyncrt.syncfuture import (
    PENDING,
    BrokenExecutorError,
    Callbacks,
    Future,
    Profile,
    Task,
    check_process,
)
from asyncrt.worker.initializer import InitializerError

if TYPE_CHECKING:
    from asyncrt.config import Config

logger = logging.getLogger(__name__)

_SWEEP_SECONDS: Final = 0.5
_CALLS_PER_RUN: Final = 4096  # a run keeps events of all its calls
_END_SECONDS: Final = 20.0  # above what closing an executor may take

_live: set[Core] = set()  # the cores whose thread runs
_exiting = False


class Job(Protocol):
    """Calls that a core has taken."""

    def end_input(self) -> None:
        """Take no more calls; go on with those that are there."""

    def cancel_pending(self) -> None:
        """Give up the calls that are not known to run."""

    def abort(self, error: BaseException) -> None:
        """End all calls with an error."""

    def count(self) -> int:
        """Return how many calls have not ended. May be asked in any thread."""


class Core:
    """A thread with an event loop and an executor opened in it.

    It starts at the first call and ends when it was closed and all calls have ended.
    """

    def __init__(self, config: Config, options: dict[str, Any]) -> None:
        self.pid = os.getpid()
        self.packer = FunctionPacker()
        self.callbacks = Callbacks()
        self.jobs: set[Job] = set()
        self._executor = Executor(config=config, **options)
        self._opened = False
        # The garbage collector may close an executor in the middle of anything, in any thread.
        self._lock = threading.RLock()
        self._inbox: deque[Future[Any] | Callable[[], object]] = deque()
        self._woken = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop = asyncio.Event()
        self._cancel = asyncio.Event()
        self._closed = False
        self._ended = False
        self._broken: dict[tuple[Any, ...] | None, BaseException] = {}
        self._submitted: dict[tuple[str, int], SubmitJob] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    # -- from any thread --------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it takes no more calls."""
        return self._closed

    def has_calls(self) -> bool:
        """Whether waiting for its end may take long."""
        return self._count() > 0

    def _count(self) -> int:
        with self._lock:
            waiting = sum(isinstance(item, Future) for item in self._inbox)
            return waiting + sum(job.count() for job in tuple(self.jobs))

    def check(self, shape: tuple[Any, ...]) -> None:
        """Refuse calls that cannot be run.

        Args:
            shape: Of the workers that they need.

        Raises:
            ExecutorClosedError: It was shut down, the interpreter exits, or this is a fork.
            BrokenExecutorError: Its workers cannot work.
        """
        check_process(self.pid)
        if self._broken:
            cause = self._broken.get(None) or self._broken.get(shape)
            if cause is not None:
                raise _broken_error(cause)
        if self._closed:
            raise ExecutorClosedError(
                "cannot schedule new calls after shutdown: make a new executor"
            )
        if _exiting:
            raise ExecutorClosedError("cannot schedule new calls after interpreter shutdown")

    def post_call(self, item: Future[Any] | Callable[[], object], profile: Profile) -> None:
        """Hand over new calls, in order; start the thread if this is the first time.

        Raises:
            ExecutorClosedError: See ``check``.
            BrokenExecutorError: See ``check``.
        """
        check_process(self.pid)  # before the lock: who held it may be gone
        with self._lock:
            self.check(profile.shape)
            if self._loop is None:
                self._start()
            self._inbox.append(item)
            self._wake()

    def post(self, action: Callable[[], object]) -> None:
        """Have something done in the event loop; not at all if that has ended."""
        if os.getpid() != self.pid:
            return
        with self._lock:
            if not self._ended:
                self._inbox.append(action)
                self._wake()

    def _wake(self) -> None:
        if self._loop is not None and not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._take)
            except RuntimeError:
                return  # the loop is closed: the thread is about to look here once more

    def _start(self) -> None:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._run, args=(loop,), name="asyncrt-loop", daemon=True)
        try:
            _live.add(self)
            thread.start()
        except BaseException:
            _live.discard(self)
            loop.close()
            raise
        self._loop, self._thread = loop, thread

    def close(self, *, cancel_pending: bool = False) -> None:
        """Take no more calls; end when those that were taken have ended. Does not wait."""
        if os.getpid() != self.pid:
            return
        with self._lock:
            self._closed = True
        if cancel_pending:
            self.post(self._cancel_pending)
        self.post(self._stop.set)

    def abort(self) -> int:
        """Close, kill what runs; return how many calls were given up. Does not wait."""
        self.close()
        calls = self._count()
        self.post(self._cancel.set)
        return calls

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the thread, and of callbacks. Never waits for itself."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(timeout)
        self.callbacks.join(timeout)

    # -- the thread -------------------------------------------------------------------------------

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        self.callbacks.loop_thread = threading.get_ident()
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(self._main())
        except BaseException as error:  # noqa: ASYNC103 - told to all who wait or come later
            logger.debug("the executor has failed", exc_info=error)
            self._broken.setdefault(None, innermost(error))
        with self._lock:
            self._closed = self._ended = True
            left = tuple(self._inbox)
            self._inbox.clear()
        cause = self._broken.get(None) or RunCancelledError("the executor was closed")
        for job in tuple(self.jobs):
            job.abort(cause)
        for item in left:
            if isinstance(item, Future):
                item.settle(None, self.translate(cause, None))
        self.callbacks.end()
        _live.discard(self)

    async def _main(self) -> None:
        await self._executor._open()
        self._opened = True
        self._take()
        await self._stop.wait()
        self._take()
        for job in tuple(self.jobs):
            job.end_input()
        async with anyio.create_task_group() as group:
            group.start_soon(self._cancel_when_told, group.cancel_scope)
            await self._executor.aclose()
            group.cancel_scope.cancel()

    async def _cancel_when_told(self, closing: anyio.CancelScope) -> None:
        """Let the executor wait no longer: who closes it and is cancelled kills what runs."""
        await self._cancel.wait()
        closing.cancel()

    def _take(self) -> None:
        """Do what is in the inbox."""
        if not self._opened:
            return
        with self._lock:
            items, self._inbox = self._inbox, deque()
            self._woken = False
        fed: dict[SubmitJob, list[Any]] = {}
        for item in items:
            if isinstance(item, Future):
                self._submit(item, fed)
            else:
                self._feed(fed)
                item()
        self._feed(fed)

    def _submit(self, future: Future[Any], fed: dict[SubmitJob, list[Any]]) -> None:
        task = future.take_task()
        if task is None:
            return
        key = task.function.name, id(task.profile)
        job = self._submitted.get(key)
        if job is None:
            try:
                job = self._submitted[key] = SubmitJob(self, task)
            except Exception as error:  # noqa: BLE001 - of the pool; told by the future
                future.settle(None, self.translate(error, task.profile))
                return
            if self._sweeper is None:
                self._sweep_later()
        fed.setdefault(job, []).append(task.arguments)
        if job.add(future) >= _CALLS_PER_RUN:
            self._feed(fed)
            job.end_input()

    @staticmethod
    def _feed(fed: dict[SubmitJob, list[Any]]) -> None:
        for job, batch in fed.items():
            job.run.take(batch)
        fed.clear()

    def forget(self, future: Future[Any]) -> None:
        """Give up the call of a future that was cancelled."""
        future.note_cancelled()
        if future._place is not None:
            job, index = future._place
            job.run.cancel_call(index)

    def begin(
        self,
        function: PackedFunction,
        iterables: Sequence[Any] | None,
        style: Any,
        profile: Profile,
        listener: RunListener,
    ) -> Run[Any]:
        """Start a run. See ``Executor``."""
        return self._executor._begin(
            function, iterables, style, profile.run_settings, listener=listener
        )

    def executor_for(self, profile: Profile) -> Executor:
        """Return the async executor, with a profile's options."""
        return self._executor.view(profile.settings)

    def release(self, job: SubmitJob) -> None:
        """Feed a run no more."""
        if self._submitted.get(job.key) is job:
            del self._submitted[job.key]

    def _sweep_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweeper = loop.call_later(_SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """End runs that nothing was submitted to for a while."""
        self._sweeper = None
        for job in tuple(self._submitted.values()):
            if not job.futures:
                job.end_input()
        if self._submitted:
            self._sweep_later()

    def _cancel_pending(self) -> None:
        for job in tuple(self.jobs):
            job.cancel_pending()

    def translate_call_error(self, error: BaseException) -> BaseException:
        """Return what users are told of a failed call: its error, unless the initializer raised."""
        if not isinstance(error, InitializerError):
            return error
        if None not in self._broken:
            self._broken[None] = error
            asyncio.get_running_loop().call_soon(self._abort_jobs, error)
        return _broken_error(error)

    def translate(self, error: BaseException, profile: Profile | None) -> BaseException:
        """Return what users are told when no call is to blame: the executor is broken.

        If the workers cannot be had, that is so for those of this profile only.
        """
        if isinstance(error, RunCancelledError | RunDeadlineError | ExecutorClosedError):
            return error
        of_workers = profile is not None and not isinstance(error, InitializerError)
        self._broken.setdefault(profile.shape if profile and of_workers else None, error)
        return _broken_error(error)

    def _abort_jobs(self, error: BaseException) -> None:
        for job in tuple(self.jobs):
            job.abort(error)


class SubmitJob:
    """A run that is fed with calls that were submitted one by one, and their futures."""

    def __init__(self, core: Core, task: Task) -> None:
        self.key = task.function.name, id(task.profile)
        self.futures: dict[int, Future[Any]] = {}
        self._core = core
        self._profile = task.profile  # its identity is part of the key
        self._taken = 0
        self.run = core.begin(task.function, None, "full", task.profile, self)
        core.jobs.add(self)

    def add(self, future: Future[Any]) -> int:
        """Take a call; return how many were taken."""
        self.futures[self._taken] = future
        future._place = self, self._taken
        self._taken += 1
        return self._taken

    def end_input(self) -> None:
        """See ``Job``."""
        self._core.release(self)
        self.run.input_ended()

    def cancel_pending(self) -> None:
        """See ``Job``."""
        for future in tuple(self.futures.values()):
            if future._state == PENDING:
                future.cancel()

    def abort(self, error: BaseException) -> None:
        """See ``Job``."""
        self._core.release(self)
        self.run.abort(error)

    def count(self) -> int:
        """See ``Job``."""
        return len(self.futures)

    # -- RunListener ------------------------------------------------------------------------------

    def started(self, run: Run[Any], index: int) -> None:
        """See ``RunListener``."""
        del run
        future = self.futures.get(index)
        if future is not None:
            future.note_started()

    def settled(self, run: Run[Any], indexes: Sequence[int]) -> None:
        """See ``RunListener``."""
        values, states = run.collect(indexes)
        for index, value, state in zip(indexes, values, states, strict=True):
            future = self.futures.pop(index)
            if state == SUCCEEDED:
                future.settle(value, None)
            else:
                future.settle(None, self._core.translate_call_error(value))

    def ended(self, run: Run[Any], error: BaseException | None) -> None:
        """See ``RunListener``."""
        del run
        self._core.release(self)
        self._core.jobs.discard(self)
        left = tuple(self.futures.values())
        self.futures.clear()
        for future in left:
            future._place = None
            if isinstance(error, RunCancelledError) and future._state == PENDING:
                future.cancel()
                future.note_cancelled()
                continue
            assert error is not None  # a run ends well when all its calls have ended
            future.settle(None, self._core.translate(error, self._profile))


def _broken_error(cause: BaseException) -> BrokenExecutorError:
    error = BrokenExecutorError(
        f"the workers cannot work: {cause}\nmake a new executor when that is repaired"
    )
    error.__cause__ = cause
    return error


def _at_exit() -> None:
    """End what is left when the main thread has ended."""
    global _exiting  # noqa: PLW0603 - the interpreter exits once
    _exiting = True
    pid = os.getpid()
    cores = [core for core in tuple(_live) if core.pid == pid]
    unclosed = [core for core in cores if not core.closed]
    calls = sum(core.abort() for core in unclosed)
    if calls:
        logger.warning(
            "%s calls of executors that nobody closed were cancelled, since the program exits: "
            "use 'with asyncrt.sync.Executor() as executor', or executor.shutdown()",
            calls,
        )
    for core in unclosed:
        core.join(_END_SECONDS)
    for core in cores:
        try:
            core.join()
        except KeyboardInterrupt:
            core.abort()
            core.join(_END_SECONDS)
            raise


# As the standard library's executors do. What ``atexit`` calls comes too late: from Python 3.12 on,
# neither threads nor processes can be started then, and calls that are waited for may need new
# workers (https://github.com/python/cpython/issues/104690). A thread that is not a daemon and waits
# for the main thread would be a public way, but nothing could end it before.
threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
