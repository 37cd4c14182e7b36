"""The dispatcher: each branch by itself, then any interleaving of everything."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest

from asyncrt.actions import Action, Cancel, Failed, Requeued, Retried, Revoke, Send
from asyncrt.dispatcher import MAX_CHUNK_CALLS, MAX_LOSSES, Dispatcher
from asyncrt.errors import OutOfMemoryError, RunCancelledError, WorkerLostError
from asyncrt.options import Retry
from asyncrt.queues import Chunk, RunQueue

ONCE = Retry(attempts=1)
TWICE = Retry(attempts=2, delay=1.0, jitter=False)


def make(
    *workers: str,
    slots: int = 1,
    chunksize: int | None = 1,
    retry: Retry = ONCE,
    alone: bool = False,
) -> tuple[Dispatcher, RunQueue]:
    dispatcher = Dispatcher(draw=itertools.repeat(1.0))
    for worker in workers:
        dispatcher.worker_joined(worker, slots, now=0.0)
    run = RunQueue("run", retry, chunksize, alone)
    dispatcher.add_run(run)
    return dispatcher, run


def chunks(actions: Iterable[Action]) -> list[Chunk]:
    return [action.chunk for action in actions if isinstance(action, Send)]


def sent(actions: Iterable[Action]) -> list[list[int]]:
    return [list(chunk.indexes) for chunk in chunks(actions)]


def finish(
    dispatcher: Dispatcher, chunk: Chunk, *, seconds: float = 1.0, now: float = 1.0
) -> list[Action]:
    count = len(chunk.indexes)
    _, actions = dispatcher.finished(chunk, 0, count, {}, busy_seconds=seconds * count, now=now)
    return actions


# -- sending ---------------------------------------------------------------------------------------


def test_calls_that_were_offered_before_a_worker_joined_are_sent_when_it_does() -> None:
    dispatcher, run = make()
    assert dispatcher.offer(run, 2, now=0.0) == []
    assert sent(dispatcher.worker_joined("a", 1, now=0.0)) == [[0]]


def test_each_free_slot_gets_a_call_and_no_more_before_its_duration_is_known() -> None:
    dispatcher, run = make("a", "b", slots=2)
    assert sent(dispatcher.offer(run, 10, now=0.0)) == [[0], [1], [2], [3]]
    assert {len(worker.chunks) for worker in dispatcher.workers.values()} == {2}


def test_a_finished_call_makes_room_for_the_next_on_its_worker() -> None:
    dispatcher, run = make("a", "b")
    first, _ = chunks(dispatcher.offer(run, 3, now=0.0))
    (third,) = chunks(finish(dispatcher, first))
    assert (list(third.indexes), third.worker) == ([2], first.worker)


def test_long_calls_are_never_sent_to_wait_behind_another() -> None:
    dispatcher, run = make("a")
    (first,) = chunks(dispatcher.offer(run, 3, now=0.0))
    assert sent(finish(dispatcher, first, seconds=10.0)) == [[1]]


def test_short_calls_are_sent_ahead_to_hide_the_round_trip() -> None:
    dispatcher, run = make("a")
    (first,) = chunks(dispatcher.offer(run, 3, now=0.0))
    assert sent(finish(dispatcher, first, seconds=0.01)) == [[1], [2]]


def test_calls_that_want_a_process_each_travel_alone_and_never_wait_behind_another() -> None:
    dispatcher, run = make("a", chunksize=None, alone=True)
    (first,) = chunks(dispatcher.offer(run, 100, now=0.0))
    assert sent(finish(dispatcher, first, seconds=1e-6)) == [[1]]


def test_a_fixed_chunksize_is_kept() -> None:
    dispatcher, run = make("a", "b", chunksize=3)
    assert sent(dispatcher.offer(run, 5, now=0.0)) == [[0, 1, 2], [3, 4]]


def test_short_calls_are_coalesced_step_by_step_up_to_a_limit() -> None:
    dispatcher, run = make("a", chunksize=None)
    run.total = 1_000_000
    actions = dispatcher.offer(run, 1_000_000, now=0.0)
    sizes: list[int] = []
    while len(sizes) < 12:
        (chunk, *_) = waiting = chunks(actions)
        sizes += [len(each.indexes) for each in waiting]
        actions = finish(dispatcher, chunk, seconds=1e-6)
        for other in waiting[1:]:
            actions += finish(dispatcher, other, seconds=1e-6)
    assert sizes[0] == 1
    assert sizes == sorted(sizes)
    assert sizes[-1] == MAX_CHUNK_CALLS


def test_calls_with_large_arguments_are_not_coalesced() -> None:
    dispatcher, run = make("a", chunksize=None)
    (first,) = chunks(dispatcher.offer(run, 1000, now=0.0))
    dispatcher.measured(run, 1, 10 << 20)
    assert all(len(indexes) == 1 for indexes in sent(finish(dispatcher, first, seconds=1e-6)))


def test_runs_take_turns() -> None:
    dispatcher, run = make("a")
    other = RunQueue("other", ONCE, 1, alone=False)
    dispatcher.add_run(other)
    (chunk,) = chunks(dispatcher.offer(run, 5, now=0.0))
    assert dispatcher.offer(other, 5, now=0.0) == []
    order = []
    for _ in range(4):
        (chunk,) = chunks(finish(dispatcher, chunk))
        order.append(chunk.run.id)
    assert order == ["run", "other", "run", "other"]


def test_a_draining_worker_is_given_nothing() -> None:
    dispatcher, run = make("a")
    dispatcher.drain("a")
    assert dispatcher.offer(run, 2, now=0.0) == []
    assert sent(dispatcher.worker_joined("b", 1, now=0.0)) == [[0]]


def test_demand_counts_calls_that_are_ready_delayed_and_out_up_to_the_limit() -> None:
    dispatcher, run = make("a", retry=TWICE)
    (first,) = chunks(dispatcher.offer(run, 5, now=0.0))
    assert dispatcher.demand(100) == 5
    assert dispatcher.demand(3) == 3
    dispatcher.finished(first, 0, 1, {0: ValueError()}, busy_seconds=1.0, now=0.0)
    assert dispatcher.demand(100) == 5
    dispatcher.cancel_run(run, now=0.0)
    assert dispatcher.demand(100) == 0


def test_a_worker_is_idle_from_the_end_of_its_last_chunk_on() -> None:
    dispatcher, run = make("a")
    assert dispatcher.is_idle("a")
    (chunk,) = chunks(dispatcher.offer(run, 1, now=0.0))
    assert not dispatcher.is_idle("a")
    finish(dispatcher, chunk, now=7.0)
    assert dispatcher.is_idle("a")
    assert dispatcher.workers["a"].idle_since == 7.0


# -- outcomes --------------------------------------------------------------------------------------


def test_outcomes_of_a_chunk_may_come_in_parts() -> None:
    dispatcher, run = make("a", chunksize=4)
    (chunk,) = chunks(dispatcher.offer(run, 5, now=0.0))
    news, actions = dispatcher.finished(chunk, 0, 3, {}, busy_seconds=3.0, now=1.0)
    assert list(news) == [0, 1, 2]
    assert actions == []  # the slot is still taken
    news, actions = dispatcher.finished(chunk, 3, 1, {}, busy_seconds=1.0, now=2.0)
    assert list(news) == [3]
    assert sent(actions) == [[4]]


def test_an_outcome_that_comes_twice_counts_once() -> None:
    dispatcher, run = make("a", chunksize=4)
    (chunk,) = chunks(dispatcher.offer(run, 4, now=0.0))
    dispatcher.finished(chunk, 0, 3, {}, busy_seconds=3.0, now=1.0)
    news, actions = dispatcher.finished(
        chunk, 0, 4, {1: ValueError(), 3: ValueError()}, busy_seconds=3.0, now=1.0
    )
    assert list(news) == []
    assert [action.index for action in actions if isinstance(action, Failed)] == [3]


def test_outcomes_beyond_the_chunk_are_ignored() -> None:
    dispatcher, run = make("a", chunksize=2)
    (chunk,) = chunks(dispatcher.offer(run, 2, now=0.0))
    news, _ = dispatcher.finished(chunk, 5, 3, {}, busy_seconds=3.0, now=1.0)
    assert list(news) == []
    news, _ = dispatcher.finished(chunk, 0, 9, {}, busy_seconds=3.0, now=1.0)
    assert list(news) == [0, 1]
    assert run.chunks == {}


def test_news_of_unknown_chunks_and_workers_finds_nothing() -> None:
    dispatcher, run = make("a")
    (chunk,) = chunks(dispatcher.offer(run, 1, now=0.0))
    assert dispatcher.chunk("a", chunk.id) is chunk
    assert dispatcher.chunk("a", chunk.id + 1) is None
    assert dispatcher.chunk("b", chunk.id) is None
    assert dispatcher.worker_lost("b", now=0.0) == []
    assert dispatcher.reconcile("b", [], now=0.0) == []


def test_a_failure_is_final_without_retries() -> None:
    dispatcher, run = make("a")
    (chunk,) = chunks(dispatcher.offer(run, 1, now=0.0))
    error = ValueError("no")
    news, actions = dispatcher.finished(chunk, 0, 1, {0: error}, busy_seconds=1.0, now=1.0)
    assert list(news) == []
    assert actions == [Failed(run, 0, error, 1)]
    assert dispatcher.next_due() is None


def test_a_failed_call_is_sent_again_after_its_delay_and_not_before() -> None:
    dispatcher, run = make("a", retry=TWICE)
    (chunk,) = chunks(dispatcher.offer(run, 1, now=0.0))
    error = ValueError("no")
    _, actions = dispatcher.finished(chunk, 0, 1, {0: error}, busy_seconds=1.0, now=1.0)
    assert actions == [Retried(run, 0, error, 1.0)]
    assert dispatcher.next_due() == 2.0
    assert dispatcher.tick(now=1.5) == []
    (again,) = chunks(dispatcher.tick(now=2.0))
    assert (list(again.indexes), again.attempt) == ([0], 2)
    _, actions = dispatcher.finished(again, 0, 1, {0: error}, busy_seconds=1.0, now=3.0)
    assert actions == [Failed(run, 0, error, 2)]


@pytest.mark.parametrize("error", [KeyError("x"), OutOfMemoryError("x"), RunCancelledError("x")])
def test_an_error_that_is_not_worth_a_retry_is_final(error: Exception) -> None:
    on = (ValueError, OutOfMemoryError, RunCancelledError)
    dispatcher, run = make("a", retry=Retry(attempts=5, on=on))
    (chunk,) = chunks(dispatcher.offer(run, 1, now=0.0))
    _, actions = dispatcher.finished(chunk, 0, 1, {0: error}, busy_seconds=1.0, now=1.0)
    assert actions == [Failed(run, 0, error, 1)]


def test_calls_that_cannot_be_sent_fail_and_the_others_of_their_chunk_are_sent_again() -> None:
    dispatcher, run = make("a", chunksize=3)
    (chunk,) = chunks(dispatcher.offer(run, 3, now=0.0))
    error = TypeError("a lock")
    actions = dispatcher.unsendable(chunk, {1: error}, now=0.0)
    assert [action for action in actions if isinstance(action, Failed)] == [
        Failed(run, 1, error, 1)
    ]
    assert sorted(itertools.chain(*sent(actions))) == [0, 2]


def test_a_worker_whose_only_call_cannot_be_sent_gets_the_next_one() -> None:
    dispatcher, run = make("a")
    (chunk,) = chunks(dispatcher.offer(run, 2, now=0.0))
    assert sent(dispatcher.unsendable(chunk, {0: TypeError()}, now=0.0)) == [[1]]


# -- lost workers ----------------------------------------------------------------------------------


def test_calls_of_a_lost_worker_are_sent_again_uncharged_and_each_for_itself() -> None:
    dispatcher, run = make("a", chunksize=3)
    dispatcher.offer(run, 3, now=0.0)
    actions = dispatcher.worker_lost("a", now=1.0)
    assert actions == [Requeued(run, (index,), "a") for index in range(3)]
    (chunk,) = chunks(dispatcher.worker_joined("b", 1, now=1.0))
    assert (list(chunk.indexes), chunk.attempt) == ([0], 2)
    assert run.failures == {}


def test_calls_of_a_lost_worker_that_had_ended_are_not_sent_again() -> None:
    dispatcher, run = make("a", chunksize=3)
    (chunk,) = chunks(dispatcher.offer(run, 3, now=0.0))
    dispatcher.finished(chunk, 0, 2, {}, busy_seconds=1.0, now=1.0)
    assert dispatcher.worker_lost("a", now=1.0) == [Requeued(run, (2,), "a")]


def test_a_call_that_was_there_each_time_a_worker_was_lost_has_failed() -> None:
    dispatcher, run = make()
    dispatcher.offer(run, 1, now=0.0)
    actions: list[Action] = []
    for number in range(MAX_LOSSES):
        assert sent(dispatcher.worker_joined(f"w{number}", 1, now=0.0)) == [[0]]
        actions = dispatcher.worker_lost(f"w{number}", now=0.0)
    (failed,) = actions
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, WorkerLostError)
    assert failed.attempts == MAX_LOSSES
    assert failed.error.worker == f"w{MAX_LOSSES - 1}"
    assert dispatcher.worker_joined("last", 1, now=0.0) == []


def test_losses_do_not_use_up_retries() -> None:
    dispatcher, run = make(retry=TWICE)
    dispatcher.offer(run, 1, now=0.0)
    for number in range(MAX_LOSSES - 1):
        dispatcher.worker_joined(f"w{number}", 1, now=0.0)
        dispatcher.worker_lost(f"w{number}", now=0.0)
    (chunk,) = chunks(dispatcher.worker_joined("last", 1, now=0.0))
    assert chunk.attempt == MAX_LOSSES
    _, actions = dispatcher.finished(chunk, 0, 1, {0: ValueError()}, busy_seconds=1.0, now=0.0)
    assert isinstance(actions[0], Retried)
    (again,) = chunks(dispatcher.tick(now=100.0))
    assert again.attempt == MAX_LOSSES + 1


def test_after_a_reconnection_what_the_worker_does_not_know_is_sent_again() -> None:
    dispatcher, run = make("a", slots=2)
    first, second = chunks(dispatcher.offer(run, 2, now=0.0))
    actions = dispatcher.reconcile("a", [second.id], now=1.0)
    (again,) = chunks(actions)
    assert actions[0] == Requeued(run, [0], "a")
    assert again.id != first.id
    assert (list(again.indexes), again.attempt) == ([0], 1)
    assert dispatcher.chunk("a", first.id) is None


# -- taking back -----------------------------------------------------------------------------------


def test_a_call_that_waits_behind_another_is_asked_back_for_an_idle_worker() -> None:
    dispatcher, run = make("a", chunksize=None)
    (first,) = chunks(dispatcher.offer(run, 1, now=0.0))
    finish(dispatcher, first, seconds=0.02)
    _, waiting = chunks(dispatcher.offer(run, 2, now=0.0))
    assert dispatcher.worker_joined("b", 1, now=0.0) == [Revoke("a", waiting.id)]
    requeued, send = dispatcher.revoked(waiting, 0, 1, now=0.0)
    assert requeued == Requeued(run, [2], "a")
    assert isinstance(send, Send)
    assert (send.chunk.worker, list(send.chunk.indexes), send.chunk.attempt) == ("b", [2], 1)


def test_calls_are_asked_back_once_and_not_again_before_the_answer() -> None:
    dispatcher, run = make("a", "b", chunksize=None)
    first, second = chunks(dispatcher.offer(run, 2, now=0.0))
    finish(dispatcher, first, seconds=0.005)
    finish(dispatcher, second, seconds=0.005)
    out = chunks(dispatcher.offer(run, 4, now=0.0))
    asked: list[int] = []
    by_worker = [chunk for chunk in out if chunk.worker == "a"]
    for chunk in by_worker:
        actions = finish(dispatcher, chunk, seconds=0.005)
        asked += [action.chunk for action in actions if isinstance(action, Revoke)]
    assert len(asked) == len(set(asked))


def test_chunks_of_a_size_that_was_asked_for_are_not_taken_apart() -> None:
    dispatcher, run = make("a", chunksize=10)
    dispatcher.offer(run, 10, now=0.0)
    assert dispatcher.worker_joined("b", 1, now=0.0) == []


def test_calls_that_are_given_back_are_sent_again_as_the_same_attempt() -> None:
    dispatcher, run = make("a", chunksize=4)
    (chunk,) = chunks(dispatcher.offer(run, 4, now=0.0))
    dispatcher.finished(chunk, 0, 1, {}, busy_seconds=9.0, now=1.0)
    actions = dispatcher.revoked(chunk, 2, 2, now=1.0)
    assert actions == [Requeued(run, [2, 3], "a")]
    (again,) = chunks(dispatcher.worker_joined("b", 1, now=1.0))
    assert (list(again.indexes), again.attempt) == ([2, 3], 1)
    assert dispatcher.chunk("a", chunk.id) is chunk  # call 1 is still running


def test_calls_that_are_given_back_twice_are_sent_again_once() -> None:
    dispatcher, run = make("a", chunksize=2)
    (chunk,) = chunks(dispatcher.offer(run, 2, now=0.0))
    assert sent(dispatcher.revoked(chunk, 0, 2, now=0.0)) == [[0, 1]]
    assert dispatcher.revoked(chunk, 0, 9, now=0.0) == []


# -- cancelling ------------------------------------------------------------------------------------


def test_cancelling_a_run_tells_its_workers_once_and_sends_nothing_more() -> None:
    dispatcher, run = make("a", "b", retry=TWICE)
    first, second = chunks(dispatcher.offer(run, 10, now=0.0))
    dispatcher.finished(first, 0, 1, {0: ValueError()}, busy_seconds=1.0, now=0.0)
    third = next(chunk for chunk in run.chunks.values() if chunk is not second)
    actions = dispatcher.cancel_run(run, now=1.0)
    assert set(map(repr, actions)) == {
        repr(Cancel(chunk.worker, chunk.id, None)) for chunk in (second, third)
    }
    assert dispatcher.cancel_run(run, now=1.0) == []
    assert dispatcher.tick(now=99.0) == []
    assert dispatcher.offer(run, 5, now=99.0) == []
    assert dispatcher.worker_joined("c", 1, now=99.0) == []


def test_the_slots_of_a_cancelled_run_are_free_when_its_workers_say_so() -> None:
    dispatcher, run = make("a")
    (chunk,) = chunks(dispatcher.offer(run, 1, now=0.0))
    other = RunQueue("other", ONCE, 1, alone=False)
    dispatcher.add_run(other)
    dispatcher.offer(other, 1, now=0.0)
    assert sent(dispatcher.cancel_run(run, now=0.0)) == []
    news, actions = dispatcher.finished(
        chunk, 0, 1, {0: RunCancelledError("x")}, busy_seconds=1.0, now=0.0
    )
    assert list(news) == []
    assert [each.run.id for each in chunks(actions)] == ["other"]


def test_a_call_that_is_cancelled_before_it_was_sent_never_is() -> None:
    dispatcher, run = make()
    dispatcher.offer(run, 3, now=0.0)
    assert dispatcher.cancel_call(run, 0, now=0.0) == []
    assert sent(dispatcher.worker_joined("a", 5, now=0.0)) == [[1], [2]]


def test_a_call_that_is_cancelled_while_it_waits_for_its_retry_is_not_sent_again() -> None:
    dispatcher, run = make("a", retry=TWICE)
    (chunk,) = chunks(dispatcher.offer(run, 1, now=0.0))
    dispatcher.finished(chunk, 0, 1, {0: ValueError()}, busy_seconds=1.0, now=0.0)
    dispatcher.cancel_call(run, 0, now=0.0)
    assert dispatcher.tick(now=99.0) == []
    assert (run.waiting, run.ready) == (0, 0)


def test_a_call_that_is_cancelled_on_a_worker_is_told_there_and_its_outcome_ignored() -> None:
    dispatcher, run = make("a", chunksize=2)
    (chunk,) = chunks(dispatcher.offer(run, 2, now=0.0))
    assert dispatcher.cancel_call(run, 1, now=0.0) == [Cancel("a", chunk.id, [1])]
    assert dispatcher.cancel_call(run, 1, now=0.0) == []
    news, actions = dispatcher.finished(chunk, 0, 2, {}, busy_seconds=1.0, now=0.0)
    assert (list(news), actions) == ([0], [])
    assert run.chunks == {}


def test_a_cancelled_call_of_a_lost_worker_is_not_sent_again() -> None:
    dispatcher, run = make("a", chunksize=2)
    dispatcher.offer(run, 2, now=0.0)
    dispatcher.cancel_call(run, 0, now=0.0)
    assert dispatcher.worker_lost("a", now=0.0) == [Requeued(run, (1,), "a")]


def test_a_run_that_has_finished_is_given_no_more_turns() -> None:
    dispatcher, run = make("a")
    (chunk,) = chunks(dispatcher.offer(run, 1, now=0.0))
    finish(dispatcher, chunk)
    dispatcher.finish_run(run)
    assert run.over
    assert dispatcher.demand(10) == 0
    assert dispatcher.offer(run, 1, now=0.0) == []
