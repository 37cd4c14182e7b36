"""The same executor without ``async``: a ``concurrent.futures.Executor``.

Programs that were written for ``ProcessPoolExecutor`` run when their import is changed:

    from asyncrt.sync import Executor as ProcessPoolExecutor

Example:
    with asyncrt.sync.Executor(max_workers=2) as executor:
        future = executor.submit(pow, 2, 10)
        assert future.result() == 1024
        assert list(executor.map(abs, [-1, -2])) == [1, 2]

It works in scripts, in threads, several at once, and where an event loop runs (there, blocking
that loop is warned of). docs/sync.md lists what differs from ``ProcessPoolExecutor``.
"""

from __future__ import annotations

import functools
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Executor as _StandardExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, TypeVar, Unpack, overload

from asyncrt.checks import check_count
from asyncrt.config import Config, load_config
from asyncrt.errors import INSTEAD_OF_NESTING, ConfigError, NestedExecutorError
from asyncrt.executor import Executor as AsyncExecutor
from asyncrt.executor import check_reduction
from asyncrt.host import choose_backend
from asyncrt.options import PoolOptions, RunOptions, Settings
from asyncrt.run import Run
from asyncrt.serialize import PackedFunction, check_function
from asyncrt.synccore import Core
from asyncrt.syncfuture import (
    BrokenExecutorError,
    Future,
    Profile,
    Task,
    check_process,
    warn_if_in_loop,
)
from asyncrt.syncmap import MapJob, iterate
from asyncrt.syncreduce import ReduceJob
from asyncrt.worker.initializer import Initialized

__all__ = ["BrokenExecutorError", "Executor", "Future", "MapOptions", "Options"]

R = TypeVar("R")

_END_SECONDS = 20.0  # above what closing an executor may take


class MapOptions(RunOptions, total=False):
    """Options of ``map``. See ``CallOptions``; ``timeout`` has another meaning here."""

    return_exceptions: bool
    max_in_flight: int | None


class Options(MapOptions, PoolOptions, total=False):
    """Options of the constructor and of ``with_options``. See ``ExecutorOptions``."""

    chunksize: int | Literal["auto"]
    timeout: float | None


class Executor(_StandardExecutor):
    """Runs functions on workers. Is a ``concurrent.futures.Executor``.

    A thread with an event loop starts at the first call. It ends at ``shutdown``, when the executor
    is dropped, or when the interpreter exits: then, calls of an executor that nobody closed are
    cancelled, and a warning is logged.

    Example:
        from concurrent.futures import as_completed

        with asyncrt.sync.Executor() as executor:
            futures = [executor.submit(pow, 2, exponent) for exponent in range(4)]
            assert {future.result() for future in as_completed(futures)} == {1, 2, 4, 8}

    Args:
        max_workers: Workers at most; ``None``: the CPUs that this process may use.
        mp_context: Accepted and not used: workers are fresh interpreters, whatever it says.
        initializer: Called in each process before its first call. If it raises, the executor is
            broken.
        initargs: Its arguments.
        max_tasks_per_child: Calls that a process runs at most: a number means that each call gets
            a process of its own (``isolation="call"``).
        config: See ``asyncrt.Executor``.
        options: See ``asyncrt.options``. They win over the environment and the file. ``timeout`` is
            that of one attempt.

    Raises:
        ConfigError: An unknown option or a bad value.
        TypeError: An argument of a wrong type.
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
        **options: Unpack[Options],
    ) -> None:
        given: dict[str, Any] = dict(options)
        if max_workers is not None:
            given["max_workers"] = max_workers
        if mp_context is not None and not hasattr(mp_context, "get_start_method"):
            raise TypeError(f"mp_context must be a context of multiprocessing, not {mp_context!r}")
        if initializer is not None:
            check_function(initializer)
        if max_tasks_per_child is not None:
            check_count("max_tasks_per_child", max_tasks_per_child)
            if initializer is not None and max_tasks_per_child > 1:
                raise ConfigError(
                    f"max_tasks_per_child={max_tasks_per_child} would call the initializer for "
                    "each call: use recycle_memory=... to replace processes that have grown, "
                    "or max_tasks_per_child=1",
                    key="max_tasks_per_child",
                    expected="1 or None with an initializer",
                )
            given["isolation"] = "call"
        Settings().updated(given)  # what is wrong in itself is told at once
        self._config = config
        self._options = given
        self._initializer = initializer
        self._initargs = tuple(initargs)
        self._id = uuid.uuid4().hex
        self._opening = threading.Lock()
        self._core: Core | None = None
        self._profile: Profile | None = None
        self._closed = False

    # -- calls ------------------------------------------------------------------------------------

    @overload
    def submit(
        self, fn: Callable[..., Coroutine[Any, Any, R]], /, *args: Any, **kwargs: Any
    ) -> Future[R]: ...

    @overload
    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]: ...

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start ``fn(*args, **kwargs)``, return its future.

        Every argument is the function's own; options go through ``with_options``.

        Example:
            with asyncrt.sync.Executor() as executor:
                assert executor.submit(int, "ff", base=16).result() == 255

        Raises:
            TypeError: Not a function that can run elsewhere.
            SerializationError: The function cannot be pickled. (Of arguments the future tells it.)
            ExecutorClosedError: The executor was shut down, or belongs to the process that this one
                was forked from. Is a ``RuntimeError``.
            BrokenExecutorError: Its workers cannot work.
        """
        core, profile = self._ready()
        core.check(profile.shape)
        function = self._pack(fn, {}, profile)
        future: Future[Any] = Future(core, Task(function, (args, kwargs), profile))
        core.post_call(future, profile)
        return future

    @overload
    def map(
        self,
        fn: Callable[..., Coroutine[Any, Any, R]],
        /,
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | Literal["auto"] = 1,
        buffersize: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[MapOptions],
    ) -> Iterator[R]: ...

    @overload
    def map(
        self,
        fn: Callable[..., R],
        /,
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | Literal["auto"] = 1,
        buffersize: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[MapOptions],
    ) -> Iterator[R]: ...

    def map(
        self,
        fn: Callable[..., Any],
        /,
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | Literal["auto"] = 1,
        buffersize: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[MapOptions],
    ) -> Iterator[Any]:
        """Start a call for each input, return an iterator over the results, in input order.

        A failure is raised where its result would come; then, what is left is cancelled. So it is
        when the iterator is dropped after it was begun.

        Example:
            with asyncrt.sync.Executor() as executor:
                assert list(executor.map(pow, [2, 3], [5, 2])) == [32, 9]

        Args:
            fn: A plain or ``async def`` function, a lambda, a partial, a method, any callable.
            iterables: Inputs, collected at once; with several, the calls get one item of each, up
                to the shortest.
            timeout: Seconds from now until the last result must have come, as in the standard
                library. (For one attempt: ``with_options(timeout=...)``.)
            chunksize: Calls that travel together; ``"auto"`` measures, and is the fastest.
            buffersize: Pull inputs only as results are taken: so many calls whose results were not
                taken, at most. Inputs may be infinite then.
            kwargs: Keyword arguments that all calls share; they travel once.
            options: See ``MapOptions``. ``ordered=False`` gives results as they come.

        Raises:
            TimeoutError: From the iterator: not all results came in time.
            TypeError: Not a function that can run elsewhere, or not an iterable.
            SerializationError: The function or ``kwargs`` cannot be pickled.
            ConfigError: An unknown option or a bad value.
            ExecutorClosedError: See ``submit``.
            BrokenExecutorError: See ``submit``.
        """
        style: Literal["one", "star"] = "one" if len(iterables) == 1 else "star"
        return self._map(
            fn, iterables, style, kwargs, timeout, buffersize, {"chunksize": chunksize, **options}
        )

    @overload
    def starmap(
        self,
        fn: Callable[..., Coroutine[Any, Any, R]],
        iterable: Iterable[Any],
        /,
        *,
        timeout: float | None = None,
        chunksize: int | Literal["auto"] = 1,
        buffersize: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[MapOptions],
    ) -> Iterator[R]: ...

    @overload
    def starmap(
        self,
        fn: Callable[..., R],
        iterable: Iterable[Any],
        /,
        *,
        timeout: float | None = None,
        chunksize: int | Literal["auto"] = 1,
        buffersize: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[MapOptions],
    ) -> Iterator[R]: ...

    def starmap(
        self,
        fn: Callable[..., Any],
        iterable: Iterable[Any],
        /,
        *,
        timeout: float | None = None,
        chunksize: int | Literal["auto"] = 1,
        buffersize: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[MapOptions],
    ) -> Iterator[Any]:
        """Start ``fn(*item)`` for each item of the input. Otherwise as ``map``.

        Example:
            with asyncrt.sync.Executor() as executor:
                assert list(executor.starmap(pow, [(2, 5), (3, 2)])) == [32, 9]
        """
        given = {"chunksize": chunksize, **options}
        return self._map(fn, (iterable,), "star", kwargs, timeout, buffersize, given)

    def _map(
        self,
        fn: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        style: Literal["one", "star"],
        kwargs: Mapping[str, Any] | None,
        timeout: float | None,
        buffersize: int | None,
        options: Mapping[str, Any],
    ) -> Iterator[Any]:
        end = None if timeout is None else timeout + time.monotonic()
        core, base = self._ready()
        core.check(base.shape)
        if not iterables:
            return iter(())
        check_count("buffersize", buffersize, optional=True)
        profile = Profile(base.settings.updated(options, only_calls=True))
        call = profile.settings.call
        if buffersize is None:
            buffersize = call.max_in_flight
        function = self._pack(fn, kwargs or {}, profile)
        inputs: Any
        if buffersize is not None:
            inputs = iter(iterables[0]) if len(iterables) == 1 else zip(*iterables, strict=False)
        elif len(iterables) == 1:
            inputs = (_collect(iterables[0]),)
        elif all(isinstance(iterable, range | tuple | list) for iterable in iterables):
            inputs = tuple(_collect(iterable) for iterable in iterables)
        else:
            inputs = (tuple(zip(*iterables, strict=False)),)
        job = MapJob(core, profile, function, inputs, style, buffersize=buffersize)
        job.begin()
        keep = None if buffersize is None else self
        return iterate(job, end=end, return_exceptions=call.return_exceptions, keep=keep)

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
        **options: Unpack[MapOptions],
    ) -> Future[R]:
        """Map, then reduce the list of results on a worker. See ``asyncrt.Executor.map_reduce``.

        Example:
            with asyncrt.sync.Executor() as executor:
                assert executor.map_reduce(len, ["to", "be"], sum).result() == 4

        Raises:
            ConfigError: A bad ``fan_in``, ``spawn_reducer`` or option. Otherwise as ``map``.
        """
        check_reduction(fan_in, spawn_reducer)
        core, base = self._ready()
        core.check(base.shape)
        profile = Profile(base.settings.updated(options, only_calls=True))
        future: Future[R] = Future(core)
        inputs = _collect(iterable)
        start = functools.partial(
            _start_reduction,
            self._initialized(fn),
            inputs,
            self._initialized(reduce_fn),
            kwargs=dict(kwargs or {}),
            fan_in=fan_in,
            spawn_reducer=spawn_reducer,
        )
        job = ReduceJob(core, profile, future, start)
        core.post_call(job.begin, profile)
        return future

    def _initialized(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that the initializer precedes, if there is one."""
        check_function(fn)
        if self._initializer is None:
            return fn
        return Initialized(fn, self._id, self._initializer, self._initargs)

    def _pack(
        self, fn: Callable[..., Any], kwargs: Mapping[str, Any], profile: Profile
    ) -> PackedFunction:
        core, _ = self._ready()
        if self._initializer is not None:
            fn = self._initialized(fn)
        return core.packer.pack(fn, kwargs, profile.settings.call)

    # -- options ----------------------------------------------------------------------------------

    def with_options(
        self, *, max_workers: int | None = None, **options: Unpack[Options]
    ) -> Executor:
        """Return a view of this executor with other options. Shutting it down does nothing.

        Example:
            with asyncrt.sync.Executor() as executor:
                patient = executor.with_options(timeout=60, retries=asyncrt.Retry(attempts=3))
                assert patient.submit(abs, -1).result() == 1

        It shares the workers if they are what it asks for (and then their ``max_workers``); else it
        has its own, which end with this executor.

        Raises:
            ConfigError: An unknown option or a bad value.
        """
        given: dict[str, Any] = dict(options)
        if max_workers is not None:
            given["max_workers"] = max_workers
        return _View(self, given)

    def _ready(self) -> tuple[Core, Profile]:
        """Return what runs calls, and how. The first time, configuration is read."""
        core, profile = self._core, self._profile
        if core is None or profile is None:
            with self._opening:
                core, profile = self._core, self._profile
                if core is None or profile is None:
                    core, profile = self._open()
                    self._core, self._profile = core, profile
        return core, profile

    def _open(self) -> tuple[Core, Profile]:
        config = self._config
        if not isinstance(config, Config):
            config = load_config(config)
        settings = config.settings(self._options)
        choose_backend(settings.pool)
        core = Core(config, self._options)
        # At exit, calls are dealt with while workers can still be started. See ``synccore``.
        weakref.finalize(self, core.close).atexit = False
        if self._closed:
            core.close()
        return core, Profile(settings)

    def __reduce__(self) -> NoReturn:
        raise NestedExecutorError(f"an executor cannot travel to a worker: {INSTEAD_OF_NESTING}")

    # -- the end ----------------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and end when those that were taken have ended. May be repeated.

        Args:
            wait: Return when all calls have ended and no process is left. If not, calls go on, and
                the program does not exit before they have ended.
            cancel_futures: Cancel calls that are not known to run.
        """
        with self._opening:  # or what another thread opens right now would stay open
            self._closed = True
            core = self._core
        if core is None:
            return
        check_process(core.pid)
        core.close(cancel_pending=cancel_futures)
        if wait:
            self._wait(core, stacklevel=4)

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Wait for all calls; after Ctrl-C kill them."""
        if exc_type is not None and issubclass(exc_type, KeyboardInterrupt):
            self._abort()
        else:
            self.shutdown(wait=True)

    def _wait(self, core: Core, *, stacklevel: int) -> None:
        if core.has_calls():
            warn_if_in_loop(
                "shutdown(wait=True)",
                "use shutdown(wait=False), or asyncrt.Executor with 'async with'",
                stacklevel=stacklevel,
            )
        try:
            core.join()
        except KeyboardInterrupt:
            self._abort()
            raise

    def _abort(self) -> None:
        self._closed = True
        if self._core is not None:
            self._core.abort()
            self._core.join(_END_SECONDS)


class _View(Executor):
    """What ``with_options`` returns: it has no thread of its own, and closes nothing."""

    def __init__(self, parent: Executor, options: dict[str, Any]) -> None:
        core, profile = parent._ready()
        self._core = core
        self._profile = Profile(profile.settings.updated(options))
        self._parent = parent  # lives as long as its views
        self._initializer = parent._initializer
        self._initargs = parent._initargs
        self._id = parent._id
        choose_backend(self._profile.settings.pool)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Do nothing: calls go on, the executor behind this is shut down by its owner."""

    def _abort(self) -> None:
        """Do nothing."""


def _collect(iterable: Iterable[Any]) -> range | tuple[Any, ...]:
    """Return a sequence that does not change."""
    return iterable if isinstance(iterable, range) else tuple(iterable)


def _start_reduction(
    fn: Callable[..., Any],
    inputs: Iterable[Any],
    reduce_fn: Callable[..., Any],
    executor: AsyncExecutor,
    **options: Any,
) -> Run[Any]:
    return executor.map_reduce(fn, inputs, reduce_fn, **options).run
