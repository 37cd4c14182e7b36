"""The workers of one shape, and the runs on them: carries out what the dispatcher decides."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

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
from asyncrt.backends.base import Backend, WorkerExit, WorkerPoolHandle
from asyncrt.dispatcher import Dispatcher
from asyncrt.echo import Echo
from asyncrt.errorgroups import innermost
from asyncrt.errors import (
    AsyncrtError,
    ExecutorClosedError,
    RunCancelledError,
    SerializationError,
    WorkerStartError,
)
from asyncrt.events import CopyDropped as CopyDroppedEntry
from asyncrt.events import Lost, Sent, Started
from asyncrt.events import Requeued as RequeuedEntry
from asyncrt.link import Link
from asyncrt.options import PoolSettings
from asyncrt.queues import Chunk, Pace
from asyncrt.restarts import Restarts
from asyncrt.results import (
    Outcomes,
    Part,
    annotate,
    explain,
    facts_of,
    finished_entry,
    load_outcomes,
)
from asyncrt.run import Run
from asyncrt.serialize import pack_arguments
from asyncrt.spill import Spill
from asyncrt.threads import run_in_thread
from asyncrt.worker.protocol import Buffer, Frame, Kind, byte_length

logger = logging.getLogger(__name__)


_LARGE_BYTES: Final = 1 << 20
_HOLD_SECONDS: Final = 0.05
_SAY_SECONDS: Final = 5.0
_MAX_PACES: Final = 128


class WorkerPool:
    """Starts workers as calls need them, sends chunks, takes outcomes home.

    Everything but the tasks below ``run`` is synchronous: an event of the loop comes in, the
    dispatcher decides, actions are carried out at once.
    """

    def __init__(self, settings: PoolSettings, backend: Backend, *, token: bytes) -> None:
        self.settings = settings
        self._backend = backend
        self._token = token
        self._dispatcher = Dispatcher(draw=_draws())
        self._runs: dict[str, Run[Any]] = {}
        self._functions: Counter[str] = Counter()
        self._paces: dict[str, Pace] = {}
        self._links: dict[str, Link] = {}
        self._starting = 0
        self._draining: set[str] = set()
        self._spill = Spill(settings.spill_dir, settings.spill_limit_bytes)
        self._restarts = Restarts()
        self._group: TaskGroup | None = None
        self._feeds: TaskGroup
        self._echo = Echo() if settings.echo else None
        self._handle: WorkerPoolHandle | None = None
        self._failed: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time  # what anyio.current_time() looks up each time
        self._timer: asyncio.TimerHandle | None = None
        self._leaving: dict[str, Run[Any]] = {}  # ended, but workers still have calls of them
        self._deadlines: dict[str, asyncio.TimerHandle] = {}
        self._pending: deque[Action] = deque()
        self._acting = False
        self._said = 0.0

    # -- life -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the pool until cancelled. A backend that fails ends its runs, not the executor."""
        try:
            # Inputs outermost: one that cannot be stopped must not keep the workers from ending.
            async with (
                anyio.create_task_group() as self._feeds,
                self._backend.open_pool(self.settings, token=self._token) as handle,
                anyio.create_task_group() as group,
            ):
                self._handle, self._group = handle, group
                for run in tuple(self._runs.values()):
                    self._start_feed(run)
                self._scale()
                await anyio.sleep_forever()
        except* AsyncrtError as errors:
            self._fail(innermost(errors))
        except* Exception as errors:
            # A bug: its runs are told what it is, and those of other pools go on.
            logger.exception("a pool of workers failed")
            self._fail(innermost(errors))
        finally:
            self._group = None
            self._spill.close()
            if self._timer is not None:
                self._timer.cancel()
            if self._failed is None:
                self._failed = ExecutorClosedError("the executor was closed")
                for run in tuple(self._runs.values()):
                    run.close()
                    run.quiet.set()
            for run in self._leaving.values():
                run.quiet.set()

    def _fail(self, error: BaseException) -> None:
        self._failed = error
        for run in tuple(self._runs.values()):
            run.abort(error)
            run.quiet.set()

    def tick(self) -> None:
        """Do what time brings, twice a second: end idle workers, say what runs wait for."""
        now = self._now()
        self._end_idle(now)
        note = self._what_is_missing()
        for run in self._runs.values():
            run.note = note
        if note and self._runs and now - self._said >= _SAY_SECONDS:
            if self._said:
                logger.info("%s", note)
            self._said = now
        elif not note:
            self._said = 0.0

    def _what_is_missing(self) -> str | None:
        ready = sum(1 for link in self._links.values() if link.joined)
        if ready or not self._runs:
            return None
        if self._starting or self._links:
            return "waiting for a worker to be ready"
        return "waiting for a worker to be started"

    # -- runs -------------------------------------------------------------------------------------

    def add(self, run: Run[Any]) -> None:
        """Take a run; its calls are on their way when this returns.

        Raises:
            AsyncrtError: The pool could not be opened; as its other runs were told.
        """
        if self._failed is not None:
            raise self._failed
        self._runs[run.id] = run
        self._functions.update(run.function.hashes)
        run.queue.pace = self._pace(run.function.name)
        self._dispatcher.add_run(run.queue)
        if run.settings.deadline is not None:
            self._deadlines[run.id] = self._loop.call_at(run.settings.deadline, run.expire)
        if self._group is not None:
            self._start_feed(run)

    def _pace(self, function: str) -> Pace:
        """Return what is known of a function; forget the one that was used longest ago."""
        pace = self._paces.pop(function, None) or Pace()
        self._paces[function] = pace
        if len(self._paces) > _MAX_PACES:
            del self._paces[next(iter(self._paces))]
        return pace

    def _start_feed(self, run: Run[Any]) -> None:
        if run.feed is not None and self._group is not None:
            self._feeds.start_soon(self._feed, run)

    async def _feed(self, run: Run[Any]) -> None:
        feed = run.feed
        assert feed is not None
        try:
            await feed.run()
        except asyncio.CancelledError as error:  # noqa: ASYNC103 - told below, unless the pool is closed
            if anyio.current_effective_deadline() == -math.inf:  # the pool is closed
                raise
            # The input's own: it awaited something that was cancelled.
            failure = RunCancelledError(f"the input of run {run.id} raised CancelledError")
            failure.__cause__ = error
            run.abort(failure)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - the user's own input may raise anything
            run.abort(error)
        else:
            run.input_ended()

    @property
    def runs(self) -> Sequence[Run[Any]]:
        """The runs that have not ended."""
        return tuple(self._runs.values())

    def offer(self, run: Run[Any], count: int) -> None:
        """Take more calls of a run. See ``RunOwner``."""
        self._act(self._dispatcher.offer(run.queue, count, now=self._now()))
        self._scale()

    def give_up(self, run: Run[Any]) -> None:
        """Cancel what is left of a run. See ``RunOwner``."""
        self._act(self._dispatcher.cancel_run(run.queue, now=self._now()))
        self._remove(run)
        self._check_quiet(run)

    def give_up_call(self, run: Run[Any], index: int) -> None:
        """Cancel one call. See ``RunOwner``."""
        self._act(self._dispatcher.cancel_call(run.queue, index, now=self._now()))

    def forget(self, run: Run[Any]) -> None:
        """Let go of a run that has ended. See ``RunOwner``."""
        self._dispatcher.finish_run(run.queue)
        self._remove(run)
        self._check_quiet(run)

    def _remove(self, run: Run[Any]) -> None:
        if self._runs.pop(run.id, None) is not None:
            for name in run.function.hashes:
                self._functions[name] -= 1
                if not self._functions[name]:
                    del self._functions[name]
            if run.queue.chunks:
                self._leaving[run.id] = run
            if run.id in self._deadlines:
                self._deadlines.pop(run.id).cancel()
        if self._failed is not None or self._group is None:
            run.quiet.set()

    def _check_quiet(self, run: Run[Any]) -> None:
        if run.queue.over and not run.queue.chunks:
            run.quiet.set()
            self._leaving.pop(run.id, None)

    # -- workers ----------------------------------------------------------------------------------

    def _max_workers(self) -> int:
        if self.settings.max_workers is not None:
            return self.settings.max_workers
        return self._handle.default_max_workers if self._handle else 1

    def _scale(self) -> None:
        """Start workers if there is more to do than those that are there, or coming, can take."""
        if self._group is None:
            return
        most = self._max_workers()
        have = len(self._links) + self._starting - len(self._draining)
        if have >= most:
            return
        slots = self.settings.slots
        wanted = math.ceil(self._dispatcher.demand(most * slots) / slots)
        for _ in range(min(most, max(wanted, self.settings.min_workers)) - have):
            self._starting += 1
            self._group.start_soon(self._run_worker)

    def _end_idle(self, now: float) -> None:
        timeout = self.settings.idle_timeout
        if timeout is None:
            return
        spare = len(self._links) - len(self._draining) - self.settings.min_workers
        for name, state in tuple(self._dispatcher.workers.items()):
            if spare <= 0:
                return
            if (
                name not in self._draining
                and not state.chunks
                and now - state.idle_since >= timeout
            ):
                self._dispatcher.drain(name)
                self._draining.add(name)
                self._links[name].send(Kind.DRAIN, {})
                spare -= 1

    async def _run_worker(self) -> None:
        handle = self._handle
        assert handle is not None
        link: Link | None = None
        error: WorkerStartError | None = None
        ended: WorkerExit | None = None
        try:
            worker = await handle.start_worker()
            link = Link(
                worker,
                self,
                token=self._token,
                heartbeat_interval=self.settings.heartbeat_interval,
                start_timeout=self.settings.start_timeout,
                orphan_timeout=self.settings.orphan_timeout,
                schedule=self._schedule,
                allocate=self._spill.allocate,
            )
            self._links[link.name] = link
            self._starting -= 1
            ended = await link.run()
        except WorkerStartError as failure:
            error = failure
        except OSError as failure:  # of this machine: no descriptors, no memory
            error = WorkerStartError(f"no worker could be started: {failure}")
        finally:
            if link is None:
                self._starting -= 1
            else:
                self._lose(link)
        if link is None or not link.joined:
            await self._after_failed_start(error, ended)
        elif ended is not None and not ended.expected:
            logger.warning("%s was lost: %s", link.name, ended.reason)
        self._scale()

    def _lose(self, link: Link) -> None:
        self._links.pop(link.name, None)
        if self._echo is not None:
            self._echo.forget(link.name)
        self._draining.discard(link.name)
        actions = self._dispatcher.worker_lost(link.name, now=self._now())
        self._record_lost(actions, link.name, sent=True)
        self._act(actions)
        for run in tuple(self._leaving.values()):
            self._check_quiet(run)

    async def _after_failed_start(
        self, error: WorkerStartError | None, ended: WorkerExit | None
    ) -> None:
        """Try again in a moment; after some failures in a row tell the runs."""
        self._restarts.failed()
        if error is None and ended is not None:
            error = WorkerStartError(
                f"{ended.reason}, before it was ready\n{ended.log_tail}".strip(),
                log_tail=ended.log_tail,
                exit_code=ended.exit_code,
            )
        failure = error or WorkerStartError("no worker could be started")
        level = logging.WARNING if self._restarts.are_news else logging.DEBUG
        logger.log(level, "a worker could not be started: %s", failure)
        final = self._restarts.are_many or isinstance(failure, TimeoutError)
        if final and not self._dispatcher.workers:
            for run in tuple(self._runs.values()):
                run.abort(failure)
            self._restarts.told()
        await anyio.sleep(self._restarts.delay)

    # -- LinkOwner --------------------------------------------------------------------------------

    def on_joined(self, link: Link) -> None:
        """Give a new worker something to do."""
        self._restarts.succeeded()
        self._act(self._dispatcher.worker_joined(link.name, link.slots, now=self._now()))

    def on_resumed(self, link: Link, chunks: Sequence[int]) -> None:
        """After a reconnection, make good what was lost on the way to the worker."""
        known = set(chunks)
        state = self._dispatcher.workers.get(link.name)
        for chunk in tuple(state.chunks.values()) if state else ():
            run = self._runs.get(chunk.run.id)
            if chunk.id in known and run is not None:
                link.send_function(run.function)
            elif chunk.id in known:
                link.send(Kind.CANCEL, {"chunk": chunk.id})
        self._act(self._dispatcher.reconcile(link.name, chunks, now=self._now()))
        if link.name in self._draining:
            link.send(Kind.DRAIN, {})

    def needs_function(self, name: str) -> bool:
        """Whether a run that has not ended uses a function, or a unit of modules."""
        return name in self._functions

    def on_frame(self, link: Link, frame: Frame) -> None:
        """Handle what a worker says."""
        header = frame.header
        if frame.kind == Kind.RESULT:
            self._on_result(link, frame)
        elif frame.kind == Kind.REVOKED:
            for number, first, count in header["parts"]:
                chunk = self._dispatcher.chunk(link.name, number)
                if chunk is not None:
                    self._act(self._dispatcher.revoked(chunk, first, count, now=self._now()))
                    self._after_news(chunk)
        elif frame.kind == Kind.STARTED:
            self._on_started(link, header)
        elif frame.kind == Kind.LOG:
            self._on_log(link, header, frame.body)
        elif frame.kind == Kind.GOODBYE:
            logger.info("%s ends: %s", link.name, header.get("reason"))
            if link.name in self._dispatcher.workers:
                self._dispatcher.drain(link.name)
                self._draining.add(link.name)
                self._scale()

    def _on_started(self, link: Link, header: dict[str, Any]) -> None:
        chunk = self._dispatcher.chunk(link.name, header["chunk"])
        run = self._runs.get(chunk.run.id) if chunk else None
        if chunk is None or run is None:
            return
        index = chunk.indexes[header["position"]]
        at = header["time"] + link.clock_offset
        run.log.append(Started(at, (index,), chunk.attempt, link.name))
        if run.listener is not None:
            run.listener.started(run, index)
        self._act(self._dispatcher.started(chunk, header["position"], at=at, now=self._now()))

    def _on_log(self, link: Link, header: dict[str, Any], body: Buffer) -> None:
        text = bytes(body)
        run = self._runs.get(header["run"]) or self._leaving.get(header["run"])
        if run is not None:
            run.logs.add(header["index"], text)
        if self._echo is not None:
            self._echo.write(link.name, header["stream"], text)

    # -- outcomes ---------------------------------------------------------------------------------

    def _on_result(self, link: Link, frame: Frame) -> None:
        parts = []
        for number, first, count in frame.header["parts"]:
            parts.append((self._dispatcher.chunk(link.name, number), first, count))
        if len(frame.body) > _LARGE_BYTES and self._group is not None:
            self._group.start_soon(self._take_large, link, parts, frame.body)
        else:
            for outcomes in self._load(link, parts, frame.body, later=False):
                self._take(link, outcomes)

    @staticmethod
    def _load(link: Link, parts: list[Part], body: Buffer, *, later: bool) -> Iterator[Outcomes]:
        return load_outcomes(
            parts,
            body,
            worker=link.name,
            clock_offset=link.clock_offset,
            later=later,
        )

    async def _take_large(self, link: Link, parts: list[Part], body: Buffer) -> None:
        """Unpickle in a thread; the loop goes on between slices of a large object."""
        later = self._spill.defers
        found = await run_in_thread(lambda: list(self._load(link, parts, body, later=later)))
        for outcomes in found:
            if self._dispatcher.chunk(link.name, outcomes.chunk.id) is outcomes.chunk:
                self._take(link, outcomes)

    def _take(self, link: Link, outcomes: Outcomes) -> None:
        chunk, first, values = outcomes.chunk, outcomes.first, outcomes.values
        errors, times = outcomes.errors, outcomes.times
        run = self._runs.get(chunk.run.id)
        if run is not None:
            for position, (error, trace) in errors.items():
                index = chunk.indexes[position]
                explain(error, run.function.modules, run.settings.exclude_modules)
                annotate(error, trace, run.logs.of(index), facts_of(chunk, position, link.name))
        news, actions = self._dispatcher.finished(
            chunk,
            first,
            len(values),
            {position: error for position, (error, _) in errors.items()},
            busy_seconds=sum(times[1::2]) - sum(times[::2]),
            times=times,
            now=self._now(),
        )
        if run is not None and (news or errors):
            run.log.append(finished_entry(outcomes, news, actions, now=self._now()))
            if run.queue.stragglers is not None:  # told before the run may end with these outcomes
                self._act([action for action in actions if isinstance(action, CopyDropped)])
                actions = [action for action in actions if not isinstance(action, CopyDropped)]
            if isinstance(news, range):
                if news:
                    found = values[news.start - first : news.stop - first]
                    run.settle_successes(chunk.indexes[news.start : news.stop], found)
            elif news:
                found = [values[position - first] for position in news]
                run.settle_successes([chunk.indexes[position] for position in news], found)
        self._act(actions)
        self._after_news(chunk)

    def _record_lost(self, actions: Sequence[Action], worker: str, *, sent: bool) -> None:
        for action in actions:
            if isinstance(action, Failed) and (run := self._runs.get(action.run.id)) is not None:
                run.log.append(
                    Lost(self._now(), (action.index,), action.attempts, worker, action.error, sent)
                )

    def _after_news(self, chunk: Chunk) -> None:
        if chunk.run.id in self._leaving:
            self._check_quiet(self._leaving[chunk.run.id])

    # -- actions ----------------------------------------------------------------------------------

    def _act(self, actions: list[Action]) -> None:
        """Carry out actions. What that brings about is carried out in turn, not inside."""
        self._pending.extend(actions)
        if self._acting:
            return
        self._acting = True
        try:
            while self._pending:
                self._act_once(self._pending.popleft())
        finally:
            self._acting = False
        self._set_timer()

    def _act_once(self, action: Action) -> None:
        match action:
            case Send(chunk):
                self._send(chunk)
            case Cancel(worker, chunk_id, positions):
                link = self._links.get(worker)
                if link is not None and self._dispatcher.chunk(worker, chunk_id) is not None:
                    link.send(Kind.CANCEL, {"chunk": chunk_id, "positions": positions})
            case Revoke(worker, chunk_id):
                link = self._links.get(worker)
                if link is not None:
                    link.send(Kind.REVOKE, {"chunk": chunk_id})
            case Failed(queue, index, error, attempts):
                run = self._runs.get(queue.id)
                if run is not None:
                    run.settle_failure(index, error, attempts=attempts)
            case Requeued(queue, indexes, worker):
                run = self._runs.get(queue.id)
                if run is not None:
                    run.log.append(RequeuedEntry(self._now(), indexes, worker))
            case CopyDropped(queue, index, worker, failure):
                run = self._runs.get(queue.id)
                if run is not None:
                    run.log.append(CopyDroppedEntry(self._now(), (index,), worker, failure))
            case Retried(queue, index, error, delay):
                logger.info(
                    "run %s: call %s failed and is tried again in %.2f s: %r",
                    queue.id, index, delay, error,
                )  # fmt: skip

    def _send(self, chunk: Chunk) -> None:
        run = self._runs.get(chunk.run.id)
        link = self._links.get(chunk.worker)
        if link is None:
            return
        if run is None:  # it ended between the decision and now
            self._act(self._dispatcher.unsendable(chunk, {}, now=self._now()))
            self._after_news(chunk)
            return
        body: list[Buffer] = []
        size = 0
        failures: dict[int, Exception] = {}
        for position, index in enumerate(chunk.indexes):
            try:
                segments = pack_arguments(run.arguments(index), size)
            except SerializationError as error:
                error.run_id, error.index = run.id, index
                failures[position] = error
            else:
                body += segments
                size += byte_length(segments)
        if failures:
            actions = self._dispatcher.unsendable(chunk, failures, now=self._now())
            self._record_lost(actions, chunk.worker, sent=False)
            self._act(actions)
            return
        self._dispatcher.measured(chunk.run, len(chunk.indexes), size)
        settings, indexes = run.settings, chunk.indexes
        header: dict[str, Any] = {
            "chunk": chunk.id,
            "run": run.id,
            "function": run.function.name,
            "count": len(indexes),
            "indexes": indexes[0] if isinstance(indexes, range) else list(indexes),
            "attempt": chunk.attempt,
            "style": run.style,
            "hold": _HOLD_SECONDS,
        }
        if settings.timeout is not None:
            header["timeout"] = settings.timeout
        if settings.isolation == "call":
            header["fresh"] = True
        run.log.append(Sent(self._now(), indexes, chunk.attempt, chunk.worker))
        link.send_calls(header, body, run.function)

    def _set_timer(self) -> None:
        """Wake when a delayed call is due."""
        due = self._dispatcher.next_due()
        if self._timer is not None:
            if due is not None and self._timer.when() == due:
                return
            self._timer.cancel()
            self._timer = None
        if due is not None and self._group is not None:
            self._timer = self._loop.call_at(due, self._on_due)

    def _on_due(self) -> None:
        self._timer = None
        self._act(self._dispatcher.tick(now=self._now()))
        self._scale()

    def _schedule(self, delay: float, callback: Callable[[], None]) -> object:
        if delay:
            return self._loop.call_later(delay, callback)
        return self._loop.call_soon(callback)


def _draws() -> Iterator[float]:
    while True:
        yield random.random()  # noqa: S311 - jitter
