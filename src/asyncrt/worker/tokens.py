"""Who runs a call: whoever took its token. The kernel is the lock.

For each call of a chunk the parent writes one ``CALL`` byte into a socket, then one ``END``. The
child reads a byte before it begins a call. The parent holds the reading end too: it takes calls
back by reading them itself, and the bytes that are left tell which call is running. No message, no
wakeup, and it holds when the child dies at any point.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import termios
from typing import Final

CALL: Final = b"c"
END: Final = b"e"
MAX_CALLS: Final = 1 << 14


class Tokens:
    """The parent's side."""

    def __init__(self) -> None:
        self._writer, self._reader = socket.socketpair()
        # The child must not be stopped by a full buffer, nor the parent by an empty one.
        self._writer.setblocking(False)

    @property
    def child_fd(self) -> int:
        """The descriptor that the child reads from, one byte at a time."""
        return self._reader.fileno()

    def offer(self, calls: int) -> None:
        """Let the child begin calls. The previous ones are all taken."""
        self._writer.send(CALL * calls + END)

    def left(self) -> int:
        """Return how many calls nobody has begun."""
        waiting = array.array("i", [0])
        fcntl.ioctl(self._reader, termios.FIONREAD, waiting)
        return max(0, waiting[0] - 1)

    def take_back(self) -> int:
        """Take the calls that nobody has begun; return how many, from the end of the chunk."""
        try:
            taken = self._reader.recv(MAX_CALLS + 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        if taken.endswith(END):
            self._writer.send(END)  # the child still learns that the chunk is over
        return taken.count(CALL)

    def close(self) -> None:
        self._writer.close()
        self._reader.close()


def take(fd: int) -> bool:
    """Take one token, as the child does; ``False`` if the chunk is over."""
    return os.read(fd, 1) == CALL
