"""How a scripted worker runs calls: in the client's own event loop."""

from __future__ import annotations

import asyncio
import io
import sys
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final, ParamSpec, Protocol, TypeVar

import anyio
import anyio.lowlevel

from asyncrt.errors import SerializationError
from asyncrt.inside import seat
from asyncrt.worker.child import describe_error, dump_result, load_function
from asyncrt.worker.payload import decode
from asyncrt.worker.protocol import Buffer, Frame
from asyncrt.worker.records import LENGTH, RECORD, Outcome, pack_failure

P = ParamSpec("P")
R = TypeVar("R")

LOOK_SECONDS: Final = 0.05  # as the real worker: until then a call is not announced
_CALLS_A_REPORT: Final = 8
_ATTRIBUTE: Final = "__asyncrt_takes__"
_Loaded = tuple[Callable[..., Any], dict[str, Any]]


def takes(seconds: float | Callable[P, float], fn: Callable[P, R]) -> Callable[P, R]:
    """Return a function that takes a while before it does what another one does.

    A scripted worker lets the time pass in the event loop, so in no time under a virtual clock. Any
    other worker sleeps, so the same function serves on every backend.

    Args:
        seconds: How long; or a function of the call's arguments that says so.
        fn: What it does then.
    """

    def slow(*args: P.args, **kwargs: P.kwargs) -> R:
        import time  # noqa: PLC0415 - it travels by value: what it needs comes with it

        time.sleep(seconds(*args, **kwargs) if callable(seconds) else seconds)
        return fn(*args, **kwargs)

    slow.__dict__[_ATTRIBUTE] = (seconds, fn)
    return slow


class Work:
    """A chunk of calls.

    Attributes:
        end: Calls from here on were given back.
    """

    def __init__(self, frame: Frame) -> None:
        header = frame.header
        self.header = header
        self.body = memoryview(frame.body)
        self.id: int = header["chunk"]
        self.function: str = header["function"]
        self.end: int = header["count"]

    def index_of(self, position: int) -> int:
        """Return the index of a call within its run."""
        indexes = self.header["indexes"]
        return int(indexes[position] if isinstance(indexes, list) else indexes + position)


class SlotOwner(Protocol):
    """The worker of a slot."""

    def load(self, function: str) -> Buffer:
        """Return a packed function."""

    def on_records(self, work: Work, first: int, records: list[bytes]) -> None:
        """Outcomes of consecutive calls."""

    def on_given_back(self, work: Work, first: int, count: int) -> None:
        """Calls that will not run here."""

    def on_began(self, work: Work, position: int) -> None:
        """A call begins."""

    def on_started(self, work: Work, position: int, started: float) -> None:
        """A call has been running for a moment."""

    def on_hold_over(self, slot: ScriptedSlot) -> None:
        """A call runs for longer than others shall wait behind it."""

    def on_printed(self, work: Work, position: int, name: str, text: str) -> None:
        """A call wrote to its standard output or error."""

    def on_idle(self) -> None:
        """A slot is free."""


class ScriptedSlot:
    """Runs one chunk at a time."""

    def __init__(self, owner: SlotOwner) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._loaded: dict[str, _Loaded] = {}
        self._scope = anyio.CancelScope()
        self._verdict: bytes | None = None
        self.work: Work | None = None
        self.position = 0

    def take_back(self) -> None:
        """Give back the calls that have not begun."""
        work = self.work
        if work is not None and work.end > self.position + 1:
            first, count = self.position + 1, work.end - self.position - 1
            work.end = first
            self._owner.on_given_back(work, first, count)

    def condemn(self, error: str, message: str, **facts: Any) -> None:
        """End the running call, as if its process had been killed; it fails as told."""
        if self._verdict is None:
            self._verdict = pack_failure(error, message, **facts)
            self._scope.cancel()

    async def run(self, work: Work) -> None:
        """Run a chunk. ``work`` was set before, so that nobody gives this slot another one."""
        records: list[bytes] = []
        first = 0
        at = 0
        self.position = 0
        while self.position < work.end:
            size = LENGTH.unpack_from(work.body, at)[0]
            begin = at + LENGTH.size
            at = begin + size
            records.append(await self._run_call(work, begin, at))
            self.position += 1
            if self.position >= work.end or len(records) >= _CALLS_A_REPORT:
                self._owner.on_records(work, first, records)
                first, records = self.position, []
        self.work = None
        self._owner.on_idle()

    async def _run_call(self, work: Work, begin: int, end: int) -> bytes:
        """Run one call; return its record."""
        position, started = self.position, self._loop.time()
        self._owner.on_began(work, position)
        timeout: float | None = work.header.get("timeout")
        hold: float | None = work.header.get("hold")
        timers = [
            self._loop.call_later(LOOK_SECONDS, self._owner.on_started, work, position, started)
        ]
        if timeout is not None:
            message = f"the attempt ran longer than timeout={timeout:g} s and was killed"
            timers.append(self._loop.call_later(timeout, self._time_out, message, timeout))
        if hold is not None:
            timers.append(self._loop.call_later(hold, self._owner.on_hold_over, self))
        done: list[tuple[int, bytes]] = []
        self._verdict = None
        try:
            with anyio.CancelScope() as self._scope:
                done.append(await self._outcome(work, position, begin, end, started))
        finally:
            for timer in timers:
                timer.cancel()
        outcome, payload = done[0] if done else (Outcome.FAILED, self._told_verdict())
        return RECORD.pack(started, self._loop.time(), len(payload), outcome) + payload

    def _told_verdict(self) -> bytes:
        return self._verdict or b""

    def _time_out(self, message: str, timeout: float) -> None:
        self.condemn("CallTimeoutError", message, timeout=timeout)

    async def _outcome(
        self, work: Work, position: int, begin: int, end: int, started: float
    ) -> tuple[int, bytes]:
        seating = _Seating(work, position, started, self._owner)
        try:
            await anyio.lowlevel.checkpoint()
            function, fixed = self._load(work.function)
            value = decode(work.body, begin, end)
            style = work.header["style"]
            args, kwargs = (value,), fixed
            if style == "star":
                args = value
            elif style == "full":
                args, kwargs = value[0], {**fixed, **value[1]}
            while hasattr(function, _ATTRIBUTE):
                seconds, function = getattr(function, _ATTRIBUTE)
                with seating:
                    delay = seconds(*args, **kwargs) if callable(seconds) else seconds
                await anyio.sleep(delay)
            with seating:
                value = function(*args, **kwargs)
            if isinstance(value, Coroutine):
                value = await seating.drive(value)
            elif isinstance(value, types.GeneratorType | types.AsyncGeneratorType):
                raise SerializationError("a generator cannot travel")
        except asyncio.CancelledError as error:  # noqa: ASYNC103 - raised on if it is ours
            if self._is_cancelled():
                raise
            return Outcome.RAISED, describe_error(error)  # noqa: ASYNC104 - the user's own
        except BaseException as error:  # noqa: BLE001 - the outcome of user code, whatever it is
            return Outcome.RAISED, describe_error(error)
        finally:
            seating.leave()
        try:
            return Outcome.SUCCESS, b"".join(dump_result(value, base=RECORD.size))
        except Exception as error:  # noqa: BLE001 - any object's own reduction may raise anything
            name = type(value).__qualname__
            text = f"the call succeeded, but its result of type {name} cannot be pickled: {error}"
            return Outcome.RAISED, describe_error(SerializationError(text))

    def _is_cancelled(self) -> bool:
        task = asyncio.current_task()
        return self._scope.cancel_called or (task is not None and task.cancelling() > 0)

    def _load(self, name: str) -> _Loaded:
        loaded = self._loaded.get(name)
        if loaded is None:
            loaded = self._loaded[name] = load_function(self._owner.load(name))
        return loaded


class _Printed(io.TextIOBase):
    """Standard output or error of one call."""

    def __init__(self, told: Callable[[str], None]) -> None:
        self._told = told

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if text:
            self._told(text)
        return len(text)


class _Seating:
    """Makes ``current_call()``, standard output and error those of one call, while it runs."""

    def __init__(self, work: Work, position: int, started: float, owner: SlotOwner) -> None:
        header = work.header
        self._mine: dict[str, Any] = {
            "run_id": header["run"],
            "index": work.index_of(position),
            "attempt": header["attempt"],
            "started": started,
            "timeout": header.get("timeout"),
            "call": None,
        }
        self._streams = (
            _Printed(lambda text: owner.on_printed(work, position, "out", text)),
            _Printed(lambda text: owner.on_printed(work, position, "err", text)),
        )
        self._outer: dict[str, Any] = {}
        self._outer_streams = sys.stdout, sys.stderr

    def __enter__(self) -> None:
        self._outer = {name: getattr(seat, name) for name in self._mine}
        self._outer_streams = sys.stdout, sys.stderr
        self._put(self._mine)
        sys.stdout, sys.stderr = self._streams

    def __exit__(self, *exc_info: object) -> None:
        self._mine = {name: getattr(seat, name) for name in self._mine}
        self._put(self._outer)
        sys.stdout, sys.stderr = self._outer_streams

    @staticmethod
    def _put(values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(seat, name, value)

    @types.coroutine
    def drive(self, coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Run a coroutine to its end, seated at each of its steps."""
        step: Callable[[], Any] = lambda: coroutine.send(None)  # noqa: E731 - replaced at each step
        while True:
            try:
                with self:
                    waits_for = step()
            except StopIteration as stop:
                return stop.value
            try:
                sent = yield waits_for
            except BaseException as error:  # noqa: ASYNC103, BLE001 - thrown into the coroutine
                raised = error
                step = lambda: coroutine.throw(raised)  # noqa: B023, E731
            else:
                step = lambda: coroutine.send(sent)  # noqa: B023, E731

    def leave(self) -> None:
        """Remove what the call leaves."""
        call = self._mine["call"]
        if call is not None:
            call.remove_scratch()
