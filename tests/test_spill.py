"""Large results that wait on disk."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from desk import Unloadable, make_array, make_bytes

import asyncrt
from asyncrt.errors import ConfigError, SerializationError
from asyncrt.spill import Deferred, Spill

MIB = 1 << 20


def deleted_files(directory: Path) -> list[str]:
    """Return the files without a name in a directory that this process holds."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.islink(link)]
    return [target for target in targets if target.startswith(str(directory))]


def is_on_disk(body: Any) -> bool:
    return isinstance(body, memoryview)


# -- the memory ------------------------------------------------------------------------------------


def test_without_a_directory_everything_is_in_memory() -> None:
    assert not is_on_disk(Spill(None, 0).allocate(8 * MIB))


def test_what_is_over_the_limit_is_on_disk_and_comes_back_as_it_was(tmp_path: Path) -> None:
    spill = Spill(str(tmp_path), 3 * MIB)
    first, second, third = spill.allocate(2 * MIB), spill.allocate(2 * MIB), spill.allocate(MIB)
    assert [is_on_disk(body) for body in (first, second, third)] == [False, True, False]
    view = memoryview(second)
    assert (len(view), set(view[:MIB])) == (2 * MIB, {0})
    view[:] = bytes(range(256)) * (2 * MIB // 256)
    assert bytes(view[-256:]) == bytes(range(256))
    assert list(tmp_path.iterdir()) == []


def test_memory_that_was_let_go_counts_no_more(tmp_path: Path) -> None:
    spill = Spill(str(tmp_path), 3 * MIB)
    first = spill.allocate(2 * MIB)
    assert is_on_disk(spill.allocate(2 * MIB))
    del first
    gc.collect()
    assert not is_on_disk(spill.allocate(2 * MIB))


def test_files_are_shared_and_go_with_the_last_of_their_bodies(tmp_path: Path) -> None:
    spill = Spill(str(tmp_path), 0)
    bodies = [memoryview(spill.allocate(MIB + 1)) for _ in range(50)]
    for number, body in enumerate(bodies):
        body[:] = bytes([number]) * len(body)
    assert [body[-1] for body in bodies] == list(range(50))
    assert len(deleted_files(tmp_path)) == 2  # the segment, and its mapping
    spill.close()
    assert bodies[49][0] == 49
    body = bodies[0]
    del bodies
    del body
    gc.collect()
    assert deleted_files(tmp_path) == []


def test_a_body_larger_than_a_segment_has_one_of_its_own(tmp_path: Path) -> None:
    spill = Spill(str(tmp_path), 0)
    small = memoryview(spill.allocate(MIB))
    large = memoryview(spill.allocate((256 << 20) + 1))
    small[:1], large[-1:] = b"s", b"l"
    assert (len(large), bytes(small[:1]), bytes(large[-1:])) == ((256 << 20) + 1, b"s", b"l")
    spill.close()


def test_a_directory_that_cannot_be_written_to_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spill = Spill(str(tmp_path / "missing"), 0)
    with caplog.at_level(logging.WARNING):
        bodies = [spill.allocate(2 * MIB) for _ in range(3)]
    assert not any(is_on_disk(body) for body in bodies)
    assert len(caplog.records) == 1
    assert "missing" in caplog.text


# -- results ---------------------------------------------------------------------------------------


@pytest.fixture
async def executor(tmp_path: Path) -> AsyncIterator[asyncrt.Executor]:
    options: Any = {"spill_dir": str(tmp_path), "spill_limit": "1Mi"}
    async with asyncio.timeout(60), asyncrt.Executor(max_workers=2, **options) as executor:
        yield executor


SIZES = [5 * MIB, 3, 2 * MIB, 2 * MIB + 1]


@pytest.mark.anyio
async def test_results_are_the_same_however_they_are_taken(executor: asyncrt.Executor) -> None:
    run = executor.map(make_bytes, SIZES)
    expected = [make_bytes(size) for size in SIZES]
    assert await run == expected
    assert await run == expected
    assert [await call for call in run.calls] == expected
    assert [call.outcome for call in run.calls] == [asyncrt.Success(value) for value in expected]
    assert [value async for value in executor.map(make_bytes, SIZES)] == expected
    assert [value async for value in executor.map(make_bytes, iter(SIZES))] == expected
    completed = [call async for call in executor.map(make_bytes, SIZES).as_completed()]
    assert {call.index: await call for call in completed} == dict(enumerate(expected))
    assert await executor.submit(make_bytes, 4 * MIB) == make_bytes(4 * MIB)
    assert await executor.map_reduce(make_bytes, SIZES, lambda parts: [len(each) for each in parts])
    assert await executor.map_reduce(make_bytes, SIZES, b"".join, fan_in=2) == b"".join(expected)


@pytest.mark.anyio
async def test_large_results_wait_as_they_came(executor: asyncrt.Executor) -> None:
    run = executor.map(make_bytes, SIZES)
    await run.finished()
    kinds = [type(value) for value in run._values]
    assert kinds == [Deferred, bytes, Deferred, Deferred]


@pytest.mark.anyio
async def test_arrays_are_views_of_the_file_and_can_be_written(
    executor: asyncrt.Executor, tmp_path: Path
) -> None:
    numpy = pytest.importorskip("numpy")
    array: Any = await executor.submit(make_array, 8 * MIB)
    assert not array.flags.owndata
    assert array.ctypes.data % 64 == 0
    array += 1
    assert numpy.array_equal(array, make_array(8 * MIB) + 1)  # type: ignore[operator]
    assert deleted_files(tmp_path)


@pytest.mark.anyio
async def test_a_result_that_cannot_be_loaded_fails_its_call_when_it_is_taken(
    executor: asyncrt.Executor,
) -> None:
    run = executor.map(Unloadable, [os.getpid()])
    with pytest.raises(SerializationError, match="no such table"):
        await run
    with pytest.raises(SerializationError, match="no such table") as error:
        await run.calls[0]
    assert (error.value.index, error.value.run_id) == (0, run.id)
    (failure,) = await executor.map(Unloadable, [os.getpid()], return_exceptions=True)
    assert isinstance(failure, SerializationError)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_results_that_nobody_has_taken_do_not_fill_the_memory(tmp_path: Path) -> None:
    program = """
import asyncio, sys, asyncrt

def make(number):
    return number.to_bytes(1, "little") * (16 << 20)

def anonymous_bytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))

async def main():
    options = dict(spill_dir=sys.argv[1], spill_limit="32Mi", max_workers=2)
    async with asyncrt.Executor(**options) as executor:
        await executor.submit(len, "")
        before = anonymous_bytes()
        run = executor.map(make, range(40))
        await run.finished()
        waiting = anonymous_bytes() - before
        numbers = [value[-1] async for value in run]
        print(waiting >> 20, numbers == list(range(40)))

asyncio.run(main())
"""
    shown = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout.split()
    assert int(shown[0]) < 200  # of 640 MiB
    assert shown[1] == "True"


def test_the_limit_is_a_quantity() -> None:
    with pytest.raises(ConfigError, match="spill_limit"):
        asyncrt.Executor(spill_limit="1GB")
