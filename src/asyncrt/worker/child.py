"""The process that runs calls. One per slot; the only one that runs user code.

Three things connect it with the parent:

channel
    A socket: functions and chunks of calls in, outcomes out.
tokens
    One byte for each call, see ``asyncrt.worker.tokens``: taken before a call begins. So the parent
    can take calls back, and knows which one is running, without a message.
board
    Shared memory. Outcomes are written there first and sent in batches. So the outcomes of fast
    calls cost no system call each, and if the process dies, or its next call takes an hour, the
    parent still has them.

The order makes it safe: the child writes an outcome, *then* takes the next token; the parent reads
the number of tokens left, copies the outcomes of calls before the running one, and looks at the
number again. While it has not changed, the child cannot have overwritten the board.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import resource
import struct
import sys
import time
import traceback
import types
from collections.abc import Callable, Coroutine, Mapping, MutableMapping, Sequence
from typing import Any, Final

from asyncrt.errors import SerializationError
from asyncrt.inside import seat
from asyncrt.worker.channel import Channel, SharedMemory
from asyncrt.worker.modules import install
from asyncrt.worker.payload import decode, encode
from asyncrt.worker.protocol import Buffer, Frame, Kind, byte_length
from asyncrt.worker.records import LENGTH, RECORD, Outcome, pack_raised
from asyncrt.worker.tokens import take

BOARD_BYTES: Final = 1 << 19
BOARD_HEAD: Final = struct.Struct("<dQ")  # start of the running call; outcomes written since flush
BOARD_START: Final = 64
_FLUSH_SECONDS: Final = 0.005
_MEASURE_SECONDS: Final = 0.05
_LINE_LIMIT: Final = 8192
_LARGE_RECORD_BYTES: Final = 1 << 16
_Loaded = tuple[Callable[..., Any], dict[str, Any]]
_COUNT: Final = struct.Struct("<Q")
_START: Final = struct.Struct("<d")
_NOTHING: Final[Mapping[str, str]] = {}


class Child:
    """Runs chunks of calls until the parent hangs up."""

    def __init__(self, channel: Channel, tokens: int, board: SharedMemory) -> None:
        self._channel = channel
        self._tokens = tokens
        self._board = board
        self._streams: tuple[LogStream, ...] = ()
        self._packed: dict[str, Buffer] = {}
        self._units: dict[str, Mapping[str, str]] = {}  # of functions, see worker.modules
        self._packed_units: dict[str, Buffer] = {}
        self._loaded: dict[str, _Loaded] = {}
        self._at = BOARD_START
        self._unsent = 0
        self._first = 0
        self._flushed = 0.0
        self._measured = 0.0
        self._pid = os.getpid()

    def preload(self, loaded: dict[str, _Loaded]) -> None:
        """Take functions that the server had loaded before it forked this process."""
        self._loaded.update(loaded)

    def redirect(self, mark: str) -> None:
        """Make standard output and error of this process the parent's pipes, call by call."""
        self._streams = LogStream(1, mark), LogStream(2, mark)
        sys.stdout, sys.stderr = self._streams

    def forget(self, names: Sequence[str]) -> None:
        """Drop functions that the client will not use again."""
        for name in names:
            self._packed.pop(name, None)
            self._units.pop(name, None)
            self._loaded.pop(name, None)

    def serve(self) -> None:
        """Run until the parent hangs up."""
        while True:
            received = self._channel.receive()
            if received is None:
                return
            while received:
                kind = received[0][0].kind
                if kind == Kind.CALLS:
                    self._run_chunk(received.pop(0)[0])  # no name here may keep its body alive
                    continue
                frame, _ = received.pop(0)
                if kind == Kind.FUNCTION:
                    self._take(frame.header, frame.body)
                elif kind == Kind.QUIT:
                    return
                del frame

    def _take(self, header: dict[str, Any], body: Buffer) -> None:
        """Take a function, or a unit of modules that one needs."""
        if "unit" in header:
            self._packed_units[header["unit"]] = body
            return
        self.forget(header["forget"])
        self._packed[header["function"]] = body
        self._units[header["function"]] = header.get("units", _NOTHING)

    def _run_chunk(self, frame: Frame) -> None:
        chunk = frame.header
        self._at = BOARD_START
        self._unsent = 0
        self._first = 0
        self._flushed = time.monotonic()
        seat.run_id = chunk["run"]
        seat.attempt = chunk["attempt"]
        seat.timeout = chunk.get("timeout")
        indexes = chunk["indexes"]
        body = memoryview(frame.body)
        at = 0
        loaded: _Loaded | bytes | None = None
        segments: list[Buffer] = []
        for position in range(chunk["count"]):
            if not take(self._tokens):
                break  # the parent took the rest back
            started = time.monotonic()
            _START.pack_into(self._board, 0, started)
            seat.index = indexes[position] if isinstance(indexes, list) else indexes + position
            seat.started = started
            seat.call = None
            if loaded is None:
                loaded = self._load(chunk["function"])
                started = time.monotonic()
            size = LENGTH.unpack_from(body, at)[0]
            begin = at + LENGTH.size
            at = begin + size
            if isinstance(loaded, bytes):
                self._write(started, Outcome.RAISED, [loaded])
                continue
            outcome, segments = _run_call(loaded, chunk["style"], body, begin, at)
            if os.getpid() != self._pid:
                os._exit(0)  # a copy that the call forked and let return: its answer is not wanted
            for stream in self._streams:
                if stream.pending:
                    with contextlib.suppress(OSError):  # the call has closed it
                        stream.flush()
            seat.leave()  # before anybody can know of the outcome
            self._write(started, outcome, segments)
        else:
            take(self._tokens)  # the end
        seat.run_id = None
        del body, frame, loaded, segments
        self._flush(done=True)

    def _load(self, name: str) -> _Loaded | bytes:
        """Return the function, or the outcome of every call of it if it cannot be loaded."""
        loaded = self._loaded.get(name)
        if loaded is None:
            try:
                loaded = self._loaded[name] = load_function(
                    self._packed[name], self._units[name], self._packed_units
                )
            except SerializationError as error:
                return describe_error(error)
            del self._packed[name], self._units[name]
        return loaded

    def _write(self, started: float, outcome: int, segments: list[Buffer]) -> None:
        """Put an outcome on the board, or send it at once if it is large."""
        size = byte_length(segments)
        head = RECORD.pack(started, time.monotonic(), size, outcome)
        total = RECORD.size + size
        if total > _LARGE_RECORD_BYTES:
            self._flush()
            self._send([head, *segments], 1, done=False)
            return
        if self._at + total > BOARD_BYTES:
            self._flush()
        board, at = self._board, self._at
        board[at : at + RECORD.size] = head
        at += RECORD.size
        for segment in segments:
            end = at + len(segment)
            board[at:end] = segment
            at = end
        self._at = at
        self._unsent += 1
        _COUNT.pack_into(board, 8, self._unsent)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush()

    def _flush(self, *, done: bool = False) -> None:
        if not self._unsent and not done:
            return
        with memoryview(self._board) as view, view[BOARD_START : self._at] as records:
            self._send([records], self._unsent, done=done)
        self._at = BOARD_START
        self._unsent = 0
        _COUNT.pack_into(self._board, 8, 0)

    def _send(self, records: list[Buffer], count: int, *, done: bool) -> None:
        header: dict[str, Any] = {"first": self._first, "count": count}
        self._flushed = time.monotonic()
        if done:
            header["done"] = True
            self._measure(header)
            for stream in self._streams:
                if stream.take_printed():
                    header["printed"] = True
        self._first += count
        self._channel.send(Kind.RESULT, header, records)

    def _measure(self, header: dict[str, Any]) -> None:
        """Tell how much memory this process holds, now and then: reading it costs 20 us."""
        if self._flushed - self._measured > _MEASURE_SECONDS:
            self._measured = self._flushed
            header["peak"] = peak_bytes()
            header["held"] = held_bytes()


def _run_call(
    loaded: _Loaded, style: str, body: memoryview, begin: int, end: int
) -> tuple[int, list[Buffer]]:
    """Run one call; whatever happens in it becomes an outcome."""
    function, fixed = loaded
    try:
        try:
            arguments = decode(body, begin, end)
        except Exception as error:
            raise _explained("the arguments cannot be loaded here", error) from error
        if style == "one":
            value = function(arguments, **fixed)
        elif style == "star":
            value = function(*arguments, **fixed)
        else:
            value = function(*arguments[0], **arguments[1])
        del arguments
        if isinstance(value, Coroutine):
            import asyncio  # noqa: PLC0415 - 50 ms that calls of plain functions do not pay

            value = asyncio.run(value)
        elif isinstance(value, types.GeneratorType | types.AsyncGeneratorType):
            raise SerializationError("a generator cannot travel: return a list of what it yields")
    except BaseException as error:  # noqa: BLE001 - the outcome of user code, whatever it is
        return Outcome.RAISED, [describe_error(error)]
    try:
        return Outcome.SUCCESS, dump_result(value, base=RECORD.size)
    except BaseException as error:  # noqa: BLE001 - any object's own reduction may raise anything
        reason = _explained(
            f"the call succeeded, but its result (a {_type_name(type(value))}) cannot be pickled",
            error,
        )
        return Outcome.RAISED, [describe_error(reason)]


def load_function(
    packed: Buffer,
    units: Mapping[str, str] = _NOTHING,
    packed_units: MutableMapping[str, Buffer] | None = None,
) -> _Loaded:
    """Return the function and the keyword arguments that all its calls share.

    Args:
        units: Directories of the units that it needs, see ``asyncrt.worker.modules``.
        packed_units: Those that may not be unpacked yet. They are taken out.

    Raises:
        SerializationError: It cannot be loaded here, with the reason.
    """
    try:
        install(units, {} if packed_units is None else packed_units)
        view = memoryview(packed)
        function, fixed = decode(view, 0, view.nbytes)
    except BaseException as error:
        raise _explained("the function cannot be loaded here", error) from error
    return function, fixed


def dump_result(value: Any, *, base: int = 0) -> list[Buffer]:
    """Pickle a value: as the standard library does where that works, else as cloudpickle does."""
    try:
        return encode(value, pickle.Pickler, base=base)
    except Exception:  # noqa: BLE001 - any object's own reduction may raise anything
        import cloudpickle  # noqa: PLC0415 - loaded by the server, except where fork is unsafe

        return encode(value, cloudpickle.Pickler, base=base)


def _explained(what: str, error: BaseException) -> SerializationError:
    text = f"{what}: {_type_name(type(error))}: {_text(error)}"
    module = error.name if isinstance(error, ImportError) else None
    return SerializationError(text, module=module or "")


def describe_error(error: BaseException) -> bytes:
    """Return an exception as a payload: its facts as text and, if it survives the way, itself."""
    facts: dict[str, Any] = {
        "type": _type_name(type(error)),
        "text": _text(error),
        "traceback": _trace(error),
    }
    if not isinstance(error, Exception):
        return pack_raised({**facts, "exit": True}, ())
    try:
        BaseException.with_traceback(error, None)  # a frozen one refuses the attribute
        segments = dump_result(error)
        packed = b"".join(segments)
        copy = decode(memoryview(packed), 0, len(packed))
        if type(copy).__qualname__ != type(error).__qualname__:
            return pack_raised({**facts, "reason": "pickle changes its type"}, ())
    except BaseException as reason:  # noqa: BLE001 - the user's own reduction and constructor
        return pack_raised({**facts, "reason": f"{_type_name(type(reason))}: {_text(reason)}"}, ())
    return pack_raised(facts, [packed])


def _trace(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(type(error), error, _user_frames(error)))
    except BaseException as second:  # noqa: BLE001 - the user's own attributes
        return f"(its traceback cannot be shown: {_type_name(type(second))})"


def _user_frames(error: BaseException) -> types.TracebackType | None:
    """Return the traceback without the frames of this module."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals is globals():
        trace = trace.tb_next
    return trace


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as second:  # noqa: BLE001 - the user's own __str__
        return f"<str() raised {_type_name(type(second))}>"


def _type_name(kind: type) -> str:
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )


def peak_bytes() -> int:
    """Return the most memory that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_bytes() -> int:
    """Return the memory that this process holds now; its peak where that is not known."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes()


class LogStream(io.TextIOBase):
    """Standard output or error of a child: line by line, each call's text marked as its own.

    The mark goes through the same pipe as the text, before the first text of each call, so that it
    is right also for calls that last microseconds. Code that writes to the descriptor itself is
    taken for output of the call that printed last.
    """

    def __init__(self, fd: int, mark: str) -> None:
        self._fd = fd
        self._mark = mark
        self._marked: tuple[str | None, int] | None = None
        self.buffer = io.FileIO(fd, "wb", closefd=False)
        self.pending = ""
        self._printed = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True

    def take_printed(self) -> bool:
        """Return whether anything was written since this was asked last."""
        printed, self._printed = self._printed, False
        return printed

    def write(self, text: str) -> int:
        self.pending += text
        if "\n" in text or len(self.pending) > _LINE_LIMIT:
            self.flush()
        return len(text)

    def flush(self) -> None:
        text, self.pending = self.pending, ""
        if not text:
            return
        self._printed = True
        data = text.encode("utf-8", "backslashreplace")
        position = (seat.run_id, seat.index)
        if position != self._marked:
            self._marked = position
            index = seat.index if seat.run_id is not None else -1
            data = f"\0{self._mark}{index}\0".encode() + data
        while data:
            data = data[os.write(self._fd, data) :]


def run_child(
    channel: Channel,
    tokens: int,
    board: SharedMemory,
    *,
    mark: str,
    loaded: dict[str, _Loaded],
) -> None:
    """Run calls in this process, whose standard output and error are the parent's pipes already."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    child = Child(channel, tokens, board)
    child.redirect(mark)
    child.preload(loaded)
    child.serve()
