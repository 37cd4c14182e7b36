"""Whom a run tells what: who runs its calls, and who waits for them in a way of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from asyncrt.run import Run


class RunOwner(Protocol):
    """Who runs the calls of a run."""

    def offer(self, run: Run[Any], count: int) -> None:
        """More calls were taken from the input."""

    def give_up(self, run: Run[Any]) -> None:
        """Nobody wants the calls that are not settled."""

    def give_up_call(self, run: Run[Any], index: int) -> None:
        """Nobody wants one call."""

    def forget(self, run: Run[Any]) -> None:
        """All calls are settled."""


class RunListener(Protocol):
    """Who is told what becomes of the calls, instead of waiting for them. In the event loop."""

    def started(self, run: Run[Any], index: int) -> None:
        """A worker reports that a call is running."""

    def settled(self, run: Run[Any], indexes: Sequence[int]) -> None:
        """Calls have ended. ``Run.collect`` gives their outcomes."""

    def ended(self, run: Run[Any], error: BaseException | None) -> None:
        """Nothing more will happen. Calls that were not settled share the error."""
