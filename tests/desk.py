"""What tests run in workers, and a desk where calls report and wait until they may go on.

No clock is involved. Workers import this module: it needs nothing of the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncrt


def wait_at(port: int, name: object) -> None:
    """Report to a desk and block until the test says so. Runs in a worker."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(f"{name}\n".encode())
        if not sock.recv(1):
            raise ConnectionError("the desk was closed")


class Desk:
    """Knows which calls have begun, lets them go on, and notices when their process ends.

    Attributes:
        port: What ``wait_at`` needs.
        seen: The names that were reported, in that order.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.seen: list[str] = []
        self._arrived: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._released: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._killed: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._all_released = False

    async def arrived(self, *names: object) -> None:
        """Wait until calls have begun."""
        for name in names:
            await self._arrived[str(name)].wait()

    async def killed(self, *names: object) -> None:
        """Wait until the processes of calls that were not released have ended."""
        for name in names:
            await self._killed[str(name)].wait()

    def release(self, *names: object) -> None:
        """Let calls go on; without names all, and all to come."""
        self._all_released = self._all_released or not names
        for name in names or tuple(self._arrived):
            self._released[str(name)].set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Attend to one call."""
        try:
            await self._attend((await reader.readline()).decode().strip(), reader)
            writer.write(b"!")
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _attend(self, name: str, reader: asyncio.StreamReader) -> None:
        self.seen.append(name)
        self._arrived[name].set()
        if self._all_released:
            return
        released = asyncio.create_task(self._released[name].wait())
        ended = asyncio.create_task(reader.read())
        try:
            await asyncio.wait({released, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not released.done():
                self._killed[name].set()
        finally:
            for task in (released, ended):
                task.cancel()
            await asyncio.gather(released, ended, return_exceptions=True)


@asynccontextmanager
async def open_desk() -> AsyncIterator[Desk]:
    """Open a desk; at the end, whoever still waits there fails."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        desk = Desk(listener.getsockname()[1])
        tasks: set[asyncio.Task[None]] = set()

        def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            tasks.add(asyncio.create_task(desk.serve(reader, writer)))

        server = await asyncio.start_server(begin, sock=listener)
        try:
            yield desk
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class RefusedError(Exception):
    """The user's own."""


def square(number: int) -> int:
    return number * number


def refuse(number: int) -> int:
    raise RefusedError(number)


def refuse_odd(number: int) -> int:
    if number % 2:
        raise RefusedError(number)
    return number


class Wait:
    """Waits at the desk if asked to, then squares."""

    def __init__(self, desk: Desk, *only: int) -> None:
        self.port = desk.port
        self.only = only

    def __call__(self, number: int) -> int:
        if not self.only or number in self.only:
            wait_at(self.port, number)
        return number * number


class ReportSum:
    """Reports what it is to add, waits, then adds."""

    def __init__(self, desk: Desk) -> None:
        self.port = desk.port

    def __call__(self, numbers: list[int]) -> int:
        wait_at(self.port, " ".join(["reduce", *map(str, numbers)]))
        return sum(numbers)


class RefuseOdd(Wait):
    def __call__(self, number: int) -> int:
        if number in self.only:
            wait_at(self.port, number)
        return refuse_odd(number)


def keywords(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return args, kwargs


def succeed_on_attempt(number: int) -> int:
    attempt = asyncrt.current_call().attempt
    if attempt < number:
        raise RefusedError(attempt)
    return attempt


def look_around() -> tuple[str, int, int, bool, str]:
    call = asyncrt.current_call()
    (call.scratch() / "file").write_text("x")
    return call.run_id, call.index, call.attempt, call.deadline is not None, str(call.scratch())


def say(number: int) -> None:
    print("number", number)


def variable(name: str) -> str | None:
    return os.environ.get(name)


def size_of(data: bytes) -> int:
    return len(data)


def make_bytes(size: int) -> bytes:
    return b"x" * size


def size_of_array(array: object) -> int:
    return int(array.nbytes)  # type: ignore[attr-defined]


def make_array(size: int) -> object:
    import numpy as np

    return np.ones(size // 8)


def kill_self_once(number: int, *, at: int, mark: str) -> int:
    """Die at one number, the first time that it comes."""
    if number == at:
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return number * number
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def kill_server(directory: str) -> None:
    """Kill the worker's parent, from within a call."""
    call = asyncrt.current_call()
    open(f"{directory}/{call.attempt}", "x").close()
    with open(f"/proc/{os.getppid()}/stat") as file:
        parent = int(file.read().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    signal.pause()


def slow_at_first(number: int) -> int:
    """Take very long if this is the first attempt of call 7."""
    call = asyncrt.current_call()
    if call.index == 7 and call.attempt == 1:
        time.sleep(300)
    return number + call.attempt


class DieAtFirst:
    """Call 5 waits at the desk; its first attempt dies when it is released."""

    def __init__(self, desk: Desk) -> None:
        self.port = desk.port

    def __call__(self, number: int) -> int:
        call = asyncrt.current_call()
        if call.index != 5:
            return number
        wait_at(self.port, f"attempt {call.attempt}")
        if call.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return -number


class Unloadable:
    """Can be pickled, and not be loaded at the client."""

    def __init__(self, client: int) -> None:
        self.client = client
        self.data = bytes(2 << 20)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["client"] == os.getpid():
            raise LookupError("no such table")
        self.__dict__.update(state)
