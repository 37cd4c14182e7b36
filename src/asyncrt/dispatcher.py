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
import operator
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from asyncrt.actions import (
    Action,
    Cancel,
    CopyDropped,
    Failed,
    Requeued,
    Retried,
    Revoke,
    Send,
)
from asyncrt.errors import CallError, OutOfMemoryError, RunCancelledError, WorkerLostError
from asyncrt.options import Retry
from asyncrt.queues import Chunk, RunQueue, WorkerState
from asyncrt.worker.tokens import MAX_CALLS

MAX_LOSSES: Final = 3
MAX_CHUNK_CALLS: Final = 4096
MAX_PREFETCH: Final = 64
_TARGET_SECONDS: Final = 0.02  # of a chunk that is coalesced: far above a round trip
_PREFETCH_BELOW_SECONDS: Final = 0.05  # longer calls gain nothing from one waiting beside them
_PREFETCH_SECONDS: Final = 0.005  # of work that waits at a slot
_TARGET_BYTES: Final = 1 << 20
_WORTH_MOVING_SECONDS: Final = 0.005
_GROWTH: Final = 16
_LOOK_AHEAD: Final = 16  # runs that are asked for a call to wait at a worker
_SMOOTHING: Final = 0.3


class Dispatcher:
    """The calls of all runs of one pool, over its workers.

    Args:
        draw: Gives numbers from 0 to 1, for the jitter of delays.
    """

    def __init__(self, *, draw: Iterable[float]) -> None:
        self._draw = iter(draw)
        self._runs: dict[RunQueue, None] = {}
        self._ready: deque[RunQueue] = deque()  # that have something to send
        self._workers: dict[str, WorkerState] = {}
        self._idle: dict[str, WorkerState] = {}  # with a free slot
        self._spare: dict[str, WorkerState] = {}  # busy, with room for a call that waits there
        self._chunk_ids = itertools.count(1)
        self._delayed: list[tuple[float, int, RunQueue, int, int]] = []
        self._ticket = itertools.count()
        self._revoking: set[int] = set()
        self._speculative: dict[RunQueue, None] = {}  # runs with backups
        self._copy_at: float | None = None  # when a running call may be due for a copy

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
        """Return when a delayed call may be sent again, or a straggler be copied."""
        delayed = self._delayed[0][0] if self._delayed else None
        if self._copy_at is None or delayed is None:
            return self._copy_at if delayed is None else delayed
        return min(delayed, self._copy_at)

    def is_idle(self, worker: str) -> bool:
        """Whether a worker has nothing to do."""
        return not self._workers[worker].chunks

    # -- runs -------------------------------------------------------------------------------------

    def add_run(self, run: RunQueue) -> None:
        """Take a run. Its calls come with ``offer``."""
        self._runs[run] = None
        if run.stragglers is not None:
            self._speculative[run] = None

    def offer(self, run: RunQueue, count: int, *, now: float) -> list[Action]:
        """Take more calls of a run."""
        run.offered += count
        self._queue(run)
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
        run.forget_returned()
        run.next_index = run.offered
        return actions + self._fill(now)

    def finish_run(self, run: RunQueue) -> None:
        """Forget a run all of whose calls are settled."""
        self._end_run(run)

    def cancel_call(self, run: RunQueue, index: int, *, now: float) -> list[Action]:
        """Give up one call."""
        run.cancelled.add(index)
        run.settled += 1
        copies = run.copies.pop(index, None) or run.chunks.values()
        actions: list[Action] = []
        for chunk in copies:
            if index in chunk.indexes:
                actions += self._give_up(chunk, chunk.indexes.index(index))
        return actions or self._fill(now)

    @staticmethod
    def _give_up(chunk: Chunk, position: int) -> list[Action]:
        """Want a call of a chunk no more; its worker says when it has let go of it."""
        if chunk.settled[position]:
            return []
        chunk.settled[position] = 1
        chunk.left -= 1
        return [Cancel(chunk.worker, chunk.id, [position])]

    def _end_run(self, run: RunQueue) -> None:
        run.over = True
        run.copies.clear()
        self._runs.pop(run, None)
        self._speculative.pop(run, None)

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

    def started(self, chunk: Chunk, position: int, *, at: float, now: float) -> list[Action]:
        """Note that a call runs, and goes on running."""
        chunk.running, chunk.since = position, at
        return self._fill(now) if chunk.run.stragglers is not None else []

    def finished(
        self,
        chunk: Chunk,
        first: int,
        count: int,
        failures: dict[int, Exception],
        *,
        busy_seconds: float,
        times: Sequence[float] = (),
        now: float,
    ) -> tuple[list[int] | range, list[Action]]:
        """Record outcomes of consecutive calls of a chunk.

        Args:
            first: Position of the first of them.
            failures: Errors by position.
            busy_seconds: What they took together.
            times: Start and end of each; needed by runs with ``backups`` only.

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
            known = run.pace.seconds
            run.pace.seconds = seconds if known is None else known + _SMOOTHING * (seconds - known)
        if run.stragglers is not None:
            run.stragglers.learn(map(operator.sub, times[1::2], times[::2]))
        if failures:
            for position in news:
                error = failures.get(position)
                if error is not None:
                    actions += self._fail(chunk, chunk.indexes[position], error, now)
            news = [position for position in news if position not in failures]
        run.settled += len(news)
        if run.copies:
            actions += self._supersede(chunk, news)
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
                run.give_back((index,), attempt)
                self._queue(run)
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
            index = chunk.indexes[position]
            if dropped := self._drop_copy(chunk, index, error):
                actions += dropped
            else:
                chunk.run.settled += 1
                actions.append(Failed(chunk.run, index, error, chunk.attempt))
        self._return_positions(chunk, chunk.open_positions())
        self._close(chunk, worker, now)
        return actions + self._fill(now)

    def measured(self, run: RunQueue, calls: int, size_bytes: int) -> None:
        """Learn how large arguments are."""
        each = size_bytes / calls
        run.pace.call_bytes += (_SMOOTHING if run.pace.call_bytes else 1.0) * (
            each - run.pace.call_bytes
        )

    # -- inside -----------------------------------------------------------------------------------

    def _fail(self, chunk: Chunk, index: int, error: Exception, now: float) -> list[Action]:
        run = chunk.run
        if run.over or index in run.cancelled:
            return []
        if dropped := self._drop_copy(chunk, index, error):
            return dropped
        failures = run.failures[index] = run.failures.get(index, 0) + 1
        attempt = failures + run.losses.get(index, 0) + run.copied.get(index, 0)
        if failures < run.retry.attempts and self._worth_retrying(run.retry, error):
            delay = run.retry.delay_before(failures + 1, draw=next(self._draw))
            run.waiting += 1
            heapq.heappush(
                self._delayed, (now + delay, next(self._ticket), run, index, attempt + 1)
            )
            return [Retried(run, index, error, delay)]
        run.failures.pop(index)
        run.settled += 1
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
        if dropped := self._drop_copy(chunk, index, None):
            return dropped
        losses = run.losses[index] = run.losses.get(index, 0) + 1
        attempt = losses + run.failures.get(index, 0) + run.copied.get(index, 0)
        if losses < MAX_LOSSES:
            run.give_back((index,), attempt + 1, alone=True)
            self._queue(run)
            return [Requeued(run, (index,), worker)]
        run.settled += 1
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
        actions: list[Action] = []
        if run.copies:
            for index in indexes:
                actions += self._drop_copy(chunk, index, None)
            dropped = {action.index for action in actions if isinstance(action, CopyDropped)}
            indexes = [index for index in indexes if index not in dropped]
        if indexes:
            run.last_size = 1  # something was slower than thought: begin with care
            run.give_back(indexes, chunk.attempt, first=True)
            self._queue(run)
            actions.append(Requeued(run, indexes, chunk.worker))
        return actions

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
        self._copy_at = None
        if self._idle:
            actions += self._balance()
            actions += self._copy_stragglers(now)
        return actions

    def _next_chunk(self, room: dict[str, WorkerState], *, prefetch: bool) -> Chunk | None:
        worker = next(iter(room.values()))
        tries = min(len(self._ready), _LOOK_AHEAD) if prefetch else len(self._ready)
        while self._ready and tries:
            run = self._ready[0]
            if run.over or not run.has_ready:
                run.queued = False
                self._ready.popleft()
                continue
            tries -= 1
            self._ready.rotate(-1)
            if prefetch and len(worker.chunks) >= worker.slots * (1 + self._prefetch(run)):
                continue
            indexes, attempt = self._take(run)
            if indexes:
                return self._make_chunk(run, indexes, attempt, worker)
        return None

    def _queue(self, run: RunQueue) -> None:
        """Note that a run has something to send."""
        if not run.queued:
            run.queued = True
            self._ready.append(run)

    @staticmethod
    def _prefetch(run: RunQueue) -> int:
        """Return how many chunks may wait at a slot, so that it never waits for the next one."""
        if run.alone or run.pace.seconds is None or run.pace.seconds > _PREFETCH_BELOW_SECONDS:
            return 0
        chunk_seconds = max(run.pace.seconds * run.last_size, 1e-6)
        return max(1, min(MAX_PREFETCH, int(_PREFETCH_SECONDS / chunk_seconds)))

    def _take(self, run: RunQueue) -> tuple[Sequence[int], int]:
        """Take the next calls of a run that are still wanted; none if there are none."""
        indexes: Sequence[int] = ()
        while not indexes and run.has_ready:
            size = self._chunk_size(run)
            if run.returned:
                indexes, attempt = run.take_returned(size)
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
            return min(run.chunksize, MAX_CALLS)
        if run.pace.seconds is None:
            return 1
        size = min(int(_TARGET_SECONDS / max(run.pace.seconds, 1e-6)), MAX_CHUNK_CALLS)
        size = min(size, run.last_size * _GROWTH)
        if run.pace.call_bytes:
            size = min(size, int(_TARGET_BYTES / run.pace.call_bytes))
        slots = sum(worker.slots for worker in self._workers.values()) or 1
        left = run.ready if run.total is None else run.ready + run.total - run.offered
        return max(1, min(size, math.ceil(left / (3 * slots))))

    def _balance(self) -> list[Action]:
        """Nothing is ready and somebody is idle: ask for calls that wait elsewhere."""
        best: Chunk | None = None
        for worker in self._workers.values():
            waits = len(worker.chunks) > worker.slots
            for chunk in worker.chunks.values():
                if chunk.run.over or chunk.run.chunksize is not None or chunk.id in self._revoking:
                    continue
                if (waits or chunk.left > 1) and (best is None or chunk.left >= best.left):
                    best = chunk
        if best is None or (best.run.pace.seconds or 0.0) * best.left < _WORTH_MOVING_SECONDS:
            return []
        self._revoking.add(best.id)
        return [Revoke(best.worker, best.id)]

    # -- second copies ----------------------------------------------------------------------------

    def _copy_stragglers(self, now: float) -> list[Action]:
        """Nothing is ready and somebody is idle: start calls that run too long once more."""
        actions: list[Action] = []
        for run in self._speculative:
            assert run.stragglers is not None
            for chunk in tuple(run.chunks.values()):
                threshold = run.stragglers.threshold(run.total, run.settled)
                if threshold is None:
                    break
                if chunk.running < 0 or chunk.settled[chunk.running]:
                    continue
                index = chunk.indexes[chunk.running]
                tried = run.failures.get(index, 0) + run.losses.get(index, 0)
                if index in run.copies or run.copied.get(index, 0) > tried:
                    continue  # one for each attempt: a call that always fails is no straggler
                if now < chunk.since + threshold:
                    due = chunk.since + threshold
                    self._copy_at = due if self._copy_at is None else min(due, self._copy_at)
                elif (worker := self._worker_for_copy(chunk)) is not None:
                    copied = run.copied[index] = run.copied.get(index, 0) + 1
                    run.stragglers.copies += 1
                    copy = self._make_chunk(run, (index,), tried + copied + 1, worker)
                    run.copies[index] = chunk, copy
                    actions.append(Send(copy))
        return actions

    def _worker_for_copy(self, chunk: Chunk) -> WorkerState | None:
        """Return who has a free slot, another worker if there is one: this one may be slow."""
        others = (worker for worker in self._idle.values() if worker.name != chunk.worker)
        return next(others, None) or self._idle.get(chunk.worker)

    def _supersede(self, chunk: Chunk, positions: Iterable[int]) -> list[Action]:
        """Cancel the other copies of calls that are settled now."""
        actions: list[Action] = []
        for position in positions:
            index = chunk.indexes[position]
            copies = chunk.run.copies.pop(index, None)
            if copies is not None:
                other = copies[1] if copies[0] is chunk else copies[0]
                actions += self._give_up(other, other.indexes.index(index))
                actions.append(CopyDropped(chunk.run, index, other.worker, None))
        return actions

    @staticmethod
    def _drop_copy(chunk: Chunk, index: int, error: Exception | None) -> list[Action]:
        """Leave a call to its other copy, if it has one."""
        copies = chunk.run.copies.get(index)
        if copies is None or chunk not in copies:
            return []
        del chunk.run.copies[index]
        return [CopyDropped(chunk.run, index, chunk.worker, error)]


def _lost_too_often(run_id: str, index: int, attempt: int, worker: str) -> CallError:
    return WorkerLostError(
        f"{MAX_LOSSES} workers were lost while they had this call",
        run_id=run_id,
        index=index,
        attempt=attempt,
        worker=worker,
    )
