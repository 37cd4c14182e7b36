"""The results of a sync ``map``, on their way from the event loop to who iterates over them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal

from asyncrt.errors import ExecutorClosedError, RunCancelledError
from asyncrt.run import CANCELLED, FAILED, SUCCEEDED
from asyncrt.syncfuture import check_process, loaded, warn_if_in_loop

if TYPE_CHECKING:
    from asyncrt.run import Run
    from asyncrt.serialize import PackedFunction
    from asyncrt.synccore import Core
    from asyncrt.syncfuture import Profile

_FLUSH_SECONDS: Final = 0.002  # waking the other thread takes time from this one

_Batch = tuple[list[Any], bytes]


class MapJob:
    """The calls of one ``map``.

    Outcomes come in batches, those that may be delivered now. Either all inputs are known, or they
    are pulled by who iterates, as the standard library's ``buffersize`` says.

    Args:
        inputs: Sequences (``style`` as in ``Run``), or an iterator of single arguments.
    """

    def __init__(
        self,
        core: Core,
        profile: Profile,
        function: PackedFunction,
        inputs: Sequence[Sequence[Any]] | Iterator[Any],
        style: Literal["one", "star"],
        *,
        buffersize: int | None,
    ) -> None:
        self._core = core
        self._profile = profile
        self._function = function
        self._style = style
        self._ordered = profile.settings.call.ordered
        self._sequences: Sequence[Sequence[Any]] | None = None
        self._source: Iterator[Any] | None = None
        self._room = 0
        if buffersize is None:
            assert isinstance(inputs, Sequence)
            self._sequences = inputs
        else:
            assert isinstance(inputs, Iterator)
            self._source, self._room = inputs, buffersize
        self._changed = threading.Condition(threading.Lock())
        self._batches: deque[_Batch] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._run: Run[Any] | None = None
        self._running: set[int] = set()
        self._completed: list[int] = []  # and not handed on, unless in order
        self._flushed = 0.0
        self._flush_timer: asyncio.TimerHandle | None = None
        self._left = 0 if self._sequences is None else min(map(len, self._sequences))

    # -- who iterates -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Let the calls be started.

        Raises:
            ExecutorClosedError: There is no executor any more.
            BrokenExecutorError: Its workers cannot work.
        """
        first, complete = self._pull()
        self._core.jobs.add(self)
        try:
            self._core.post_call(functools.partial(self._begin, first, complete), self._profile)
        except BaseException:
            self._core.jobs.discard(self)
            raise

    def _pull(self) -> tuple[list[Any], bool]:
        """Take inputs as far as there is room; tell whether these were the last ones."""
        if self._source is None:
            return [], True
        found = list(islice(self._source, self._room))
        if len(found) < self._room:
            self._source = None
        self._room -= len(found)
        return found, self._source is None

    def pull_more(self) -> None:
        """Take inputs for those whose results were delivered, if they are taken one by one.

        Raises:
            ExecutorClosedError: There is no executor any more that could take them.
        """
        if self._source is None or self._core.closed:
            return
        more, complete = self._pull()
        if more:
            self._core.post_call(functools.partial(self._take, more), self._profile)
        if complete:
            self._core.post(self.end_input)

    def delivered(self) -> None:
        """Note that a result was handed out."""
        self._room += 1

    def next_batch(self, end: float | None) -> _Batch | None:
        """Wait for outcomes: values or errors, and a state of each. ``None``: there are no more.

        Args:
            end: When to give up, ``time.monotonic()``.

        Raises:
            TimeoutError: It is past ``end``.
            Exception: What ended all calls at once.
        """
        if not self._batches and not self._ended:
            check_process(self._core.pid)
            warn_if_in_loop(
                "waiting for the next result of map",
                "use asyncrt.Executor, whose map is awaited",
                stacklevel=4,
            )
        with self._changed:
            while not self._batches:
                if self._ended:
                    if self._error is None:
                        return None
                    raise self._error
                wait = None if end is None else end - time.monotonic()
                if wait is not None and wait <= 0:
                    raise TimeoutError
                self._changed.wait(wait)
            return self._batches.popleft()

    def check_complete(self) -> None:
        """Refuse to end before the inputs do.

        Raises:
            ExecutorClosedError: The executor was shut down, there are inputs that nobody took.
        """
        if self._source is not None:
            raise ExecutorClosedError("the executor was shut down before map had all its inputs")

    def cancel(self) -> None:
        """Give up what has not ended. Does not wait."""
        if not self._ended:
            self._core.post(self._cancel)

    # -- Job, in the event loop -------------------------------------------------------------------

    def _begin(self, first: list[Any], complete: bool) -> None:
        core = self._core
        if self._ended:
            return
        try:
            run = core.begin(self._function, self._sequences, self._style, self._profile, self)
        except Exception as error:  # noqa: BLE001 - of the pool; told to who iterates
            self._end(core.translate(error, self._profile))
            return
        self._run = run
        self._sequences = None
        if first:
            self._take(first)
        if complete:
            run.input_ended()

    def _take(self, more: list[Any]) -> None:
        assert self._run is not None  # inputs are taken in the order in which they were posted
        if not self._run.done():
            self._left += len(more)
            self._run.take(more)

    def _cancel(self) -> None:
        self.abort(RunCancelledError("the results of the map are not wanted any more"))

    def end_input(self) -> None:
        """See ``Job``."""
        if self._run is not None:
            self._run.input_ended()

    def cancel_pending(self) -> None:
        """See ``Job``."""
        if self._run is not None:
            for call in self._run.calls:
                if call.index not in self._running:
                    self._run.cancel_call(call.index)

    def abort(self, error: BaseException) -> None:
        """See ``Job``."""
        if self._run is not None:
            self._run.abort(error)
        else:
            self._end(self._core.translate(error, self._profile))

    def count(self) -> int:
        """See ``Job``."""
        return self._left

    # -- RunListener ------------------------------------------------------------------------------

    def started(self, run: Run[Any], index: int) -> None:
        """See ``RunListener``."""
        del run
        self._running.add(index)

    def settled(self, run: Run[Any], indexes: Sequence[int]) -> None:
        """See ``RunListener``."""
        self._left -= len(indexes)
        if self._running:
            self._running.difference_update(indexes)
        if not self._ordered:
            self._completed.extend(indexes)
        if self._flush_timer is None:
            loop = asyncio.get_running_loop()
            wait = self._flushed + _FLUSH_SECONDS - loop.time()
            if wait > 0:
                self._flush_timer = loop.call_later(wait, self._flush, run)
            else:
                self._flush(run)

    def _flush(self, run: Run[Any]) -> None:
        """Hand on what can be delivered."""
        self._flush_timer = None
        self._flushed = asyncio.get_running_loop().time()
        indexes: Sequence[int] = run.settled_ahead()
        if not self._ordered:
            indexes, self._completed = self._completed, []
        if not indexes:
            return
        values, states = batch = run.collect(indexes)
        if FAILED in states:
            for position, state in enumerate(states):
                if state == FAILED:
                    values[position] = self._core.translate_call_error(values[position])
        values.reverse()  # who iterates pops from the end, and keeps no result
        with self._changed:
            self._batches.append(batch)
            self._changed.notify()

    def ended(self, run: Run[Any], error: BaseException | None) -> None:
        """See ``RunListener``."""
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush(run)
        self._end(None if error is None else self._core.translate(error, self._profile))

    def _end(self, error: BaseException | None) -> None:
        self._core.jobs.discard(self)
        self._left = 0
        with self._changed:
            self._error = error
            self._ended = True
            self._changed.notify_all()


def iterate(
    job: MapJob, *, end: float | None, return_exceptions: bool, keep: object
) -> Iterator[Any]:
    """Yield results as they come.

    A generator, as the standard library's: dropped after it was begun, it cancels what is left;
    dropped before, it does not.

    Args:
        job: Begun already.
        end: When to give up, ``time.monotonic()``.
        return_exceptions: Yield failures, do not raise them.
        keep: What must live as long as this.
    """
    try:
        while (batch := job.next_batch(end)) is not None:
            values, states = batch
            for state in states:
                if state == CANCELLED and not return_exceptions:
                    raise concurrent.futures.CancelledError
                if state != SUCCEEDED and not return_exceptions:
                    raise values.pop()
                yield loaded(values.pop())
                job.delivered()
                job.pull_more()
        job.check_complete()
    finally:
        job.cancel()
