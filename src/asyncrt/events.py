"""What happened to the calls of a run, as typed, timestamped events.

The run keeps entries of whole chunks; events of single calls are made from them when somebody
reads. Times are values of ``anyio.current_time()`` on the client; what a worker measured is
translated.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import anyio

MAX_ENTRIES: Final = 50_000

State: TypeAlias = Literal["running", "succeeded", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class CallEvent:
    """Base of the events of one call.

    Attributes:
        time: Seconds, ``anyio.current_time()``.
        index: The call's index within the run.
    """

    time: float
    index: int


@dataclass(frozen=True, slots=True)
class CallQueued(CallEvent):
    """Taken from the input."""


@dataclass(frozen=True, slots=True)
class CallSent(CallEvent):
    """On its way to a worker."""

    attempt: int
    worker: str


@dataclass(frozen=True, slots=True)
class CallStarted(CallEvent):
    """Running. Short calls are reported when they have ended, with the time of their start."""

    attempt: int
    worker: str


@dataclass(frozen=True, slots=True)
class CallReturned(CallEvent):
    """Its worker has run it to the end. ``started`` and ``time`` are the worker's."""

    attempt: int
    worker: str
    started: float


@dataclass(frozen=True, slots=True)
class CallFailed(CallEvent):
    """An attempt failed. ``delay`` is the wait before the next one; ``None``: there is none."""

    attempt: int
    worker: str
    started: float
    error: Exception
    delay: float | None


@dataclass(frozen=True, slots=True)
class CallReturnedToQueue(CallEvent):
    """A worker that had it did not begin it, or was lost; it will be sent again, uncharged."""

    worker: str


@dataclass(frozen=True, slots=True)
class CallCopyDropped(CallEvent):
    """A second copy of it was out (see ``Backups``); this one is not needed, the other settles it.

    It was too slow, its worker was lost, or it failed while the other one ran: ``error``.
    """

    worker: str
    error: Exception | None


@dataclass(frozen=True, slots=True)
class CallCancelled(CallEvent):
    """Nobody wants it any more."""


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The last event of a run."""

    time: float
    state: State
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class EventsDropped:
    """The reader came late: this many of the oldest entries are no longer kept."""

    count: int


Event: TypeAlias = CallEvent | RunEnded | EventsDropped


@dataclass(slots=True)
class Entry:
    """One thing that happened to several calls at once."""

    time: float
    indexes: Sequence[int]

    def events(self) -> Iterator[Event]:
        """Yield the events of the single calls."""
        raise NotImplementedError


@dataclass(slots=True)
class Queued(Entry):
    """Calls were taken from the input."""

    def events(self) -> Iterator[Event]:
        """See ``Entry``."""
        return (CallQueued(self.time, index) for index in self.indexes)


@dataclass(slots=True)
class Sent(Entry):
    """A chunk was sent."""

    attempt: int
    worker: str

    def events(self) -> Iterator[Event]:
        """See ``Entry``."""
        return (CallSent(self.time, index, self.attempt, self.worker) for index in self.indexes)


@dataclass(slots=True)
class Started(Entry):
    """A call that takes a while has begun."""

    attempt: int
    worker: str

    def events(self) -> Iterator[Event]:
        """See ``Entry``."""
        return (CallStarted(self.time, index, self.attempt, self.worker) for index in self.indexes)


@dataclass(slots=True)
class Finished(Entry):
    """Calls ended. ``times`` holds start and end of each; ``failures`` the errors, by index."""

    attempt: int
    worker: str
    times: array[float]
    failures: Mapping[int, tuple[Exception, float | None]] = field(default_factory=dict)

    def events(self) -> Iterator[Event]:
        """See ``Entry``."""
        for position, index in enumerate(self.indexes):
            started, ended = self.times[2 * position], self.times[2 * position + 1]
            yield CallStarted(started, index, self.attempt, self.worker)
            if index in self.failures:
                error, delay = self.failures[index]
                yield CallFailed(ended, index, self.attempt, self.worker, started, error, delay)
            else:
                yield CallReturned(ended, index, self.attempt, self.worker, started)


@dataclass(slots=True)
class Lost(Entry):
    """A call failed for good although no worker ran it to an end.

    ``sent`` tells whether it was with one: else it could not even be sent.
    """

    attempt: int
    worker: str
    error: Exception
    sent: bool

    def events(self) -> Iterator[Event]:
        """See ``Entry``."""
        return (
            CallFailed(self.time, index, self.attempt, self.worker, self.time, self.error, None)
            for index in self.indexes
        )


@dataclass(slots=True)
class Requeued(Entry):
    """Calls came back without having run to an end."""

    worker: str

    def events(self) -> Iterator[Event]:
        """See ``Entry``."""
        return (CallReturnedToQueue(self.time, index, self.worker) for index in self.indexes)


@dataclass(slots=True)
class CopyDropped(Entry):
    """One of two copies of a call is not needed any more."""

    worker: str
    error: Exception | None

    def events(self) -> Iterator[Event]:
        """See ``Entry``."""
        return (
            CallCopyDropped(self.time, index, self.worker, self.error) for index in self.indexes
        )


@dataclass(slots=True)
class Cancelled(Entry):
    """Calls were given up. ``sent`` tells how many were with workers, copies counted."""

    sent: int

    def events(self) -> Iterator[Event]:
        """See ``Entry``."""
        return (CallCancelled(self.time, index) for index in self.indexes)


@dataclass(slots=True)
class Ended(Entry):
    """The run is over."""

    state: State
    error: BaseException | None

    def events(self) -> Iterator[Event]:
        """See ``Entry``."""
        return iter((RunEnded(self.time, self.state, self.error),))


@dataclass(slots=True)
class Stats:
    """Counts and times of a run so far, folded from its events.

    Attributes:
        queued: Calls taken from the input.
        sent: Attempts sent to workers and not back yet.
        succeeded: Calls that returned.
        failed: Calls that failed for good.
        cancelled: Calls that were given up.
        retried: Attempts that failed and are followed by another one.
        requeued: Calls that came back from a worker without having run to an end.
        copies_dropped: Second copies of stragglers, or their first ones, that were not needed.
        busy_seconds: Time that calls ran, summed over all attempts.
        began: Time of the first event.
        ended: Time of the last event; ``None`` while the run goes on.
    """

    queued: int = 0
    sent: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    requeued: int = 0
    copies_dropped: int = 0
    busy_seconds: float = 0.0
    began: float = 0.0
    ended: float | None = None

    @property
    def done(self) -> int:
        """Calls with a final outcome."""
        return self.succeeded + self.failed + self.cancelled

    @property
    def pending(self) -> int:
        """Calls that were taken from the input and have no final outcome."""
        return self.queued - self.done

    def fold(self, entry: Entry) -> None:
        """Take one more entry into account."""
        count = len(entry.indexes)
        match entry:
            case Queued():
                self.began = self.began or entry.time
                self.queued += count
            case Sent():
                self.sent += count
            case Finished():
                final = sum(1 for _, delay in entry.failures.values() if delay is None)
                self.sent -= count
                self.succeeded += count - len(entry.failures)
                self.failed += final
                self.retried += len(entry.failures) - final
                self.busy_seconds += sum(entry.times[1::2]) - sum(entry.times[::2])
            case Lost():
                self.sent -= count * entry.sent
                self.failed += count
            case Requeued():
                self.sent -= count
                self.requeued += count
            case CopyDropped():
                self.sent -= count
                self.copies_dropped += count
            case Cancelled():
                self.cancelled += count
                self.sent -= entry.sent
            case Ended():
                self.ended = entry.time
            case _:
                pass


class EventLog:
    """The entries of one run: the newest ``MAX_ENTRIES`` of them, and what they add up to."""

    def __init__(self, *, max_entries: int = MAX_ENTRIES) -> None:
        self.stats = Stats()
        self._entries: deque[Entry] = deque(maxlen=max_entries)
        self._total = 0
        self._changed: anyio.Event | None = None
        self.ended = False

    def append(self, entry: Entry) -> None:
        """Add an entry and wake the readers."""
        self._entries.append(entry)
        self._total += 1
        self.stats.fold(entry)
        self.ended = self.ended or isinstance(entry, Ended)
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def since(self, position: int) -> tuple[list[Entry], int, int]:
        """Return the entries from a position on, the next position, and how many were dropped."""
        oldest = self._total - len(self._entries)
        dropped = max(0, oldest - position)
        start = max(0, position - oldest)
        return list(self._entries)[start:], self._total, dropped

    async def wait(self, position: int) -> None:
        """Wait until there is an entry at a position."""
        if self._total <= position and not self.ended:
            if self._changed is None:
                self._changed = anyio.Event()
            await self._changed.wait()


class EventStream:
    """The events of a run from its beginning, then as they happen, until it has ended.

    An async iterator; also an async context manager, which changes nothing but reads well.
    """

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._position = 0
        self._ready: deque[Event] = deque()
        self._entries: deque[Entry] = deque()
        self._started: set[tuple[int, int]] = set()  # told before their end, with index and attempt

    async def __aenter__(self) -> EventStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._ready.clear()
        self._entries.clear()

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        while not self._ready:
            if self._entries:
                self._ready.extend(self._events_of(self._entries.popleft()))
                continue
            entries, self._position, dropped = self._log.since(self._position)
            if dropped:
                self._ready.append(EventsDropped(dropped))
            self._entries.extend(entries)
            if not entries:
                if self._log.ended:
                    raise StopAsyncIteration
                await self._log.wait(self._position)
        return self._ready.popleft()

    def _events_of(self, entry: Entry) -> Iterator[Event]:
        """Yield the events of an entry, but no start twice."""
        if isinstance(entry, Started):
            self._started.update((index, entry.attempt) for index in entry.indexes)
        for event in entry.events():
            if isinstance(event, CallStarted) and isinstance(entry, Finished):
                told = event.index, event.attempt
                if told in self._started:
                    self._started.discard(told)
                    continue
            yield event
