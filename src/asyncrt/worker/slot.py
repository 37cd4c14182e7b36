"""One slot of the worker, as the parent sees it: a child process and the chunk that it runs."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from asyncrt.errors import ProtocolError
from asyncrt.worker.channel import INLINE_BYTES, Channel, SharedMemory, close_descriptors
from asyncrt.worker.protocol import Buffer, Kind
from asyncrt.worker.records import RECORD, Outcome, iterate_records, pack_failure
from asyncrt.worker.server import kill_group
from asyncrt.worker.tokens import Tokens

BOARD_BYTES: Final = 1 << 19
BOARD_START: Final = 64
LOOK_SECONDS: Final = 0.05  # how often a chunk that runs on is looked at
_MERGED_CALLS: Final = 256
_MERGED_BODIES: Final = 64
_SAME: Final = ("run", "function", "attempt", "style", "timeout", "hold", "fresh")
_TAIL_BYTES: Final = 4096
_LOG_READ_BYTES: Final = 1 << 16
_NOTHING: Final[Mapping[str, Any]] = {}


class Chunk:
    """Calls that travel together, and what became of them.

    Several small chunks of one run that wait are merged, so that a child runs through them without
    asking; what is reported names the client's own chunks, its ``parts``.
    """

    def __init__(self, header: dict[str, Any], body: Buffer) -> None:
        self.header = header
        self.bodies = [body]
        self.parts: list[tuple[int, int]] = [(header["chunk"], header["count"])]
        self.function: str = header["function"]
        self.count: int = header["count"]
        _check(header)
        self.timeout: float | None = header.get("timeout")
        self.hold: float | None = header.get("hold")
        self.fresh: bool = header.get("fresh", False)
        self.end = self.count  # calls from here on were given back
        self.delivered = 0
        self.sent = 0  # by the child itself; what it has on its board comes after that
        self.began = 0.0
        self.announced = False
        self.look_at = float("inf")

    @property
    def ids(self) -> list[int]:
        """The client's chunks that are in it."""
        return [number for number, _ in self.parts]

    def merge(self, other: Chunk) -> bool:
        """Take in another chunk that has not begun, if it is small and of the same kind."""
        mine, its = self.header, other.header
        if (
            self.fresh
            or self.count + other.count > _MERGED_CALLS
            or len(self.bodies[0]) + len(other.bodies[0]) > INLINE_BYTES // _MERGED_BODIES
            or len(self.bodies) >= _MERGED_BODIES
            or any(mine.get(name) != its.get(name) for name in _SAME)
        ):
            return False
        self.header = {**mine, "indexes": _listed(mine) + _listed(its)}
        self.header["count"] = self.count = self.end = self.count + other.count
        self.parts += other.parts
        self.bodies += other.bodies
        return True

    def split(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """Return consecutive calls as ``(client's chunk, first position in it, count)``."""
        found: list[tuple[int, int, int]] = []
        begin = 0
        for number, size in self.parts:
            low, high = max(first, begin), min(first + count, begin + size)
            if low < high:
                found.append((number, low - begin, high - low))
            begin += size
        return found


class Verdict:
    """Why the parent killed a child, as the failure of the call that it ran."""

    def __init__(self, error: str, message: str, **facts: Any) -> None:
        self.error = error
        self.message = message
        self.facts = facts


class Slot:
    """A child, its connections, and its current chunk.

    Args:
        deliver: Called with ``(chunk, first, count, records, done)`` for outcomes.
        give_back: Called with ``(chunk, first, count)`` for calls that will not run here.
        log: Called with ``(chunk or None, index, "out" or "err", text)``.
    """

    def __init__(
        self,
        number: int,
        *,
        deliver: Callable[[Chunk, int, int, Sequence[Buffer], bool], None],
        give_back: Callable[[Chunk, int, int], None],
        log: Callable[[Chunk | None, int, str, bytes], None],
    ) -> None:
        self.number = number
        self.generation = 0
        self.pid = 0
        self.server: Channel
        self.units: dict[str, str] = {}  # that the child has, or will have: see worker.modules
        self.chunk: Chunk | None = None
        self.retiring = False
        self.held_bytes = 0
        self.peak_bytes = 0
        self.last_function: str | None = None
        self.fresh_wanted = False
        self.mark = os.urandom(8).hex() + ":"
        self.tail = b""
        self._deliver = deliver
        self._give_back = give_back
        self._log = log
        self._verdict: Verdict | None = None
        self._functions: set[str] = set()
        self._forget: list[str] = []
        self._open = False
        self._log_indexes: dict[str, int] = {}
        self._log_rest: dict[str, bytes] = {}

    # -- the process ------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether it may be given a chunk."""
        return self._open and self.chunk is None and not self.retiring

    def spawn(self, server: Channel, units: Mapping[str, str] = _NOTHING) -> None:
        """Ask a server for a child. It may be given work at once: its socket buffers that.

        Args:
            units: Directories of the units that the server has, by their modules' names.

        Raises:
            OSError: The server is gone.
        """
        self.generation += 1
        self.pid = 0
        self.server = server
        self.retiring = False
        self.fresh_wanted = False
        self.held_bytes = 0
        self._verdict = None
        self.units = dict(units)
        self._functions = set()
        self._forget = []
        self._log_indexes = {}
        self._log_rest = {}
        mine, its = socket.socketpair()
        mine.setblocking(False)
        self.channel = Channel(mine)
        self.tokens = Tokens()
        self.board = SharedMemory(BOARD_BYTES)
        self.out, out = _pipe()
        self.err, err = _pipe()
        self._open = True
        try:
            server.send(
                Kind.SPAWN,
                {"child": [self.number, self.generation], "mark": self.mark},
                fds=[its.fileno(), self.tokens.child_fd, self.board.fd, out, err],
            )
        finally:
            its.close()
            close_descriptors((out, err))

    @property
    def is_open(self) -> bool:
        """Whether there is a child whose end is not settled."""
        return self._open

    def kill(self) -> None:
        """Kill the child and what it started, without its server, which may be gone."""
        if self._open and self.pid:
            kill_group(self.pid)

    def retire(self) -> None:
        """Let the child end by itself; it has no chunk."""
        self.retiring = True
        self.channel.send(Kind.QUIT, {})

    def close(self) -> None:
        """Close what connects with the child. It ends, if it has not."""
        if self._open:
            self._open = False
            self.channel.close()
            self.tokens.close()
            close_descriptors((self.out, self.err))

    # -- chunks -----------------------------------------------------------------------------------

    def has(self, function: str) -> bool:
        """Whether the child was given a function."""
        return function in self._functions

    def begin(
        self,
        chunk: Chunk,
        function: Buffer | None,
        *,
        now: float,
        units: Mapping[str, str] = _NOTHING,
        packed: Mapping[str, Buffer] = _NOTHING,
    ) -> None:
        """Give the child a chunk.

        Args:
            function: The packed function; not needed if the child has it.
            units: Directories of the units that it needs, by their modules' names.
            packed: Those of them that are not unpacked, by their directories.
        """
        self.chunk = chunk
        chunk.began = now
        chunk.look_at = now + min(LOOK_SECONDS, chunk.timeout or LOOK_SECONDS)
        self.tail = b""
        # First, so that all calls are given back if the child turns out to be dead. It takes no
        # token before it has the chunk.
        self.tokens.offer(chunk.count)
        if chunk.function not in self._functions and function is not None:
            self._functions.add(chunk.function)
            self.units |= units
            for path, body in packed.items():
                self.channel.send(Kind.FUNCTION, {"unit": path}, [body])
            note = {"function": chunk.function, "forget": self._forget, "units": dict(units)}
            self._forget = []
            self.channel.send(Kind.FUNCTION, note, [function])
        self.channel.send(Kind.CALLS, chunk.header, chunk.bodies)
        chunk.bodies = []

    def forget(self, function: str) -> None:
        """Let the child drop a function, when it is given the next one."""
        if function in self._functions:
            self._functions.discard(function)
            self._forget.append(function)

    def running(self) -> tuple[int, float] | None:
        """Return position and start (monotonic seconds) of the call that runs; ``None`` if none.

        A child that does not even begin counts as running the first call since it was told to.
        """
        chunk = self.chunk
        if chunk is None or chunk.delivered >= chunk.end:
            return None
        begun = chunk.end - self.tokens.left()
        if begun <= chunk.delivered:
            return chunk.delivered, chunk.began
        started: float = memoryview(self.board)[:8].cast("d")[0]
        return begun - 1, max(started, chunk.began)

    @property
    def has_begun(self) -> bool:
        """Whether the child has begun a call whose outcome is not known."""
        chunk = self.chunk
        return chunk is not None and chunk.end - self.tokens.left() > chunk.delivered

    def take_back(self) -> None:
        """Give the client back the calls of the current chunk that have not begun."""
        chunk = self.chunk
        if chunk is None:
            return
        taken = self.tokens.take_back()
        if taken:
            chunk.end -= taken
            self._give_back(chunk, chunk.end, taken)

    def read_board(self) -> None:
        """Deliver outcomes that the child has not sent yet, while it runs on."""
        self.receive()
        chunk = self.chunk
        if chunk is None:
            return
        left = self.tokens.left()
        finished = chunk.end - left - 1
        if finished <= chunk.delivered:
            return
        copy = bytes(memoryview(self.board)[BOARD_START:])
        if self.tokens.left() != left or self.receive():
            return  # it went on: what it sent, or will send, has these outcomes too
        first = chunk.delivered
        records = _cut(copy, first - chunk.sent, finished - chunk.sent)
        self._hand_on(chunk, first, finished - first, [records], done=False)

    def receive(self) -> bool:
        """Handle all that the child sent; return whether there was anything."""
        anything = False
        while self.receive_some():
            anything = True
        return anything

    def receive_some(self) -> bool:
        """Handle what one read gives; return whether there was anything."""
        try:
            received = self.channel.receive()
        except BlockingIOError:
            return False
        if received is None:
            return False
        for frame, _ in received:
            self._on_result(frame.header, frame.body)
        return True

    def _on_result(self, header: dict[str, Any], body: Buffer) -> None:
        chunk = self.chunk
        if chunk is None:
            return
        first, count, done = header["first"], header["count"], header.get("done", False)
        if "held" in header:
            self.peak_bytes, self.held_bytes = header["peak"], header["held"]
        chunk.sent = first + count
        if "printed" in header:
            self.read_logs()  # what its calls printed was written before their outcomes
        records: Buffer = body
        seen = min(chunk.delivered - first, count)
        if seen > 0:  # already read from the board
            records = _cut(body, seen, count)
            first, count = first + seen, count - seen
        if done:
            self.chunk = None
            self.last_function = chunk.function
            self.fresh_wanted = chunk.fresh
        self._hand_on(chunk, first, count, [records] if count else [], done=done)

    def _hand_on(
        self, chunk: Chunk, first: int, count: int, records: Sequence[Buffer], *, done: bool
    ) -> None:
        chunk.delivered = max(chunk.delivered, first + count)
        self._deliver(chunk, first, count, records, done)

    # -- endings ----------------------------------------------------------------------------------

    def condemn(self, verdict: Verdict) -> None:
        """Kill the child. The verdict is the failure of the call that it is running.

        Raises:
            OSError: The server is gone, and the child with it.
        """
        if self._verdict is None and not self.retiring:
            self._verdict = verdict
            self.retiring = True
            self.server.send(Kind.KILL, {"child": [self.number, self.generation]})

    def on_exit(self, code: int, explain: Callable[[int], Verdict]) -> None:
        """Settle everything after the child's death, and close.

        Args:
            code: As of ``subprocess``: negative for a signal.
            explain: Gives the verdict if it was not the parent who killed it.
        """
        self.receive()
        self.read_logs()
        chunk = self.chunk
        if chunk is not None:
            self._settle(chunk, code, explain)
        self.close()

    def _settle(self, chunk: Chunk, code: int, explain: Callable[[int], Verdict]) -> None:
        self.take_back()
        written = int.from_bytes(memoryview(self.board)[8:16], "little")
        records: list[Buffer] = []
        first = chunk.delivered
        # Not more than began: it may have died between sending the board and clearing the count.
        known = min(chunk.sent + written, chunk.end)
        count = known - first
        if count > 0:
            board = bytes(memoryview(self.board)[BOARD_START:])
            records.append(_cut(board, first - chunk.sent, known - chunk.sent))
        if first + count < chunk.end:
            verdict = self._verdict or explain(code)
            started: float = memoryview(self.board)[:8].cast("d")[0]
            payload = pack_failure(verdict.error, verdict.message, **verdict.facts)
            begun = max(started, chunk.began)
            records.append(RECORD.pack(begun, time.monotonic(), len(payload), Outcome.FAILED))
            records.append(payload)
            count += 1
        self.chunk = None
        self._hand_on(chunk, first, count, records, done=True)

    # -- logs -------------------------------------------------------------------------------------

    def read_logs(self) -> None:
        """Hand on all that the child has printed so far."""
        for fd, name in ((self.out, "out"), (self.err, "err")):
            while self.read_log(fd, name):
                pass

    def read_log(self, fd: int, name: str) -> bool | None:
        """Hand on what the child printed; return whether there was any, ``None`` at the end."""
        try:
            data = os.read(fd, _LOG_READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._hand_on_log(name, self._log_rest.pop(name, b""))
            return None
        data = self._log_rest.pop(name, b"") + data
        begin = b"\0" + self.mark.encode()
        cut = _find_unfinished_mark(data, begin)
        if cut < len(data):
            self._log_rest[name] = data[cut:]
        before, *marked = data[:cut].split(begin)
        self._hand_on_log(name, before)
        for part in marked:
            index, _, text = part.partition(b"\0")
            self._log_indexes[name] = int(index)
            self._hand_on_log(name, text)
        return True

    def _hand_on_log(self, name: str, text: bytes) -> None:
        if text:
            self.tail = (self.tail + text)[-_TAIL_BYTES:]
            self._log(self.chunk, self._log_indexes.get(name, -1), name, text)


def _check(header: dict[str, Any]) -> None:
    """Refuse what would fail later, where nobody could tell whose fault it was."""
    for name in ("chunk", "count"):
        if type(header[name]) is not int:
            raise ProtocolError(f"calls with {name}={header[name]!r}")
    for name in ("function", "run", "style"):
        if not isinstance(header[name], str):
            raise ProtocolError(f"calls with {name}={header[name]!r}")
    for name in ("timeout", "hold"):
        value = header.get(name)
        if value is not None and not (isinstance(value, int | float) and value >= 0):
            raise ProtocolError(f"calls with {name}={value!r}")
    indexes = header["indexes"]
    if not (
        type(indexes) is int or (isinstance(indexes, list) and len(indexes) == header["count"])
    ):
        raise ProtocolError("calls without an index for each")


def _listed(header: dict[str, Any]) -> list[int]:
    indexes = header["indexes"]
    if isinstance(indexes, list):
        return indexes
    return list(range(indexes, indexes + header["count"]))


def _cut(records: Buffer, first: int, end: int) -> memoryview:
    """Return the records from one position up to another."""
    view = memoryview(records)
    ends = [0, *(record[4] for record in iterate_records(view, end))]
    return view[ends[first] : ends[end]]


def explain_exit(code: int, tail: bytes) -> Verdict:
    """Return the failure of a call whose process ended by itself."""
    text = tail.decode("utf-8", "replace")
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return Verdict(
            "WorkerCrashedError",
            f"the process that ran the call was killed by {name}",
            signal=-code,
            log_tail=text,
        )
    return Verdict(
        "WorkerCrashedError",
        f"the process that ran the call exited with code {code}",
        exit_code=code,
        log_tail=text,
    )


def _find_unfinished_mark(data: bytes, begin: bytes) -> int:
    """Return where a mark begins that goes on in what was not read yet; else the end."""
    last = data.rfind(begin)
    after = 0
    if last >= 0:
        after = data.find(b"\0", last + len(begin)) + 1
        if not after:
            return last
    for size in range(min(len(begin) - 1, len(data) - after), 0, -1):
        if data.endswith(begin[:size]):
            return len(data) - size
    return len(data)


def _pipe() -> tuple[int, int]:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    return reading, writing
