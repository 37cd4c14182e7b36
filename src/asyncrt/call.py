"""One invocation of the user's function, as users hold it."""

from __future__ import annotations

from collections.abc import Awaitable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import anyio.lowlevel

from asyncrt.outcome import Failure, Success

if TYPE_CHECKING:
    from asyncrt.run import Run

R = TypeVar("R")


class Call(Awaitable[R], Generic[R]):
    """A call of a run. Await it for its result, or for its own exception.

    Awaiting may be repeated. Cancelling who awaits it cancels the call, as with a task; shield it
    (``asyncio.shield``) if others wait for it, too.
    """

    def __init__(self, run: Run[R], index: int) -> None:
        self._run = run
        self._index = index

    def __repr__(self) -> str:
        return f"<Call {self._index} of run {self._run.id}: {self.status}>"

    def __await__(self) -> Generator[Any, None, R]:
        return self._run.wait_for_call(self._index).__await__()

    @property
    def index(self) -> int:
        """Index within the run, from 0."""
        return self._index

    @property
    def run(self) -> Run[R]:
        """The run that it belongs to."""
        return self._run

    @property
    def attempts(self) -> int:
        """Attempts that were sent to a worker so far."""
        return self._run.attempts_of(self._index)

    @property
    def status(self) -> Literal["queued", "sent", "succeeded", "failed", "cancelled"]:
        """Where it stands. ``"sent"`` is with a worker, begun or not."""
        return self._run.status_of(self._index)

    @property
    def outcome(self) -> Success[R] | Failure | None:
        """How it ended, as a value; ``None`` while it has not, or once its result was delivered."""
        return self._run.outcome_of(self._index)

    async def cancel(self) -> None:
        """Give it up: a queued call never runs, a running one is killed. No-op if it has ended.

        Who awaits it gets ``RunCancelledError``. The other calls of its run go on if the run has
        ``return_exceptions=True``; else this counts as its first failure.
        """
        self._run.cancel_call(self._index)
        await anyio.lowlevel.checkpoint()  # so that the cancel is on its way

    def logs(self) -> str:
        """Return what it printed so far: the last 64 KiB, all attempts."""
        return self._run.logs_of(self._index)


class Calls(Sequence[Call[R]], Generic[R]):
    """The calls of a run, made when they are asked for."""

    def __init__(self, run: Run[R], start: int, end: int) -> None:
        self._run = run
        self._indexes = range(start, end)

    def __len__(self) -> int:
        return len(self._indexes)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [Call(self._run, index) for index in self._indexes[position]]
        return Call(self._run, self._indexes[position])

    def __iter__(self) -> Iterator[Call[R]]:
        return (Call(self._run, index) for index in self._indexes)
