"""Workers in memory that speak the real protocol, and break down when they are told to."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from asyncrt.backends.base import Receiver, WorkerExit
from asyncrt.errors import WorkerStartError
from asyncrt.options import PoolSettings
from asyncrt.testing.memorystream import MemoryStream, WorkerEnd
from asyncrt.testing.scriptedcalls import ScriptedSlot, Work
from asyncrt.worker.protocol import Buffer, Frame, Kind

_KILLED: Final = -9
_Report = tuple[int, dict[str, Any], Sequence[Buffer]]


class ScriptedBackend:
    """A backend without processes: calls run in the client's own event loop.

    Functions are called directly, coroutines become tasks, so a call that blocks blocks everything:
    use ``takes`` for calls that last. Nothing is isolated: a call that ends the process ends the
    test. A cancelled or timed out call is ended at its next ``await``. There is no memory limit.

    Args:
        default_max_workers: What ``max_workers=None`` means.
        latency: Seconds that bytes take to the worker, and back.

    Attributes:
        workers: All that were ever started, in order.
    """

    name = "scripted"

    def __init__(self, *, default_max_workers: int = 2, latency: float = 0.0) -> None:
        self.default_max_workers = default_max_workers
        self.latency = latency
        self.workers: list[ScriptedWorker] = []
        self._failing_starts: deque[WorkerStartError] = deque()
        self._refusals = 0

    @property
    def running(self) -> list[ScriptedWorker]:
        """The workers that have not ended."""
        return [worker for worker in self.workers if not worker.ended]

    def fail_next_starts(self, count: int, error: WorkerStartError | None = None) -> None:
        """Let the next workers not start."""
        failure = error or WorkerStartError("no worker can be started, as the test asked for")
        self._failing_starts.extend([failure] * count)

    def refuse_next_connections(self, count: int) -> None:
        """Let the next attempts to connect to any worker fail."""
        self._refusals += count

    def take_refusal(self) -> bool:
        """Count one attempt to connect; return whether it is to fail."""
        refused = self._refusals > 0
        self._refusals -= refused
        return refused

    def take_failing_start(self) -> WorkerStartError | None:
        """Return the error of the worker to be started now, if it is to fail."""
        return self._failing_starts.popleft() if self._failing_starts else None

    @asynccontextmanager
    async def open_pool(
        self, settings: PoolSettings, *, token: bytes
    ) -> AsyncIterator[ScriptedPool]:
        """Open a pool. See ``Backend.open_pool``."""
        async with anyio.create_task_group() as group:
            pool = ScriptedPool(self, settings, token, group)
            try:
                yield pool
            finally:
                pool.end_all()
                group.cancel_scope.cancel()


class ScriptedPool:
    """The workers of one executor."""

    def __init__(
        self, backend: ScriptedBackend, settings: PoolSettings, token: bytes, group: TaskGroup
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._token = token
        self._group = group
        self._workers: list[ScriptedWorker] = []

    @property
    def default_max_workers(self) -> int:
        """How many workers there may be if nobody says."""
        return self._backend.default_max_workers

    async def start_worker(self) -> ScriptedWorker:
        """Start a worker; it listens at once."""
        await anyio.lowlevel.checkpoint()
        failure = self._backend.take_failing_start()
        if failure is not None:
            raise failure
        number = len(self._backend.workers) + 1
        worker = ScriptedWorker(
            f"scripted-{number}", self._backend, self._settings, self._token, self._group
        )
        self._backend.workers.append(worker)
        self._workers.append(worker)
        return worker

    def end_all(self) -> None:
        """End the workers of this pool."""
        for worker in self._workers:
            worker.end("the pool was closed", exit_code=0, expected=True)


class ScriptedWorker:
    """A worker in memory, with hooks to break it.

    Attributes:
        connections: How often it was connected to.
        repeat_reports: Send each report twice.
        report_delay: Seconds for which reports are held up; they keep their order.
        ran: Run and index of each call that it began, in order.
    """

    def __init__(
        self,
        name: str,
        backend: ScriptedBackend,
        settings: PoolSettings,
        token: bytes,
        group: TaskGroup,
    ) -> None:
        self.name = name
        self.connections = 0
        self.repeat_reports = False
        self.report_delay = 0.0
        self.ran: list[tuple[str, int]] = []
        self._backend = backend
        self._settings = settings
        self._token = token
        self._group = group
        self._loop = asyncio.get_running_loop()
        self._client: WorkerEnd | None = None
        self._ends: set[WorkerEnd] = set()
        self._hung = False
        self._ending = False
        self._exit: asyncio.Future[WorkerExit] = self._loop.create_future()
        self._functions: dict[str, Buffer] = {}
        self._queue: deque[Work] = deque()
        self._slots = [ScriptedSlot(self) for _ in range(settings.slots)]
        self._scopes: set[anyio.CancelScope] = set()
        self._sequence = itertools.count(1)
        self._unacknowledged: OrderedDict[int, _Report] = OrderedDict()
        self._logs: deque[tuple[dict[str, Any], bytes]] = deque()
        self._cancelled_early: set[int] = set()
        self._orphaned: asyncio.TimerHandle | None = None
        self._await_client()

    # -- what the test does -----------------------------------------------------------------------

    def cut_connection(self) -> None:
        """End its connections; what is on its way is lost. It goes on working."""
        for end in tuple(self._ends):
            end.close()

    def die(self, *, exit_code: int = _KILLED, reason: str = "it died, as the test asked") -> None:
        """End at once, with everything that it runs."""
        self.end(reason, exit_code=exit_code, expected=False)

    def hang(self) -> None:
        """Say nothing any more and hear nothing, for ever; connections stay open, calls go on."""
        self._hung = True
        for end in self._ends:
            end.deaf = True

    def crash_call(self, slot: int = 0, *, signal: int = 9) -> None:
        """Let the call that a slot runs end as if something had killed its process."""
        message = f"the process that ran the call was killed by signal {signal}"
        self._slots[slot].condemn("WorkerCrashedError", message, signal=signal, log_tail="")

    def exhaust_memory(self, slot: int = 0) -> None:
        """Let the call that a slot runs end as if it had needed more memory than there is."""
        limit = self._settings.memory_bytes or 0
        message = "the call needed more memory than the worker has"
        self._slots[slot].condemn("OutOfMemoryError", message, limit_bytes=limit, peak_bytes=limit)

    def terminate(self) -> None:
        """Begin to end, as on SIGTERM: give back what has not begun, finish what runs."""
        if not self._ending and not self.ended:
            self._send(Kind.GOODBYE, {"reason": "SIGTERM", "grace": 5.0})
            self._ending = True
            self._revoke(None)
            self._end_if_done()

    # -- Worker -----------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self._exit.done()

    @property
    def busy(self) -> bool:
        """Whether it has calls that have not ended."""
        return bool(self._queue) or any(slot.work is not None for slot in self._slots)

    async def connect(self, receiver: Receiver) -> MemoryStream:
        """Open a stream. See ``Worker.connect``."""
        await anyio.lowlevel.checkpoint()
        if self.ended:
            raise WorkerStartError(self._exit.result().reason)
        if self._backend.take_refusal():
            raise ConnectionError(f"{self.name} refuses a connection, as the test asked for")
        self.connections += 1
        stream = MemoryStream(receiver, latency=self._backend.latency)
        end = WorkerEnd(
            stream,
            token=self._token,
            facts=self._facts,
            handle=self._on_frame,
            lost=self._on_lost,
        )
        end.deaf = self._hung
        self._ends.add(end)
        return stream

    async def wait_exit(self) -> WorkerExit:
        """Return when it has ended."""
        return await asyncio.shield(self._exit)

    def kill(self) -> None:
        """End it at once. See ``Worker.kill``."""
        self.end("it was killed", exit_code=_KILLED, expected=True)

    def end(self, reason: str, *, exit_code: int, expected: bool) -> None:
        """End it. No-op if it has ended."""
        if self.ended:
            return
        self._exit.set_result(WorkerExit(reason, exit_code, expected=expected))
        if self._orphaned is not None:
            self._orphaned.cancel()
        self._queue.clear()
        for scope in self._scopes:
            scope.cancel()
        self.cut_connection()

    # -- connections ------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        return {
            "python": ".".join(str(part) for part in sys.version_info[:3]),
            "slots": len(self._slots),
            "time": self._loop.time(),
        }

    def _await_client(self) -> None:
        self._orphaned = self._loop.call_later(self._settings.orphan_timeout, self._be_orphan)

    def _be_orphan(self) -> None:
        self.end("nobody was connected", exit_code=0, expected=True)

    def _on_lost(self, end: WorkerEnd) -> None:
        self._ends.discard(end)
        if end is self._client:
            self._client = None
            if not self.ended:
                self._await_client()

    def _on_frame(self, end: WorkerEnd, frame: Frame) -> None:
        if end is not self._client:
            older, self._client = self._client, end
            if older is not None:
                older.close()
            if self._orphaned is not None:
                self._orphaned.cancel()
        header = frame.header
        match frame.kind:
            case Kind.RESUME:
                self._resume(header["sequence"])
            case Kind.FUNCTION:
                self._functions[header["function"]] = frame.body
                for name in header.get("forget", ()):
                    self._functions.pop(name, None)
            case Kind.CALLS:
                self._on_calls(Work(frame))
            case Kind.ACKNOWLEDGE:
                self._acknowledge(header["sequence"])
            case Kind.CANCEL:
                self._cancel(header["chunk"], header.get("positions"))
            case Kind.REVOKE:
                self._revoke(header.get("chunk"))
            case Kind.HEARTBEAT:
                answer = {"time": self._loop.time(), "echo": header.get("time")}
                self._send(Kind.HEARTBEAT, answer)
            case Kind.DRAIN:
                self._ending = True
            case Kind.QUIT:
                self.end("it was told to quit", exit_code=0, expected=True)
        if not self.ended:
            self._dispatch()
            self._end_if_done()

    def _send(self, kind: int, header: dict[str, Any], body: Sequence[Buffer] = ()) -> None:
        if self._client is not None:
            self._client.send(kind, header, body)

    def _report(self, kind: int, header: dict[str, Any], body: Sequence[Buffer] = ()) -> None:
        """Send what the client must learn, and keep it until it is acknowledged."""
        if self.ended:
            return
        sequence = header["sequence"] = next(self._sequence)
        self._unacknowledged[sequence] = kind, header, body
        for _ in range(2 if self.repeat_reports else 1):
            if self.report_delay:
                self._loop.call_later(self.report_delay, self._send, kind, header, body)
            else:
                self._send(kind, header, body)

    def _acknowledge(self, sequence: int) -> None:
        for known in tuple(self._unacknowledged):
            if known <= sequence:
                del self._unacknowledged[known]

    def _resume(self, sequence: int) -> None:
        self._acknowledge(sequence)
        known = [work.id for work in self._queue]
        known += [slot.work.id for slot in self._slots if slot.work is not None]
        for _, report, _ in self._unacknowledged.values():
            known += [part[0] for part in report["parts"]]
        self._send(Kind.RESUME, {"chunks": known, "functions": list(self._functions)})
        for kind, header, body in self._unacknowledged.values():
            self._send(kind, header, body)
        while self._logs:
            note, text = self._logs.popleft()
            self._send(Kind.LOG, note, [text])

    # -- calls ------------------------------------------------------------------------------------

    def _on_calls(self, work: Work) -> None:
        if "acknowledge" in work.header:
            self._acknowledge(work.header["acknowledge"])
        if work.id in self._cancelled_early or self._ending:
            self._cancelled_early.discard(work.id)
            self.on_given_back(work, 0, work.end)
        else:
            self._queue.append(work)

    def _dispatch(self) -> None:
        for slot in self._slots:
            ready = next((work for work in self._queue if work.function in self._functions), None)
            if ready is None:
                return
            if slot.work is None:
                self._queue.remove(ready)
                slot.work = ready
                self._group.start_soon(self._run, slot, ready)

    async def _run(self, slot: ScriptedSlot, work: Work) -> None:
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                if not self.ended:
                    await slot.run(work)
            finally:
                self._scopes.discard(scope)
                if slot.work is work:
                    slot.work = None

    def _cancel(self, chunk: int, positions: list[int] | None) -> None:
        for work in self._queue:
            if work.id == chunk:
                self._queue.remove(work)
                self.on_given_back(work, 0, work.end)
                return
        for slot in self._slots:
            if slot.work is not None and slot.work.id == chunk:
                slot.take_back()
                if positions is None or slot.position in positions:
                    slot.condemn("RunCancelledError", "the call was cancelled")
                return
        self._cancelled_early.add(chunk)

    def _revoke(self, chunk: int | None) -> None:
        for work in tuple(self._queue):
            if chunk in (None, work.id):
                self._queue.remove(work)
                self.on_given_back(work, 0, work.end)
        for slot in self._slots:
            if slot.work is not None and chunk in (None, slot.work.id):
                slot.take_back()

    def _end_if_done(self) -> None:
        unread = self._unacknowledged and self._client is not None
        if self._ending and not (self.busy or unread or self.ended):
            self.end("it was told to end", exit_code=0, expected=True)

    # -- SlotOwner --------------------------------------------------------------------------------

    def load(self, function: str) -> Buffer:
        """Return a packed function."""
        return self._functions[function]

    def on_records(self, work: Work, first: int, records: list[bytes]) -> None:
        """Report outcomes."""
        self._report(Kind.RESULT, {"parts": [[work.id, first, len(records)]]}, records)

    def on_given_back(self, work: Work, first: int, count: int) -> None:
        """Report calls that will not run here."""
        self._report(Kind.REVOKED, {"parts": [[work.id, first, count]]})

    def on_began(self, work: Work, position: int) -> None:
        """Note that a call was begun."""
        self.ran.append((work.header["run"], work.index_of(position)))

    def on_started(self, work: Work, position: int, started: float) -> None:
        """Tell that a call has been running for a moment."""
        note = {"chunk": work.id, "position": position, "time": started}
        self._send(Kind.STARTED, note)

    def on_hold_over(self, slot: ScriptedSlot) -> None:
        """Give back calls that were thought to be short, and wait behind one that is not."""
        slot.take_back()
        if all(other.work is not None for other in self._slots):
            for waiting in tuple(self._queue):
                if "hold" in waiting.header:
                    self._queue.remove(waiting)
                    self.on_given_back(waiting, 0, waiting.end)

    def on_printed(self, work: Work, position: int, name: str, text: str) -> None:
        """Pass on what a call wrote."""
        note = {"stream": name, "index": work.index_of(position), "run": work.header["run"]}
        if self._client is None:
            self._logs.append((note, text.encode()))
        else:
            self._send(Kind.LOG, note, [text.encode()])

    def on_idle(self) -> None:
        """Give a slot that is free something to do."""
        self._dispatch()
        self._end_if_done()
