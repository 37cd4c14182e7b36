"""What the rest of asyncrt needs of a backend, and nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from asyncrt.options import PoolSettings
from asyncrt.worker.protocol import Buffer


class Receiver(Protocol):
    """Takes what a stream reads. Called by the event loop, never concurrently."""

    def get_buffer(self) -> memoryview:
        """Return where the next bytes go."""

    def received(self, size: int) -> None:
        """Take bytes that were written to ``get_buffer()``."""

    def writable(self) -> None:
        """Learn that the stream takes more bytes: see ``ByteStream.write``."""

    def closed(self, error: Exception | None) -> None:
        """Learn that the stream has ended. Nothing is called afterwards."""


class ByteStream(Protocol):
    """A connection to a worker."""

    def write(self, segments: Sequence[Buffer]) -> bool:
        """Write bytes without waiting; return whether more may follow now.

        After ``False`` the writer waits for ``Receiver.writable``, so that what is buffered stays
        bounded. Segments are borrowed until they are written.
        """

    def close(self) -> None:
        """Close at once. ``Receiver.closed`` follows."""


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """How a worker ended.

    Attributes:
        reason: For people.
        exit_code: ``None`` if it is not known.
        log_tail: The last lines that the worker itself (not its calls) wrote.
        expected: It ended because it was told to.
    """

    reason: str
    exit_code: int | None = None
    log_tail: str = ""
    expected: bool = False


class Worker(Protocol):
    """A worker that was asked for. It may not be there yet."""

    @property
    def name(self) -> str:
        """A name that no other worker of the pool ever has."""

    async def connect(self, receiver: Receiver) -> ByteStream:
        """Open a stream, waiting for the worker to be there.

        Raises:
            WorkerStartError: It will never be there.
            ConnectionError: Not now; worth another try.
        """

    async def wait_exit(self) -> WorkerExit:
        """Return when the worker has ended."""

    def kill(self) -> None:
        """End it at once, with everything that it runs."""


class WorkerPoolHandle(Protocol):
    """The workers of one shape."""

    @property
    def default_max_workers(self) -> int:
        """How many workers there may be if nobody says."""

    async def start_worker(self) -> Worker:
        """Ask for one more worker.

        Raises:
            WorkerStartError: The backend will not give one.
        """


class Backend(Protocol):
    """A place where workers run."""

    @property
    def name(self) -> str:
        """For people and logs."""

    def open_pool(
        self, settings: PoolSettings, *, token: bytes
    ) -> AbstractAsyncContextManager[WorkerPoolHandle]:
        """Open a pool of workers that know a token. Leaving the context ends them all.

        Raises:
            ConfigError: The backend cannot do what the settings ask for.
        """
