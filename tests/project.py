"""A project on disk, as users have them, and a backend whose workers cannot see it."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from asyncrt.backends.base import ByteStream, Receiver, Worker, WorkerExit, WorkerPoolHandle
from asyncrt.backends.local import LocalBackend
from asyncrt.options import PoolSettings
from asyncrt.worker.protocol import Buffer, Decoder, Frame, Kind, Limits

# Begins a script of a project: ``backend()`` gives workers that cannot see the project.
PRELUDE: Final = """\
import asyncio, json, sys
from pathlib import Path
import asyncrt
from asyncrt.backends.local import LocalBackend

def backend():
    here = Path(__file__).resolve().parents[LEVELS]
    return LocalBackend(
        sys_path=[p for p in sys.path if p and not Path(p).resolve().is_relative_to(here)]
    )

"""


class Project:
    """A directory with files in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, name: str, content: str | bytes) -> Path:
        """Write one file; return its path."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = textwrap.dedent(content).encode()
        path.write_bytes(content)
        return path

    def script(self, name: str, source: str) -> Path:
        """Write a script that has ``backend()``."""
        levels = str(name.count("/"))
        prelude = PRELUDE.replace("LEVELS", levels)
        return self.put(name, prelude + textwrap.dedent(source))

    def run(
        self, *arguments: str | Path, cwd: Path, path: Sequence[Path] = (), code: int = 0
    ) -> str:
        """Run Python elsewhere; return what it printed."""
        own = Path(importlib.import_module("asyncrt").__file__ or "").parents[1]
        done = subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            cwd=cwd,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(map(str, [own, *path]))},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == code, done.stderr
        return done.stdout


def paths_outside(directory: Path) -> list[str]:
    """Return ``sys.path`` without what is in a directory."""
    return [
        entry
        for entry in sys.path
        if entry and not Path(entry).resolve().is_relative_to(directory.resolve())
    ]


def units_in(frames: Sequence[Frame]) -> list[str]:
    """Return the names of the units among frames, in order."""
    return [
        frame.header["unit"]
        for frame in frames
        if frame.kind == Kind.FUNCTION and "unit" in frame.header
    ]


class WatchedBackend:
    """Local workers that cannot see a directory, and all frames that were sent to them."""

    name = "watched"

    def __init__(self, hidden: Path, **options: Any) -> None:
        self.frames: list[Frame] = []
        self.streams: list[_WatchedStream] = []
        self._backend = LocalBackend(sys_path=paths_outside(hidden), **options)

    def sent_units(self) -> list[str]:
        """Return the names of the units that were sent, in order."""
        return units_in(self.frames)

    @asynccontextmanager
    async def open_pool(
        self, settings: PoolSettings, *, token: bytes
    ) -> AsyncIterator[WorkerPoolHandle]:
        async with self._backend.open_pool(settings, token=token) as pool:
            yield _WatchedPool(self, pool)


class _WatchedPool:
    def __init__(self, backend: WatchedBackend, pool: WorkerPoolHandle) -> None:
        self._backend = backend
        self._pool = pool

    @property
    def default_max_workers(self) -> int:
        return self._pool.default_max_workers

    async def start_worker(self) -> _WatchedWorker:
        return _WatchedWorker(self._backend, await self._pool.start_worker())


class _WatchedWorker:
    def __init__(self, backend: WatchedBackend, worker: Worker) -> None:
        self._backend = backend
        self._worker = worker

    @property
    def name(self) -> str:
        return self._worker.name

    async def connect(self, receiver: Receiver) -> _WatchedStream:
        stream = _WatchedStream(self._backend, await self._worker.connect(receiver))
        self._backend.streams.append(stream)
        return stream

    async def wait_exit(self) -> WorkerExit:
        return await self._worker.wait_exit()

    def kill(self) -> None:
        self._worker.kill()


class _WatchedStream:
    def __init__(self, backend: WatchedBackend, stream: ByteStream) -> None:
        self._backend = backend
        self._stream = stream
        self._decoder = Decoder(Limits())
        self.frames: list[Frame] = []

    def write(self, segments: Sequence[Buffer]) -> bool:
        data = memoryview(b"".join(segments))
        while data:
            room = self._decoder.get_buffer()
            size = min(len(room), len(data))
            room[:size] = data[:size]
            data = data[size:]
            frames = self._decoder.received(size)
            self.frames += frames
            self._backend.frames += frames
        return self._stream.write(segments)

    def close(self) -> None:
        self._stream.close()
