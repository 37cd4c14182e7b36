"""The desk of ``desk.py`` for tests without an event loop of their own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from desk import Desk, open_desk

LONGEST_SECONDS = 30.0


class SyncDesk:
    """Runs a desk in a thread."""

    def __init__(self, desk: Desk, loop: asyncio.AbstractEventLoop) -> None:
        self._desk = desk
        self._loop = loop
        self.port = desk.port
        self.seen = desk.seen

    def arrived(self, *names: object) -> None:
        """Wait until calls have begun."""
        asyncio.run_coroutine_threadsafe(self._desk.arrived(*names), self._loop).result(
            LONGEST_SECONDS
        )

    def killed(self, *names: object) -> None:
        """Wait until the processes of calls that were not released have ended."""
        asyncio.run_coroutine_threadsafe(self._desk.killed(*names), self._loop).result(
            LONGEST_SECONDS
        )

    def release(self, *names: object) -> None:
        """Let calls go on; without names all, and all to come."""
        self._loop.call_soon_threadsafe(self._desk.release, *names)


@contextmanager
def open_sync_desk() -> Iterator[SyncDesk]:
    """Open a desk; at the end, whoever still waits there fails."""
    ready = threading.Event()
    found: list[SyncDesk] = []
    done: list[asyncio.Event] = []

    async def main() -> None:
        async with open_desk() as desk:
            found.append(SyncDesk(desk, asyncio.get_running_loop()))
            done.append(asyncio.Event())
            ready.set()
            await done[0].wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        assert ready.wait(LONGEST_SECONDS)
        yield found[0]
    finally:
        found[0]._loop.call_soon_threadsafe(done[0].set)
        thread.join()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what nobody tells: the state of a future, the end of a thread."""
    end = time.monotonic() + LONGEST_SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
