"""What holds between a client and one worker when either is slow, full, or of another opinion."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import psutil
import pytest
from project import WatchedBackend
from raw_client import running_worker

import asyncrt
from asyncrt.errors import ProtocolError
from asyncrt.pack import worker_program
from asyncrt.worker.protocol import Frame, Kind

MIB = 1 << 20


@pytest.mark.anyio
async def test_a_worker_that_drops_every_connection_at_once_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The client sends a chunk that the worker, with its own limit, takes for a broken peer.
    monkeypatch.setattr("asyncrt.dispatcher.MAX_CALLS", 1 << 20)
    async with asyncio.timeout(60), asyncrt.Executor(max_workers=1) as executor:
        with pytest.raises(ProtocolError, match="dropped 20 connections in a row"):
            await executor.map(abs, range(20_000), chunksize=20_000)


@pytest.mark.anyio
async def test_large_functions_that_nobody_calls_any_more_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncrt.link._MAX_FUNCTION_BYTES", 3 * MIB)
    backend = WatchedBackend(tmp_path)
    async with asyncio.timeout(60), asyncrt.Executor(backend=backend, max_workers=1) as executor:
        for number in range(6):
            data = bytes([number]) * MIB
            assert await executor.submit(lambda data=data: data[-1]) == number
    assert most_bytes_kept(backend.frames) <= 3 * MIB


def most_bytes_kept(frames: list[Frame]) -> int:
    """Return how much a worker had at once of the functions that it was sent."""
    kept: dict[str, int] = {}
    most = 0
    for frame in frames:
        if frame.kind == Kind.FUNCTION:
            for name in frame.header.get("forget", ()):
                del kept[name]
            kept[frame.header["function"]] = len(frame.body)
            most = max(most, sum(kept.values()))
    assert most > MIB
    return most


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_client_that_does_not_read_makes_calls_that_print_wait(tmp_path: Path) -> None:
    program = tmp_path / "worker.pyz"
    program.write_bytes(worker_program())
    total = 64 * MIB

    def say(path: str) -> int:
        import sys

        line = "x" * 65535 + "\n"
        for printed in range(1024):
            sys.stdout.write(line)
            with open(path, "w") as file:
                file.write(str(printed + 1))
        return len(line) * 1024

    with running_worker(program) as worker:
        client = worker.connect()
        progress = tmp_path / "progress"
        client.function("say", say)
        client.calls(1, "say", [str(progress)])
        assert wait_until_still(progress) < 128  # of 1,024 lines: the rest waits for a reader
        report = client.report(1)
        assert report.values == {0: total}
        assert sum(len(frame.body) for frame in client.logs()) == total
        assert peak_bytes(worker.process.pid) < 48 * MIB


def wait_until_still(progress: Path) -> int:
    """Return what a file says when that has not changed for a while.

    Looking too early makes the test easier to pass, never harder.
    """
    said, looks = -1, 0
    while looks < 20:
        time.sleep(0.02)
        found = int(progress.read_text() or 0) if progress.exists() else 0
        looks = looks + 1 if found == said and found else 0
        said = found
    return said


def peak_bytes(pid: int) -> int:
    """Return the most memory that a process ever held."""
    assert psutil.pid_exists(pid)
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
