"""The blocking face: a ``concurrent.futures.Executor`` for scripts, threads and notebooks.

Example:
    from asyncrt.sync import Executor

    with Executor(max_workers=2) as executor:
        assert list(executor.map(abs, [-1, 2])) == [1, 2]
        assert executor.submit(pow, 2, 10).result() == 1024
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import queue
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack

from asyncrt.errors import (
    AsyncrtError,
    ConfigError,
    InitializerError,
    RunCancelledError,
    RuntimeMismatchError,
    WorkerStartError,
)
from asyncrt.executor import Executor as AsyncExecutor
from asyncrt.inside import Initialized
from asyncrt.loopthread import LoopThread
from asyncrt.options import (
    BlockingCallOptions,
    CallOptions,
    CallSettings,
    ExecutorOptions,
    Settings,
)
from asyncrt.serialize import FunctionPacker, check_function, label_of
from asyncrt.spill import Deferred

if TYPE_CHECKING:
    from asyncrt.config import Config
    from asyncrt.run import Run
    from asyncrt.serialize import PackedFunction

__all__ = ["BrokenExecutorError", "Executor", "Future"]

logger = logging.getLogger(__name__)

R = TypeVar("R")

Batch = list[tuple[bool, Any]]  # of outcomes: whether it is a success, and its result or error


class BrokenExecutorError(AsyncrtError, concurrent.futures.BrokenExecutor):
    """No worker can run calls any more: the executor is of no further use. See its cause."""


class Future(concurrent.futures.Future[R]):
    """A call, as ``concurrent.futures`` knows it. Made by ``Executor.submit``."""

    def __init__(self, thread: LoopThread) -> None:
        super().__init__()
        self._thread = thread
        self._run: Run[Any] | None = None
        self._is_told = False  # whether it was made to run, or its cancellation known; in the loop

    def cancel(self) -> bool:
        """Give the call up, unless it is known to run or has ended. Return whether it is given up.

        A worker tells that a call runs when it has run for some 50 ms. One that is given up before
        is killed if it has begun; its result is lost in any case.
        """
        if not super().cancel():
            return False
        self._thread.post(self._give_up)
        return True

    def result(self, timeout: float | None = None) -> R:
        """Return the result, waiting for it.

        Args:
            timeout: Seconds to wait; ``None``: without a limit.

        Raises:
            TimeoutError: It has not ended in time. It goes on.
            CancelledError: It was cancelled.
            BrokenExecutorError: No worker can run it.
            Exception: What the function raised.
        """
        self._before_waiting()
        value: R = _loaded(super().result(timeout))
        return value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the function raised, or ``None``, waiting for the end. See ``result``."""
        self._before_waiting()
        return super().exception(timeout)

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[R]], object]) -> None:
        """Call something with this future when it has ended; at once if it has.

        In a thread of the executor's that exists for this: a callback may block. Callbacks of one
        executor are called one after the other, those of one future in the order of adding.
        """
        if not self.done():
            self._thread.callbacks.start()
        super().add_done_callback(functools.partial(self._call_back, fn))

    def _call_back(self, fn: Callable[[concurrent.futures.Future[R]], object], _: object) -> None:
        if self._thread.is_current():
            self._thread.callbacks.call(functools.partial(_call_safely, fn, self))
        else:
            fn(self)  # ``concurrent.futures`` logs what it raises

    def _before_waiting(self) -> None:
        if not self.done():
            self._thread.check_process()
            _warn_of_blocking()

    # -- in the loop's thread ---------------------------------------------------------------------

    def begin(self, start: Callable[[], Run[Any]]) -> None:
        """Start the call."""
        if self.cancelled():
            self._give_up()
            return
        try:
            run = self._run = start()
        except Exception as error:  # noqa: BLE001 - whatever it is, the future tells it
            self._settle(None, error)
            return
        run.listener = self
        if run.done():
            self.on_news()

    def on_started(self, index: int) -> None:
        """See ``RunListener``."""
        del index
        self._tell()

    def on_news(self) -> None:
        """See ``RunListener``."""
        run = self._run
        if run is None or not run.done():
            return
        run.listener = None
        self._run = None
        value, error = run.single_outcome()
        self._settle(value, error)

    def _settle(self, value: Any, error: BaseException | None) -> None:
        if not self._tell() or self.done():
            return
        if error is None:
            self.set_result(value)
        else:
            self.set_exception(_broken(self._thread, error))

    def _tell(self) -> bool:
        """Make it run, or its cancellation known, once; return whether it was not cancelled."""
        if not self._is_told:
            self._is_told = True
            return self.set_running_or_notify_cancel()
        return not self.cancelled()

    def _give_up(self) -> None:
        self._tell()
        run, self._run = self._run, None
        if run is not None:
            run.listener = None
            run.give_up()


class Results:
    """Brings results of a run from the loop's thread to whoever iterates, in batches.

    Args:
        ordered: In the order of the input, else as they come.
        ahead: Ask for the next batch while the last one is used up.
    """

    def __init__(self, thread: LoopThread, *, ordered: bool, ahead: bool) -> None:
        self._thread = thread
        self._ordered = ordered
        self._ahead = ahead
        self._run: Run[Any] | None = None
        self._batches: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._asked = False
        self._wanted = False

    def take(self, deadline: float | None) -> Batch:
        """Return the next results, waiting for some; an empty batch is the end.

        Raises:
            TimeoutError: There are none at the deadline.
            BaseException: What ended the run.
        """
        if not self._asked:
            self._ask()
        if self._batches.empty():
            self._thread.check_process()
            _warn_of_blocking()
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            batch = self._batches.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError("the results were not there in time") from None
        self._asked = False
        if isinstance(batch, BaseException):
            self._batches.put(batch)
            self._asked = True
            raise _broken(self._thread, batch)
        if batch and self._ahead:
            self._ask()
        return batch

    def give_up(self) -> None:
        """Cancel what has not ended."""
        if self._run is not None and not self._run.done():
            self._thread.post(self._run.give_up)

    def _ask(self) -> None:
        self._asked = True
        if not self._thread.post(self._want):
            self._want()  # the thread has ended: nobody else touches the run

    # -- in the loop's thread ---------------------------------------------------------------------

    def begin(self, start: Callable[[], Run[Any]]) -> None:
        """Start the calls."""
        try:
            self._run = start()
        except Exception as error:  # noqa: BLE001 - whatever it is, the iterator raises it
            self._batches.put(error)
            return
        self._run.listener = self

    def on_started(self, index: int) -> None:
        """See ``RunListener``."""

    def on_news(self) -> None:
        """See ``RunListener``."""
        if self._wanted:
            self._wanted = False
            self._thread.soon(self._want)  # what comes in one turn of the loop goes together

    def _want(self) -> None:
        run = self._run
        if run is None:
            return
        batch = run.collect(ordered=self._ordered)
        if batch or (run.done() and run.error is None):
            self._batches.put(batch)
        elif run.error is not None:
            self._batches.put(run.error)
        else:
            self._wanted = True


class Executor(concurrent.futures.Executor):
    """Runs functions on workers, for code that blocks. Otherwise as ``asyncrt.Executor``.

    Example:
        from concurrent.futures import as_completed

        import asyncrt.sync

        with asyncrt.sync.Executor(max_workers=2) as executor:
            futures = [executor.submit(pow, number, 2) for number in range(5)]
            assert sorted(future.result() for future in as_completed(futures)) == [0, 1, 4, 9, 16]

    It takes the place of ``ProcessPoolExecutor``: see ``docs/sync.md`` for what differs. Its loop
    runs in a thread, which starts with the first call and ends at ``shutdown``, when nobody holds
    the executor any more (what was started is done first), or at the exit of the interpreter.

    Args:
        max_workers: See ``asyncrt.options``.
        mp_context: Of no meaning: workers never share the memory of this process.
        initializer: Called once in each process, before its first call. If it raises, the executor
            is broken.
        initargs: Its arguments.
        max_tasks_per_child: ``None``, or 1: each call gets a process of its own
            (``isolation="call"``).
        config: See ``asyncrt.Executor``.
        options: See ``asyncrt.ExecutorOptions``. ``timeout`` is for one attempt of a call.

    Raises:
        ConfigError: An unknown option or a bad value.
        TypeError: ``initializer`` cannot be called.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: object = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        config: Config | str | Path | None = None,
        **options: Any,
    ) -> None:
        del mp_context
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if max_tasks_per_child not in (None, 1):
            raise ConfigError(
                f"max_tasks_per_child must be None or 1, not {max_tasks_per_child!r}: processes "
                "that grow are replaced by recycle_memory",
                key="max_tasks_per_child",
                expected="None or 1",
            )
        if max_workers is not None:
            options["max_workers"] = max_workers
        if max_tasks_per_child == 1:
            options.setdefault("isolation", "call")
        self._thread = LoopThread(config, options)
        self._state = _State(initializer, initargs)
        self._overrides: dict[str, Any] = {}
        # Not at exit: that is the loop threads' matter. What was started is done first, since
        # somebody may hold its futures.
        weakref.finalize(self, self._thread.end, "wait").atexit = False

    # -- calls ------------------------------------------------------------------------------------

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        """Start one call: ``fn(*args, **kwargs)``. Every argument is the function's own.

        Raises:
            TypeError: Not a function that can run elsewhere.
            SerializationError: The function cannot be pickled. (Of arguments the future tells it.)
            BrokenExecutorError: No worker can run it.
            ExecutorClosedError: After ``shutdown``, at the exit of the interpreter, or in a process
                that was forked. It is a ``RuntimeError``.
        """
        function = self._pack(fn, {}, {})
        future: Future[R] = Future(self._thread)
        self._post(
            functools.partial(
                future.begin,
                functools.partial(self._start, function, [[(args, kwargs)]], "full", {}),
            )
        )
        return future

    def map(
        self,
        fn: Callable[..., R],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | Literal["auto"] = 1,
        buffersize: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[BlockingCallOptions],
    ) -> Iterator[R]:
        """Start a call for each input, and return an iterator over the results, in their order.

        A failure is raised when its result is asked for; then what has not ended is cancelled. So
        it is when an iterator that was begun is dropped; one that was not begun does not matter.

        Args:
            iterables: Inputs, collected at once; with several, the calls get one item of each, up
                to the shortest.
            timeout: Seconds from now until the result that is asked for must be there. (What one
                attempt of a call may take is ``with_options(timeout=...)``.)
            chunksize: Calls that travel together. ``"auto"`` measures, and is the fastest.
            buffersize: Calls whose results were not asked for yet, at most, as in Python 3.14: then
                inputs are pulled, in a thread, as results are consumed. ``None``: no limit.
            kwargs: Keyword arguments that all calls share; they travel once.
            options: See ``BlockingCallOptions``.

        Raises:
            TimeoutError: By the iterator.
            ConfigError: An unknown option or a bad value. Otherwise as ``submit``.
        """
        style: Literal["one", "star"] = "one" if len(iterables) == 1 else "star"
        inputs = iterables[0] if len(iterables) == 1 else zip(*iterables, strict=False)
        more = {"chunksize": chunksize, "max_in_flight": buffersize, **options}
        return self._map(fn, inputs, style, kwargs or {}, timeout, more)

    def starmap(
        self,
        fn: Callable[..., R],
        iterable: Iterable[Iterable[Any]],
        /,
        *,
        timeout: float | None = None,
        chunksize: int | Literal["auto"] = 1,
        buffersize: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[BlockingCallOptions],
    ) -> Iterator[R]:
        """Start ``fn(*item)`` for each item of the input. Otherwise as ``map``."""
        more = {"chunksize": chunksize, "max_in_flight": buffersize, **options}
        return self._map(fn, iterable, "star", kwargs or {}, timeout, more)

    def map_reduce(
        self,
        fn: Callable[..., Any],
        iterable: Iterable[Any],
        reduce_fn: Callable[[list[Any]], R],
        /,
        *,
        kwargs: Mapping[str, Any] | None = None,
        fan_in: int | None = None,
        spawn_reducer: float = 0.2,
        **options: Unpack[CallOptions],
    ) -> Future[R]:
        """Map, then reduce the list of results on a worker. See ``asyncrt.Executor.map_reduce``."""
        self._check(options)
        check_function(fn)
        check_function(reduce_fn)
        inputs = list(iterable)
        future: Future[R] = Future(self._thread)

        def start() -> Run[Any]:
            executor = self_view()
            call = executor.map_reduce(
                fn,
                inputs,
                reduce_fn,
                kwargs=kwargs,
                fan_in=fan_in,
                spawn_reducer=spawn_reducer,
                **options,
            )
            return call.run

        self_view = functools.partial(_view, self._thread, self._overrides)
        self._post(functools.partial(future.begin, start))
        return future

    def with_options(self, **options: Unpack[ExecutorOptions]) -> Executor:
        """Return a view of this executor with other options; its ``shutdown`` closes nothing.

        Example:
            import asyncrt.sync

            with asyncrt.sync.Executor() as executor:
                patient = executor.with_options(timeout=60)  # of one attempt
                assert patient.submit(abs, -1).result() == 1

        Raises:
            ConfigError: An unknown option or a bad value.
        """
        Settings().updated(options)
        return _View(self, {**self._overrides, **options})

    # -- the end ----------------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and end the workers when those that were started have ended.

        Args:
            wait: Return when that is so. The interpreter does not exit before in any case.
            cancel_futures: Cancel the calls that do not run yet.
        """
        if cancel_futures:
            self._thread.post(self._cancel_queued)
        self._thread.end("wait")
        if wait:
            _warn_of_blocking()
            self._thread.join()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> Literal[False]:
        # An interrupt is for the workers too: in sessions of their own, they did not get it.
        if exc_type is not None and not issubclass(exc_type, Exception):
            self._thread.end("cancel")
        self.shutdown(wait=True)
        return False

    # -- inside -----------------------------------------------------------------------------------

    def _check(self, options: Mapping[str, Any]) -> None:
        self._thread.check()
        if self._thread.failure is not None:
            raise _broken(self._thread, self._thread.failure)
        if options:
            Settings().updated(options, only_calls=True)

    def _pack(
        self, fn: Callable[..., Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> PackedFunction:
        self._check(options)
        check_function(fn)
        settings = self._state.settings(self._thread, {**self._overrides, **options})
        return self._state.pack(fn, kwargs, settings.call)

    def _post(self, action: Callable[[], None]) -> None:
        if not self._thread.post(action):
            self._check({})
            raise _broken(self._thread, RuntimeError("the event loop has ended"))

    def _start(
        self,
        function: PackedFunction,
        iterables: Any,
        style: Literal["one", "star", "full"],
        options: Mapping[str, Any],
    ) -> Run[Any]:
        return _view(self._thread, self._overrides).start_packed(
            function, iterables, style, options
        )

    def _map(
        self,
        fn: Callable[..., R],
        inputs: Iterable[Any],
        style: Literal["one", "star"],
        kwargs: Mapping[str, Any],
        timeout: float | None,
        options: dict[str, Any],
    ) -> Iterator[R]:
        deadline = None if timeout is None else time.monotonic() + timeout
        function = self._pack(fn, kwargs, options)
        lazy = options.get("max_in_flight") is not None
        taken = iter(inputs) if lazy else list(inputs)
        tolerant = options.pop("return_exceptions", False)
        results = Results(self._thread, ordered=options.get("ordered", True), ahead=not lazy)
        self._post(
            functools.partial(
                results.begin,
                functools.partial(
                    self._start, function, (taken,), style, {**options, "return_exceptions": True}
                ),
            )
        )
        return _iterate(self, results, deadline, tolerant=tolerant)

    def _cancel_queued(self) -> None:
        for run in self._thread.executor.unfinished():
            if isinstance(run.listener, Future):
                run.listener.cancel()
            else:
                run.cancel_queued()


class _View(Executor):
    """What ``with_options`` returns."""

    def __init__(self, base: Executor, overrides: dict[str, Any]) -> None:
        self._base = base  # which must not be dropped before
        self._thread = base._thread
        self._state = base._state
        self._overrides = overrides

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Do nothing: the executor that this is a view of is to be shut down."""
        del wait, cancel_futures

    def __exit__(self, *exc_info: object) -> Literal[False]:
        return False


class _State:
    """Packs functions for any thread."""

    def __init__(
        self, initializer: Callable[..., object] | None, initargs: tuple[Any, ...]
    ) -> None:
        self._packer = FunctionPacker()
        self._lock = threading.Lock()
        self._initializer = initializer
        self._initargs = initargs
        self._settings: Settings | None = None
        self._key = f"{id(self):x}-{time.monotonic_ns():x}"

    def settings(self, thread: LoopThread, options: Mapping[str, Any]) -> Settings:
        """Return what holds with options laid over those of the executor."""
        if self._settings is None:
            self._settings = thread.executor.resolve()
        return self._settings.updated(options) if options else self._settings

    def pack(
        self, fn: Callable[..., Any], kwargs: Mapping[str, Any], settings: CallSettings
    ) -> PackedFunction:
        """Return a function as it travels."""
        if self._initializer is not None:
            fn = Initialized(fn, label_of(fn), self._key, self._initializer, self._initargs)
        with self._lock:
            return self._packer.pack(fn, kwargs, settings)


def _view(thread: LoopThread, overrides: dict[str, Any]) -> AsyncExecutor:
    executor = thread.executor
    return executor.with_options(**overrides) if overrides else executor


def _iterate(
    executor: Executor, results: Results, deadline: float | None, *, tolerant: bool
) -> Iterator[Any]:
    """Yield results. ``executor`` is held, so that it is not dropped before they are there."""
    batch: deque[tuple[bool, Any]] = deque()
    try:
        while True:
            if not batch:
                batch.extend(results.take(deadline))
                if not batch:
                    return
            succeeded, value = batch.popleft()
            value = _loaded(value)
            if not succeeded and not tolerant:
                raise _broken(executor._thread, value)
            yield value
    finally:
        results.give_up()


def _loaded(value: Any) -> Any:
    return value.load() if isinstance(value, Deferred) else value


def _broken(thread: LoopThread, error: BaseException) -> BaseException:
    """Return what to raise for an error; note it if no worker can run calls any more."""
    if isinstance(error, RunCancelledError):
        return concurrent.futures.CancelledError(str(error))
    if not isinstance(error, WorkerStartError | RuntimeMismatchError | InitializerError):
        return error
    thread.failure = error
    broken = BrokenExecutorError(f"the executor is broken: {error}")
    broken.__cause__ = error
    return broken


def _call_safely(
    fn: Callable[[concurrent.futures.Future[R]], object], future: concurrent.futures.Future[R]
) -> None:
    try:
        fn(future)
    except Exception:
        logger.exception("a done-callback of %r raised", future)


def _warn_of_blocking() -> None:
    """Warn who blocks the event loop of the thread that this is called in."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    warnings.warn(
        "this blocks the event loop that runs in this thread: use asyncrt.Executor, or "
        "'await asyncio.wrap_future(future)'",
        RuntimeWarning,
        stacklevel=4,
    )
