"""The client's end of one worker: handshake, frames, acknowledgements, reconnection."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import anyio
import msgspec
from anyio import current_time

from asyncrt.backends.base import ByteStream, Worker, WorkerExit
from asyncrt.errors import ProtocolError, RuntimeMismatchError, StartTimeoutError
from asyncrt.serialize import PackedFunction
from asyncrt.worker.authentication import new_nonce, prove, verify
from asyncrt.worker.protocol import (
    Buffer,
    Decoder,
    Frame,
    Kind,
    Limits,
    Outbox,
    allocate_anonymous,
    byte_length,
)

logger = logging.getLogger(__name__)

_FIRST_DELAY: Final = 0.01
_MAX_DELAY: Final = 5.0
_ACKNOWLEDGE_SECONDS: Final = 0.1
_LARGE_BYTES: Final = 1 << 18
_WRITES_AT_ONCE: Final = 8  # of at most 1 MiB each, if they are pieces of a large body
_MAX_FUNCTIONS: Final = 128
_MAX_FUNCTION_BYTES: Final = 1 << 26  # of functions and units that nobody needs any more
_MAX_FRUITLESS: Final = 20
_FRUITLESS_SECONDS: Final = 1.0


class LinkOwner(Protocol):
    """Who is told what a worker says."""

    def on_joined(self, link: Link) -> None:
        """The worker is there, for the first time."""

    def on_resumed(self, link: Link, chunks: Sequence[int]) -> None:
        """The worker is there again; these are the chunks that it knows."""

    def on_frame(self, link: Link, frame: Frame) -> None:
        """The worker said something."""

    def needs_function(self, name: str) -> bool:
        """Whether a function may still be called, or one that needs a unit of modules."""


class Link:
    """Keeps a worker connected.

    What the worker reports has a sequence number. It is acknowledged when everything before it has
    come, too (a large body is overtaken by small frames), and dropped when it comes twice.
    """

    def __init__(
        self,
        worker: Worker,
        owner: LinkOwner,
        *,
        token: bytes,
        heartbeat_interval: float,
        start_timeout: float,
        orphan_timeout: float,
        schedule: Callable[[float, Callable[[], None]], object],
        allocate: Callable[[int], Buffer] = allocate_anonymous,
    ) -> None:
        self.worker = worker
        self.name = worker.name
        self.slots = 0
        self.joined = False
        self.clock_offset = 0.0
        self._owner = owner
        self._token = token
        self._heartbeat_interval = heartbeat_interval
        self._start_timeout = start_timeout
        self._orphan_timeout = orphan_timeout
        self._schedule = schedule
        self._allocate = allocate
        self._now = asyncio.get_running_loop().time
        self._stream: ByteStream | None = None
        self._reset()
        self._received = 0
        self._ahead: set[int] = set()
        self._acknowledged = 0
        self._acknowledge_soon = False
        self._functions: OrderedDict[str, int] = OrderedDict()  # with their sizes in bytes
        self._function_bytes = 0
        self._fruitless = 0
        self._fatal: Exception | None = None

    # -- life -------------------------------------------------------------------------------------

    async def run(self) -> WorkerExit:
        """Keep the worker connected until it has ended; return how it ended.

        Raises:
            StartTimeoutError: It was not there within ``start_timeout``. It was killed.
            RuntimeMismatchError: It cannot work with this client. It was killed.
            WorkerStartError: It will never be there.
        """
        began = current_time()
        ended: list[WorkerExit] = []

        async def watch() -> None:
            ended.append(await self.worker.wait_exit())
            group.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(watch)
                await self._keep_connected(began)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # noqa: ASYNC123 - the lone one, told as it is
        finally:
            self.send(Kind.QUIT, {})  # if the pool is closed; else there is nobody to read it
            self._pump()
            self._close_stream()
        if self._fatal is not None:
            raise self._fatal
        return ended[0]

    async def _keep_connected(self, began: float) -> None:
        delay = _FIRST_DELAY
        cut_at = began
        while self._fatal is None:
            if self._step == "live":
                cut_at = current_time()
            elif self.joined and current_time() - cut_at > self._orphan_timeout:
                # It has ended by itself by now; or it hangs, and would never say so.
                waited = self._orphan_timeout
                logger.warning("%s: unreachable for %g s, given up", self.name, waited)
                self.worker.kill()
                await anyio.sleep_forever()  # until its exit is seen
            live_at: float | None = None
            left = began + self._start_timeout - current_time()
            if not self.joined and left <= 0:
                self._give_up(
                    StartTimeoutError(
                        f"{self.name} was not ready within start_timeout={self._start_timeout:g} s"
                    )
                )
                return
            try:
                with anyio.move_on_after(max(left, 0.0) if not self.joined else None) as scope:
                    await self._connect(scope)
                    delay = _FIRST_DELAY
                    live_at = current_time()
                    await self._attend()
            except (ConnectionError, TimeoutError) as error:
                logger.debug("%s: %s", self.name, error)
            finally:
                self._close_stream()
            if live_at is not None and self._is_hopeless(current_time() - live_at):
                return
            if self._fatal is None:
                await anyio.sleep(delay * random.random())  # noqa: S311 - jitter
                delay = min(2 * delay, _MAX_DELAY)

    def _is_hopeless(self, lived: float) -> bool:
        """Give the worker up if it drops one connection after the other, without a word."""
        if lived > _FRUITLESS_SECONDS or self._heard_frame:
            self._fruitless = 0
            return False
        self._fruitless += 1
        if self._fruitless < _MAX_FRUITLESS:
            return False
        self._give_up(
            ProtocolError(
                f"{self.name} dropped {_MAX_FRUITLESS} connections in a row, each at once: it does "
                "not take what this client sends"
            )
        )
        return True

    async def _connect(self, scope: anyio.CancelScope) -> None:
        """Connect and shake hands. ``scope`` limits the time until the worker has joined."""
        self._reset()
        self._stream = await self.worker.connect(self)
        self._pump()
        with anyio.fail_after(3 * self._heartbeat_interval):
            await self._live.wait()
        if self._stream is None:
            raise ConnectionError("closed during the handshake")
        scope.deadline = float("inf")

    async def _attend(self) -> None:
        """Stay with a live connection until it ends or falls silent."""
        while self._stream is not None:
            with anyio.move_on_after(self._heartbeat_interval):
                await self._gone.wait()
            if current_time() - self._last_heard > 3 * self._heartbeat_interval:
                raise TimeoutError("silent for three heartbeats")
            self.send(Kind.HEARTBEAT, {"time": current_time()})

    def _reset(self) -> None:
        """Forget what belongs to a connection that is no more."""
        self._decoder = Decoder(
            Limits(header_bytes=1 << 16, body_bytes=0, open_streams=0),
            allocate=self._allocate,
            load=_load_header,
        )
        self._outbox = Outbox(dump=msgspec.json.encode)
        self._nonce = ""
        self._step = "challenge"
        self._live = anyio.Event()
        self._gone = anyio.Event()
        self._pumping = False
        self._heard_frame = False
        self._last_heard = current_time()

    def _close_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _give_up(self, error: Exception) -> None:
        self._fatal = error
        self.worker.kill()
        self._close_stream()

    # -- writing ----------------------------------------------------------------------------------

    @property
    def live(self) -> bool:
        """Whether frames can be sent now."""
        return self._step == "live" and self._stream is not None

    def send(self, kind: int, header: dict[str, Any], body: Sequence[Buffer] = ()) -> None:
        """Send a frame; without a connection it is dropped, and made good on reconnection."""
        if self.live:
            self._outbox.put(kind, header, body)
            self._pump_soon()

    def send_calls(
        self, header: dict[str, Any], body: Sequence[Buffer], function: PackedFunction
    ) -> None:
        """Send a chunk, and before it its function if the worker has not got it."""
        self.send_function(function)
        if self._received > self._acknowledged:
            self._acknowledged = header["acknowledge"] = self._received
        self.send(Kind.CALLS, header, body)

    def send_function(self, function: PackedFunction) -> None:
        """Send a function and its modules, if the worker has not got them; let it forget others."""
        for unit in function.modules:
            if not self._has(unit.hash):
                self._send_once({"function": unit.hash, "unit": unit.name}, unit.segments)
        if not self._has(function.name):
            header: dict[str, Any] = {"function": function.name}
            if function.modules:
                header["modules"] = {unit.name: unit.hash for unit in function.modules}
            self._send_once(header, function.segments)

    def _has(self, name: str) -> bool:
        """Whether the worker has a function or a unit, which is in use then."""
        if name not in self._functions:
            return False
        self._functions.move_to_end(name)
        return True

    def _send_once(self, header: dict[str, Any], body: Sequence[Buffer]) -> None:
        size = byte_length(body)
        forget = self._make_room(size)
        self._functions[header["function"]] = size
        self._function_bytes += size
        if forget:
            header["forget"] = forget
        self.send(Kind.FUNCTION, header, body)

    def _make_room(self, size: int) -> list[str]:
        """Return what the worker shall forget: what was used longest ago, and nobody needs."""
        forget: list[str] = []
        for name in tuple(self._functions):
            enough = self._function_bytes + size <= _MAX_FUNCTION_BYTES
            if len(self._functions) < _MAX_FUNCTIONS and enough:
                break
            if not self._owner.needs_function(name):
                self._function_bytes -= self._functions.pop(name)
                forget.append(name)
        return forget

    def _pump_soon(self) -> None:
        """Write the first frame of a turn of the loop at once, the rest together at its end."""
        if not self._pumping:
            self._pumping = True
            self._schedule(0.0, self._pump_rest)
            self._pump()

    def _pump_rest(self) -> None:
        self._pumping = False
        self._pump()

    def _pump(self) -> None:
        for _ in range(_WRITES_AT_ONCE):
            if self._stream is None or not self._outbox:
                return
            if not self._stream.write(self._outbox.take()):
                return  # ``writable`` goes on
        # A peer that reads as fast as this writes would keep the loop here for a whole large body.
        if not self._pumping:
            self._pumping = True
            self._schedule(0.0, self._pump_rest)

    # -- reading: Receiver ------------------------------------------------------------------------

    def get_buffer(self) -> memoryview:
        """See ``Receiver``."""
        return self._decoder.get_buffer()

    def received(self, size: int) -> None:
        """See ``Receiver``."""
        self._last_heard = self._now()
        try:
            for frame in self._decoder.received(size):
                self._on_frame(frame)
        except RuntimeMismatchError as error:
            self._give_up(error)
        except ProtocolError as error:
            logger.warning("%s: dropped a connection that broke the protocol: %s", self.name, error)
            self._close_stream()
        except Exception as error:  # noqa: BLE001 - a bug here must end the pool loudly, not a callback
            self._give_up(error)

    def writable(self) -> None:
        """See ``Receiver``."""
        self._pump()

    def closed(self, error: Exception | None) -> None:
        """See ``Receiver``."""
        self._stream = None
        if self._step != "live":
            self._step = "closed"
        self._live.set()
        self._gone.set()

    def _on_frame(self, frame: Frame) -> None:
        if self._step == "live":
            self._heard_frame = True
            if "sequence" in frame.header and not self._is_new(frame):
                return
            self._owner.on_frame(self, frame)
        elif self._step == "challenge" and frame.kind == Kind.CHALLENGE:
            self._worker_nonce: str = frame.header["nonce"]
            self._nonce = new_nonce()
            proof = prove(self._token, "client", self._worker_nonce, self._nonce)
            self._put(Kind.RESPONSE, {"nonce": self._nonce, "proof": proof})
            self._step = "hello"
        elif self._step == "hello" and frame.kind == Kind.HELLO:
            verify(
                frame.header.get("proof"), self._token, "worker", self._worker_nonce, self._nonce
            )
            self._decoder.limits = Limits()
            self._check(frame.header)
            self._put(Kind.RESUME, {"sequence": self._received})
            self._step = "resume"
        elif self._step == "resume" and frame.kind == Kind.RESUME:
            self._functions = OrderedDict(
                (name, self._functions.get(name, 0)) for name in frame.header["functions"]
            )
            self._function_bytes = sum(self._functions.values())
            self._step = "live"
            self._live.set()
            if self.joined:
                self._owner.on_resumed(self, frame.header["chunks"])
            else:
                self.joined = True
                self._owner.on_joined(self)
        elif self._step in ("challenge", "hello"):
            raise ProtocolError(f"unexpected frame {frame.kind} in the handshake")

    def _put(self, kind: int, header: dict[str, Any]) -> None:
        self._outbox.put(kind, header)
        self._pump_soon()

    def _check(self, hello: dict[str, Any]) -> None:
        """Refuse a worker that cannot exchange pickles with this client."""
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        there = ".".join(hello["python"].split(".")[:2])
        if here != there:
            raise RuntimeMismatchError(
                f"this client runs Python {here}, the worker {there}: they cannot exchange "
                f"functions; use a runtime with Python {here}, such as python:{here}-slim",
                what="Python",
                client=here,
                worker=hello["python"],
            )
        self.slots = int(hello["slots"])
        self.clock_offset = current_time() - float(hello["time"])

    def _is_new(self, frame: Frame) -> bool:
        sequence: int = frame.header["sequence"]
        if sequence <= self._received or sequence in self._ahead:
            return False
        self._ahead.add(sequence)
        while self._received + 1 in self._ahead:
            self._received += 1
            self._ahead.discard(self._received)
        if len(frame.body) > _LARGE_BYTES:
            self._acknowledge()
        elif not self._acknowledge_soon:
            self._acknowledge_soon = True
            self._schedule(_ACKNOWLEDGE_SECONDS, self._acknowledge)
        return True

    def _acknowledge(self) -> None:
        self._acknowledge_soon = False
        if self._received > self._acknowledged:
            self._acknowledged = self._received
            self.send(Kind.ACKNOWLEDGE, {"sequence": self._received})


def _load_header(packed: bytes) -> Any:
    try:
        return msgspec.json.decode(packed)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error
