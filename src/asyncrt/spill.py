"""Large results that wait on disk until somebody takes them."""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from typing import Any, Final

from asyncrt.worker.protocol import Buffer, allocate_anonymous

logger = logging.getLogger(__name__)

_SEGMENT_BYTES: Final = 1 << 28
_ALIGNMENT: Final = 64  # of arrays in a payload, see asyncrt.worker.payload


class Deferred:
    """A result that is a payload yet, and mostly on disk.

    Args:
        load: Returns the result, or raises ``SerializationError``.
    """

    __slots__ = ("load",)

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load = load


class Spill:
    """Gives memory for large bodies: up to a limit anonymous memory, above it that of files.

    Results in them are loaded when somebody takes them: until then it is their body that counts.

    The files have no name, so that nothing is left whatever happens. They are mapped, in segments
    of 256 MiB, since each mapping holds a descriptor; a segment's space is free again when all that
    lay there was let go.

    Args:
        directory: Where the files are; ``None``: everything stays in memory.
        limit_bytes: Large bodies that may be in memory at once.
    """

    def __init__(self, directory: str | None, limit_bytes: int) -> None:
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._in_memory = 0
        self._file = -1
        self._segment: memoryview | None = None
        self._used = 0
        self._warned = False

    def allocate(self, size_bytes: int) -> Buffer:
        """Return zeroed memory, or mapped memory of a file."""
        if self._directory is None:
            return allocate_anonymous(size_bytes)
        if self._in_memory + size_bytes > self._limit_bytes:
            try:
                return self._allocate_on_disk(size_bytes)
            except OSError as error:
                if not self._warned:
                    logger.warning("spill_dir: %s; results stay in memory", error)
                self._warned = True
        memory = allocate_anonymous(size_bytes)
        self._in_memory += size_bytes
        weakref.finalize(memory, self._release, size_bytes).atexit = False
        return memory

    @property
    def defers(self) -> bool:
        """Whether results in large bodies are loaded only when they are taken."""
        return self._directory is not None

    def close(self) -> None:
        """Let go of the current segment. What was handed out stays."""
        self._segment = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _release(self, size_bytes: int) -> None:
        self._in_memory -= size_bytes

    def _allocate_on_disk(self, size_bytes: int) -> memoryview:
        if self._segment is None or self._used + size_bytes > len(self._segment):
            self._open_segment(max(size_bytes, _SEGMENT_BYTES))
        segment = self._segment
        assert segment is not None
        # Now, since a page that finds no space when it is written kills the process.
        os.posix_fallocate(self._file, self._used, size_bytes)
        piece = segment[self._used : self._used + size_bytes]
        self._used += size_bytes + -size_bytes % _ALIGNMENT
        return piece

    def _open_segment(self, size_bytes: int) -> None:
        self.close()
        file, path = tempfile.mkstemp(prefix="asyncrt-spill-", dir=self._directory)
        os.unlink(path)
        self._file, self._used = file, 0
        os.ftruncate(file, size_bytes)
        self._segment = memoryview(mmap.mmap(file, size_bytes))
