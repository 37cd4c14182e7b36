"""Blocking work beside the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio.to_thread

T = TypeVar("T")


async def run_in_thread(work: Callable[[], T]) -> T:
    """Run something that blocks in a thread; here, where no thread can be started any more.

    From Python 3.12 on that is so when the interpreter ends. What was to be done before that still
    has to be: another thread waits for it.
    """
    begun = False

    def note_and_work() -> T:
        nonlocal begun
        begun = True
        return work()

    try:
        return await anyio.to_thread.run_sync(note_and_work)
    except RuntimeError:
        if begun:
            raise
        return work()
