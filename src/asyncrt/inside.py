"""What a function can know about the call that it runs in. Travels with the worker."""

from __future__ import annotations

from pathlib import Path


class CurrentCall:
    """The call that this process is running.

    Attributes:
        run_id: The run.
        index: The call's index within the run.
        attempt: Which try this is, from 1.
        deadline: Value of ``time.monotonic()`` in this process at which the attempt is killed;
            ``None`` if it has no timeout.
    """

    def __init__(self, run_id: str, index: int, attempt: int, deadline: float | None) -> None:
        self.run_id = run_id
        self.index = index
        self.attempt = attempt
        self.deadline = deadline
        self._scratch: Path | None = None

    def __repr__(self) -> str:
        return f"<call {self.index} of run {self.run_id}, attempt {self.attempt}>"

    def scratch(self) -> Path:
        """Return a directory of this call's own. It is made when asked for, removed afterwards."""
        import tempfile  # noqa: PLC0415 - rarely needed, and slow to import

        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix=f"asyncrt-{self.run_id}-{self.index}-"))
        return self._scratch

    def remove_scratch(self) -> None:
        """Remove the scratch directory, if there is one."""
        if self._scratch is not None:
            import shutil  # noqa: PLC0415 - see above

            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None


class _Seat:
    """Where the child notes its position, cheaply; a ``CurrentCall`` is made if somebody asks."""

    __slots__ = ("attempt", "call", "index", "run_id", "started", "timeout")

    def __init__(self) -> None:
        self.run_id: str | None = None
        self.index = 0
        self.attempt = 0
        self.started = 0.0
        self.timeout: float | None = None
        self.call: CurrentCall | None = None

    def leave(self) -> None:
        """Remove what the call that has ended leaves."""
        if self.call is not None:
            self.call.remove_scratch()


seat = _Seat()


def current_call() -> CurrentCall:
    """Return the call that this process is running.

    Example:
        async with asyncrt.Executor() as executor:
            indexes = await executor.map(lambda _: asyncrt.current_call().index, "abc")
        assert indexes == [0, 1, 2]

    Raises:
        RuntimeError: This process is not running a call.
    """
    if seat.run_id is None:
        raise RuntimeError("current_call() works inside a call only")
    if seat.call is None:
        deadline = None if seat.timeout is None else seat.started + seat.timeout
        seat.call = CurrentCall(seat.run_id, seat.index, seat.attempt, deadline)
    return seat.call
