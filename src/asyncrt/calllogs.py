"""What the calls of a run printed."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

_BYTES_PER_CALL: Final = 1 << 16
_BYTES: Final = 1 << 23


class CallLogs:
    """Keeps what calls printed: the last 64 KiB of each, 8 MiB of those that printed last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, bytearray] = OrderedDict()
        self._bytes = 0

    def of(self, index: int) -> str:
        """Return what a call printed."""
        return self._kept.get(index, b"").decode("utf-8", "replace")

    def add(self, index: int, text: bytes) -> None:
        """Add to what a call printed."""
        kept = self._kept.setdefault(index, bytearray())
        self._kept.move_to_end(index)
        self._bytes -= len(kept)
        kept += text
        del kept[:-_BYTES_PER_CALL]
        self._bytes += len(kept)
        while self._bytes > _BYTES:
            self._bytes -= len(self._kept.popitem(last=False)[1])
