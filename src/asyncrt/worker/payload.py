"""Python objects as bytes. Used on both sides.

A payload is a plain pickle or, where the object has buffers of its own (numpy, Arrow: pickle
protocol 5), an envelope: the pickle, then each buffer on a 64-byte boundary of the body, so that
arrays are views of what was received and aligned. Which of the two is told by the first byte: every
pickle of protocol 2 or more begins with 0x80.

Nothing large is copied on the way out: a ``bytes`` object over 64 KiB is handed to the pickler's
file as it is, and becomes a segment.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from typing import Any, Final

from asyncrt.worker.protocol import Buffer

_ENVELOPE: Final = struct.Struct("<B3xIQ")
_SPAN: Final = struct.Struct("<QQ")  # offset within the payload, and size, of a buffer
_ENVELOPE_MARK: Final = 0x42
_ALIGNMENT: Final = 64
_LARGE_BYTES: Final = 1 << 16
_SLICE_BYTES: Final = 1 << 20


class SegmentSink:
    """The file that a pickler writes to: joins what is small, keeps what is large as it is."""

    def __init__(self) -> None:
        self.segments: list[Buffer] = []
        self._small = bytearray()

    def write(self, data: Buffer) -> int:
        size = len(data)
        if size > _LARGE_BYTES and isinstance(data, bytes):
            self._flush()
            self.segments.append(data)
        else:
            self._small += data
        return size

    def finish(self) -> list[Buffer]:
        self._flush()
        return self.segments

    def _flush(self) -> None:
        if self._small:
            self.segments.append(self._small)
            self._small = bytearray()


class _ReferenceNeeded(Exception):  # noqa: N818 - control flow, never seen outside
    pass


class _PlainPickler(pickle.Pickler):
    """Takes objects of built-in types only: those for which C pickle and cloudpickle agree."""

    def reducer_override(self, obj: Any) -> Any:
        raise _ReferenceNeeded


_PLAIN_TYPES: Final = frozenset({int, float, str, bool, type(None)})
_PicklerFactory = Callable[..., pickle.Pickler]


def encode(value: Any, make_pickler: _PicklerFactory, *, base: int = 0) -> list[Buffer]:
    """Return the segments of a payload.

    Args:
        value: Any object. Its buffers and large ``bytes`` are borrowed, not copied.
        make_pickler: Called as ``make_pickler(file, protocol, buffer_callback=...)`` unless the
            object consists of built-in types only.
        base: Offset of the payload within its body, for the alignment of buffers.

    Raises:
        Exception: Whatever the object's own reduction raises.
    """
    if type(value) in _PLAIN_TYPES:
        return [pickle.dumps(value, 5)]
    sink = SegmentSink()
    try:
        _PlainPickler(sink, 5).dump(value)
    except _ReferenceNeeded:
        pass
    else:
        return sink.finish()
    sink = SegmentSink()
    buffers: list[pickle.PickleBuffer] = []
    make_pickler(sink, 5, buffer_callback=buffers.append).dump(value)
    segments = sink.finish()
    if not buffers:
        return segments
    views = [buffer.raw() for buffer in buffers]
    pickle_bytes = sum(len(segment) for segment in segments)
    at = _ENVELOPE.size + _SPAN.size * len(views) + pickle_bytes
    spans: list[bytes] = []
    for view in views:
        gap = -(base + at) % _ALIGNMENT
        if gap:
            segments.append(bytes(gap))
        segments.append(view)
        spans.append(_SPAN.pack(at + gap, view.nbytes))
        at += gap + view.nbytes
    head = _ENVELOPE.pack(_ENVELOPE_MARK, len(views), pickle_bytes)
    segments.insert(0, b"".join((head, *spans)))
    return segments


class _SlicedReader(io.RawIOBase):
    """Feeds an unpickler in slices, so that another thread gets the GIL between them.

    One ``memcpy`` of 100 MB into fresh pages holds the GIL for about 0.1 s.
    """

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        end = len(self._view) if size < 0 else self._at + size
        found = bytes(self._view[self._at : end])
        self._at += len(found)
        return found

    def readinto(self, target: Any) -> int:
        into = memoryview(target).cast("B")
        total = min(len(into), len(self._view) - self._at)
        for start in range(0, total, _SLICE_BYTES):
            end = min(start + _SLICE_BYTES, total)
            into[start:end] = self._view[self._at + start : self._at + end]
        self._at += total
        return total


def decode(body: memoryview, start: int, end: int) -> Any:
    """Return the object of a payload at ``body[start:end]``; its arrays are views of the body.

    Raises:
        ValueError: Not a payload.
        Exception: Whatever loading the object raises.
    """
    if start == end:
        raise ValueError("empty payload")
    if body[start] != _ENVELOPE_MARK:
        return _loads(body[start:end], None)
    _, count, pickle_bytes = _ENVELOPE.unpack_from(body, start)
    at = start + _ENVELOPE.size
    buffers = []
    for _ in range(count):
        offset, size = _SPAN.unpack_from(body, at)
        at += _SPAN.size
        if start + offset + size > end:
            raise ValueError("payload is cut off")
        buffers.append(body[start + offset : start + offset + size])
    return _loads(body[at : at + pickle_bytes], buffers)


def _loads(packed: memoryview, buffers: list[memoryview] | None) -> Any:
    if len(packed) > _SLICE_BYTES:
        return pickle.Unpickler(_SlicedReader(packed), buffers=buffers).load()
    return pickle.loads(packed, buffers=buffers)
