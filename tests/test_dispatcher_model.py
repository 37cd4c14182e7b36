"""The dispatcher against any interleaving of what clients, workers and the network may do."""

from __future__ import annotations

import itertools
from collections import Counter

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from asyncrt.actions import Action, Cancel, Failed, Requeued, Retried, Revoke, Send
from asyncrt.dispatcher import MAX_PREFETCH, Dispatcher
from asyncrt.options import Backups, Retry
from asyncrt.queues import Chunk, RunQueue
from asyncrt.stragglers import Stragglers

EAGER = Backups(multiplier=1.0, quantile=0.0, min_seconds=0.0, max_share=1.0)


class Model(RuleBasedStateMachine):
    """Plays workers, the client and the network against the dispatcher.

    What a worker has is taken from ``Send`` only. It runs its chunks from the front, reports
    outcomes once or twice, and gives back from the end.
    """

    runs = Bundle("runs")

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.dispatcher = Dispatcher(draw=itertools.cycle([0.0, 0.5, 1.0]))
        self.names = itertools.count()
        self.limits: dict[str, int] = {}  # slots of the workers that are there
        self.draining: set[str] = set()
        self.out: dict[tuple[str, int], Chunk] = {}  # what workers have
        self.done: dict[tuple[str, int], int] = {}  # how far each chunk was run
        self.ends: dict[tuple[str, int], int] = {}  # calls from here on were given back
        self.past: list[tuple[str, int, int, int]] = []  # reports that may come again
        self.settled: Counter[tuple[str, int]] = Counter()
        self.all_runs: list[RunQueue] = []
        self.cancelled_runs: set[str] = set()

    # -- what the dispatcher says -----------------------------------------------------------------

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.receive(action.chunk)
            elif isinstance(action, Failed):
                self.settle(action.run, action.index)
            elif isinstance(action, (Cancel, Revoke)):
                assert (action.worker, action.chunk) in self.out
            elif isinstance(action, Requeued):
                for index in action.indexes:
                    assert not self.settled[action.run.id, index]
            elif isinstance(action, Retried):
                assert not self.settled[action.run.id, action.index]

    def receive(self, chunk: Chunk) -> None:
        assert chunk.worker in self.limits, "sent to a worker that is not there"
        assert chunk.worker not in self.draining, "sent to a worker that drains"
        assert chunk.indexes, "sent an empty chunk"
        assert chunk.run.id not in self.cancelled_runs, "sent a call of a cancelled run"
        known = self.open_calls()
        for index in chunk.indexes:
            call = (chunk.run.id, index)
            assert not self.settled[call], f"{call} was settled or cancelled, and is sent again"
            if index in chunk.run.copies:
                assert chunk is chunk.run.copies[index][1]
            else:
                assert call not in known, f"{call} is with two workers"
            assert index < chunk.run.offered, "sent a call that was never offered"
        self.out[chunk.worker, chunk.id] = chunk
        self.done[chunk.worker, chunk.id] = 0
        self.ends[chunk.worker, chunk.id] = len(chunk.indexes)

    def open_calls(self) -> set[tuple[str, int]]:
        return {
            (chunk.run.id, index)
            for key, chunk in self.out.items()
            for index in chunk.indexes[self.done[key] : self.ends[key]]
            if not self.settled[chunk.run.id, index]
        }

    def settle(self, run: RunQueue, index: int) -> None:
        self.settled[run.id, index] += 1
        assert self.settled[run.id, index] == 1, f"call {index} of {run.id} was settled twice"
        if not any(
            not self.settled[run.id, each] for each in range(run.offered)
        ):  # as a run does when all of its calls are settled and its input has ended
            run.total = run.offered

    # -- what happens -----------------------------------------------------------------------------

    @rule(
        target=runs,
        chunksize=st.sampled_from([None, 1, 3]),
        attempts=st.integers(1, 3),
        alone=st.booleans(),
        backups=st.sampled_from([None, EAGER, Backups()]),
    )
    def add_run(
        self, chunksize: int | None, attempts: int, *, alone: bool, backups: Backups | None
    ) -> RunQueue:
        retry = Retry(attempts=attempts, delay=1.0)
        run = RunQueue(f"r{len(self.all_runs)}", retry, chunksize, alone)
        run.stragglers = Stragglers(backups) if backups else None
        self.all_runs.append(run)
        self.dispatcher.add_run(run)
        return run

    @rule(run=runs, count=st.integers(1, 30))
    def offer(self, run: RunQueue, count: int) -> None:
        self.act(self.dispatcher.offer(run, count, now=self.now))

    @rule(slots=st.integers(1, 3))
    def join(self, slots: int) -> None:
        name = f"w{next(self.names)}"
        self.limits[name] = slots
        self.act(self.dispatcher.worker_joined(name, slots, now=self.now))

    @precondition(lambda self: self.limits)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.limits)))
        del self.limits[name]
        self.draining.discard(name)
        for key in [key for key in self.out if key[0] == name]:
            self.let_go(key)
        self.act(self.dispatcher.worker_lost(name, now=self.now))

    @precondition(lambda self: self.limits)
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.limits)))
        self.draining.add(name)
        self.dispatcher.drain(name)

    @precondition(lambda self: self.out)
    @rule(
        data=st.data(), count=st.integers(1, 10), seconds=st.sampled_from([1e-6, 1e-3, 0.02, 1.0])
    )
    def run_some(self, data: st.DataObject, count: int, seconds: float) -> None:
        key = data.draw(st.sampled_from(sorted(self.out)))
        first = self.done[key]
        count = min(count, self.ends[key] - first)
        failing = data.draw(st.sets(st.integers(first, first + count - 1), max_size=2))
        self.report(key, first, count, failing, seconds)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def start_one(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.out)))
        chunk, position = self.out[key], self.done[key]
        if position < self.ends[key] and self.dispatcher.chunk(*key) is chunk:
            self.act(self.dispatcher.started(chunk, position, at=self.now, now=self.now))

    @rule(run=runs)
    def input_ends(self, run: RunQueue) -> None:
        run.total = run.offered

    def report(
        self, key: tuple[str, int], first: int, count: int, failing: set[int], seconds: float
    ) -> None:
        self.done[key] = max(self.done[key], first + count)
        chunk = self.dispatcher.chunk(*key)
        self.past.append((*key, first, count))
        if self.done[key] == self.ends[key]:
            self.let_go(key)
        if chunk is None:
            return
        failures: dict[int, Exception] = {
            position: ValueError(str(position)) for position in failing
        }
        news, actions = self.dispatcher.finished(
            chunk,
            first,
            count,
            failures,
            busy_seconds=count * seconds,
            times=[0.0, seconds] * count,
            now=self.now,
        )
        for position in news:
            self.settle(chunk.run, chunk.indexes[position])
        self.act(actions)

    def let_go(self, key: tuple[str, int]) -> None:
        for of_chunk in (self.out, self.done, self.ends):
            del of_chunk[key]

    @precondition(lambda self: self.past)
    @rule(data=st.data(), fails=st.booleans())
    def report_again(self, data: st.DataObject, *, fails: bool) -> None:
        worker, number, first, count = data.draw(st.sampled_from(self.past))
        chunk = self.dispatcher.chunk(worker, number)
        if chunk is None:
            return
        failures: dict[int, Exception] = {first: ValueError()} if fails else {}
        news, actions = self.dispatcher.finished(
            chunk, first, count, failures, busy_seconds=1.0, now=self.now
        )
        assert not news
        self.act(actions)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), keep=st.integers(0, 3))
    def give_back(self, data: st.DataObject, keep: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.out)))
        chunk = self.out[key]
        first = min(self.done[key] + keep, self.ends[key])
        count = self.ends[key] - first
        self.ends[key] = first
        if self.done[key] == first:
            self.let_go(key)
        if self.dispatcher.chunk(*key) is chunk:
            self.act(self.dispatcher.revoked(chunk, first, count, now=self.now))

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def reconnect(self, data: st.DataObject) -> None:
        """Chunks that the worker has not begun may have been lost on the way to it."""
        name = data.draw(st.sampled_from(sorted({key[0] for key in self.out})))
        mine = [key for key in self.out if key[0] == name]
        fresh = [
            key
            for key in mine
            if not self.done[key] and self.ends[key] == len(self.out[key].indexes)
        ]
        lost = data.draw(st.sets(st.sampled_from(fresh))) if fresh else set()
        for key in lost:
            self.let_go(key)
        known = [key[1] for key in mine if key not in lost]
        self.act(self.dispatcher.reconcile(name, known, now=self.now))

    @rule(run=runs, data=st.data())
    def cancel_call(self, run: RunQueue, data: st.DataObject) -> None:
        open_indexes = [index for index in range(run.offered) if not self.settled[run.id, index]]
        if not open_indexes or run.over:
            return
        index = data.draw(st.sampled_from(open_indexes))
        actions = self.dispatcher.cancel_call(run, index, now=self.now)
        self.settle(run, index)
        self.act(actions)

    @rule(run=runs)
    def cancel_run(self, run: RunQueue) -> None:
        actions = self.dispatcher.cancel_run(run, now=self.now)
        self.cancelled_runs.add(run.id)
        for index in range(run.offered):
            if not self.settled[run.id, index]:
                self.settle(run, index)
        self.act(actions)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def cannot_send(self, data: st.DataObject) -> None:
        """A chunk that was just decided on turns out not to be picklable."""
        fresh = [
            key
            for key, chunk in self.out.items()
            if not self.done[key]
            and self.ends[key] == chunk.left == len(chunk.indexes)
            and not chunk.run.over
        ]
        if not fresh:
            return
        key = data.draw(st.sampled_from(sorted(fresh)))
        chunk = self.out[key]
        self.let_go(key)
        failures: dict[int, Exception] = {0: TypeError("a lock")}
        self.act(self.dispatcher.unsendable(chunk, failures, now=self.now))

    @rule(seconds=st.floats(0.0, 5.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.act(self.dispatcher.tick(now=self.now))
        due = self.dispatcher.next_due()
        assert due is None or due > self.now

    # -- what always holds ------------------------------------------------------------------------

    @invariant()
    def no_worker_has_too_many_chunks(self) -> None:
        for name, slots in self.limits.items():
            assert len(self.dispatcher.workers[name].chunks) <= (1 + MAX_PREFETCH) * slots

    @invariant()
    def no_slot_is_free_while_a_call_is_ready(self) -> None:
        for run in self.all_runs:
            if run.over or not any(
                index not in run.cancelled
                for index in itertools.chain(
                    range(run.next_index, run.offered), *(item[0] for item in run.returned)
                )
            ):
                continue
            for name, slots in self.limits.items():
                if name not in self.draining:
                    assert len(self.dispatcher.workers[name].chunks) >= slots

    def teardown(self) -> None:
        """Whatever was done to them: with one good worker, all calls come to an end."""
        for name in tuple(self.limits):
            del self.limits[name]
            for key in [key for key in self.out if key[0] == name]:
                self.let_go(key)
            self.act(self.dispatcher.worker_lost(name, now=self.now))
        self.join(2)
        while self.out or self.dispatcher.next_due() is not None:
            for key in tuple(self.out):
                self.report(key, self.done[key], self.ends[key] - self.done[key], set(), 1e-3)
            self.now = max(self.now, self.dispatcher.next_due() or 0.0)
            self.act(self.dispatcher.tick(now=self.now))
        for run in self.all_runs:
            for index in range(run.offered):
                if not run.over:
                    assert self.settled[run.id, index] == 1, f"{run.id}, call {index} was lost"
            assert not run.chunks


Model.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestAnyInterleaving = Model.TestCase
