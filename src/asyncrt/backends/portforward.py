"""A port of a pod as a byte stream: what ``kubectl port-forward`` does, over a websocket.

Binary messages; the first byte is the channel: 0 for data, 1 for an error in words. The first
message on each channel is the port, and comes before anything else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import anyio

from asyncrt.backends.base import Receiver
from asyncrt.worker.protocol import Buffer

if TYPE_CHECKING:
    import aiohttp

_DATA: Final = 0
_PORT_MESSAGE_BYTES: Final = 3
_MESSAGE_BYTES: Final = 1 << 18
_BUFFERED_BYTES: Final = 1 << 20
_CLOSE_SECONDS: Final = 1.0


class PortForward:
    """A ``ByteStream`` over an open websocket. ``run`` must be running somewhere.

    Args:
        socket: Of ``pods/<name>/portforward``, for one port.
        receiver: Takes what comes.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, receiver: Receiver) -> None:
        self._socket = socket
        self._receiver = receiver
        self._writing: deque[memoryview] = deque()
        self._buffered = 0
        self._more = anyio.Event()
        self._full = False
        self._closed = False
        self._scope = anyio.CancelScope()

    async def run(self) -> None:
        """Move bytes both ways until either side closes."""
        error: Exception | None = None
        try:
            with self._scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(self._write_all)
                    error = await self._read_all()
                    group.cancel_scope.cancel()
        except* OSError as errors:  # aiohttp's are, too
            error = ConnectionError(str(errors.exceptions[0]))
        finally:
            self._end(error)
            with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
                await self._socket.close()

    async def _read_all(self) -> Exception | None:
        """Hand on what comes; return what is wrong when nothing more does."""
        headed: set[int] = set()
        while True:
            message = await self._socket.receive()
            data = message.data
            if not isinstance(data, bytes) or not data:
                return ConnectionError("the API server closed the port-forward")
            channel = data[0]
            if channel not in headed:
                headed.add(channel)
                if len(data) != _PORT_MESSAGE_BYTES:
                    return ConnectionError(f"not a port-forward: began with {data[:64]!r}")
            elif channel == _DATA:
                self._hand_on(memoryview(data)[1:])
                if self._closed:
                    return None
            else:
                return ConnectionError(data[1:].decode("utf-8", "replace").strip())

    def _hand_on(self, data: memoryview) -> None:
        while data and not self._closed:
            target = self._receiver.get_buffer()
            size = min(len(target), len(data))
            target[:size] = data[:size]
            del target
            self._receiver.received(size)
            data = data[size:]

    async def _write_all(self) -> None:
        while True:
            while not self._writing:
                self._more = anyio.Event()
                await self._more.wait()
            await self._socket.send_bytes(self._next_message())
            if self._full and self._buffered <= _BUFFERED_BYTES // 2:
                self._full = False
                self._receiver.writable()

    def _next_message(self) -> bytes:
        parts: list[Buffer] = [bytes((_DATA,))]
        room = _MESSAGE_BYTES
        while self._writing and room:
            head = self._writing[0]
            if len(head) <= room:
                parts.append(self._writing.popleft())
            else:
                parts.append(head[:room])
                self._writing[0] = head[room:]
            room -= len(parts[-1])
        self._buffered -= _MESSAGE_BYTES - room
        return b"".join(parts)

    def write(self, segments: Sequence[Buffer]) -> bool:
        """See ``ByteStream``."""
        if self._closed:
            return False
        for segment in segments:
            view = memoryview(segment).cast("B")
            if len(view):
                self._writing.append(view)
                self._buffered += len(view)
        self._more.set()
        self._full = self._buffered > _BUFFERED_BYTES
        return not self._full

    def close(self) -> None:
        """See ``ByteStream``."""
        self._end(None)
        self._scope.cancel()

    def _end(self, error: Exception | None) -> None:
        if not self._closed:
            self._closed = True
            self._writing.clear()
            self._receiver.closed(error)
