"""The calls of one ``map``, ``starmap`` or ``submit``, as users hold them."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Generator, Sequence
from types import TracebackType
from typing import Any, Final, Generic, Literal, TypeVar, cast

import anyio

from asyncrt.call import Call, Calls
from asyncrt.calllogs import CallLogs
from asyncrt.errors import RunCancelledError, RunDeadlineError, SerializationError
from asyncrt.events import Cancelled, Ended, EventLog, EventStream, Queued, State, Stats
from asyncrt.options import CallSettings
from asyncrt.outcome import Failure, Success
from asyncrt.queues import RunQueue
from asyncrt.runroles import RunListener, RunOwner
from asyncrt.serialize import PackedFunction
from asyncrt.sources import Feed
from asyncrt.spill import Deferred
from asyncrt.stragglers import Stragglers
from asyncrt.threads import run_in_thread

logger = logging.getLogger(__name__)

R = TypeVar("R")

DEFAULT_WINDOW: Final = 1000
_TRIM: Final = 1024
_QUIET_SECONDS: Final = 10.0

_OPEN, SUCCEEDED, FAILED, CANCELLED, _DELIVERED = range(5)
_Style = Literal["one", "star", "full"]


class Run(Awaitable[list[R]], AsyncIterator[R], Generic[R]):
    """The calls of one ``map``. They are on their way already.

    Either await it: ``results = await run`` gives the list of all results, in input order, and may
    be repeated. Or iterate it, once: ``async for result in run`` gives results as they come, in
    input order unless ``ordered=False``. Doing both is an error.

    Example:
        async with asyncrt.Executor() as executor:
            run = executor.map(lambda number: 1 / number, [1, 0, 2], return_exceptions=True)
            results = await run
        assert results[2] == 0.5
        assert isinstance(run.failures[0].error, ZeroDivisionError)

    The first failure is raised when it happens, as the user's own exception, and cancels what has
    not finished; ``return_exceptions=True`` puts failures in place of results instead. Cancelling
    who waits cancels the run; leaving ``async with run`` does, too.
    """

    def __init__(
        self,
        run_id: str,
        function: PackedFunction,
        style: _Style,
        settings: CallSettings,
        owner: RunOwner,
        *,
        sequences: Sequence[Sequence[Any]] | None,
        listener: RunListener | None = None,
    ) -> None:
        self.id = run_id
        self.function = function
        self.style = style
        self.settings = settings
        self.log = EventLog()
        self._now = asyncio.get_running_loop().time  # what anyio.current_time() looks up each time
        self.queue = RunQueue(
            run_id,
            settings.retries,
            None if settings.chunksize == "auto" else settings.chunksize,
            settings.isolation == "call",
            stragglers=Stragglers(settings.backups) if settings.backups else None,
        )
        self.feed: Feed | None = None
        self.quiet = asyncio.Event()  # no worker has any call of it
        self._owner = owner
        self.listener = listener
        self._sequences = sequences
        self._inputs: dict[int, Any] = {}
        self._total = None if sequences is None else min(len(items) for items in sequences)
        self._window = settings.max_in_flight or (DEFAULT_WINDOW if sequences is None else None)
        self._base = 0
        self._values: list[Any] = []
        self._states = bytearray()
        self._taken = 0
        self._settled = 0
        self._delivered = 0
        self._next = 0
        self._completed: deque[int] = deque()
        self._completed_batches: deque[Sequence[int]] = deque()
        self._mode: Literal["await", "iterate"] | None = None
        self._keeps_order_of_completion = True  # until it is known that nobody needs it
        self._state: State = "running"
        self._error: BaseException | None = None
        self._traceback: TracebackType | None = None
        self._failures: dict[int, Failure] = {}
        self._drains = False  # nobody needs to take results for more calls to be let in
        self._is_cut = False  # the executor was left before the input had ended
        self._done = asyncio.Event()
        self._news: set[asyncio.Future[None]] = set()
        self._waiting_for: dict[int, set[asyncio.Future[None]]] = {}
        self.logs = CallLogs()
        self.note: str | None = None
        self.is_single = self._total == 1

    def __repr__(self) -> str:
        return f"<Run {self.id}: {self.status}>"

    # -- what users ask ---------------------------------------------------------------------------

    @property
    def calls(self) -> Sequence[Call[R]]:
        """The calls; of an input without a size, those that are not delivered yet."""
        return Calls(self, self._base, self._taken)

    def only_call(self) -> Call[R]:
        """Say that there will be one call, which its input is still to give; return that."""
        self.is_single = True
        return Call(self, 0)

    @property
    def total(self) -> int | None:
        """The number of calls; ``None`` while that is not known."""
        return self._total

    @property
    def stats(self) -> Stats:
        """Counts and times so far. A live object: copy it to keep it."""
        return self.log.stats

    @property
    def status(self) -> str:
        """One line for people: where the run stands, and what it waits for."""
        stats = self.log.stats
        of = f"/{self._total}" if self._total is not None else ""
        parts = [f"{self._state}: {stats.succeeded}{of} succeeded"]
        for name in ("failed", "cancelled", "retried"):
            count = getattr(stats, name)
            if count:
                parts.append(f"{count} {name}")
        if self._state == "running" and self.note:
            parts.append(self.note)
        return ", ".join(parts)

    @property
    def state(self) -> State:
        """Whether it goes on, and if not, how it ended."""
        return self._state

    @property
    def failures(self) -> Sequence[Failure]:
        """The calls that failed for good, in the order in which they did.

        Of an input without a size, those that were not delivered, and the last 1,000.
        """
        return tuple(self._failures.values())

    def done(self) -> bool:
        """Whether nothing more will happen."""
        return self._done.is_set()

    def events(self) -> EventStream:
        """Return all events from the beginning, then as they happen, until the run has ended."""
        return EventStream(self.log)

    # -- results ----------------------------------------------------------------------------------

    def __await__(self) -> Generator[Any, None, list[R]]:
        return self._gather().__await__()

    async def _gather(self) -> list[R]:
        if self._mode == "iterate":
            raise RuntimeError("this run is iterated: it cannot be awaited as well")
        self._mode = "await"
        self._keep_order_of_completion(keep=False)
        self._update_room()
        try:
            await self._done.wait()
        except asyncio.CancelledError:
            self._end_cancelled()
            raise
        if self._error is not None:
            raise self._error.with_traceback(self._traceback)  # not longer with each await
        if any(isinstance(value, Deferred) for value in self._values):
            self._values = await run_in_thread(
                functools.partial(self._load_all, list(self._values))
            )
        return list(self._values)

    def _load_all(self, values: list[Any]) -> list[Any]:
        return [self._load(value) for value in values]

    def _load(self, value: Any) -> Any:
        """Return a result, also one that was not loaded yet. In a thread: it is large."""
        if not isinstance(value, Deferred):
            return value
        try:
            return value.load()
        except SerializationError as error:
            if self.settings.return_exceptions:
                return error
            raise

    def __aiter__(self) -> Run[R]:
        self._begin_iteration(ordered=self.settings.ordered)
        return self

    def _begin_iteration(self, *, ordered: bool) -> None:
        if self._mode is not None:
            how = "awaited" if self._mode == "await" else "iterated already"
            raise RuntimeError(f"this run is {how}: a run is iterated once")
        self._mode = "iterate"
        self._keep_order_of_completion(keep=not ordered)

    def _keep_order_of_completion(self, *, keep: bool) -> None:
        self._keeps_order_of_completion = keep
        if not keep:
            self._completed_batches.clear()

    async def __anext__(self) -> R:
        if self._mode != "iterate":
            raise RuntimeError("iterate a run with 'async for'")
        index = await self._next_settled(ordered=self.settings.ordered)
        if index is None:
            raise StopAsyncIteration
        value = self._deliver(index)
        if isinstance(value, Deferred):
            value = await run_in_thread(functools.partial(self._load, value))
        return cast("R", value)

    async def as_completed(self) -> AsyncIterator[Call[R]]:
        """Iterate over calls as they end, whatever ``ordered`` says. Is the one iteration."""
        self._begin_iteration(ordered=False)
        while (index := await self._next_settled(ordered=False)) is not None:
            self._delivered += 1
            yield Call(self, index)
            self._trim(index)

    async def _next_settled(self, *, ordered: bool) -> int | None:
        """Wait for the next call to deliver; ``None`` at the end."""
        while True:
            if self._error is not None:
                raise self._error
            index = self._next_in_order() if ordered else self._next_completed()
            if index is not None:
                return index
            if self._done.is_set():
                if self._is_cut:
                    raise self._cut_error()
                return None
            news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._news.add(news)
            try:
                await news
            except asyncio.CancelledError:
                self._end_cancelled()
                raise
            finally:
                self._news.discard(news)

    def _next_in_order(self) -> int | None:
        index = self._next
        if index < self._taken and self._states[index - self._base] != _OPEN:
            self._next += 1
            return index
        return None

    def _next_completed(self) -> int | None:
        if not self._completed and self._completed_batches:
            self._completed.extend(self._completed_batches.popleft())
        return self._completed.popleft() if self._completed else None

    def _deliver(self, index: int) -> Any:
        value = self._values[index - self._base]
        self._delivered += 1
        self._trim(index)
        return value

    def _trim(self, index: int) -> None:
        """Let go of a delivered result of an input without a size, and pull more."""
        if self._window is None:
            return
        if self._sequences is None:
            self._states[index - self._base] = _DELIVERED
            self._values[index - self._base] = None
            queue = self.queue
            for tried in (queue.failures, queue.losses, queue.copied):
                tried.pop(index, None)
            if len(self._failures) > DEFAULT_WINDOW:  # an endless input may have endless failures
                del self._failures[next(iter(self._failures))]
            self._forget_delivered()
        self._update_room()

    def _forget_delivered(self) -> None:
        while self._states.startswith(b"\4" * _TRIM):
            del self._states[:_TRIM], self._values[:_TRIM]
            self._base += _TRIM

    # -- cancelling -------------------------------------------------------------------------------

    async def cancel(self) -> None:
        """Give up what has not finished; return when no worker runs any of it. No-op at the end.

        Who waits for the run gets ``RunCancelledError``.
        """
        self._end_cancelled()
        await self._wait_until_quiet()

    def _end_cancelled(self) -> None:
        self._end("cancelled", RunCancelledError(f"run {self.id} was cancelled"))

    async def __aenter__(self) -> Run[R]:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if not self._done.is_set():
            self._end("cancelled", RunCancelledError(f"run {self.id} was left before its end"))
        await self._wait_until_quiet()  # noqa: ASYNC102 - bounded; a cancellation may end it

    async def _wait_until_quiet(self) -> None:
        """Wait until no worker runs a call of it, but not for one that cannot be reached."""
        with anyio.move_on_after(_QUIET_SECONDS) as scope:
            await self.quiet.wait()
        if scope.cancelled_caught:
            logger.warning("run %s: calls may run on, no word within %s s", self.id, _QUIET_SECONDS)

    def cancel_call(self, index: int) -> None:
        """Give up one call. See ``Call.cancel``."""
        if self.is_single and not self._taken:
            self._end_cancelled()
        elif self._state_of(index) == _OPEN and not self._done.is_set():
            sent = self._count_sent(index)
            self._owner.give_up_call(self, index)
            self.log.append(Cancelled(self._now(), (index,), sent))
            error = RunCancelledError(f"call {index} of run {self.id} was cancelled")
            self.settle_failure(index, error, attempts=0, cancelled=True)

    # -- single calls, for Call -------------------------------------------------------------------

    async def wait_for_call(self, index: int) -> R:
        """Return the result of one call. See ``Call``."""
        while True:
            state = self._state_of(index)
            if state == SUCCEEDED:
                value = self._values[index - self._base]
                if isinstance(value, Deferred):
                    value = await run_in_thread(value.load)
                return cast("R", value)
            if state == FAILED:
                raise self._values[index - self._base]
            if state == _DELIVERED:
                raise RuntimeError(f"the result of call {index} was delivered and is not kept")
            if self._error is not None and self._state == "failed":
                raise self._error  # of the run: its input, its workers, another call
            if state == CANCELLED or self._done.is_set():
                raise RunCancelledError(f"call {index} of run {self.id} was cancelled")
            settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiting = self._waiting_for.setdefault(index, set())
            waiting.add(settled)
            try:
                await settled
            except asyncio.CancelledError:
                if self.is_single:
                    self._end_cancelled()
                else:
                    self.cancel_call(index)
                raise
            finally:
                waiting.discard(settled)

    def _state_of(self, index: int) -> int:
        if index < self._base:
            return _DELIVERED
        if self.is_single and not self._taken:
            return CANCELLED if self._done.is_set() else _OPEN
        return self._states[index - self._base]

    def status_of(
        self, index: int
    ) -> Literal["queued", "sent", "succeeded", "failed", "cancelled"]:
        """Return where a call stands."""
        state = self._state_of(index)
        if state == _OPEN:
            return "sent" if self._is_sent(index) else "queued"
        if state == FAILED:
            return "failed"
        return "cancelled" if state == CANCELLED else "succeeded"

    def _is_sent(self, index: int) -> bool:
        return self._count_sent(index) > 0

    def _count_sent(self, index: int) -> int:
        """Return how many workers have a call: two if there is a second copy of it."""
        return sum(index in chunk.indexes for chunk in self.queue.chunks.values())

    def attempts_of(self, index: int) -> int:
        """Return how many attempts of a call were sent."""
        if index in self._failures:
            return self._failures[index].attempts
        queue = self.queue
        tried = sum(tries.get(index, 0) for tries in (queue.failures, queue.losses, queue.copied))
        ended = self._state_of(index) in (SUCCEEDED, _DELIVERED)
        return tried + 1 if ended or self._is_sent(index) else tried

    def outcome_of(self, index: int) -> Success[R] | Failure | None:
        """Return how a call ended."""
        state = self._state_of(index)
        if state == SUCCEEDED:
            value = self._values[index - self._base]
            return Success(value.load() if isinstance(value, Deferred) else value)
        if state in (FAILED, CANCELLED):
            return self._failures.get(index)
        return None

    # -- in bulk, for listeners -------------------------------------------------------------------

    def settled_ahead(self) -> range:
        """Return the calls that come next in input order, as far as they are settled."""
        end = self._states.find(_OPEN, self._next - self._base, self._taken - self._base)
        return range(self._next, self._taken if end < 0 else self._base + end)

    def collect(self, indexes: Sequence[int]) -> tuple[list[Any], bytes]:
        """Hand out settled calls, and forget them: values or errors, and a state of each."""
        base = self._base
        if isinstance(indexes, range) and indexes:
            part = slice(indexes.start - base, indexes.stop - base)
            values, states = self._values[part], bytes(self._states[part])
            self._values[part] = [None] * len(values)
            self._states[part] = bytes((_DELIVERED,)) * len(values)
            self._next = max(self._next, indexes.stop)
        else:
            at = [index - base for index in indexes]
            values = [self._values[position] for position in at]
            states = bytes(self._states[position] for position in at)
            for position in at:
                self._values[position], self._states[position] = None, _DELIVERED
        self._delivered += len(values)
        if self._sequences is None:
            self._forget_delivered()
        return values, states

    # -- what the pool tells ----------------------------------------------------------------------

    def feed_from(self, iterables: Sequence[Any]) -> None:
        """Get ready to pull from inputs without a size."""
        self.feed = Feed(iterables, room=self._window or DEFAULT_WINDOW, take=self.take)

    def start(self) -> None:
        """Take the calls of sized inputs."""
        if self._total is None:
            return
        self.queue.total = self._total
        self._values = [None] * self._total
        self._states = bytearray(self._total)
        if self._total == 0:
            self._end("succeeded", None)
            return
        self._update_room()

    def take(self, batch: list[Any]) -> None:
        """Take arguments from an input without a size."""
        first = self._taken
        for offset, item in enumerate(batch):
            self._inputs[first + offset] = item
        self._values += [None] * len(batch)
        self._states += bytes(len(batch))
        self._admit(len(batch))

    def input_ended(self) -> None:
        """Learn that there are no more arguments."""
        if self._total is None:
            self._total = self.queue.total = self._taken
            self._finish_if_settled()

    def arguments(self, index: int) -> Any:
        """Return the arguments of a call: one value, or a tuple, as ``style`` says."""
        if self._sequences is None:
            return self._inputs[index]
        if len(self._sequences) == 1:
            return self._sequences[0][index]
        return tuple(items[index] for items in self._sequences)

    def _admit(self, count: int) -> None:
        first = self._taken
        self._taken += count
        self.log.append(Queued(self._now(), range(first, self._taken)))
        self._owner.offer(self, count)

    def _update_room(self) -> None:
        """Let more calls in as results are delivered (or, awaited, as they end)."""
        if self._window is None:
            room = (self._total or 0) - self._taken
        else:
            counts = self._mode == "await" or self._drains
            out = self._settled if counts else self._delivered
            room = self._window - (self._taken - out)
        if self._done.is_set():
            return
        if self._sequences is None:
            if self.feed is not None:
                self.feed.set_room(room)
        elif self._total is not None and self._taken < self._total and room > 0:
            self._admit(min(room, self._total - self._taken))

    def settle_successes(self, indexes: Sequence[int], values: list[Any]) -> None:
        """Record results."""
        if self._done.is_set():
            return
        base = self._base
        if isinstance(indexes, range):
            start, end = indexes.start - base, indexes.stop - base
            self._values[start:end] = values
            self._states[start:end] = b"\1" * len(values)
        else:
            for index, value in zip(indexes, values, strict=True):
                self._values[index - base] = value
                self._states[index - base] = SUCCEEDED
        self._after_settling(indexes)

    def settle_failure(
        self, index: int, error: Exception, *, attempts: int, cancelled: bool = False
    ) -> None:
        """Record that a call failed for good."""
        if self._done.is_set():
            return
        self._values[index - self._base] = error
        self._states[index - self._base] = CANCELLED if cancelled else FAILED
        self._failures[index] = Failure(index, error, attempts)
        self._after_settling((index,))
        if not self.settings.return_exceptions:
            self._end("failed", error)

    def _after_settling(self, indexes: Sequence[int]) -> None:
        self._settled += len(indexes)
        if self._inputs:
            for index in indexes:
                self._inputs.pop(index, None)
        if self.listener is not None:
            self.listener.settled(self, indexes)
        elif self._keeps_order_of_completion:
            self._completed_batches.append(indexes)
        if self._waiting_for:
            for index in indexes:
                _wake(self._waiting_for.pop(index, ()))
        if self._news:
            _wake(self._news)
        if self._window is not None and (self._mode == "await" or self._drains):
            self._update_room()
        self._finish_if_settled()

    def _finish_if_settled(self) -> None:
        if self._settled == self._total and self.settings.return_exceptions | (not self._failures):
            if self._is_cut and self._mode == "await":
                self._end("cancelled", self._cut_error())
            else:
                self._end("succeeded", None)

    def _cut_error(self) -> RunCancelledError:
        return RunCancelledError(
            f"run {self.id}: its executor was left before its input had ended, what came is not all"
        )

    def abort(self, error: BaseException) -> None:
        """End the run with an error that is no call's: of its input, of the workers."""
        self._end("failed", error)

    def expire(self) -> None:
        """End the run since its deadline has passed."""
        self._end("failed", RunDeadlineError(f"run {self.id} was not done at its deadline"))

    def close(self) -> None:
        """End the run since its executor was closed."""
        self._end(
            "cancelled", RunCancelledError(f"run {self.id} was cancelled: the executor was closed")
        )

    def stop_pulling(self) -> None:
        """Take nothing more from the input; what was taken goes on.

        Input with a size was accepted whole, unless somebody iterates and takes no more. Who waits
        for a run whose input is cut gets ``RunCancelledError``: what came is not all.
        """
        if self.feed is not None:
            self._is_cut = self._is_cut or self._total is None
            self.feed.stop()
        elif self._total is not None and self._taken < self._total and not self._done.is_set():
            if self._mode != "iterate":
                self._drains = True
                self._update_room()
                return
            self._is_cut = True
            self._total = self.queue.total = self._taken
            del self._values[self._taken :], self._states[self._taken :]
            self._finish_if_settled()

    async def finished(self) -> None:
        """Wait for the end, however it ends."""
        await self._done.wait()

    def _end(self, state: State, error: BaseException | None) -> None:
        if self._done.is_set():
            return
        self._state = state
        self._error = error
        self._traceback = error.__traceback__ if error is not None else None
        self._done.set()
        self.stop_pulling()
        now = self._now()
        if self._settled < self._taken:
            left = [
                self._base + position
                for position, known in enumerate(self._states[: self._taken - self._base])
                if known == _OPEN
            ]
            for index in left:
                self._states[index - self._base] = CANCELLED
            sent = sum(chunk.left for chunk in self.queue.chunks.values())
            self.log.append(Cancelled(now, left, sent))
            self._owner.give_up(self)
        else:
            self._owner.forget(self)
        self._inputs.clear()
        if state != "cancelled" or error is not None:
            logger.debug("run %s %s: %s", self.id, state, error)
        self.log.append(Ended(now, (), state, error))
        _wake(self._news)
        for waiting in self._waiting_for.values():
            _wake(waiting)
        self._waiting_for.clear()
        if self.listener is not None:
            self.listener.ended(self, error)


def _wake(waiting: Any) -> None:
    for future in waiting:
        if not future.done():
            future.set_result(None)
