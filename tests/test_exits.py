"""However a client ends, nothing of it is left; whatever is killed, no call is lost.

The clients are real processes in a session of their own, with a ``TMPDIR`` of their own. What is
left is looked for by that: every process that they start inherits it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from desk import Wait, kill_self_once, kill_server, open_desk, square
from processes import carrying

from asyncrt import Executor, Retry, Run
from asyncrt.backends.local import LocalPool, LocalWorker
from asyncrt.errors import WorkerCrashedError, WorkerLostError

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc"),
]

TESTS = Path(__file__).parent
GONE_SECONDS = 10.0

CLIENT = """
import asyncio, json, os, signal, sys, threading
sys.path.insert(0, {tests!r})
import asyncrt
from desk import wait_at

PORT = {port}

def forever(number):
    wait_at(PORT, number)

def descriptors():
    return len(os.listdir("/proc/self/fd"))

def what_is_left():
    tasks = asyncio.all_tasks() - {{asyncio.current_task()}}
    threads = [t.name for t in threading.enumerate() if t.name.startswith("asyncrt")]
    return [sorted(t.get_name() for t in tasks), threads]

async def body():
    {body}

async def main():
    warm = await asyncio.to_thread(int)
    before = descriptors()
    try:
        async with asyncrt.Executor(max_workers=2, memory={memory!r}, echo=False) as executor:
            run = executor.map(forever, range(2))
            {body}
    except (ZeroDivisionError, TimeoutError) as error:
        print(type(error).__name__)
    finally:
        print(json.dumps([*what_is_left(), descriptors() - before]), flush=True)

def until_signal():
    async def wrapped():
        task = asyncio.current_task()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await main()
    return wrapped()

asyncio.run(until_signal())
"""


class Client:
    """A process that uses an executor."""

    def __init__(self, tmp_path: Path, port: int, body: str, *, memory: str | None = None) -> None:
        self.directory = tmp_path / "tmp"
        self.directory.mkdir()
        source = CLIENT.format(tests=str(TESTS), port=port, body=body, memory=memory)
        source = source.replace(f"async def body():\n    {body}\n", "")
        script = tmp_path / "client.py"
        script.write_text(source)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(self.directory)},
        )

    def family(self) -> list[psutil.Process]:
        """Return every process that carries this client's TMPDIR."""
        return carrying("TMPDIR", str(self.directory))

    def cgroups(self) -> list[Path]:
        """Return cgroups that are named after one of this client's directories."""
        names = {path.name for path in self.directory.iterdir()}
        names |= self.names
        return [
            path
            for root in (Path("/sys/fs/cgroup"),)
            for path in root.rglob("asyncrt-*")
            if path.name.rpartition("-")[0] in names
        ]

    names: set[str] = set()  # noqa: RUF012 - replaced, never changed

    def remember_names(self) -> None:
        self.names = {path.name for path in self.directory.iterdir()}

    async def end(self) -> tuple[int, str, str]:
        """Wait for the end; return exit code, output and errors."""
        out, err = await asyncio.to_thread(self.process.communicate, timeout=30)
        return self.process.returncode, out, err

    def assert_nothing_is_left(self, *, at_once: bool = True) -> None:
        family = self.family()
        if at_once:
            assert family == []
        _, alive = psutil.wait_procs(family, timeout=GONE_SECONDS)
        assert alive == []
        assert list(self.directory.glob("asyncrt-*")) == []
        assert self.cgroups() == []


WAIT = "await run"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("await run.cancel()", None),
        ("1 / 0", "ZeroDivisionError"),
        ("async with asyncio.timeout(1.0): await run", "TimeoutError"),
    ],
    ids=["normally", "by an exception", "by a cancellation"],
)
async def test_a_client_that_ends_by_itself_leaves_nothing(
    tmp_path: Path, body: str, told: str | None
) -> None:
    async with open_desk() as desk:
        client = Client(tmp_path, desk.port, body, memory="256Mi")
        code, out, err = await client.end()
        assert (code, err) == (0, "")
        *before, left = out.splitlines()
        assert before == ([told] if told else [])
        assert json.loads(left) == [[], [], 0]
        client.assert_nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_that_cancels_the_client_leaves_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with open_desk() as desk:
        client = Client(tmp_path, desk.port, WAIT, memory="256Mi")
        await desk.arrived(0, 1)
        client.remember_names()
        if number == signal.SIGINT:
            os.killpg(client.process.pid, number)  # as a terminal does on Ctrl-C
        else:
            client.process.send_signal(number)
        code, out, err = await client.end()
        await desk.killed(0, 1)
        assert code != 0
        assert "KeyboardInterrupt" in err or "CancelledError" in err
        assert json.loads(out) == [[], [], 0]
        client.assert_nothing_is_left()


async def test_the_workers_of_a_client_that_was_killed_end_by_themselves(tmp_path: Path) -> None:
    async with open_desk() as desk:
        client = Client(tmp_path, desk.port, WAIT)
        await desk.arrived(0, 1)
        client.remember_names()
        client.process.kill()
        await client.end()
        await desk.killed(0, 1)
        client.assert_nothing_is_left(at_once=False)


# -- what is killed in the middle of a map ---------------------------------------------------------


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[LocalWorker]:
    """Return the workers that are started, in that order."""
    started: list[LocalWorker] = []
    start = LocalPool.start_worker

    async def noting(self: LocalPool) -> LocalWorker:
        worker = await start(self)
        started.append(worker)
        return worker

    monkeypatch.setattr(LocalPool, "start_worker", noting)
    return started


SQUARES = [number * number for number in range(1000)]


async def test_a_child_that_is_killed_costs_one_attempt_of_one_call(tmp_path: Path) -> None:
    async with Executor(max_workers=2, echo=False) as executor:
        run = executor.map(
            kill_self_once,
            range(1000),
            kwargs={"at": 500, "mark": str(tmp_path / "mark")},
            retries=Retry(attempts=2, delay=0),
        )
        assert await run == SQUARES
        assert run.stats.retried == 1
        assert run.stats.succeeded == 1000


async def test_a_child_that_is_killed_without_retries_is_the_typed_error(tmp_path: Path) -> None:
    async with Executor(max_workers=2, echo=False) as executor:
        run = executor.map(
            kill_self_once,
            range(1000),
            kwargs={"at": 500, "mark": str(tmp_path / "mark")},
            return_exceptions=True,
        )
        results = await run
    error = results[500]
    assert isinstance(error, WorkerCrashedError)
    assert (error.signal, error.index) == (signal.SIGKILL, 500)
    assert results[:500] + results[501:] == SQUARES[:500] + SQUARES[501:]


async def test_a_worker_that_is_killed_costs_nothing(pools: list[LocalWorker]) -> None:
    async with Executor(max_workers=2, echo=False) as executor:
        run = executor.map(square, range(1000))
        results = aiter(run)
        found = [await anext(results)]
        os.kill(pools[0].pid, signal.SIGKILL)
        async for result in results_after(run):
            found.append(result)
        assert found == SQUARES
        assert await executor.map(square, range(1000)) == SQUARES
    assert psutil.Process().children(recursive=True) == []


async def results_after(run: Run[int]) -> AsyncIterator[int]:
    while (result := await anext(run, None)) is not None:
        yield result


async def test_a_call_whose_worker_is_lost_each_time_is_the_typed_error(tmp_path: Path) -> None:
    async with Executor(max_workers=1, echo=False) as executor:
        with pytest.raises(WorkerLostError):
            await executor.submit(kill_server, str(tmp_path))
        assert len(os.listdir(tmp_path)) == 3
        assert await executor.map(square, range(10)) == SQUARES[:10]
    assert psutil.Process().children(recursive=True) == []


async def test_a_connection_that_is_cut_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[object] = []
    connect = LocalWorker.connect

    async def noting(self: LocalWorker, receiver: object) -> object:
        stream = await connect(self, receiver)  # type: ignore[arg-type]
        streams.append(stream)
        return stream

    monkeypatch.setattr(LocalWorker, "connect", noting)
    async with (
        open_desk() as desk,
        Executor(max_workers=2, echo=False) as executor,
    ):
        run = executor.map(Wait(desk, 300, 600), range(1000))
        results = aiter(run)
        found: list[int] = []
        for held in (300, 600):
            while len(found) < held:
                found.append(await anext(results))
            await desk.arrived(held)
            for stream in streams[-2:]:
                stream._socket.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]
            desk.release(held)
        found += [result async for result in results_after(run)]
        assert found == SQUARES
        assert run.stats.retried == 0
    assert len(streams) > 2
    assert psutil.Process().children(recursive=True) == []
