from __future__ import annotations

import os
import shutil
import signal
import tempfile
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import carrying

from asyncrt.backends.local import LocalBackend, LocalWorker
from asyncrt.testing import BackendConformance, takes
from asyncrt.testing.conformancebase import absolute, until_started

GONE_WITHIN_SECONDS = 10.0


class TestLocalBackend(BackendConformance):
    spawn: str | None = None

    mark: str
    directory: Path

    @pytest.fixture(autouse=True)
    def own_directory(
        self,
        nothing_is_left: None,
        tmp_path_factory: pytest.TempPathFactory,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        tmp_path_factory.getbasetemp()  # made where it belongs, before the directory changes
        monkeypatch.setattr(tempfile, "tempdir", str(self.directory))

    def make_backend(self) -> LocalBackend:
        self.mark = uuid.uuid4().hex
        self.directory = Path(tempfile.mkdtemp(prefix="conformance-"))
        return LocalBackend(spawn=self.spawn)

    def executor_options(self) -> dict[str, Any]:
        # The mark finds all processes of this test, also those whose parent is gone.
        return {"env": {"CONFORMANCE_MARK": self.mark, "TMPDIR": str(self.directory)}}

    def leftovers(self) -> list[str]:
        _, alive = psutil.wait_procs(self.processes(), timeout=GONE_WITHIN_SECONDS)
        files = [str(path) for path in self.directory.rglob("*")]
        shutil.rmtree(self.directory)
        return [str(process) for process in alive] + files

    def processes(self) -> list[psutil.Process]:
        return carrying("CONFORMANCE_MARK", self.mark)

    def kill_one_worker(self) -> None:
        worker = self.backend.connected[0].inner
        assert isinstance(worker, LocalWorker)
        os.kill(worker.pid, signal.SIGKILL)

    async def test_stopped_worker_is_given_up_and_its_call_runs_elsewhere(self) -> None:
        def seconds(_: int) -> float:
            import asyncrt

            return 3600 if asyncrt.current_call().attempt == 1 else 0

        options = {"max_workers": 1, "heartbeat_interval": 0.2, "orphan_timeout": 1.0}
        async with self.open(**options) as executor:
            run = executor.map(takes(seconds, absolute), [-1])
            await until_started(run)
            worker = self.backend.connected[0].inner
            assert isinstance(worker, LocalWorker)
            os.kill(worker.pid, signal.SIGSTOP)
            assert await run == [1]
        assert run.calls[0].attempts == 2
        assert len(self.backend.workers) == 2


class TestLocalBackendWithoutFork(TestLocalBackend):
    spawn = "exec"
