"""The worker's parent process: connection, slots, timers. One thread, one ``select``."""

from __future__ import annotations

import contextlib
import functools
import os
import selectors
import signal
import socket
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from asyncrt.errors import ProtocolError
from asyncrt.worker.channel import Channel
from asyncrt.worker.connection import Connection
from asyncrt.worker.memory import MemoryWatch
from asyncrt.worker.modules import Library, conflict
from asyncrt.worker.protocol import Buffer, Frame, Kind
from asyncrt.worker.servers import Servers
from asyncrt.worker.settings import WorkerSettings
from asyncrt.worker.slot import LOOK_SECONDS, Chunk, Slot, Verdict, explain_exit
from asyncrt.worker.tokens import MAX_CALLS

EXIT_SERVER_LOST: Final = 70  # EX_SOFTWARE of sysexits.h
_GRACE_SECONDS: Final = 5.0  # for running calls after SIGTERM
_LONGEST_WAIT_SECONDS: Final = 3600.0  # ``select`` refuses what is much longer
_LAST_WRITE_SECONDS: Final = 0.5
_LOG_BACKLOG_BYTES: Final = 1 << 20
_REMEMBERED_CANCELS: Final = 1024


class Parent:
    """Serves one client at a time until told to end, or until nobody comes any more."""

    def __init__(self, settings: WorkerSettings, listener: socket.socket) -> None:
        self._settings = settings
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._client: Connection | None = None
        self._strangers: set[Connection] = set()
        self._unwatched: set[Any] = set()  # in this turn of the loop
        self._stalled: set[Any] = set()  # connections and channels whose buffer is full
        self._memory = MemoryWatch(settings.memory_bytes, enforced=settings.memory_enforced)
        self._queue: deque[Chunk] = deque()
        self._library = Library(settings.modules)
        self._cancelled_early: OrderedDict[int, Any] = OrderedDict()
        self._unacknowledged: OrderedDict[int, tuple[int, dict[str, Any], list[Buffer]]]
        self._unacknowledged = OrderedDict()
        self._sequence = 0
        self._logs: deque[tuple[dict[str, Any], bytes]] = deque()
        self._log_bytes = 0
        self._unread: list[tuple[Slot, int, int, str]] = []  # pipes that wait for the client
        self._slots = [
            Slot(number, deliver=self._deliver, give_back=self._give_back, log=self._log)
            for number in range(settings.slots)
        ]
        self._servers = Servers(
            spawn=settings.spawn,
            modules=settings.modules,
            watch=self._watch,
            unwatch=self._unwatch,
            on_frame=self._on_server,
            on_template_lost=self._on_template_lost,
        )
        self.abandoned = False
        self._ending: str | None = None
        self._terminated = False
        self._exit_code = 0
        self._end_at = float("inf")
        self._now = time.monotonic()
        self._last_client = self._now

    # -- the loop ---------------------------------------------------------------------------------

    def run(self, *, lifeline: int | None = None) -> int:
        """Serve; return the exit code of the process.

        Args:
            lifeline: A descriptor whose end means that the client's process is gone for good.
        """
        self._servers.start(
            leave=[self._listener], leave_fds=[] if lifeline is None else [lifeline]
        )
        wakeup_read, wakeup_write = os.pipe()
        os.set_blocking(wakeup_write, False)
        signal.set_wakeup_fd(wakeup_write)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the client's matter
        self._listener.setblocking(False)
        self._watch(self._listener, self._accept)
        self._watch(wakeup_read, lambda: os.read(wakeup_read, 512))
        if lifeline is not None:
            self._watch(lifeline, lambda: self._on_lifeline(lifeline))
        for slot in self._slots:
            self._spawn(slot)
        try:
            while self._ending != "quit":
                self._serve_once()
        finally:
            self._shut_down()
        return self._exit_code

    def _on_sigterm(self, *_: Any) -> None:
        self._terminated = True

    def _serve_once(self) -> None:
        self._flush()
        self._read_on()
        self._unwatched.clear()
        for key, mask in self._selector.select(self._seconds_to_wait()):
            self._now = time.monotonic()
            if mask & selectors.EVENT_READ and key.fileobj not in self._unwatched:
                key.data()
        self._now = time.monotonic()
        if self._terminated:
            self._terminate()
        self._look_at_slots()
        self._check_connection()
        self._dispatch()
        if self._servers.lost:
            self._exit_code = EXIT_SERVER_LOST  # the client starts another worker
            self._ending = "quit"
        elif self._ending and self._is_done():
            self._ending = "quit"

    def _watch(self, fileobj: Any, handler: Callable[[], Any]) -> None:
        self._selector.register(fileobj, selectors.EVENT_READ, handler)

    def _unwatch(self, fileobj: Any) -> None:
        self._unwatched.add(fileobj)
        self._stalled.discard(fileobj)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(fileobj)

    def _flush(self) -> None:
        for target in (self._client, *self._strangers, *(slot.channel for slot in self._slots)):
            if target is None or not (target.unsent or target in self._stalled):
                continue
            try:
                target.flush()
            except OSError:
                if isinstance(target, Connection):
                    self._drop(target)
                self._stalled.discard(target)
                continue
            self._set_writing(target, wanted=target.unsent)

    def _set_writing(self, target: Any, *, wanted: bool) -> None:
        if wanted == (target in self._stalled):
            return
        (self._stalled.add if wanted else self._stalled.discard)(target)
        try:
            key = self._selector.get_key(target)
        except KeyError:
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
        if key.events != events:
            self._selector.modify(target, events, key.data)

    def _seconds_to_wait(self) -> float:
        waits = [self._settings.heartbeat_interval, self._end_at - self._now]
        if self._client is None:
            waits.append(self._last_client + self._settings.orphan_timeout - self._now)
        for slot in self._slots:
            if slot.chunk is not None:
                waits.append(slot.chunk.look_at - self._now)
                if self._memory.must_poll:
                    waits.append(LOOK_SECONDS)
        return max(0.0, min(_LONGEST_WAIT_SECONDS, *waits))

    # -- the client -------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        connection = Connection(sock, self._settings.token, now=self._now)
        self._strangers.add(connection)
        self._watch(connection, lambda: self._on_readable(connection))

    def _on_readable(self, connection: Connection) -> None:
        try:
            frames = connection.receive(now=self._now)
            if frames is None:
                self._drop(connection)
                return
            for frame in frames:
                if connection.authenticated:
                    self._handle(frame)
                else:
                    connection.authenticate(frame, self._facts())
                    self._adopt(connection)
        except (ProtocolError, KeyError, TypeError, ValueError, IndexError) as error:
            # Whatever is wrong with a frame, it is the peer's fault: drop it, it may come again.
            self._complain(error)
            self._drop(connection)

    def _complain(self, error: Exception) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"asyncrt worker: dropped a connection: {error!r}\n".encode())

    def _adopt(self, connection: Connection) -> None:
        """Make a connection that met the challenge the client's; an older one is dead by now."""
        self._strangers.discard(connection)
        if self._client is not None:
            self._drop(self._client)
        self._client = connection

    def _drop(self, connection: Connection) -> None:
        self._unwatch(connection)
        self._strangers.discard(connection)
        connection.close()
        if connection is self._client:
            self._client = None
            self._last_client = self._now

    def _check_connection(self) -> None:
        silence = 3 * self._settings.heartbeat_interval
        for connection in (self._client, *tuple(self._strangers)):
            if connection is not None and self._now - connection.last_heard > silence:
                self._drop(connection)
        absent = self._now - self._last_client if self._client is None else 0.0
        if absent > self._settings.orphan_timeout:
            self.abandoned = True
        if self.abandoned or self._now >= self._end_at:
            self._ending = "quit"

    def _facts(self) -> dict[str, Any]:
        return {
            "python": ".".join(str(part) for part in sys.version_info[:3]),
            "asyncrt": self._settings.asyncrt_version,
            "cloudpickle": self._settings.cloudpickle_version,
            "slots": len(self._slots),
            "pid": os.getpid(),
            "time": time.monotonic(),
        }

    def _handle(self, frame: Frame) -> None:
        header = frame.header
        if frame.kind == Kind.CALLS:
            self._on_calls(Chunk(header, frame.body))
        elif frame.kind == Kind.FUNCTION:
            self._on_function(header, frame.body)
        elif frame.kind == Kind.ACKNOWLEDGE:
            self._acknowledge(header["sequence"])
        elif frame.kind == Kind.CANCEL:
            self._cancel(header["chunk"], header.get("positions"))
        elif frame.kind == Kind.REVOKE:
            self._revoke(header.get("chunk"))
        elif frame.kind == Kind.HEARTBEAT:
            self._send(Kind.HEARTBEAT, {"time": time.monotonic(), "echo": header.get("time")})
        elif frame.kind == Kind.RESUME:
            self._resume(header)
        elif frame.kind == Kind.DRAIN:
            self._ending = self._ending or "drain"
        elif frame.kind == Kind.QUIT:
            self._ending = "quit"

    def _resume(self, header: dict[str, Any]) -> None:
        """Tell what this worker has; send again what was not received."""
        self._acknowledge(header["sequence"])
        if self._client is not None:
            self._client.resumed = True
        held = [*self._queue, *(slot.chunk for slot in self._slots if slot.chunk is not None)]
        known = [number for chunk in held for number in chunk.ids]
        for _, report, _ in self._unacknowledged.values():
            known += [part[0] for part in report["parts"]]
        self._send(Kind.RESUME, {"chunks": known, "functions": self._library.names})
        for kind, again, body in self._unacknowledged.values():
            self._send(kind, again, body)
        for note, text in self._logs:
            self._send(Kind.LOG, note, [text])
        self._logs.clear()
        self._log_bytes = 0

    def _send(self, kind: int, header: dict[str, Any], body: Sequence[Buffer] = ()) -> None:
        if self._client is not None and self._client.resumed:
            self._client.send(kind, header, body)

    def _acknowledge(self, sequence: int) -> None:
        while self._unacknowledged:
            oldest = next(iter(self._unacknowledged))
            if oldest > sequence:
                return
            del self._unacknowledged[oldest]

    def _report(self, kind: int, header: dict[str, Any], body: Sequence[Buffer] = ()) -> None:
        """Send what the client must learn, and keep it until the client has acknowledged it."""
        self._sequence += 1
        header["sequence"] = self._sequence
        self._unacknowledged[self._sequence] = kind, header, list(body)
        self._send(kind, header, body)

    # -- calls ------------------------------------------------------------------------------------

    def _on_function(self, header: dict[str, Any], body: Buffer) -> None:
        self._library.add(header, body)
        for name in header.get("forget", ()):
            self._library.forget(name)
            for slot in self._slots:
                slot.forget(name)

    def _on_calls(self, chunk: Chunk) -> None:
        if not 0 < chunk.count <= MAX_CALLS:
            raise ProtocolError(f"a chunk of {chunk.count} calls")
        if chunk.ids[0] in self._cancelled_early or self._ending:
            self._cancelled_early.pop(chunk.ids[0], None)
            self._give_back(chunk, 0, chunk.count)
            return
        if "acknowledge" in chunk.header:
            self._acknowledge(chunk.header["acknowledge"])
        self._queue.append(chunk)
        if chunk.hold is not None:
            for slot in self._slots:
                if slot.chunk is not None:  # if it runs on, this chunk is given back
                    slot.chunk.look_at = min(slot.chunk.look_at, self._now + chunk.hold)

    def _dispatch(self) -> None:
        if not self._queue:
            return
        for slot in self._slots:
            if slot.ready:
                position = self._next_position()
                if position is None:
                    return
                # A child that has just died: its exit, which is on its way, settles the chunk.
                with contextlib.suppress(OSError):
                    self._begin(slot, position)

    def _next_position(self) -> int | None:
        """Return where the first chunk is whose function has arrived."""
        for position, chunk in enumerate(self._queue):
            if self._library.has(chunk.function):
                return position
        return None

    def _begin(self, slot: Slot, position: int) -> None:
        """Give a slot a waiting chunk, with what its function needs and the child has not got."""
        function = self._queue[position].function
        if slot.has(function):
            slot.begin(self._take(position), None, now=self._now)
            return
        units = self._library.directories(function)
        if conflict(slot.units, units):  # it has imported another version of a module
            slot.last_function = None  # nor may the next child come from a template that has
            slot.retire()
            return
        packed = self._library.packed_units(function)
        chunk = self._take(position)
        slot.begin(chunk, self._library.get(function), now=self._now, units=units, packed=packed)

    def _take(self, position: int) -> Chunk:
        """Take a chunk from the queue, together with small ones behind it."""
        chunk = self._queue[position]
        del self._queue[position]
        share = -(-(len(self._queue) - position) // len(self._slots))
        for _ in range(share):
            if not chunk.merge(self._queue[position]):
                break
            del self._queue[position]
        return chunk

    def _deliver(
        self, chunk: Chunk, first: int, count: int, records: Sequence[Buffer], done: bool
    ) -> None:
        if count:
            self._report(Kind.RESULT, {"parts": chunk.split(first, count)}, records)

    def _give_back(self, chunk: Chunk, first: int, count: int) -> None:
        self._report(Kind.REVOKED, {"parts": chunk.split(first, count)})

    def _cancel(self, number: int, positions: list[int] | None) -> None:
        for chunk in self._queue:
            if number in chunk.ids:
                self._queue.remove(chunk)
                self._give_back(chunk, 0, chunk.count)
                return
        for slot in self._slots:
            if slot.chunk is not None and number in slot.chunk.ids:
                slot.take_back()
                running = slot.running()
                if running is not None:
                    part, position, _ = slot.chunk.split(running[0], 1)[0]
                    if part == number and (positions is None or position in positions):
                        self._condemn(slot, Verdict("RunCancelledError", "the call was cancelled"))
                return
        self._cancelled_early[number] = positions
        if len(self._cancelled_early) > _REMEMBERED_CANCELS:
            self._cancelled_early.popitem(last=False)

    def _revoke(self, number: int | None) -> None:
        for chunk in tuple(self._queue):
            if number is None or number in chunk.ids:
                self._queue.remove(chunk)
                self._give_back(chunk, 0, chunk.count)
        for slot in self._slots:
            if slot.chunk is not None and (number is None or number in slot.chunk.ids):
                slot.take_back()

    # -- slots ------------------------------------------------------------------------------------

    def _look_at_slots(self) -> None:
        for slot in self._slots:
            chunk = slot.chunk
            if chunk is None:
                if slot.ready and self._wants_fresh(slot):
                    with contextlib.suppress(OSError):
                        slot.retire()
                continue
            if self._now >= chunk.look_at:
                chunk.look_at = self._look_at(slot, chunk)
            if self._memory.must_poll and self._memory.over_limit(slot.pid):
                self._condemn(slot, self._memory_verdict(slot))

    def _look_at(self, slot: Slot, chunk: Chunk) -> float:
        """Do what is due for a chunk that runs on; return when to look again."""
        slot.read_board()
        running = slot.running()
        if slot.chunk is not chunk or running is None:
            return self._now + LOOK_SECONDS
        position, started = running
        ran = self._now - started
        if not chunk.announced and ran > 0 and slot.has_begun:
            chunk.announced = True
            part, position, _ = chunk.split(position, 1)[0]
            self._send(Kind.STARTED, {"chunk": part, "position": position, "time": started})
        look_at = float("inf")
        if chunk.timeout is not None:
            if ran >= chunk.timeout:
                verdict = Verdict(
                    "CallTimeoutError",
                    f"the attempt ran longer than timeout={chunk.timeout:g} s and was killed",
                    timeout=chunk.timeout,
                )
                self._condemn(slot, verdict)
            look_at = max(started + chunk.timeout, self._now + 0.001)
        # A process that is still starting keeps its first call: it would come back for ever.
        if chunk.hold is not None and ran >= chunk.hold and slot.has_begun:
            self._release(slot)
        if chunk.end - chunk.delivered > 1 or not chunk.announced or self._queue:
            look_at = min(look_at, self._now + LOOK_SECONDS)
        return look_at

    def _release(self, slot: Slot) -> None:
        """Give back calls that were thought to be short, and wait behind one that is not."""
        slot.take_back()
        if any(other.ready for other in self._slots):
            return
        for waiting in tuple(self._queue):
            if waiting.hold is not None:
                self._queue.remove(waiting)
                self._give_back(waiting, 0, waiting.count)

    def _condemn(self, slot: Slot, verdict: Verdict) -> None:
        with contextlib.suppress(OSError):  # the server is gone, and the child with it
            slot.condemn(verdict)

    def _memory_verdict(self, slot: Slot) -> Verdict:
        limit = self._memory.limit_bytes or 0
        size = f" ({limit / 2**20:.0f} MiB)" if limit else ""
        return Verdict(
            "OutOfMemoryError",
            f"the call needed more memory than the worker has{size}",
            limit_bytes=limit,
            peak_bytes=max(slot.peak_bytes, self._memory.peak_bytes()),
        )

    def _wants_fresh(self, slot: Slot) -> bool:
        limit = self._settings.recycle_bytes
        return slot.fresh_wanted or (limit is not None and slot.held_bytes > limit)

    def _spawn(self, slot: Slot) -> None:
        last = slot.last_function
        server = self._servers.choose(
            last,
            self._library.get(last) if last is not None else None,
            self._library.directories(last),
            lambda channel: any(other.server is channel for other in self._slots),
        )
        try:
            slot.spawn(server.channel, server.units)
        except OSError:
            slot.close()  # that the server is gone is noticed where its channel is read
            return
        self._watch(slot.channel, lambda: self._on_child(slot))
        out, err = slot.out, slot.err
        self._watch(out, lambda: self._on_log(slot, out, "out"))
        self._watch(err, lambda: self._on_log(slot, err, "err"))

    def _on_child(self, slot: Slot) -> None:
        if not slot.receive_some():
            self._unwatch(slot.channel)  # it has ended; the server tells how

    def _on_log(self, slot: Slot, fd: int, name: str) -> None:
        if self._client is not None and self._client.backlog_bytes > _LOG_BACKLOG_BYTES:
            # The client does not read as fast as calls print: they wait at their full pipes.
            self._selector.unregister(fd)
            self._unread.append((slot, slot.generation, fd, name))
            return
        if slot.read_log(fd, name) is None:  # not when somebody else has just read it empty
            self._unwatch(fd)

    def _read_on(self) -> None:
        """Read what calls print again, once the client has caught up."""
        if not self._unread or (
            self._client is not None and self._client.backlog_bytes > _LOG_BACKLOG_BYTES // 2
        ):
            return
        unread, self._unread = self._unread, []
        for slot, generation, fd, name in unread:
            if slot.is_open and slot.generation == generation:
                self._watch(fd, functools.partial(self._on_log, slot, fd, name))

    def _on_exit(self, slot: Slot, code: int) -> None:
        def explain(code: int) -> Verdict:
            if code == -signal.SIGKILL and self._memory.killed_since_last_asked():
                return self._memory_verdict(slot)
            return explain_exit(code, slot.tail)

        if slot.is_open:
            for fileobj in (slot.channel, slot.out, slot.err):
                self._unwatch(fileobj)
            slot.on_exit(code, explain)
        self._spawn(slot)

    def _log(self, chunk: Chunk | None, index: int, name: str, text: bytes) -> None:
        if self._settings.echo:
            with contextlib.suppress(OSError):
                os.write(1 if name == "out" else 2, text)
        run = chunk.header["run"] if chunk is not None and index >= 0 else None
        note = {"stream": name, "index": index, "run": run}
        if self._client is not None and self._client.resumed:
            self._send(Kind.LOG, note, [text])
            return
        self._logs.append((note, text))
        self._log_bytes += len(text)
        while self._log_bytes > _LOG_BACKLOG_BYTES:
            self._log_bytes -= len(self._logs.popleft()[1])

    def _on_server(self, frame: Frame) -> None:
        number, generation = frame.header["child"]
        if self._slots[number].generation != generation:
            return
        if frame.kind == Kind.SPAWNED:
            self._slots[number].pid = frame.header["pid"]
        elif frame.kind == Kind.EXITED:
            self._on_exit(self._slots[number], frame.header["code"])

    def _on_template_lost(self, channel: Channel) -> None:
        """Settle the children of a template that died: they died with it, and nobody tells."""
        for slot in self._slots:
            if slot.server is channel:
                slot.kill()
                self._on_exit(slot, -signal.SIGKILL)

    # -- the end ----------------------------------------------------------------------------------

    def _on_lifeline(self, lifeline: int) -> None:
        if not os.read(lifeline, 512):
            self.abandoned = True
            self._ending = "quit"

    def _terminate(self) -> None:
        """Begin to end, on SIGTERM: say so, give back what has not begun, wait for what runs."""
        self._terminated = False
        if self._ending not in (None, "drain"):
            return
        self._ending = "terminate"
        self._end_at = self._now + _GRACE_SECONDS
        self._send(Kind.GOODBYE, {"reason": "SIGTERM", "grace": _GRACE_SECONDS})
        self._revoke(None)

    def _is_done(self) -> bool:
        busy = self._queue or any(slot.chunk is not None for slot in self._slots)
        return not busy and not self._unacknowledged  # a client that was cut off comes again

    def _shut_down(self) -> None:
        if self._client is not None:
            self._client.socket.settimeout(_LAST_WRITE_SECONDS)
            with contextlib.suppress(OSError):
                self._client.flush()
            self._client.close()
        for stranger in self._strangers:
            stranger.close()
        self._listener.close()
        for slot in self._slots:
            slot.kill()
        self._servers.close()
        for slot in self._slots:
            slot.close()
        self._selector.close()
