"""Frames between the worker's own processes: a Unix socket that also carries file descriptors.

A large body is not written to the socket. It lies in shared memory, and its descriptor travels:
what the parent received from the client is mapped by the child, without a copy, and the other way
round.

Headers are marshalled, not JSON: both ends are one program on one interpreter, and this is the
hottest path (a tenth of a round trip).
"""

from __future__ import annotations

import array
import contextlib
import marshal
import mmap
import os
import socket
import tempfile
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from asyncrt.worker.protocol import Buffer, Decoder, Frame, Limits, byte_length, encode_head

INLINE_BYTES: Final = 1 << 17
_RECEIVE_BYTES: Final = 1 << 18
_MAX_DESCRIPTORS: Final = 16
_ANCILLARY_BYTES: Final = socket.CMSG_LEN(_MAX_DESCRIPTORS * array.array("i").itemsize)


class SharedMemory(mmap.mmap):
    """Memory that another process can map by its descriptor, ``fd``. Freed with its last user."""

    fd: int

    def __new__(cls, size_bytes: int, fd: int = -1) -> SharedMemory:
        """Make memory of a size, or map what a descriptor (owned from then on) refers to."""
        if fd < 0:
            fd = _anonymous_file()
            os.ftruncate(fd, size_bytes)
        self = super().__new__(cls, fd, size_bytes)
        self.fd = fd
        return self

    def __del__(self) -> None:
        os.close(self.fd)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("asyncrt", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # macOS
        return os.dup(file.fileno())


def share(segments: Sequence[Buffer], total: int) -> SharedMemory:
    """Copy segments into new shared memory."""
    memory = SharedMemory(total)
    at = 0
    with memoryview(memory) as view:
        for segment in segments:
            with memoryview(segment) as source, source.cast("B") as flat:
                view[at : at + flat.nbytes] = flat
                at += flat.nbytes
    return memory


class Channel:
    """One end. Blocking or not is a matter of its socket.

    A frame's header says ``"fds": n`` if descriptors came with it, and ``"blob": size`` if the last
    of them is its body.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._decoder = Decoder(Limits(), buffer_bytes=_RECEIVE_BYTES, load=marshal.loads)
        self._descriptors: deque[int] = deque()
        self._outgoing: deque[tuple[memoryview, list[int], Any]] = deque()

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())
        self._outgoing.clear()

    @property
    def unsent(self) -> bool:
        """Whether ``flush`` has something to do."""
        return bool(self._outgoing)

    def send(
        self,
        kind: int,
        header: dict[str, Any],
        body: Sequence[Buffer] = (),
        fds: Sequence[int] = (),
    ) -> bool:
        """Queue a frame and write as much as goes; return whether all was written.

        Descriptors are borrowed until the frame was written. Shared memory is passed on as it is.

        Raises:
            OSError: The other end is gone.
        """
        keep: Any = None
        total = byte_length(body)
        descriptors = list(fds)
        if total > INLINE_BYTES:
            only = body[0] if len(body) == 1 else None
            keep = only if isinstance(only, SharedMemory) else share(body, total)
            descriptors.append(keep.fd)
            header = {**header, "blob": total}
            body, total = (), 0
        if descriptors:
            header = {**header, "fds": len(descriptors)}
        packed = b"".join((encode_head(kind, header, total, dump=marshal.dumps), *body))
        self._outgoing.append((memoryview(packed), descriptors, keep))
        return self.flush()

    def flush(self) -> bool:
        """Write what is queued; return whether all was written."""
        while self._outgoing:
            data, descriptors, keep = self._outgoing[0]
            try:
                if descriptors:
                    sent = socket.send_fds(self.socket, [data], descriptors)
                else:
                    sent = self.socket.send(data)
            except BlockingIOError:
                return False
            if sent == len(data):
                self._outgoing.popleft()
            else:
                self._outgoing[0] = (data[sent:], [], keep)
        return True

    def receive(self) -> list[tuple[Frame, list[int]]] | None:
        """Return the frames that one read completes, with their descriptors; ``None`` at the end.

        Raises:
            BlockingIOError: Nothing there, on a non-blocking socket.
        """
        try:
            size, ancillary, _, _ = self.socket.recvmsg_into(
                [self._decoder.get_buffer()], _ANCILLARY_BYTES
            )
        except (ConnectionResetError, BrokenPipeError):
            return None
        for level, kind, packed in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(packed[: len(packed) - len(packed) % numbers.itemsize])
                self._descriptors.extend(numbers)
        if not size:
            return None
        return [self._with_descriptors(frame) for frame in self._decoder.received(size)]

    def _with_descriptors(self, frame: Frame) -> tuple[Frame, list[int]]:
        count = frame.header.get("fds", 0)
        if not count:
            return frame, []
        descriptors = [self._descriptors.popleft() for _ in range(count)]
        for fd in descriptors:
            os.set_inheritable(fd, False)
        if "blob" in frame.header:
            memory = SharedMemory(frame.header["blob"], descriptors.pop())
            frame = Frame(frame.kind, frame.header, memory)
        return frame, descriptors


def close_descriptors(descriptors: Sequence[int]) -> None:
    """Close descriptors, whatever becomes of each."""
    for fd in descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)
