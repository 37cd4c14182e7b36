"""A connection in memory: what the client holds, and the worker's end of it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from asyncrt.backends.base import Receiver
from asyncrt.errors import ProtocolError
from asyncrt.worker.authentication import new_nonce, prove, verify
from asyncrt.worker.protocol import (
    BEFORE_AUTHENTICATION,
    Buffer,
    Decoder,
    Frame,
    Kind,
    Limits,
    Outbox,
)

_BUFFER_BYTES: Final = 1 << 22


class MemoryStream:
    """The client's end, a ``ByteStream``. Bytes arrive in order, ``latency`` seconds later."""

    def __init__(self, receiver: Receiver, *, latency: float) -> None:
        self._receiver = receiver
        self._latency = latency
        self._loop = asyncio.get_running_loop()
        self._to_worker: deque[bytes] = deque()
        self._to_client: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._full = False
        self._closed = False
        self.other_end: WorkerEnd | None = None

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._closed

    def write(self, segments: Sequence[Buffer]) -> bool:
        """Send to the worker. See ``ByteStream.write``."""
        if self._closed:
            return False
        data = b"".join(segments)
        self._to_worker.append(data)
        self._waiting_bytes += len(data)
        self._full = self._waiting_bytes > _BUFFER_BYTES
        self._later(self._reach_worker)
        return not self._full

    def push(self, data: bytes) -> None:
        """Send to the client."""
        if not self._closed:
            self._to_client.append(data)
            self._later(self._reach_client)

    def close(self) -> None:
        """End it now; what is on its way is lost."""
        if not self._closed:
            self._closed = True
            self._to_worker.clear()
            self._to_client.clear()
            if self.other_end is not None:
                self.other_end.on_closed()
            self._receiver.closed(None)

    def _later(self, callback: Callable[[], None]) -> None:
        if self._latency:
            self._loop.call_later(self._latency, callback)
        else:
            self._loop.call_soon(callback)

    def _reach_worker(self) -> None:
        if self._closed:
            return
        data = self._to_worker.popleft()
        self._waiting_bytes -= len(data)
        if self.other_end is not None:
            self.other_end.on_bytes(data)
        if self._full and not self._waiting_bytes:
            self._full = False
            self._receiver.writable()

    def _reach_client(self) -> None:
        if self._closed:
            return
        view = memoryview(self._to_client.popleft())
        while view and not self._closed:
            target = self._receiver.get_buffer()
            size = min(len(target), len(view))
            target[:size] = view[:size]
            del target
            self._receiver.received(size)
            view = view[size:]


class WorkerEnd:
    """The worker's end: frames, behind the challenge.

    Args:
        stream: The client's end.
        token: The pool's.
        facts: What the hello says.
        handle: Called with each frame once the client has proved that it knows the token.
        lost: Called once when the connection has ended.
    """

    def __init__(
        self,
        stream: MemoryStream,
        *,
        token: bytes,
        facts: Callable[[], dict[str, Any]],
        handle: Callable[[WorkerEnd, Frame], None],
        lost: Callable[[WorkerEnd], None],
    ) -> None:
        self._stream = stream
        self._token = token
        self._facts = facts
        self._handle = handle
        self._lost = lost
        self._nonce = new_nonce()
        self._decoder = Decoder(BEFORE_AUTHENTICATION)
        self._outbox = Outbox()
        self.authenticated = False
        self.deaf = False
        stream.other_end = self
        self.send(Kind.CHALLENGE, {"nonce": self._nonce})

    def send(self, kind: int, header: dict[str, Any], body: Sequence[Buffer] = ()) -> None:
        """Send a frame."""
        if self.deaf:
            return
        self._outbox.put(kind, header, body)
        while self._outbox:
            self._stream.push(b"".join(self._outbox.take()))

    def on_bytes(self, data: bytes) -> None:
        """Take what the client wrote."""
        if self.deaf:
            return
        try:
            for frame in self._decoder.feed(data):
                if self._stream.closed:
                    return
                if self.authenticated:
                    self._handle(self, frame)
                else:
                    self._authenticate(frame)
        except (ProtocolError, KeyError):
            self._stream.close()  # as the real worker does: the client may come again

    def on_closed(self) -> None:
        """Learn that the connection has ended."""
        self._lost(self)

    def close(self) -> None:
        """End the connection."""
        self._stream.close()

    def _authenticate(self, frame: Frame) -> None:
        nonce = frame.header.get("nonce")
        if frame.kind != Kind.RESPONSE or not isinstance(nonce, str):
            raise ProtocolError("expected the answer to the challenge")
        verify(frame.header.get("proof"), self._token, "client", self._nonce, nonce)
        self.authenticated = True
        self._decoder.limits = Limits()
        proof = prove(self._token, "worker", self._nonce, nonce)
        self.send(Kind.HELLO, {"proof": proof, **self._facts()})
