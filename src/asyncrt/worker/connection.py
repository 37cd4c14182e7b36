"""The parent's connection to the client: non-blocking, one at a time, behind the challenge."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

from asyncrt.errors import ProtocolError
from asyncrt.worker.authentication import new_nonce, prove, verify
from asyncrt.worker.channel import SharedMemory
from asyncrt.worker.protocol import (
    BEFORE_AUTHENTICATION,
    Buffer,
    Decoder,
    Frame,
    Kind,
    Limits,
    Outbox,
)


class Connection:
    """A socket that somebody connected to the worker.

    Nothing but a small RESPONSE is read from it before the challenge was met.
    """

    def __init__(self, sock: socket.socket, token: bytes, *, now: float) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.authenticated = False
        self.resumed = False  # the client has said what it has: frames may follow HELLO
        self.last_heard = now
        self._token = token
        self._nonce = new_nonce()
        self._decoder = Decoder(BEFORE_AUTHENTICATION, allocate=SharedMemory)
        self._outbox = Outbox()
        self._writing: deque[memoryview] = deque()
        self.send(Kind.CHALLENGE, {"nonce": self._nonce})

    def fileno(self) -> int:
        return self.socket.fileno()

    @property
    def unsent(self) -> bool:
        """Whether ``flush`` has something to do."""
        return bool(self._writing or self._outbox)

    @property
    def backlog_bytes(self) -> int:
        """Bytes of small frames that the peer has not taken yet."""
        return self._outbox.small_bytes + sum(view.nbytes for view in self._writing)

    def send(self, kind: int, header: dict[str, Any], body: Sequence[Buffer] = ()) -> None:
        """Queue a frame. ``flush`` writes it."""
        self._outbox.put(kind, header, body)

    def flush(self) -> None:
        """Write as much as the socket takes.

        Raises:
            OSError: The connection is gone.
        """
        while True:
            if not self._writing:
                self._writing.extend(memoryview(part).cast("B") for part in self._outbox.take())
                if not self._writing:
                    return
            try:
                sent = self.socket.sendmsg(list(self._writing)[:64])
            except BlockingIOError:
                return
            while self._writing and sent >= self._writing[0].nbytes:
                sent -= self._writing.popleft().nbytes
            if sent:
                self._writing[0] = self._writing[0][sent:]

    def receive(self, *, now: float) -> list[Frame] | None:
        """Return the frames that have come; ``None`` at the end of the connection.

        Raises:
            ProtocolError: The peer breaks the rules.
        """
        frames: list[Frame] = []
        for _ in range(16):  # the other descriptors want their turn, too
            view = self._decoder.get_buffer()
            try:
                size = self.socket.recv_into(view)
            except BlockingIOError:
                break
            except OSError:
                return frames or None
            if not size:
                return frames or None
            room = view.nbytes
            del view
            frames += self._decoder.received(size)
            if size < room:
                break
        if frames:
            self.last_heard = now
        return frames

    def authenticate(self, frame: Frame, facts: dict[str, Any]) -> None:
        """Check the answer to the challenge, and answer the client's.

        Raises:
            ProtocolError: Not an answer, or a wrong one.
        """
        nonce = frame.header.get("nonce")
        if frame.kind != Kind.RESPONSE or not isinstance(nonce, str):
            raise ProtocolError("expected the answer to the challenge")
        verify(frame.header.get("proof"), self._token, "client", self._nonce, nonce)
        self.authenticated = True
        self._decoder.limits = Limits()
        proof = prove(self._token, "worker", self._nonce, nonce)
        self.send(Kind.HELLO, {"proof": proof, **facts})

    def close(self) -> None:
        self.socket.close()
        self._writing.clear()
