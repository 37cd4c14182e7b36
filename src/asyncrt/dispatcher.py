"""Decides which call runs where, what is tried again, and what was the end of it.

A pure state machine: methods are events, they return actions, and somebody else acts. No clock (the
time is an argument), no I/O, no tasks. Calls are numbers here; what they are lies with the run.

The chunk is the unit of dispatch. Whatever becomes of it, each of its calls is settled exactly
once: late, duplicate and unknown news are ordinary branches.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from asyncrt.errors import CallError, OutOfMemoryError, RunCancelledError, WorkerLostError
from asyncrt.options import Retry

MAX_LOSSES: Final = 3
MAX_CHUNK_CALLS: Final = 4096
MAX_PREFETCH: Final = 64
_TARGET_SECONDS: Final = 0.02  # of a chunk that is coalesced: far above a round trip
_PREFETCH_BELOW_SECONDS: Final = 0.05  # longer calls gain nothing from one waiting beside them
_PREFETCH_SECONDS: Final = 0.005  # of work that waits at a slot
_TARGET_BYTES: Final = 1 << 20
_WORTH_MOVING_SECONDS: Final = 0.005
_GROWTH: Final = 16
_SMOOTHING: Final = 0.3


@dataclass(slots=True, eq=False)
class Chunk:
    """Calls that travel together.

    Attributes:
        indexes: The calls, a range wherever possible.
        settled: One byte for each: 1 when its outcome is known or nobody wants it.
        left: Calls that are not settled.
    """

    id: int
    run: RunQueue
    indexes: Sequence[int]
    attempt: int
    worker: str
    settled: bytearray
    left: int

    def open_positions(self) -> list[int]:
        """Return the positions of the calls that are not settled."""
        return [position for position, done in enumerate(self.settled) if not done]


@dataclass(slots=True, eq=False)
class RunQueue:
    """The calls of one run that are not settled, and what was learned about them.

    Attributes:
        chunksize: Calls in a chunk; ``None`` to measure.
        alone: Never more than one call in a process's life.
        offered: Calls that may be sent: all indexes below it were taken from the input.
        next_index: The first call that was never sent.
        total: Calls in all; ``None`` while that is not known.
        returned: Calls to send again: indexes and attempt.
        seconds: What a call takes, smoothed; ``None`` before the first has ended.
        call_bytes: What a call's arguments take, smoothed.
    """

    id: str
    retry: Retry
    chunksize: int | None
    alone: bool
    offered: int = 0
    next_index: int = 0
    total: int | None = None
    returned: deque[tuple[Sequence[int], int]] = field(default_factory=deque)
    chunks: dict[int, Chunk] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)
    losses: dict[int, int] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    waiting: int = 0
    seconds: float | None = None
    call_bytes: float = 0.0
    last_size: int = 1
    over: bool = False

    @property
    def ready(self) -> int:
        """Calls that could be sent now."""
        return self.offered - self.next_index + sum(len(item[0]) for item in self.returned)

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


Action: TypeAlias = Send | Cancel | Revoke | Retried | Failed | Requeued


class Dispatcher:
    """The calls of all runs of one pool, over its workers.

    Args:
        draw: Gives numbers from 0 to 1, for the jitter of delays.
    """

    def __init__(self, *, draw: Iterable[float]) -> None:
        self._draw = iter(draw)
        self._runs: deque[RunQueue] = deque()
        self._workers: dict[str, WorkerState] = {}
        self._idle: dict[str, WorkerState] = {}  # with a free slot
        self._spare: dict[str, WorkerState] = {}  # busy, with room for a call that waits there
        self._chunk_ids = itertools.count(1)
        self._delayed: list[tuple[float, int, RunQueue, int, int]] = []
        self._ticket = itertools.count()
        self._revoking: set[int] = set()

    # -- what others ask --------------------------------------------------------------------------

    @property
    def workers(self) -> dict[str, WorkerState]:
        """The workers that joined and were not lost."""
        return self._workers

    def demand(self, limit: int) -> int:
        """Return how many slots could be busy now, at most ``limit``."""
        wanted = 0
        for run in self._runs:
            wanted += run.ready + run.waiting
            wanted += sum(min(chunk.left, MAX_CHUNK_CALLS) for chunk in run.chunks.values())
            if wanted >= limit:
                return limit
        return wanted

    def chunk(self, worker: str, chunk_id: int) -> Chunk | None:
        """Return a chunk that a worker has, if it has it."""
        state = self._workers.get(worker)
        return state.chunks.get(chunk_id) if state else None

    def next_due(self) -> float | None:
        """Return when a delayed call may be sent again."""
        return self._delayed[0][0] if self._delayed else None

    def is_idle(self, worker: str) -> bool:
        """Whether a worker has nothing to do."""
        return not self._workers[worker].chunks

    # -- runs -------------------------------------------------------------------------------------

    def add_run(self, run: RunQueue) -> None:
        """Take a run. Its calls come with ``offer``."""
        self._runs.append(run)

    def offer(self, run: RunQueue, count: int, *, now: float) -> list[Action]:
        """Take more calls of a run."""
        run.offered += count
        return self._fill(now)

    def cancel_run(self, run: RunQueue, *, now: float) -> list[Action]:
        """Give up all calls of a run that are not settled."""
        actions: list[Action] = []
        if run.over:
            return actions
        self._end_run(run)
        for chunk in tuple(run.chunks.values()):
            actions.append(Cancel(chunk.worker, chunk.id, None))
            for position in range(len(chunk.settled)):
                chunk.settled[position] = 1
            chunk.left = 0
        run.returned.clear()
        run.next_index = run.offered
        return actions + self._fill(now)

    def finish_run(self, run: RunQueue) -> None:
        """Forget a run all of whose calls are settled."""
        self._end_run(run)

    def cancel_call(self, run: RunQueue, index: int, *, now: float) -> list[Action]:
        """Give up one call."""
        run.cancelled.add(index)
        for chunk in run.chunks.values():
            if index in chunk.indexes:
                position = chunk.indexes.index(index)
                if not chunk.settled[position]:
                    chunk.settled[position] = 1
                    chunk.left -= 1
                    return [Cancel(chunk.worker, chunk.id, [position])]
        return self._fill(now)

    def _end_run(self, run: RunQueue) -> None:
        run.over = True
        if run in self._runs:
            self._runs.remove(run)

    # -- workers ----------------------------------------------------------------------------------

    def worker_joined(self, name: str, slots: int, *, now: float) -> list[Action]:
        """Take a worker that is ready for calls."""
        worker = self._workers[name] = WorkerState(name, slots, now)
        self._place(worker)
        return self._fill(now)

    def worker_lost(self, name: str, *, now: float) -> list[Action]:
        """Settle what a worker had that will not come back.

        Its calls are sent again, uncharged and each for itself, since one of them may be the cause;
        a call that was there ``MAX_LOSSES`` times when a worker was lost has failed.
        """
        worker = self._workers.pop(name, None)
        if worker is None:
            return []
        worker.gone = True
        self._place(worker)
        actions: list[Action] = []
        for chunk in worker.chunks.values():
            chunk.run.chunks.pop(chunk.id, None)
            for position in chunk.open_positions():
                actions += self._lose(chunk, chunk.indexes[position], name)
        worker.chunks.clear()
        return actions + self._fill(now)

    def drain(self, name: str) -> None:
        """Give a worker no more calls."""
        self._workers[name].draining = True
        self._place(self._workers[name])

    def reconcile(self, name: str, known: Iterable[int], *, now: float) -> list[Action]:
        """After a reconnection: send again what was lost on the way to the worker."""
        worker = self._workers.get(name)
        if worker is None:
            return []
        kept = set(known)
        actions: list[Action] = []
        for chunk in tuple(worker.chunks.values()):
            if chunk.id not in kept:
                actions += self._return_positions(chunk, chunk.open_positions())
                self._close(chunk, worker, now)
        return actions + self._fill(now)

    # -- news of chunks ---------------------------------------------------------------------------

    def finished(
        self,
        chunk: Chunk,
        first: int,
        count: int,
        failures: dict[int, Exception],
        *,
        busy_seconds: float,
        now: float,
    ) -> tuple[list[int] | range, list[Action]]:
        """Record outcomes of consecutive calls of a chunk.

        Args:
            first: Position of the first of them.
            failures: Errors by position.
            busy_seconds: What they took together.

        Returns:
            The positions whose success counts, and actions.
        """
        end = min(first + count, len(chunk.settled))
        actions: list[Action] = []
        news: list[int] | range = range(first, end)
        if any(chunk.settled[first:end]):
            news = [position for position in news if not chunk.settled[position]]
        chunk.settled[first:end] = b"\1" * (end - first)
        chunk.left -= len(news)
        run = chunk.run
        if count:
            seconds = busy_seconds / count
            known = run.seconds
            run.seconds = seconds if known is None else known + _SMOOTHING * (seconds - known)
        if failures:
            for position in news:
                error = failures.get(position)
                if error is not None:
                    actions += self._fail(run, chunk.indexes[position], error, now)
            news = [position for position in news if position not in failures]
        worker = self._workers.get(chunk.worker)
        if worker is not None and worker.stuck:
            worker.stuck = False
            self._place(worker)
        if worker is not None and not chunk.left:
            self._close(chunk, worker, now)
        return news, actions + self._fill(now)

    def revoked(self, chunk: Chunk, first: int, count: int, *, now: float) -> list[Action]:
        """Take back calls that a worker has not begun."""
        self._revoking.discard(chunk.id)
        worker = self._workers.get(chunk.worker)
        if worker is not None:
            worker.stuck = True
            self._place(worker)
        positions = [
            position
            for position in range(first, min(first + count, len(chunk.settled)))
            if not chunk.settled[position]
        ]
        actions = self._return_positions(chunk, positions)
        if worker is not None and not chunk.left:
            self._close(chunk, worker, now)
        return actions + self._fill(now)

    def tick(self, *, now: float) -> list[Action]:
        """Send calls whose delay is over."""
        while self._delayed and self._delayed[0][0] <= now:
            _, _, run, index, attempt = heapq.heappop(self._delayed)
            run.waiting -= 1
            if not run.over and index not in run.cancelled:
                run.returned.append(((index,), attempt))
        return self._fill(now)

    def unsendable(
        self, chunk: Chunk, failures: dict[int, Exception], *, now: float
    ) -> list[Action]:
        """Settle calls of a chunk that cannot be sent; the chunk is not on its way at all.

        The others are to be sent again.
        """
        actions: list[Action] = []
        worker = self._workers[chunk.worker]
        for position, error in failures.items():
            if chunk.settled[position]:
                continue
            chunk.settled[position] = 1
            chunk.left -= 1
            actions.append(Failed(chunk.run, chunk.indexes[position], error, chunk.attempt))
        self._return_positions(chunk, chunk.open_positions())
        self._close(chunk, worker, now)
        return actions + self._fill(now)

    def measured(self, run: RunQueue, calls: int, size_bytes: int) -> None:
        """Learn how large arguments are."""
        each = size_bytes / calls
        run.call_bytes += (_SMOOTHING if run.call_bytes else 1.0) * (each - run.call_bytes)

    # -- inside -----------------------------------------------------------------------------------

    def _fail(self, run: RunQueue, index: int, error: Exception, now: float) -> list[Action]:
        if run.over or index in run.cancelled:
            return []
        failures = run.failures[index] = run.failures.get(index, 0) + 1
        attempt = failures + run.losses.get(index, 0)
        if failures < run.retry.attempts and self._worth_retrying(run.retry, error):
            delay = run.retry.delay_before(failures + 1, draw=next(self._draw))
            run.waiting += 1
            heapq.heappush(
                self._delayed, (now + delay, next(self._ticket), run, index, attempt + 1)
            )
            return [Retried(run, index, error, delay)]
        run.failures.pop(index)
        return [Failed(run, index, error, attempt)]

    @staticmethod
    def _worth_retrying(retry: Retry, error: Exception) -> bool:
        # The same memory will be too little again; a cancelled call is not wanted.
        return isinstance(error, retry.on) and not isinstance(
            error, OutOfMemoryError | RunCancelledError
        )

    def _lose(self, chunk: Chunk, index: int, worker: str) -> list[Action]:
        run = chunk.run
        if run.over or index in run.cancelled:
            return []
        losses = run.losses[index] = run.losses.get(index, 0) + 1
        attempt = losses + run.failures.get(index, 0)
        if losses < MAX_LOSSES:
            run.returned.append(((index,), attempt + 1))
            return [Requeued(run, (index,), worker)]
        error = _lost_too_often(run.id, index, attempt, worker)
        return [Failed(run, index, error, attempt)]

    def _return_positions(self, chunk: Chunk, positions: Sequence[int]) -> list[Action]:
        """Queue calls that were sent and not begun again."""
        if not positions:
            return []
        run = chunk.run
        for position in positions:
            chunk.settled[position] = 1
        chunk.left -= len(positions)
        indexes: list[int] = [chunk.indexes[position] for position in positions]
        if run.over:
            return []
        if run.cancelled:
            indexes = [index for index in indexes if index not in run.cancelled]
        if indexes:
            run.returned.appendleft((indexes, chunk.attempt))
        run.last_size = 1  # something was slower than thought: begin with care
        return [Requeued(run, indexes, chunk.worker)] if indexes else []

    def _close(self, chunk: Chunk, worker: WorkerState, now: float) -> None:
        worker.chunks.pop(chunk.id, None)
        chunk.run.chunks.pop(chunk.id, None)
        self._revoking.discard(chunk.id)
        worker.idle_since = now
        self._place(worker)

    def _place(self, worker: WorkerState) -> None:
        """Note which room a worker has, behind those that had it before."""
        self._idle.pop(worker.name, None)
        self._spare.pop(worker.name, None)
        if worker.gone or worker.draining:
            return
        if len(worker.chunks) < worker.slots:
            self._idle[worker.name] = worker
        elif not worker.stuck and len(worker.chunks) < (1 + MAX_PREFETCH) * worker.slots:
            self._spare[worker.name] = worker

    def _fill(self, now: float) -> list[Action]:
        """Give what is ready to who has room, in turns between the runs."""
        actions: list[Action] = []
        while self._idle and (chunk := self._next_chunk(self._idle, prefetch=False)) is not None:
            actions.append(Send(chunk))
        while self._spare and (chunk := self._next_chunk(self._spare, prefetch=True)) is not None:
            actions.append(Send(chunk))
        if self._idle:
            actions += self._balance()
        return actions

    def _next_chunk(self, room: dict[str, WorkerState], *, prefetch: bool) -> Chunk | None:
        worker = next(iter(room.values()))
        for _ in range(len(self._runs)):
            run = self._runs[0]
            self._runs.rotate(-1)
            if prefetch and len(worker.chunks) >= worker.slots * (1 + self._prefetch(run)):
                continue
            indexes, attempt = self._take(run)
            if indexes:
                return self._make_chunk(run, indexes, attempt, worker)
        return None

    @staticmethod
    def _prefetch(run: RunQueue) -> int:
        """Return how many chunks may wait at a slot, so that it never waits for the next one."""
        if run.alone or run.seconds is None or run.seconds > _PREFETCH_BELOW_SECONDS:
            return 0
        chunk_seconds = max(run.seconds * run.last_size, 1e-6)
        return max(1, min(MAX_PREFETCH, int(_PREFETCH_SECONDS / chunk_seconds)))

    def _take(self, run: RunQueue) -> tuple[Sequence[int], int]:
        """Take the next calls of a run that are still wanted; none if there are none."""
        indexes: Sequence[int] = ()
        while not indexes and run.has_ready:
            size = self._chunk_size(run)
            if run.returned:
                indexes, attempt = run.returned.popleft()
                if len(indexes) > size:
                    run.returned.appendleft((indexes[size:], attempt))
                    indexes = indexes[:size]
            else:
                end = min(run.next_index + size, run.offered)
                indexes, attempt = range(run.next_index, end), 1
                run.next_index = end
            if run.cancelled:
                indexes = [index for index in indexes if index not in run.cancelled]
            if indexes:
                return indexes, attempt
        return (), 0

    def _make_chunk(
        self, run: RunQueue, indexes: Sequence[int], attempt: int, worker: WorkerState
    ) -> Chunk:
        count = len(indexes)
        run.last_size = count
        chunk = Chunk(
            next(self._chunk_ids), run, indexes, attempt, worker.name, bytearray(count), count
        )
        worker.chunks[chunk.id] = run.chunks[chunk.id] = chunk
        self._place(worker)
        return chunk

    def _chunk_size(self, run: RunQueue) -> int:
        if run.alone:
            return 1
        if run.chunksize is not None:
            return run.chunksize
        if run.seconds is None:
            return 1
        size = min(int(_TARGET_SECONDS / max(run.seconds, 1e-6)), MAX_CHUNK_CALLS)
        size = min(size, run.last_size * _GROWTH)
        if run.call_bytes:
            size = min(size, int(_TARGET_BYTES / run.call_bytes))
        slots = sum(worker.slots for worker in self._workers.values()) or 1
        left = run.ready if run.total is None else run.ready + run.total - run.offered
        return max(1, min(size, math.ceil(left / (3 * slots))))

    def _balance(self) -> list[Action]:
        """Nothing is ready and somebody is idle: ask for calls that wait elsewhere."""
        best: Chunk | None = None
        for run in self._runs:
            if run.chunksize is not None:
                continue
            for chunk in run.chunks.values():
                worker = self._workers.get(chunk.worker)
                if worker is None or chunk.id in self._revoking:
                    continue
                waits = len(worker.chunks) > worker.slots
                if (waits or chunk.left > 1) and (best is None or chunk.left >= best.left):
                    best = chunk
        if best is None or (best.run.seconds or 0.0) * best.left < _WORTH_MOVING_SECONDS:
            return []
        self._revoking.add(best.id)
        return [Revoke(best.worker, best.id)]


def _lost_too_often(run_id: str, index: int, attempt: int, worker: str) -> CallError:
    return WorkerLostError(
        f"{MAX_LOSSES} workers were lost while they had this call",
        run_id=run_id,
        index=index,
        attempt=attempt,
        worker=worker,
    )
