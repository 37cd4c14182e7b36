"""What a RESULT frame holds, as Python objects: values, errors, times."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from asyncrt.actions import Action, Failed, Retried
from asyncrt.errors import SerializationError
from asyncrt.events import Finished
from asyncrt.modules import explain_import
from asyncrt.queues import Chunk
from asyncrt.serialize import build_failure, load_error, text_of
from asyncrt.spill import Deferred
from asyncrt.units import Unit
from asyncrt.worker.payload import decode
from asyncrt.worker.protocol import Buffer
from asyncrt.worker.records import Outcome, iterate_records

_LAST_LOG_LINES: Final = 10

# A chunk (``None`` if it is not known any more), the position of the first outcome, their number.
Part: TypeAlias = tuple[Chunk | None, int, int]
_Record: TypeAlias = tuple[float, float, int, int, int]


@dataclass(slots=True)
class Outcomes:
    """Outcomes of consecutive calls of a chunk.

    Attributes:
        first: Position of the first of them.
        values: What they returned; ``None`` for those that failed.
        errors: Error and remote traceback of those that failed, by position.
        times: Start and end of each, in the client's time.
    """

    chunk: Chunk
    first: int
    values: list[Any]
    errors: dict[int, tuple[Exception, str]]
    times: array[float]


def load_outcomes(
    parts: Sequence[Part], body: Buffer, *, worker: str, clock_offset: float, later: bool
) -> Iterator[Outcomes]:
    """Load what a frame holds. May run in a thread: it touches nothing but its arguments.

    Args:
        later: Leave results in the body until somebody takes them.
    """
    view = memoryview(body)
    records = iterate_records(view, sum(count for _, _, count in parts))
    for chunk, first, count in parts:
        mine = itertools.islice(records, count)
        if chunk is None:  # late news
            deque(mine, maxlen=0)
        else:
            yield _load_part(chunk, first, view, mine, worker, clock_offset, later)


def _load_part(
    chunk: Chunk,
    first: int,
    body: memoryview,
    records: Iterator[_Record],
    worker: str,
    clock_offset: float,
    later: bool,
) -> Outcomes:
    values: list[Any] = []
    errors: dict[int, tuple[Exception, str]] = {}
    times = array("d")
    position = first
    for started, ended, outcome, begin, end in records:
        times.append(started + clock_offset)
        times.append(ended + clock_offset)
        value: Any = None
        if outcome == Outcome.SUCCESS and later:
            facts = facts_of(chunk, position, worker)
            value = Deferred(functools.partial(_load_result, body[begin:end], facts))
        elif outcome == Outcome.SUCCESS:
            try:
                value = decode(body, begin, end)
            except BaseException as error:  # noqa: ASYNC103, BLE001 - loading runs the user's own code
                errors[position] = _unloadable(error, facts_of(chunk, position, worker)), ""
        elif outcome == Outcome.RAISED:
            facts = facts_of(chunk, position, worker)
            errors[position] = load_error(body[begin:end], _load, **facts)
        else:
            facts = facts_of(chunk, position, worker)
            described = json.loads(bytes(body[begin:end]))
            errors[position] = build_failure(described, **facts), ""
        values.append(value)
        position += 1
    return Outcomes(chunk, first, values, errors, times)


def finished_entry(
    outcomes: Outcomes, news: Sequence[int], actions: Sequence[Action], *, now: float
) -> Finished:
    """Return what the log of a run keeps of outcomes.

    Args:
        news: Positions whose success counts.
        actions: What the dispatcher said to the outcomes: which failures are final.
    """
    chunk, first, times = outcomes.chunk, outcomes.first, outcomes.times
    failures: dict[int, tuple[Exception, float | None]] = {}
    for action in actions:
        if isinstance(action, Retried) and action.run is chunk.run:
            failures[action.index] = action.error, action.delay
        elif isinstance(action, Failed) and action.run is chunk.run:
            failures[action.index] = action.error, None
    indexes: Sequence[int]
    if isinstance(news, range) and not failures:
        indexes = chunk.indexes[news.start : news.stop]
        kept = times[2 * (news.start - first) : 2 * (news.stop - first)]
    else:
        settled = set(news)
        indexes, kept = [], array("d")
        for offset in range(len(times) // 2):
            index = chunk.indexes[first + offset]
            if first + offset in settled or index in failures:
                indexes.append(index)
                kept.extend(times[2 * offset : 2 * offset + 2])
    return Finished(now, indexes, chunk.attempt, chunk.worker, kept, failures)


def facts_of(chunk: Chunk, position: int, worker: str) -> dict[str, Any]:
    """Return what errors tell about a call."""
    return {
        "run_id": chunk.run.id,
        "index": chunk.indexes[position],
        "attempt": chunk.attempt,
        "worker": worker,
    }


def annotate(error: Exception, trace: str, printed: str, facts: dict[str, Any]) -> None:
    """Tell in a note of an exception where it comes from: it is the user's own, type and all."""
    lines = [
        f"asyncrt: call {facts['index']} of run {facts['run_id']}, attempt {facts['attempt']}, "
        f"on {facts['worker']}"
    ]
    if trace:
        lines += ["", "Remote traceback:", trace.rstrip()]
    last = printed.splitlines()[-_LAST_LOG_LINES:]
    if last:
        lines += ["", f"Its last {len(last)} lines of output:", *last]
    # An exception may refuse notes: frozen, or with a ``__notes__`` of its own.
    with contextlib.suppress(Exception):
        BaseException.add_note(error, "\n".join(lines))


def explain(error: Exception, modules: Sequence[Unit], excluded: Sequence[str]) -> None:
    """Say in an error of an import what to do, if that is known.

    Args:
        modules: What travelled with the function.
        excluded: What ``exclude_modules`` names.
    """
    hint = explain_import(error, modules, excluded)
    if hint and isinstance(error, SerializationError):
        error.args = (f"{error}; {hint}",)
    elif hint:
        error.add_note(f"asyncrt: {hint}")


def _load(packed: memoryview) -> Any:
    return decode(packed, 0, packed.nbytes)


def _load_result(packed: memoryview, facts: dict[str, Any]) -> Any:
    try:
        return _load(packed)
    except BaseException as error:
        raise _unloadable(error, facts) from error  # noqa: ASYNC104 - of user code


def _unloadable(error: BaseException, facts: dict[str, Any]) -> SerializationError:
    failure = SerializationError(
        "the call succeeded, but its result cannot be loaded here: "
        f"{type(error).__qualname__}: {text_of(error)}",
        **facts,
    )
    failure.__cause__ = error
    return failure
