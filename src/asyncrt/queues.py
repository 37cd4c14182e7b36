"""What the dispatcher knows: the calls of a run, those that travel together, who can take more."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from asyncrt.options import Retry
from asyncrt.stragglers import Stragglers


@dataclass(slots=True, eq=False)
class Chunk:
    """Calls that travel together.

    Attributes:
        indexes: The calls, a range wherever possible.
        settled: One byte for each: 1 when its outcome is known or nobody wants it.
        left: Calls that are not settled.
        running: Position of the call that is known to run; -1 if none is.
        since: When it began.
    """

    id: int
    run: RunQueue
    indexes: Sequence[int]
    attempt: int
    worker: str
    settled: bytearray
    left: int
    running: int = -1
    since: float = 0.0

    def open_positions(self) -> list[int]:
        """Return the positions of the calls that are not settled."""
        return [position for position, done in enumerate(self.settled) if not done]


@dataclass(slots=True, eq=False)
class Pace:
    """What was learned about the calls of a function, in all runs of a pool.

    Attributes:
        seconds: What a call takes, smoothed; ``None`` before the first has ended.
        call_bytes: What a call's arguments take, smoothed.
    """

    seconds: float | None = None
    call_bytes: float = 0.0


@dataclass(slots=True, eq=False)
class RunQueue:
    """The calls of one run that are not settled, and what was learned about them.

    Attributes:
        chunksize: Calls in a chunk; ``None`` to measure.
        alone: Never more than one call in a process's life.
        offered: Calls that may be sent: all indexes below it were taken from the input.
        next_index: The first call that was never sent.
        total: Calls in all; ``None`` while that is not known.
        returned: Calls to send again: indexes, attempt, and whether they travel alone.
        returned_calls: How many they are.
        pace: What is known of its function.
        queued: Whether it is among the runs that have something to send.
        stragglers: What decides on second copies; ``None``: there are none.
        settled: Calls that have an outcome; counted for ``stragglers``.
        copies: The second copies that are out, with their calls' first ones, by index.
        copied: How many copies each call had, if any.
    """

    id: str
    retry: Retry
    chunksize: int | None
    alone: bool
    offered: int = 0
    next_index: int = 0
    total: int | None = None
    returned: deque[tuple[Sequence[int], int, bool]] = field(default_factory=deque)
    returned_calls: int = 0
    chunks: dict[int, Chunk] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)
    losses: dict[int, int] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    waiting: int = 0
    pace: Pace = field(default_factory=Pace)
    queued: bool = False
    last_size: int = 1
    over: bool = False
    stragglers: Stragglers | None = None
    settled: int = 0
    copies: dict[int, tuple[Chunk, Chunk]] = field(default_factory=dict)
    copied: dict[int, int] = field(default_factory=dict)

    @property
    def ready(self) -> int:
        """Calls that could be sent now."""
        return self.offered - self.next_index + self.returned_calls

    def give_back(
        self, indexes: Sequence[int], attempt: int, *, alone: bool = False, first: bool = False
    ) -> None:
        """Take calls that are to be sent again.

        Args:
            alone: Never together with others: one of them may be why a worker was lost.
            first: Before those that are waiting.
        """
        self.returned_calls += len(indexes)
        (self.returned.appendleft if first else self.returned.append)((indexes, attempt, alone))

    def take_returned(self, size: int) -> tuple[Sequence[int], int]:
        """Return up to ``size`` calls that are to be sent again, of one attempt."""
        indexes, attempt, alone = self.returned.popleft()
        if len(indexes) > size:
            self.returned.appendleft((indexes[size:], attempt, alone))
            indexes = indexes[:size]
        elif not alone and len(indexes) < size:
            found = list(indexes)
            while self.returned and self.returned[0][1:] == (attempt, False):
                more = self.returned[0][0]
                if len(found) + len(more) > size:
                    break
                self.returned.popleft()
                found += more
            indexes = found
        self.returned_calls -= len(indexes)
        return indexes, attempt

    def forget_returned(self) -> None:
        """Want none of them any more."""
        self.returned.clear()
        self.returned_calls = 0

    @property
    def has_ready(self) -> bool:
        """Whether a call could be sent now."""
        return self.next_index < self.offered or bool(self.returned)


@dataclass(slots=True, eq=False)
class WorkerState:
    """A worker that can be given calls."""

    name: str
    slots: int
    idle_since: float
    chunks: dict[int, Chunk] = field(default_factory=dict)
    draining: bool = False
    gone: bool = False
    stuck: bool = False  # it gave calls back, and has finished nothing since
