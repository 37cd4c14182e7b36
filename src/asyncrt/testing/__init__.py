"""For tests of code that uses asyncrt, and of backends: nothing here starts a process or waits.

    import asyncrt
    from asyncrt.testing import ScriptedBackend, run_in_virtual_time, takes

    async def main() -> None:
        backend = ScriptedBackend()
        async with asyncrt.Executor(backend=backend, max_workers=1) as executor:
            run = executor.map(takes(3600, str), range(3))
            async for text in run:
                if text == "1":
                    backend.workers[0].die()
            assert run.stats.requeued == 1

    run_in_virtual_time(main)

``ScriptedBackend`` has workers in memory that speak the real protocol and break down when told to.
``VirtualClockEventLoop`` jumps to the next timer instead of waiting. ``InterposedBackend`` lets a
test cut the connections of any backend. ``BackendConformance`` is a pytest class that the tests of
a backend inherit; it needs pytest, the others do not. ``FakeKubernetes`` is a cluster on this
machine, with a real API over TCP and pods that are local processes: the one that is not in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asyncrt.testing.clock import VirtualClockEventLoop, run_in_virtual_time
from asyncrt.testing.interposed import InterposedBackend, InterposedWorker
from asyncrt.testing.scripted import ScriptedBackend, ScriptedWorker
from asyncrt.testing.scriptedcalls import takes

if TYPE_CHECKING:
    from asyncrt.testing.conformance import BackendConformance
    from asyncrt.testing.fakekubernetes import FakeKubernetes

__all__ = [
    "BackendConformance",
    "FakeKubernetes",
    "InterposedBackend",
    "InterposedWorker",
    "ScriptedBackend",
    "ScriptedWorker",
    "VirtualClockEventLoop",
    "run_in_virtual_time",
    "takes",
]


def __getattr__(name: str) -> Any:
    if name == "BackendConformance":
        from asyncrt.testing.conformance import BackendConformance  # noqa: PLC0415 - needs pytest

        return BackendConformance
    if name == "FakeKubernetes":
        from asyncrt.testing.fakekubernetes import FakeKubernetes  # noqa: PLC0415 - slow: aiohttp

        return FakeKubernetes
    raise AttributeError(f"module 'asyncrt.testing' has no attribute {name!r}")
