"""Outcomes of calls as bytes, without pickle: the worker's parent reads and writes them too.

A record is the outcome of one call::

    offset  bytes  field
    0       8      started, seconds of the worker's monotonic clock (double)
    8       8      ended
    16      8      length of the payload
    24      1      outcome, see ``Outcome``
    32      ...    payload
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any, Final

from asyncrt.worker.protocol import Buffer

RECORD: Final = struct.Struct("<ddQB7x")
LENGTH: Final = struct.Struct("<Q")


class Outcome(IntEnum):
    """How a call ended."""

    SUCCESS = 0
    RAISED = 1  # by the user's function, or for it by the child
    FAILED = 2  # told by the worker's parent: timeout, crash, memory, cancel


def iterate_records(body: memoryview, count: int) -> Iterator[tuple[float, float, int, int, int]]:
    """Yield ``(started, ended, outcome, payload start, payload end)`` of each record.

    Raises:
        ValueError: The body does not hold that many records.
    """
    at = 0
    for _ in range(count):
        if at + RECORD.size > len(body):
            raise ValueError("records are cut off")
        started, ended, size, outcome = RECORD.unpack_from(body, at)
        at += RECORD.size
        if at + size > len(body):
            raise ValueError("records are cut off")
        yield started, ended, outcome, at, at + size
        at += size


def pack_failure(error: str, message: str, **facts: Any) -> bytes:
    """Return the payload of a failure that is told as facts: an error class and its attributes."""
    return json.dumps({"error": error, "message": message, **facts}).encode()


def pack_raised(facts: dict[str, Any], pickled: Sequence[Buffer]) -> bytes:
    """Return the payload of an exception: facts as JSON, then the pickled exception, if any."""
    described = json.dumps(facts).encode()
    return b"".join((LENGTH.pack(len(described)), described, *pickled))


def unpack_raised(payload: memoryview) -> tuple[dict[str, Any], memoryview]:
    """Return what ``pack_raised`` was given."""
    size = LENGTH.unpack_from(payload)[0]
    facts = json.loads(bytes(payload[LENGTH.size : LENGTH.size + size]))
    return facts, payload[LENGTH.size + size :]
