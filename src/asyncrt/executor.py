"""What users open, map and submit with."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, TypeVar, Unpack, overload

import anyio
import anyio.lowlevel

from asyncrt.checks import check_count, check_number
from asyncrt.errors import INSTEAD_OF_NESTING, ExecutorClosedError, NestedExecutorError
from asyncrt.host import CLOSE_SECONDS, Host, check_shared, choose_backend
from asyncrt.inside import seat
from asyncrt.mapreduce import Reduction
from asyncrt.options import (
    CallOptions,
    CommonCallOptions,
    ExecutorOptions,
    Settings,
)
from asyncrt.run import Run
from asyncrt.serialize import PackedFunction, label_of
from asyncrt.sources import as_sequences
from asyncrt.threads import run_in_thread

if TYPE_CHECKING:
    from asyncrt.call import Call
    from asyncrt.config import Config
    from asyncrt.runroles import RunListener
    from asyncrt.serialize import PackedFunction

logger = logging.getLogger(__name__)

A = TypeVar("A")
R = TypeVar("R")

_UNSAFE: Final = re.compile(r"[^A-Za-z0-9]+")

_Inputs = Iterable[Any] | AsyncIterable[Any]


class Executor:
    """Runs functions on workers, from the event loop that opened it.

    Example:
        async with asyncrt.Executor(max_workers=2) as executor:
            lengths = await executor.map(len, ["a", "bc", "def"])
        assert lengths == [1, 2, 3]

    Leaving the block normally waits for what was started (input that was not pulled yet is
    dropped); leaving it by an exception, a cancellation or Ctrl-C kills it. Either way no process
    is left.

    Args:
        config: A ``Config``, the path of a configuration file, or ``None`` to look for one in the
            usual places (see ``asyncrt.config``).
        options: See ``asyncrt.options``. They win over the environment and the file.

    Raises:
        ConfigError: An unknown option or a bad value.
    """

    def __init__(
        self, *, config: Config | str | Path | None = None, **options: Unpack[ExecutorOptions]
    ) -> None:
        Settings().updated(options)  # what is wrong in itself is told before anything is opened
        self._config = config
        self._options: dict[str, Any] = dict(options)
        self._settings: Settings | None = None
        self._host: Host | None = None

    # -- life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Executor:
        await self._open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Waits as long as calls run, as ``async with`` promises; the closing itself is shielded.
        await self._close(cancel=exc_type is not None)  # noqa: ASYNC102

    async def aclose(self, *, cancel: bool = False) -> None:
        """Close: wait for what was started, then end all workers. No-op when closed.

        Args:
            cancel: Do not wait, kill what runs.
        """
        await self._close(cancel=cancel)

    def __reduce__(self) -> NoReturn:
        raise NestedExecutorError(f"an executor cannot travel to a worker: {INSTEAD_OF_NESTING}")

    async def _open(self) -> None:
        if seat.run_id is not None:
            here = f"call {seat.index} of run {seat.run_id}"
            raise NestedExecutorError(f"{here} cannot open an executor: {INSTEAD_OF_NESTING}")
        if self._host is not None:
            raise ExecutorClosedError("this executor was opened before: make a new one")
        settings = await run_in_thread(self.resolve)
        backend = choose_backend(settings.pool)
        self._host = Host()
        try:
            await self._host.start()
            if settings.pool.min_workers:
                self._host.pool(settings.pool, backend)
        except BaseException:  # who is cancelled here gets no executor that could be closed
            with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                await self._host.close()
            raise

    def resolve(self) -> Settings:
        """Lay the options over environment and file, once. Reads files: not in the event loop."""
        if self._settings is not None:
            return self._settings
        from asyncrt.config import Config, load_config  # noqa: PLC0415 - the home of yaml

        config = self._config
        if not isinstance(config, Config):
            config = load_config(config)
        self._settings = config.settings(self._options)
        return self._settings

    async def _close(self, *, cancel: bool) -> None:
        host = self._host
        if host is None or host.closed:
            return
        try:
            if not cancel:
                await host.drain()
        finally:
            await host.close()  # noqa: ASYNC102 - shields itself, and is bounded in time

    # -- calls ------------------------------------------------------------------------------------

    @overload
    def submit(
        self, fn: Callable[..., Coroutine[Any, Any, R]], /, *args: Any, **kwargs: Any
    ) -> Call[R]: ...

    @overload
    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Call[R]: ...

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Call[Any]:
        """Start one call: ``fn(*args, **kwargs)``. Await what is returned for the result.

        Example:
            async with asyncrt.Executor() as executor:
                call = executor.submit(int, "ff", base=16)
                assert await call == 255

        Every argument is the function's own; options go through ``with_options``.

        Raises:
            TypeError: Not a function that can run elsewhere.
            SerializationError: The function cannot be pickled. (Of arguments the call tells it.)
            ModulesError: A module that it needs cannot travel.
            ExecutorClosedError: The executor is not open.
        """
        run: Run[Any] = self._start(fn, [[(args, kwargs)]], "full", {}, {})
        return run.calls[0]

    @overload
    def map(
        self,
        fn: Callable[..., Coroutine[Any, Any, R]],
        /,
        *iterables: _Inputs,
        kwargs: Mapping[str, Any] | None = None,
        return_exceptions: Literal[True],
        **options: Unpack[CommonCallOptions],
    ) -> Run[R | Exception]: ...

    @overload
    def map(
        self,
        fn: Callable[..., R],
        /,
        *iterables: _Inputs,
        kwargs: Mapping[str, Any] | None = None,
        return_exceptions: Literal[True],
        **options: Unpack[CommonCallOptions],
    ) -> Run[R | Exception]: ...

    @overload
    def map(
        self,
        fn: Callable[..., Coroutine[Any, Any, R]],
        /,
        *iterables: _Inputs,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> Run[R]: ...

    @overload
    def map(
        self,
        fn: Callable[..., R],
        /,
        *iterables: _Inputs,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> Run[R]: ...

    def map(
        self,
        fn: Callable[..., Any],
        /,
        *iterables: _Inputs,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> Run[Any]:
        """Start a call for each input. Await the run, or iterate over it.

        Example:
            async def numbers():
                for number in range(1000):
                    yield number

            async with asyncrt.Executor() as executor:
                assert await executor.map(pow, [2, 3], [5, 2]) == [32, 9]
                async with executor.map(str, numbers()) as run:
                    async for text in run:
                        if text == "20":
                            break  # nothing more is pulled, the rest is cancelled

        Args:
            fn: A plain or ``async def`` function, a lambda, a partial, a method, any callable.
            iterables: Inputs; with several, the calls get one item of each, up to the shortest.
                Sized ones are taken whole. Iterators and async iterables may be infinite: they are
                pulled as results are consumed, blocking ones in a thread.
            kwargs: Keyword arguments that all calls share; they travel once.
            options: See ``CallOptions``.

        Raises:
            TypeError: Not a function that can run elsewhere, or not an iterable.
            SerializationError: The function or ``kwargs`` cannot be pickled.
            ModulesError: A module that the function needs cannot travel.
            ConfigError: An unknown option or a bad value.
            ExecutorClosedError: The executor is not open.
        """
        style: Literal["one", "star"] = "one" if len(iterables) == 1 else "star"
        return self._start(fn, iterables, style, kwargs or {}, options)

    @overload
    def starmap(
        self,
        fn: Callable[..., Coroutine[Any, Any, R]],
        /,
        iterable: _Inputs,
        *,
        kwargs: Mapping[str, Any] | None = None,
        return_exceptions: Literal[True],
        **options: Unpack[CommonCallOptions],
    ) -> Run[R | Exception]: ...

    @overload
    def starmap(
        self,
        fn: Callable[..., R],
        /,
        iterable: _Inputs,
        *,
        kwargs: Mapping[str, Any] | None = None,
        return_exceptions: Literal[True],
        **options: Unpack[CommonCallOptions],
    ) -> Run[R | Exception]: ...

    @overload
    def starmap(
        self,
        fn: Callable[..., Coroutine[Any, Any, R]],
        /,
        iterable: _Inputs,
        *,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> Run[R]: ...

    @overload
    def starmap(
        self,
        fn: Callable[..., R],
        /,
        iterable: _Inputs,
        *,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> Run[R]: ...

    def starmap(
        self,
        fn: Callable[..., Any],
        /,
        iterable: _Inputs,
        *,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> Run[Any]:
        """Start ``fn(*item)`` for each item of the input. Otherwise as ``map``.

        Example:
            async with asyncrt.Executor() as executor:
                assert await executor.starmap(pow, [(2, 5), (3, 2)]) == [32, 9]
        """
        return self._start(fn, (iterable,), "star", kwargs or {}, options)

    @overload
    def map_reduce(
        self,
        fn: Callable[..., Any],
        iterable: _Inputs,
        reduce_fn: Callable[[list[Any]], Coroutine[Any, Any, R]],
        /,
        *,
        kwargs: Mapping[str, Any] | None = None,
        fan_in: int | None = None,
        spawn_reducer: float = 0.2,
        **options: Unpack[CallOptions],
    ) -> Call[R]: ...

    @overload
    def map_reduce(
        self,
        fn: Callable[..., Any],
        iterable: _Inputs,
        reduce_fn: Callable[[list[Any]], R],
        /,
        *,
        kwargs: Mapping[str, Any] | None = None,
        fan_in: int | None = None,
        spawn_reducer: float = 0.2,
        **options: Unpack[CallOptions],
    ) -> Call[R]: ...

    def map_reduce(
        self,
        fn: Callable[..., Any],
        iterable: _Inputs,
        reduce_fn: Callable[[list[Any]], Any],
        /,
        *,
        kwargs: Mapping[str, Any] | None = None,
        fan_in: int | None = None,
        spawn_reducer: float = 0.2,
        **options: Unpack[CallOptions],
    ) -> Call[Any]:
        """Map, then reduce the list of results on a worker. Await what is returned.

        Example:
            async with asyncrt.Executor() as executor:
                words = ["to", "be", "or", "not"]
                assert await executor.map_reduce(len, words, sum) == 9
                assert await executor.map_reduce(len, words, max, fan_in=2) == 3

        A failure of the map or of a reduction is raised as it is, and cancels what is left.

        Args:
            fn: As for ``map``.
            iterable: As for ``map``.
            reduce_fn: Gets a list of results, in the order of the input.
            kwargs: Keyword arguments of ``fn`` that all calls share.
            fan_in: ``None``: ``reduce_fn`` is called once, with all results. A number: it is called
                with so many neighbouring results as soon as they are there, then with so many of
                what *it* returned, and so on (a tree), so that reducing goes on beside the map and
                no call gets all results. Each group is a call of its own, about 0.5 ms: for many
                short calls take a number in the hundreds. It must not matter then how they are
                grouped, as for ``sum`` or ``max`` (but not for a mean).
            spawn_reducer: Share of the results that must be there before the first reduction; so
                much of the map has the workers for itself. For input without a size it counts
                once that has ended.
            options: Of the map, see ``CallOptions``; retries, timeout, deadline and isolation hold
                for the reductions too. With ``return_exceptions=True`` failures are among what
                ``reduce_fn`` gets.

        Raises:
            ConfigError: A bad ``fan_in``, ``spawn_reducer`` or option. Otherwise as ``map``.
        """
        check_reduction(fan_in, spawn_reducer)
        settings, host = self._opened()
        mine = settings.updated(options, only_calls=True)
        host.packer.pack(reduce_fn, {}, mine.call)  # what is wrong is told before anything starts
        reducer = self.view(
            replace(mine, call=mine.call.of_single_calls(f"reduce-{label_of(reduce_fn)}"))
        )
        run = self.map(fn, iterable, kwargs=kwargs, **options)
        reduction = Reduction(
            run,
            lambda values: reducer.submit(reduce_fn, values),
            fan_in=fan_in,
            fraction=spawn_reducer,
        )
        last = reducer._start(reduce_fn, (reduction.last_inputs(),), "one", {}, {})
        return last.only_call()

    def with_options(self, **options: Unpack[ExecutorOptions]) -> Executor:
        """Return a view of this executor with other options. It owns nothing and needs no closing.

        Example:
            async with asyncrt.Executor() as executor:
                patient = executor.with_options(timeout=60, retries=asyncrt.Retry(attempts=3))
                assert await patient.submit(abs, -1) == 1

        It shares the workers if they are what it asks for (and then their ``max_workers``); else it
        has its own, which end with this executor.

        Raises:
            ConfigError: An unknown option or a bad value; or one (such as ``idle_timeout``) that
                workers which are shared cannot have.
            ExecutorClosedError: The executor is not open.
        """
        mine, _ = self._opened()
        settings = mine.updated(options)
        if settings.pool.shape() == mine.pool.shape():
            check_shared(mine.pool, settings.pool)
        return self.view(settings)

    def view(self, settings: Settings) -> Executor:
        """Return a view with settings that are checked already."""
        view = _View()
        view._settings = settings
        view._host = self._host
        return view

    def _opened(self) -> tuple[Settings, Host]:
        host, settings = self._host, self._settings
        if host is None or settings is None:
            raise ExecutorClosedError(
                "this executor is not open: use 'async with', or 'await asyncrt.connect(...)'"
            )
        host.check()
        if asyncio.get_running_loop() is not host.loop:
            raise RuntimeError(
                "this executor belongs to another event loop, in another thread: "
                "use asyncrt.sync.Executor there"
            )
        return settings, host

    def _start(
        self,
        fn: Callable[..., Any],
        iterables: Any,
        style: Literal["one", "star", "full"],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> Run[Any]:
        settings, host = self._opened()
        if options:
            settings = settings.updated(options, only_calls=True)
        function = host.packer.pack(fn, kwargs, settings.call)
        return self._begin(function, iterables, style, settings)

    def _begin(
        self,
        function: PackedFunction,
        iterables: Any,
        style: Literal["one", "star", "full"],
        settings: Settings,
        *,
        listener: RunListener | None = None,
    ) -> Run[Any]:
        """Start a run of a packed function; ``iterables=None``: it is fed with ``Run.take``."""
        _, host = self._opened()
        sequences = None if iterables is None else as_sequences(iterables)
        pool = host.pool(settings.pool, choose_backend(settings.pool))
        run: Run[Any] = Run(
            _new_run_id(settings.call.name or function.label),
            function,
            style,
            settings.call,
            pool,
            sequences=sequences,
            listener=listener,
        )
        if sequences is None and iterables is not None:
            run.feed_from(iterables)
        pool.add(run)
        run.start()
        return run


class _View(Executor):
    """What ``with_options`` returns: closing it closes nothing."""

    def __init__(self) -> None:
        """Is filled by ``with_options``."""

    async def _open(self) -> None:
        self._opened()

    async def _close(self, *, cancel: bool) -> None:
        del cancel


async def connect(
    *, config: Config | str | Path | None = None, **options: Unpack[ExecutorOptions]
) -> Executor:
    """Return an open executor, for where ``async with`` does not fit, such as a notebook.

    Close it with ``await executor.aclose()``, in whichever task or cell. See ``Executor``.

    Example:
        executor = await asyncrt.connect(max_workers=1)
        assert await executor.submit(sum, [1, 2, 3]) == 6
        await executor.aclose()
    """
    executor = Executor(config=config, **options)
    await executor._open()
    return executor


def check_reduction(fan_in: int | None, spawn_reducer: float) -> None:
    """Refuse bad values of two options of ``map_reduce``.

    Raises:
        ConfigError: With what is expected.
    """
    check_count("fan_in", fan_in, optional=True, least=2)
    check_number("spawn_reducer", spawn_reducer, least=0.0, most=1.0)


def _new_run_id(label: str) -> str:
    name = _UNSAFE.sub("-", label).strip("-").lower()[:40] or "run"
    return f"{name}-{os.urandom(5).hex()}"
