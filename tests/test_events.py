"""Events of single calls are derived from entries of whole chunks; counts are folded from them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import anyio
import anyio.lowlevel
import pytest

from asyncrt.events import (
    CallCancelled,
    CallFailed,
    CallQueued,
    CallReturned,
    CallReturnedToQueue,
    CallSent,
    CallStarted,
    Cancelled,
    Ended,
    Entry,
    Event,
    EventLog,
    EventsDropped,
    EventStream,
    Finished,
    Queued,
    Requeued,
    RunEnded,
    Sent,
    Started,
)

pytestmark = pytest.mark.anyio

BOOM = ValueError("boom")
ENDED = Ended(9.0, (), "succeeded", None)


def make_log(*entries: Entry, max_entries: int = 100) -> EventLog:
    log = EventLog(max_entries=max_entries)
    for entry in entries:
        log.append(entry)
    return log


async def read(log: EventLog) -> Sequence[Event]:
    return [event async for event in EventStream(log)]


async def test_each_call_of_an_entry_becomes_an_event_of_its_own() -> None:
    log = make_log(
        Queued(1.0, range(2)),
        Sent(2.0, range(2), 1, "w"),
        Finished(5.0, range(2), 1, "w", array("d", [2.5, 3.0, 3.0, 4.0])),
        ENDED,
    )
    assert await read(log) == [
        CallQueued(1.0, 0),
        CallQueued(1.0, 1),
        CallSent(2.0, 0, 1, "w"),
        CallSent(2.0, 1, 1, "w"),
        CallStarted(2.5, 0, 1, "w"),
        CallReturned(3.0, 0, 1, "w", 2.5),
        CallStarted(3.0, 1, 1, "w"),
        CallReturned(4.0, 1, 1, "w", 3.0),
        RunEnded(9.0, "succeeded", None),
    ]


async def test_a_failed_attempt_tells_whether_another_one_follows() -> None:
    failures = {0: (BOOM, 0.5), 1: (BOOM, None)}
    times = array("d", [2.0, 3.0, 3.0, 4.0])
    log = make_log(Finished(5.0, (0, 1), 1, "w", times, failures), ENDED)
    failed = [event for event in await read(log) if isinstance(event, CallFailed)]
    assert failed == [
        CallFailed(3.0, 0, 1, "w", 2.0, BOOM, 0.5),
        CallFailed(4.0, 1, 1, "w", 3.0, BOOM, None),
    ]


async def test_a_long_call_is_reported_as_started_once() -> None:
    log = make_log(
        Started(2.0, (0,), 1, "w"), Finished(5.0, (0,), 1, "w", array("d", [2.0, 5.0])), ENDED
    )
    assert await read(log) == [
        CallStarted(2.0, 0, 1, "w"),
        CallReturned(5.0, 0, 1, "w", 2.0),
        RunEnded(9.0, "succeeded", None),
    ]


async def test_each_attempt_of_a_long_call_is_reported_as_started() -> None:
    log = make_log(
        Started(2.0, (0,), 1, "w"),
        Requeued(3.0, (0,), "w"),
        Started(4.0, (0,), 2, "v"),
        Finished(5.0, (0,), 2, "v", array("d", [4.0, 5.0])),
        ENDED,
    )
    started = [event for event in await read(log) if isinstance(event, CallStarted)]
    assert started == [CallStarted(2.0, 0, 1, "w"), CallStarted(4.0, 0, 2, "v")]


async def test_returned_and_cancelled_calls_are_told() -> None:
    log = make_log(Requeued(3.0, (4,), "w"), Cancelled(4.0, (4, 5), 0), ENDED)
    assert await read(log) == [
        CallReturnedToQueue(3.0, 4, "w"),
        CallCancelled(4.0, 4),
        CallCancelled(4.0, 5),
        RunEnded(9.0, "succeeded", None),
    ]


async def test_an_entry_has_to_say_what_its_events_are() -> None:
    with pytest.raises(NotImplementedError):
        Entry(1.0, (0,)).events()


async def test_the_counts_are_folded_from_the_entries() -> None:
    log = make_log(
        Queued(1.0, range(6)),
        Sent(2.0, range(6), 1, "w"),
        Started(2.0, (0,), 1, "w"),
        Finished(
            5.0,
            (0, 1, 2),
            1,
            "w",
            array("d", [2.0, 3.0, 3.0, 4.0, 4.0, 4.5]),
            {1: (BOOM, 0.5), 2: (BOOM, None)},
        ),
        Requeued(6.0, (3,), "w"),
        Cancelled(7.0, (4,), 0),
    )
    stats = log.stats
    assert (stats.queued, stats.succeeded, stats.failed, stats.cancelled) == (6, 1, 1, 1)
    assert (stats.retried, stats.requeued, stats.sent) == (1, 1, 2)
    assert (stats.done, stats.pending) == (3, 3)
    assert stats.busy_seconds == pytest.approx(2.5)
    assert (stats.began, stats.ended) == (1.0, None)
    log.append(ENDED)
    assert stats.ended == 9.0


async def test_every_reader_gets_all_events_from_the_beginning() -> None:
    log = make_log(Queued(1.0, range(3)), ENDED)
    assert await read(log) == await read(log)
    assert len(await read(log)) == 4


async def test_a_reader_waits_for_what_is_to_come_and_ends_with_the_run() -> None:
    log = make_log(Queued(1.0, (0,)))
    seen: list[Event] = []
    async with anyio.create_task_group() as group:

        async def reader() -> None:
            async with EventStream(log) as events:
                async for event in events:
                    seen.append(event)

        group.start_soon(reader)
        await anyio.wait_all_tasks_blocked()
        assert seen == [CallQueued(1.0, 0)]
        log.append(Queued(2.0, (1,)))
        await anyio.wait_all_tasks_blocked()
        assert seen == [CallQueued(1.0, 0), CallQueued(2.0, 1)]
        log.append(ENDED)
    assert seen[-1] == RunEnded(9.0, "succeeded", None)


async def test_a_late_reader_is_told_how_much_is_no_longer_kept() -> None:
    entries = [Queued(float(index), (index,)) for index in range(10)]
    log = make_log(*entries, ENDED, max_entries=4)
    events = await read(log)
    assert events[0] == EventsDropped(7)
    assert events[1:] == [CallQueued(float(index), index) for index in (7, 8, 9)] + [
        RunEnded(9.0, "succeeded", None)
    ]
    assert log.stats.queued == 10


async def test_a_reader_that_leaves_lets_go_of_what_it_has_not_read() -> None:
    log = make_log(Queued(1.0, range(1000)), ENDED)
    async with EventStream(log) as events:
        assert await anext(events) == CallQueued(1.0, 0)
    assert await anext(events, None) is None
