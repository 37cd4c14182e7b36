"""When a call that runs far longer than its siblings is worth a second copy. Pure."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from typing import Final

from asyncrt.options import Backups

_SAMPLE: Final = 1001  # of the newest durations: a median of so many is within a few percent


class Stragglers:
    """What a run with ``backups`` knows about how long its calls take.

    Attributes:
        copies: Copies sent so far.
    """

    def __init__(self, settings: Backups) -> None:
        self._settings = settings
        self._seconds: deque[float] = deque(maxlen=_SAMPLE)
        self._median: float | None = None
        self.copies = 0

    def learn(self, seconds: Iterable[float]) -> None:
        """Take in how long calls took that have ended."""
        self._seconds.extend(seconds)
        self._median = None

    def threshold(self, total: int | None, settled: int) -> float | None:
        """Return the seconds after which a running call gets a copy; ``None``: none gets one now.

        Args:
            total: Calls of the run; ``None`` while that is not known.
            settled: Calls that have an outcome.
        """
        settings = self._settings
        if total is None or not self._seconds or settled < settings.quantile * total:
            return None
        if self.copies >= max(1, int(settings.max_share * total)):
            return None
        if self._median is None:
            self._median = statistics.median(self._seconds)
        return max(settings.min_seconds, settings.multiplier * self._median)
