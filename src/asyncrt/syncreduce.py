"""A ``map_reduce`` of the sync face: one future, whose call other calls feed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from asyncrt.errors import RuntimeMismatchError, WorkerStartError
from asyncrt.run import SUCCEEDED

if TYPE_CHECKING:
    from asyncrt.executor import Executor
    from asyncrt.run import Run
    from asyncrt.synccore import Core
    from asyncrt.syncfuture import Future, Profile


class ReduceJob:
    """See ``Job`` of ``asyncrt.synccore``.

    Args:
        start: Starts it with an executor; returns the run of the last reduction.
    """

    run: Run[Any]

    def __init__(
        self,
        core: Core,
        profile: Profile,
        future: Future[Any],
        start: Callable[[Executor], Run[Any]],
    ) -> None:
        self._core = core
        self._profile = profile
        self._future = future
        self._start = start

    def begin(self) -> None:
        """Start it. In the event loop."""
        if self._future.cancelled():
            self._future.note_cancelled()
            return
        try:
            self.run = self._start(self._core.executor_for(self._profile))
        except Exception as error:  # noqa: BLE001 - whatever it is, the future tells it
            self._future.settle(None, self._told(error))
            return
        self._future._place = self, 0
        self.run.listener = self
        self._core.jobs.add(self)

    def end_input(self) -> None:
        """See ``Job``."""

    def cancel_pending(self) -> None:
        """See ``Job``."""
        if not self._future.running():
            self._future.cancel()

    def abort(self, error: BaseException) -> None:
        """See ``Job``."""
        self.run.abort(error)

    def count(self) -> int:
        """See ``Job``."""
        return 1

    # -- RunListener ------------------------------------------------------------------------------

    def started(self, run: Run[Any], index: int) -> None:
        """See ``RunListener``."""
        del run, index
        self._future.note_started()

    def settled(self, run: Run[Any], indexes: Sequence[int]) -> None:
        """See ``RunListener``."""
        values, states = run.collect(indexes)
        if states[0] == SUCCEEDED:
            self._future.settle(values[0], None)
        else:
            self._future.settle(None, self._core.translate_call_error(values[0]))

    def ended(self, run: Run[Any], error: BaseException | None) -> None:
        """See ``RunListener``."""
        del run
        self._core.jobs.discard(self)
        if not self._future.done():
            self._future.settle(None, self._told(error or RuntimeError("no result")))

    def _told(self, error: BaseException) -> BaseException:
        if isinstance(error, WorkerStartError | RuntimeMismatchError):
            return self._core.translate(error, self._profile)
        return self._core.translate_call_error(error)
