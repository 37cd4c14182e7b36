from __future__ import annotations

from typing import Any

import pytest

from asyncrt.testing import BackendConformance, ScriptedBackend, VirtualClockEventLoop


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualClockEventLoop}


class TestScriptedBackend(BackendConformance):
    isolates_processes = False
    kills = False
    limits_memory = False

    scripted: ScriptedBackend

    def make_backend(self) -> ScriptedBackend:
        self.scripted = ScriptedBackend()
        return self.scripted

    def leftovers(self) -> list[str]:
        return [worker.name for worker in self.scripted.workers if worker.busy or not worker.ended]

    def kill_one_worker(self) -> None:
        self.scripted.running[0].die()


class TestScriptedBackendFarAway(TestScriptedBackend):
    def make_backend(self) -> ScriptedBackend:
        self.scripted = ScriptedBackend(latency=0.02)
        return self.scripted
