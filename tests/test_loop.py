"""The event loop is never blocked for long, and memory stays in bounds."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from desk import make_array, make_bytes, size_of, size_of_array, square

from asyncrt import Executor

pytestmark = pytest.mark.anyio

LARGE_BYTES = 100 * 1000 * 1000
LONGEST_GAP_SECONDS = 0.05


class Heartbeat:
    """Measures how long the loop was away at most, apart from what the machine took itself."""

    longest = 0.0


@asynccontextmanager
async def heartbeat() -> AsyncIterator[Heartbeat]:
    found = Heartbeat()

    async def beat() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            found.longest = max(found.longest, now - last)
            last = now

    task = asyncio.create_task(beat())
    try:
        yield found
    finally:
        task.cancel()
        await asyncio.wait({task})


@pytest.fixture
async def executor() -> AsyncIterator[Executor]:
    async with Executor(max_workers=1, echo=False) as executor:
        yield executor


@pytest.mark.parametrize("kind", ["bytes", "array"])
async def test_large_arguments_do_not_block_the_loop(executor: Executor, kind: str) -> None:
    data = bytes(LARGE_BYTES) if kind == "bytes" else np.ones(LARGE_BYTES // 8)
    await executor.submit(abs, -1)
    async with heartbeat() as found:
        sizes = await executor.map(size_of if kind == "bytes" else size_of_array, [data, data])
    assert sizes == [LARGE_BYTES] * 2
    assert found.longest < LONGEST_GAP_SECONDS


@pytest.mark.parametrize("kind", ["bytes", "array"])
async def test_large_results_do_not_block_the_loop(executor: Executor, kind: str) -> None:
    await executor.submit(abs, -1)
    longest, sizes = 0.0, []
    async with heartbeat() as found:
        run = executor.map(make_bytes if kind == "bytes" else make_array, [LARGE_BYTES] * 2)
        async for result in run:
            sizes.append(len(result) if kind == "bytes" else result.nbytes)  # type: ignore[arg-type, attr-defined]
            longest = found.longest
    assert sizes == [LARGE_BYTES] * 2
    assert longest < LONGEST_GAP_SECONDS


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_timeout_around_an_endless_map_returns_at_once_and_leaves_nothing(
    kind: str,
) -> None:
    async def numbers() -> AsyncIterator[int]:
        for number in itertools.count():
            yield number

    before = asyncio.all_tasks()
    began = time.perf_counter()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5), Executor(max_workers=2, echo=False) as executor:
            await executor.map(square, itertools.count() if kind == "sync" else numbers())
    assert time.perf_counter() - began < 1.0
    assert asyncio.all_tasks() == before
    assert psutil.Process().children(recursive=True) == []
    assert "asyncrt input" not in {thread.name for thread in threading.enumerate()}


def run_script(tmp_path: Path, source: str) -> dict[str, float]:
    script = tmp_path / "script.py"
    script.write_text(source)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


MANY = """
import asyncio, gc, json, resource
import asyncrt

def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

async def main():
    async with asyncrt.Executor(max_workers=1) as executor:
        await executor.map(bool, range(1000))
        gc.collect()
        before = rss()
        run = executor.map(bool, range(100_000))
        results = await run
        gc.collect()
        assert results == [False] + [True] * 99_999
        print(json.dumps({"bytes": rss() - before}))

asyncio.run(main())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_call_costs_the_client_at_most_a_kibibyte(tmp_path: Path) -> None:
    assert run_script(tmp_path, MANY)["bytes"] <= 1024 * 100_000


HUGE = """
import asyncio, json, resource, sys
import asyncrt

SIZE = 1 << 30

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def make(size):
    if KIND == "bytes":
        return b"x" * size
    import numpy as np
    return np.ones(size, dtype="u1")

KIND = %r

async def main():
    async with asyncrt.Executor(max_workers=1) as executor:
        await executor.submit(abs, -1)
        if %r == "argument":
            data = make(SIZE)
            before = peak()
            assert await executor.submit(len, data) == SIZE
            print(json.dumps({"above": peak() - before}))
        else:
            before = peak()
            result = await executor.submit(make, SIZE)
            assert len(result) == SIZE
            print(json.dumps({"above": peak() - before - SIZE}))

asyncio.run(main())
"""


@pytest.mark.large
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB there")
@pytest.mark.parametrize("kind", ["bytes", "array"])
@pytest.mark.parametrize("what", ["argument", "result"])
def test_a_gibibyte_passes_with_a_bounded_peak(tmp_path: Path, kind: str, what: str) -> None:
    assert run_script(tmp_path, HUGE % (kind, what))["above"] <= 1.3 * (1 << 30)
