"""Second copies of calls that run far longer than their siblings."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from desk import DieAtFirst, open_desk, slow_at_first

import asyncrt
from asyncrt import Backups
from asyncrt.actions import Action, Cancel, CopyDropped, Failed, Requeued, Retried, Send
from asyncrt.dispatcher import Dispatcher
from asyncrt.errors import ConfigError, WorkerCrashedError
from asyncrt.events import CallCopyDropped, CallSent
from asyncrt.options import Retry
from asyncrt.queues import Chunk, RunQueue
from asyncrt.stragglers import Stragglers


def make(
    *workers: str, calls: int, backups: Backups | None = None, attempts: int = 1
) -> tuple[Dispatcher, RunQueue, list[Chunk]]:
    """Return a dispatcher that has sent the first calls of a run, one to each worker."""
    dispatcher = Dispatcher(draw=itertools.repeat(0.5))
    for worker in workers:
        dispatcher.worker_joined(worker, 1, now=0.0)
    run = RunQueue("run", Retry(attempts=attempts, delay=1.0, jitter=False), 1, False)
    run.stragglers = Stragglers(backups or Backups(quantile=0.5))
    run.total = calls
    dispatcher.add_run(run)
    return dispatcher, run, sent(dispatcher.offer(run, calls, now=0.0))


def sent(actions: list[Action]) -> list[Chunk]:
    return [action.chunk for action in actions if isinstance(action, Send)]


def end(
    dispatcher: Dispatcher, chunk: Chunk, *, now: float = 1.0, error: Exception | None = None
) -> list[Action]:
    failures = {} if error is None else {0: error}
    _, actions = dispatcher.finished(
        chunk, 0, 1, failures, busy_seconds=1.0, times=(0.0, 1.0), now=now
    )
    return actions


def make_copy() -> tuple[Dispatcher, RunQueue, Chunk, Chunk]:
    """Return a dispatcher in which call 0 is with ``a`` and, a copy of it, with ``b``."""
    dispatcher, run, (first, second) = make("a", "b", calls=2, attempts=2)
    dispatcher.started(first, 0, at=0.0, now=0.1)
    end(dispatcher, second)
    (copy,) = sent(dispatcher.tick(now=3.0))
    return dispatcher, run, first, copy


# -- when ------------------------------------------------------------------------------------------


def test_a_call_that_runs_three_times_the_median_is_sent_to_an_idle_worker_too() -> None:
    dispatcher, _, (first, second) = make("a", "b", calls=2)
    dispatcher.started(first, 0, at=0.0, now=0.1)
    assert sent(end(dispatcher, second, now=1.0)) == []
    assert dispatcher.next_due() == 3.0
    assert sent(dispatcher.tick(now=2.9)) == []
    (copy,) = sent(dispatcher.tick(now=3.0))
    assert (list(copy.indexes), copy.worker, copy.attempt) == ([0], "b", 2)
    assert dispatcher.next_due() is None
    assert dispatcher.tick(now=99.0) == []  # no third one


def test_no_copy_before_the_quantile_has_ended() -> None:
    dispatcher, _, chunks = make("a", "b", "c", "d", calls=4, backups=Backups(quantile=0.75))
    dispatcher.started(chunks[0], 0, at=0.0, now=0.1)
    end(dispatcher, chunks[1])
    end(dispatcher, chunks[2])
    assert sent(dispatcher.tick(now=99.0)) == []
    assert [list(copy.indexes) for copy in sent(end(dispatcher, chunks[3], now=100.0))] == [[0]]


def test_no_copy_while_another_call_waits_for_its_first() -> None:
    dispatcher, _, (first, second) = make("a", "b", calls=3, backups=Backups(quantile=0.0))
    dispatcher.started(first, 0, at=0.0, now=0.1)
    assert [list(chunk.indexes) for chunk in sent(end(dispatcher, second, now=50.0))] == [[2]]


def test_no_copy_of_a_call_that_is_not_known_to_run() -> None:
    dispatcher, _, (_, second) = make("a", "b", calls=2)
    end(dispatcher, second)
    assert sent(dispatcher.tick(now=99.0)) == []


def test_no_copy_of_a_call_shorter_than_the_least() -> None:
    backups = Backups(quantile=0.5, min_seconds=20.0)
    dispatcher, _, (first, second) = make("a", "b", calls=2, backups=backups)
    dispatcher.started(first, 0, at=0.0, now=0.1)
    end(dispatcher, second)
    assert dispatcher.next_due() == 20.0


def test_no_copy_while_the_end_of_the_input_is_not_known() -> None:
    dispatcher, run, (first, second) = make("a", "b", calls=2)
    run.total = None
    dispatcher.started(first, 0, at=0.0, now=0.1)
    end(dispatcher, second)
    assert sent(dispatcher.tick(now=99.0)) == []


def test_the_number_of_copies_is_bounded() -> None:
    names = [f"w{number}" for number in range(20)]
    backups = Backups(quantile=0.5, max_share=0.1)
    dispatcher, _, chunks = make(*names, calls=20, backups=backups)
    for chunk in chunks[:10]:
        dispatcher.started(chunk, 0, at=0.0, now=0.1)
    for chunk in chunks[10:]:
        end(dispatcher, chunk)
    assert len(sent(dispatcher.tick(now=99.0))) == 2


@pytest.mark.parametrize(("others", "place"), [(["b"], "b"), ([], "a")])
def test_a_copy_goes_to_another_worker_if_one_is_free(others: list[str], place: str) -> None:
    dispatcher, run, _ = make(calls=2)
    dispatcher.worker_joined("a", 2, now=0.0)
    first, second = run.chunks.values()
    dispatcher.started(first, 0, at=0.0, now=0.1)
    for name in others:
        dispatcher.worker_joined(name, 1, now=0.0)
    end(dispatcher, second)
    assert [copy.worker for copy in sent(dispatcher.tick(now=99.0))] == [place]


# -- the first answer wins -------------------------------------------------------------------------


def test_when_the_copy_answers_the_first_one_is_cancelled() -> None:
    dispatcher, run, first, copy = make_copy()
    actions = end(dispatcher, copy, now=4.0)
    assert actions == [Cancel("a", first.id, [0]), CopyDropped(run, 0, "a", None)]
    news, late = dispatcher.finished(first, 0, 1, {}, busy_seconds=4.0, now=4.1)
    assert (list(news), late) == ([], [])
    assert not run.chunks


def test_when_the_first_one_answers_the_copy_is_cancelled() -> None:
    dispatcher, run, first, copy = make_copy()
    actions = end(dispatcher, first, now=4.0)
    assert actions == [Cancel("b", copy.id, [0]), CopyDropped(run, 0, "b", None)]


@pytest.mark.parametrize("which", [0, 1])
def test_a_copy_that_fails_leaves_the_call_to_the_other(which: int) -> None:
    dispatcher, run, *copies = make_copy()
    error = ValueError("two at once")
    assert end(dispatcher, copies[which], error=error, now=4.0) == [
        CopyDropped(run, 0, copies[which].worker, error)
    ]
    other = copies[1 - which]
    (retried,) = end(dispatcher, other, error=error, now=5.0)
    assert isinstance(retried, Retried)  # the failure of the last copy counts
    (again,) = sent(dispatcher.tick(now=99.0))
    assert again.attempt == 3
    (failed,) = end(dispatcher, again, error=error, now=100.0)
    assert isinstance(failed, Failed)
    assert failed.attempts == 3


@pytest.mark.parametrize("lost", ["a", "b"])
def test_a_copy_whose_worker_is_lost_leaves_the_call_to_the_other(lost: str) -> None:
    dispatcher, run, first, copy = make_copy()
    assert dispatcher.worker_lost(lost, now=4.0) == [CopyDropped(run, 0, lost, None)]
    last = copy if lost == "a" else first
    (requeued,) = dispatcher.worker_lost(last.worker, now=5.0)
    assert isinstance(requeued, Requeued)  # the loss of the last copy counts


@pytest.mark.parametrize("attempts", [1, 2])
def test_each_attempt_has_one_copy_at_most(attempts: int) -> None:
    backups = Backups(quantile=0.5, max_share=1.0)
    dispatcher, run, (first, second) = make("a", "b", calls=2, backups=backups, attempts=attempts)
    end(dispatcher, second)
    chunk, runs, now = first, 1, 0.0
    for _ in range(20):
        actions = dispatcher.started(chunk, 0, at=now, now=now)
        now += 100.0
        actions += dispatcher.tick(now=now)
        for copy in sent(actions):
            runs += 1
            assert end(dispatcher, chunk, error=ValueError(), now=now)
            chunk = copy
        if not sent(actions):
            final = end(dispatcher, chunk, error=ValueError(), now=now)
            if isinstance(final[0], Failed):
                break
            (chunk,) = sent(dispatcher.tick(now=now + 50.0))
            runs += 1
    assert runs == 2 * attempts
    assert not run.copies


def test_a_copy_that_its_worker_gives_back_is_dropped() -> None:
    dispatcher, run, _, copy = make_copy()
    actions = dispatcher.revoked(copy, 0, 1, now=3.1)
    assert actions[0] == CopyDropped(run, 0, "b", None)
    assert not run.returned


def test_a_copy_that_cannot_be_sent_is_dropped() -> None:
    dispatcher, run, _, copy = make_copy()
    error = TypeError("a lock")
    assert dispatcher.unsendable(copy, {0: error}, now=3.0)[0] == CopyDropped(run, 0, "b", error)


def test_cancelling_a_call_cancels_both_copies() -> None:
    dispatcher, run, first, copy = make_copy()
    assert dispatcher.cancel_call(run, 0, now=4.0) == [
        Cancel("a", first.id, [0]),
        Cancel("b", copy.id, [0]),
    ]


def test_cancelling_the_run_cancels_both_copies() -> None:
    dispatcher, run, first, copy = make_copy()
    assert dispatcher.cancel_run(run, now=4.0) == [
        Cancel("a", first.id, None),
        Cancel("b", copy.id, None),
    ]


# -- on real workers -------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_straggler_on_a_real_worker_is_overtaken_by_its_copy() -> None:
    async with asyncio.timeout(60), asyncrt.Executor(max_workers=2, backups=True) as executor:
        run = executor.map(slow_at_first, range(12))
        results = await run
        assert results == [number + 1 + (number == 7) for number in range(12)]
        events = [event async for event in run.events()]
        dropped = [event for event in events if isinstance(event, CallCopyDropped)]
        assert [(event.index, event.error) for event in dropped] == [(7, None)]
        copies = [event for event in events if isinstance(event, CallSent) and event.index == 7]
        assert sorted({event.attempt for event in copies}) == [1, 2]
        assert copies[-2].worker != copies[-1].worker
        assert (run.stats.copies_dropped, run.stats.sent, run.stats.succeeded) == (1, 0, 12)
        assert run.calls[7].attempts == 2
        assert await executor.map(abs, range(-4, 4)) == [4, 3, 2, 1, 0, 1, 2, 3]


@pytest.mark.anyio
async def test_a_crash_of_one_copy_does_not_end_the_call() -> None:
    async with (
        asyncio.timeout(60),
        open_desk() as desk,
        asyncrt.Executor(max_workers=2, backups=True) as executor,
    ):
        run = executor.map(DieAtFirst(desk), range(8))
        await desk.arrived("attempt 1", "attempt 2")
        desk.release("attempt 1")
        async for event in run.events():
            if isinstance(event, CallCopyDropped):
                assert isinstance(event.error, WorkerCrashedError)
                break
        desk.release("attempt 2")
        assert await run == [0, 1, 2, 3, 4, -5, 6, 7]


# -- bad options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"multiplier": 0.5},
        {"quantile": 1.1},
        {"quantile": -0.1},
        {"min_seconds": -1},
        {"max_share": 2},
        {"multiplier": float("nan")},
        {"multiplier": True},
        {"quantile": "0.5"},
    ],
)
def test_a_value_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"backups\.{next(iter(options))} must be"):
        Backups(**options)


@pytest.mark.parametrize("value", [3, "yes", 0.5])
def test_backups_of_another_type_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"backups must be asyncrt\.Backups"):
        asyncrt.Executor(backups=value)
