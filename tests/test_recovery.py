"""A pool whose workers have ended gets others."""

from __future__ import annotations

import asyncio
import os
import signal

import psutil
import pytest
from desk import Wait, open_desk, square

import asyncrt
from asyncrt.events import CallSent

pytestmark = pytest.mark.anyio


def workers() -> list[psutil.Process]:
    return [
        child for child in psutil.Process().children() if "worker.pyz" in " ".join(child.cmdline())
    ]


async def until_gone(processes: list[psutil.Process]) -> None:
    await asyncio.to_thread(psutil.wait_procs, processes)


async def test_a_new_worker_comes_after_the_idle_ones_have_ended() -> None:
    async with (
        asyncio.timeout(60),
        asyncrt.Executor(max_workers=2, idle_timeout=0.1) as executor,
    ):
        for _ in range(3):
            assert await executor.map(square, range(4)) == [0, 1, 4, 9]
            await until_gone(workers())


async def test_a_new_worker_comes_after_one_that_was_told_to_end_by_sigterm() -> None:
    async with (
        asyncio.timeout(60),
        open_desk() as desk,
        asyncrt.Executor(max_workers=1) as executor,
    ):
        call = executor.submit(Wait(desk), 2)
        await desk.arrived(2)
        (worker,) = workers()
        os.kill(worker.pid, signal.SIGTERM)
        desk.release()
        assert await call == 4
        run = executor.map(square, range(10))
        assert await run == [number**2 for number in range(10)]
        names = {event.worker async for event in run.events() if isinstance(event, CallSent)}
        assert len(names) == 1
        await until_gone([worker])


async def test_a_new_worker_comes_after_the_fork_server_was_killed() -> None:
    async with asyncio.timeout(60), asyncrt.Executor(max_workers=1) as executor:
        assert await executor.submit(square, 2) == 4
        for worker in workers():
            (server,) = worker.children()
            server.kill()
        assert await executor.map(square, range(4)) == [0, 1, 4, 9]
