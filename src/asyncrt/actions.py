"""What the dispatcher wants done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from asyncrt.queues import Chunk, RunQueue


@dataclass(frozen=True, slots=True)
class Send:
    """Send a chunk to its worker."""

    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Cancel:
    """Tell a worker that nobody wants calls of a chunk; ``None``: all of it."""

    worker: str
    chunk: int
    positions: list[int] | None


@dataclass(frozen=True, slots=True)
class Revoke:
    """Ask a worker for the calls of a chunk that it has not begun."""

    worker: str
    chunk: int


@dataclass(frozen=True, slots=True)
class Retried:
    """A call failed and will be tried again after a delay."""

    run: RunQueue
    index: int
    error: Exception
    delay: float


@dataclass(frozen=True, slots=True)
class Failed:
    """A call failed for good."""

    run: RunQueue
    index: int
    error: Exception
    attempts: int


@dataclass(frozen=True, slots=True)
class Requeued:
    """Calls came back and will be sent again."""

    run: RunQueue
    indexes: Sequence[int]
    worker: str


@dataclass(frozen=True, slots=True)
class CopyDropped:
    """One of two copies of a call is not needed any more: the other one settles it.

    Attributes:
        error: How this copy failed, if it did.
    """

    run: RunQueue
    index: int
    worker: str
    error: Exception | None


Action: TypeAlias = Send | Cancel | Revoke | Retried | Failed | Requeued | CopyDropped
