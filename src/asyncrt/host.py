"""What runs behind an executor: one task, which owns the pools of workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel

from asyncrt.backends.local import LocalBackend
from asyncrt.errorgroups import innermost
from asyncrt.errors import ConfigError, ExecutorClosedError
from asyncrt.options import PoolSettings
from asyncrt.pool import WorkerPool
from asyncrt.serialize import FunctionPacker

if TYPE_CHECKING:
    from asyncrt.backends.base import Backend
    from asyncrt.run import Run

logger = logging.getLogger(__name__)

_TICK_SECONDS: Final = 0.5
CLOSE_SECONDS: Final = 15.0


class Host:
    """The one task that owns everything that runs in the background.

    It is a task of its own so that an executor may be opened in one task and closed in another, and
    so that no cancel scope of asyncrt ever lies across the user's code.
    """

    def __init__(self) -> None:
        self.packer = FunctionPacker()
        self._pools: dict[tuple[Any, ...], WorkerPool] = {}
        self._token = os.urandom(32)
        self._pid = os.getpid()
        self.loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        self._ready = asyncio.Event()
        self._group: anyio.abc.TaskGroup | None = None
        self._crash: BaseException | None = None
        self._pid = os.getpid()

    @property
    def closed(self) -> bool:
        """Whether it was closed, or crashed."""
        return self._closing.is_set()

    async def start(self) -> None:
        """Start the task."""
        self._task = asyncio.create_task(self._main(), name="asyncrt host")
        await self._ready.wait()

    async def _main(self) -> None:
        try:
            async with anyio.create_task_group() as group:
                self._group = group
                self._ready.set()
                group.start_soon(self._tick)
                await self._closing.wait()
                group.cancel_scope.cancel()
        except BaseException as error:
            self._crash = innermost(error)
            raise
        finally:
            self._group = None
            self._closing.set()

    async def _tick(self) -> None:
        """Let time pass for the pools. It also wakes an idle loop, which then sees an interrupt."""
        while True:
            await anyio.sleep(_TICK_SECONDS)
            for pool in tuple(self._pools.values()):
                pool.tick()

    def check(self) -> None:
        """Refuse use after the end.

        Raises:
            ExecutorClosedError: It was closed, or this process is a fork of the one that has it.
            BaseException: What it crashed with.
        """
        if os.getpid() != self._pid:
            raise ExecutorClosedError(
                "this executor was opened before a fork, in the parent process: "
                "make a new one in this process"
            )
        if self._crash is not None and not isinstance(self._crash, asyncio.CancelledError):
            raise self._crash
        if self._group is None:
            raise ExecutorClosedError("this executor is closed")
        if os.getpid() != self._pid:
            raise ExecutorClosedError(
                f"this executor belongs to process {self._pid}, which this one was forked from: "
                "make a new one here"
            )

    def pool(self, settings: PoolSettings, backend: Backend) -> WorkerPool:
        """Return the pool of a shape; open it if there is none."""
        self.check()
        assert self._group is not None
        pool = self._pools.get(settings.shape())
        if pool is None:
            pool = self._pools[settings.shape()] = WorkerPool(settings, backend, token=self._token)
            self._group.start_soon(pool.run)
        elif pool.settings is not settings:
            check_shared(pool.settings, settings)
        return pool

    def runs(self) -> list[Run[Any]]:
        """Return the runs of all pools that have not ended."""
        return [run for pool in self._pools.values() for run in pool.runs]

    async def drain(self) -> None:
        """Wait for the runs that were started. Input that was not pulled yet is dropped."""
        while runs := self.runs():  # who waits for one may start the next
            for run in runs:
                if not run.is_single:  # its input is what other runs give
                    run.stop_pulling()
            for run in runs:
                await run.finished()
            await anyio.lowlevel.checkpoint()

    async def close(self) -> None:
        """Cancel what is left and end all workers. Bounded in time; what may be left is logged."""
        self._closing.set()
        with anyio.CancelScope(shield=True):
            done, _ = await asyncio.wait({self._task}, timeout=CLOSE_SECONDS)
        if not done:
            logger.warning("workers may be left: closing took over %s s", CLOSE_SECONDS)
            self._task.cancel()
        elif not self._task.cancelled():
            with contextlib.suppress(BaseException):
                self._task.result()  # a crash was, or will be, told by ``check``


def check_shared(there: PoolSettings, wanted: PoolSettings) -> None:
    """Refuse what workers that are shared cannot be; how many there are is the first one's matter.

    Raises:
        ConfigError: They would have to be two things at once.
    """
    for item in fields(there):
        name, have, want = item.name, getattr(there, item.name), getattr(wanted, item.name)
        if have != want and name != "max_workers":
            raise ConfigError(
                f"{name}={want!r}: these workers are shared, and have {name}={have!r}; give it to "
                "Executor(...), or ask for workers of another kind too (cpu, memory, slots, env, "
                "...), which are the view's own",
                key=name,
                expected=repr(have),
            )


def choose_backend(settings: PoolSettings) -> Backend:
    """Return the backend that was asked for.

    Raises:
        ConfigError: It is not part of this version.
    """
    if not isinstance(settings.backend, str):
        chosen: Backend = settings.backend
        return chosen
    if settings.backend == "local":
        return LocalBackend()
    raise ConfigError(
        f"backend={settings.backend!r} is not part of this version: use backend='local'",
        key="backend",
        expected="'local'",
    )
