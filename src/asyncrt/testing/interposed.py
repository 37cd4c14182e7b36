"""Stands between asyncrt and a backend, so that a test can break what is between them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from asyncrt.backends.base import (
    Backend,
    ByteStream,
    Receiver,
    Worker,
    WorkerExit,
    WorkerPoolHandle,
)
from asyncrt.options import PoolSettings


class InterposedBackend:
    """Passes everything on to another backend, and remembers the workers.

    Attributes:
        workers: All that were ever started, in order.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._refusals = 0
        self.workers: list[InterposedWorker] = []

    @property
    def name(self) -> str:
        """The other backend's name."""
        return self._backend.name

    @property
    def connected(self) -> list[InterposedWorker]:
        """The workers that have a connection now."""
        return [worker for worker in self.workers if worker.connected]

    def refuse_next_connections(self, count: int) -> None:
        """Let the next attempts to connect to any worker fail."""
        self._refusals += count

    def is_refused(self) -> bool:
        """Count one attempt to connect."""
        self._refusals -= 1
        return self._refusals >= 0

    @asynccontextmanager
    async def open_pool(
        self, settings: PoolSettings, *, token: bytes
    ) -> AsyncIterator[WorkerPoolHandle]:
        """Open a pool of the other backend. See ``Backend.open_pool``."""
        async with self._backend.open_pool(settings, token=token) as pool:
            yield _InterposedPool(self, pool)


class _InterposedPool:
    def __init__(self, backend: InterposedBackend, pool: WorkerPoolHandle) -> None:
        self._backend = backend
        self._pool = pool

    @property
    def default_max_workers(self) -> int:
        return self._pool.default_max_workers

    async def start_worker(self) -> InterposedWorker:
        worker = InterposedWorker(self._backend, await self._pool.start_worker())
        self._backend.workers.append(worker)
        return worker


class InterposedWorker:
    """A worker of the other backend.

    Attributes:
        inner: What the other backend returned.
        connections: How often it was connected to.
    """

    def __init__(self, backend: InterposedBackend, inner: Worker) -> None:
        self._backend = backend
        self._stream: ByteStream | None = None
        self.inner = inner
        self.connections = 0

    @property
    def name(self) -> str:
        """Its name."""
        return self.inner.name

    @property
    def connected(self) -> bool:
        """Whether it has a connection now."""
        return self._stream is not None

    async def connect(self, receiver: Receiver) -> ByteStream:
        """Open a stream. See ``Worker.connect``."""
        if self._backend.is_refused():
            raise ConnectionError(f"{self.name} refuses a connection, as the test asked for")
        self._stream = await self.inner.connect(_Notifying(receiver, self))
        self.connections += 1
        return self._stream

    async def wait_exit(self) -> WorkerExit:
        """Return when it has ended."""
        return await self.inner.wait_exit()

    def kill(self) -> None:
        """End it at once."""
        self.inner.kill()

    def cut_connection(self) -> None:
        """End its connection, if there is one; what is on its way is lost. It goes on working."""
        if self._stream is not None:
            self._stream.close()

    def lose_stream(self) -> None:
        """Learn that the connection has ended."""
        self._stream = None


class _Notifying:
    """A receiver that tells the worker when its connection has ended."""

    def __init__(self, receiver: Receiver, worker: InterposedWorker) -> None:
        self._receiver = receiver
        self._worker = worker
        self.get_buffer = receiver.get_buffer
        self.received = receiver.received
        self.writable = receiver.writable

    def closed(self, error: Exception | None) -> None:
        self._worker.lose_stream()
        self._receiver.closed(error)
