"""When workers that could not be started are worth another try."""

from __future__ import annotations

from typing import Final

_MAX_FAILURES: Final = 3
_FIRST_SECONDS: Final = 0.1
_LONGEST_SECONDS: Final = 12.8


class Restarts:
    """Counts failures in a row, and lets the time between tries grow."""

    def __init__(self) -> None:
        self._failures = 0
        self._since_told = 0

    def succeeded(self) -> None:
        """Note that a worker is ready."""
        self._failures = self._since_told = 0

    def failed(self) -> None:
        """Note that one could not be started."""
        self._failures += 1
        self._since_told += 1

    @property
    def are_many(self) -> bool:
        """Whether to give up for now, and tell who waits."""
        return self._since_told >= _MAX_FAILURES

    @property
    def are_news(self) -> bool:
        """Whether the last failure is worth a warning: not the same one over and over."""
        return self._failures <= _MAX_FAILURES

    def told(self) -> None:
        """Note that who waited was told."""
        self._since_told = 0

    @property
    def delay(self) -> float:
        """Seconds before the next try."""
        seconds: float = min(_FIRST_SECONDS * 2.0 ** (self._failures - 1), _LONGEST_SECONDS)
        return seconds
