"""The wire format: frames over a byte stream, the same on every transport.

A frame is a fixed head, a JSON header and a raw body::

    offset  bytes  field
    0       1      version of the wire format
    1       1      kind, see ``Kind``; unknown kinds are skipped
    2       2      flags: 1 = the body follows in PIECE frames of the same stream
    4       4      stream, 0 unless the body comes in pieces
    8       4      length of the header
    12      8      length of the body (of the whole one if it comes in pieces)

All numbers are big-endian. A body over ``PIECE_BYTES`` travels in pieces, between which other
frames may pass: a heartbeat or a cancel never queues behind a gigabyte.

Nothing here does I/O. ``Outbox`` says what to write next, ``Decoder`` takes what was read.
(No dataclasses in the worker's parent: importing them costs a fifth of its start.)
"""

from __future__ import annotations

import json
import mmap
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple

from asyncrt.errors import ProtocolError

VERSION: Final = 1
PIECE_BYTES: Final = 1 << 20
HEAD: Final = struct.Struct("!BBHIIQ")
MORE: Final = 1
_PIECE: Final = 18

Header = dict[str, Any]
_encode_json: Final = json.JSONEncoder(separators=(",", ":")).encode
_decode_json: Final = json.JSONDecoder().decode

Buffer = bytes | bytearray | memoryview | mmap.mmap


class Kind(IntEnum):
    """What a frame says. Direction: > client to worker, < worker to client, = both."""

    CHALLENGE = 1  # < nonce
    RESPONSE = 2  # > nonce, proof
    HELLO = 3  # < proof, versions, slots
    RESUME = 4  # = what was received, which chunks are known
    FUNCTION = 5  # > body under its content hash
    CALLS = 6  # > a chunk of calls
    STARTED = 7  # < a chunk that runs for longer than a moment
    RESULT = 8  # < outcomes of consecutive calls of a chunk
    ACKNOWLEDGE = 9  # > results up to a sequence number are safe
    CANCEL = 10  # > calls whose outcome nobody wants
    REVOKE = 11  # > give back what has not started
    REVOKED = 12  # < calls that will not run here
    LOG = 13  # < what a call printed
    HEARTBEAT = 14  # = I am alive
    DRAIN = 15  # > finish what you have, then end
    QUIT = 16  # > end now
    GOODBYE = 17  # < I am about to end, and why
    PIECE = 18  # = part of a body
    # Between the worker's own processes, never on the wire to a client:
    SPAWN = 32
    SPAWNED = 33
    EXITED = 34
    KILL = 35
    TEMPLATE = 36
    READY = 37


class Limits(NamedTuple):
    """What a peer may make us hold. Breaking one ends the connection with ``ProtocolError``."""

    header_bytes: int = 1 << 20
    body_bytes: int = 1 << 36
    open_streams: int = 64


BEFORE_AUTHENTICATION: Final = Limits(header_bytes=4096, body_bytes=0, open_streams=0)


class Frame(NamedTuple):
    """One frame as received. ``body`` belongs to the receiver."""

    kind: int
    header: dict[str, Any]
    body: Buffer = b""


def allocate_anonymous(size_bytes: int) -> mmap.mmap:
    """Return zeroed memory whose pages cost nothing until they are written (unlike a bytearray)."""
    return mmap.mmap(-1, size_bytes)


def dump_json(header: Header) -> bytes:
    """Return a header as it travels."""
    return _encode_json(header).encode()


def load_json(packed: bytes) -> Any:
    """Return what a header says.

    Raises:
        ValueError: Not JSON.
    """
    return _decode_json(packed.decode())


def encode_head(
    kind: int,
    header: Header,
    body_bytes: int,
    *,
    flags: int = 0,
    stream: int = 0,
    dump: Callable[[Header], bytes] = dump_json,
) -> bytes:
    """Return head and header of a frame."""
    packed = dump(header) if header else b""
    return HEAD.pack(VERSION, kind, flags, stream, len(packed), body_bytes) + packed


def byte_length(segments: Iterable[Buffer]) -> int:
    """Return the length of segments in bytes."""
    return sum(
        segment.nbytes if isinstance(segment, memoryview) else len(segment) for segment in segments
    )


class _Stream:
    """A large body on its way out: handed on in views, never copied."""

    __slots__ = ("header", "kind", "left", "opened", "segments")

    def __init__(
        self, kind: int, header: dict[str, Any], segments: Sequence[Buffer], total: int
    ) -> None:
        self.kind = kind
        self.header = header
        self.segments = deque(memoryview(segment).cast("B") for segment in segments)
        self.left = total
        self.opened = False

    def next_piece(
        self, stream: int, piece_bytes: int, dump: Callable[[Header], bytes]
    ) -> list[Buffer]:
        if not self.opened:
            self.opened = True
            return [
                encode_head(self.kind, self.header, self.left, flags=MORE, stream=stream, dump=dump)
            ]
        size = min(self.left, piece_bytes)
        self.left -= size
        piece: list[Buffer] = [HEAD.pack(VERSION, Kind.PIECE, 0, stream, 0, size)]
        while size:
            head = self.segments[0]
            if head.nbytes <= size:
                piece.append(self.segments.popleft())
                size -= head.nbytes
            else:
                piece.append(head[:size])
                self.segments[0] = head[size:]
                size = 0
        return piece


class Outbox:
    """What is still to be written, in order of urgency. Segments are borrowed until written."""

    def __init__(
        self,
        *,
        piece_bytes: int = PIECE_BYTES,
        streams_at_once: int = 8,
        dump: Callable[[Header], bytes] = dump_json,
    ) -> None:
        self._dump = dump
        self._piece_bytes = piece_bytes
        self._streams_at_once = streams_at_once
        self._small: list[Buffer] = []
        self.small_bytes = 0  # of frames that are not large
        self._waiting: deque[_Stream] = deque()
        self._open: deque[tuple[int, _Stream]] = deque()
        self._next_stream = 1

    def __bool__(self) -> bool:
        return bool(self._small or self._open or self._waiting)

    def put(self, kind: int, header: dict[str, Any], body: Sequence[Buffer] = ()) -> None:
        """Queue one frame."""
        total = byte_length(body)
        if total <= self._piece_bytes:
            head = encode_head(kind, header, total, dump=self._dump)
            self._small.append(head)
            self._small.extend(body)
            self.small_bytes += len(head) + total
        else:
            self._waiting.append(_Stream(kind, header, body, total))

    def take(self) -> list[Buffer]:
        """Return what to write next: every small frame, else one piece of one large body."""
        if self._small:
            small, self._small = self._small, []
            self.small_bytes = 0
            return small
        while self._waiting and len(self._open) < self._streams_at_once:
            self._open.append((self._next_stream, self._waiting.popleft()))
            self._next_stream = self._next_stream % 0xFFFFFFFF + 1
        if not self._open:
            return []
        number, stream = self._open.popleft()
        piece = stream.next_piece(number, self._piece_bytes, self._dump)
        if stream.left:
            self._open.append((number, stream))
        return piece


class _Incoming:
    """A large body on its way in."""

    __slots__ = ("filled", "frame", "view")

    def __init__(self, frame: Frame, view: memoryview) -> None:
        self.frame = frame
        self.view = view
        self.filled = 0


class Decoder:
    """Bytes in, frames out. Large bodies are read straight into their memory.

    Use either ``feed`` or, without a copy, ``get_buffer`` and ``received`` in turn.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        allocate: Callable[[int], Buffer] = allocate_anonymous,
        buffer_bytes: int = 1 << 18,
        load: Callable[[bytes], Any] = load_json,
    ) -> None:
        self._load = load
        self.limits = limits
        self._allocate = allocate
        self._buffer = bytearray(buffer_bytes)
        self._start = 0
        self._end = 0
        self._streams: dict[int, _Incoming] = {}
        self._piece: _Incoming | None = None
        self._piece_left = 0

    def get_buffer(self) -> memoryview:
        """Return where the next bytes go. Never empty."""
        if self._piece is not None:
            filled = self._piece.filled
            return self._piece.view[filled : filled + self._piece_left]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._buffer):
            self._compact()
        return memoryview(self._buffer)[self._end :]

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """Take bytes and return the frames that they complete."""
        frames: list[Frame] = []
        view = memoryview(data)
        while view:
            target = self.get_buffer()
            size = min(len(target), len(view))
            target[:size] = view[:size]
            del target
            frames += self.received(size)
            view = view[size:]
        return frames

    def received(self, size: int) -> list[Frame]:
        """Say that bytes were written to ``get_buffer()``; return the frames that they complete.

        Raises:
            ProtocolError: The decoder is of no further use.
        """
        frames: list[Frame] = []
        if self._piece is not None:
            self._advance_piece(size, frames)
            return frames
        self._end += size
        while self._piece is None:
            available = self._end - self._start
            if available < HEAD.size:
                break
            version, kind, flags, stream, header_bytes, body_bytes = HEAD.unpack_from(
                self._buffer, self._start
            )
            if version != VERSION:
                raise ProtocolError(f"wire version {version}, this side speaks {VERSION}")
            if header_bytes > self.limits.header_bytes:
                raise ProtocolError(f"header of {header_bytes} bytes is over the limit")
            if kind == _PIECE:
                self._begin_piece(stream, header_bytes, body_bytes)
                self._start += HEAD.size
                available = min(self._end - self._start, self._piece_left)
                self._copy_to_piece(available, frames)
                continue
            in_pieces = bool(flags & MORE)
            if body_bytes > self.limits.body_bytes or (not in_pieces and body_bytes > PIECE_BYTES):
                raise ProtocolError(f"body of {body_bytes} bytes is over the limit")
            needed = HEAD.size + header_bytes + (0 if in_pieces else body_bytes)
            if available < needed:
                self._reserve(needed)
                break
            at = self._start + HEAD.size
            view = memoryview(self._buffer)
            header = self._parse_header(bytes(view[at : at + header_bytes]))
            at += header_bytes
            if in_pieces:
                self._open_stream(stream, kind, header, body_bytes)
            else:
                # A bytearray, so that arrays in it can be written, like those in large bodies.
                body = bytearray(view[at : at + body_bytes]) if body_bytes else b""
                frames.append(Frame(kind, header, body))
            self._start += needed
        return frames

    def _open_stream(self, stream: int, kind: int, header: dict[str, Any], total: int) -> None:
        if len(self._streams) >= self.limits.open_streams:
            raise ProtocolError("too many bodies at once")
        if stream in self._streams or not total:
            raise ProtocolError(f"stream {stream} opened twice, or empty")
        try:
            memory = self._allocate(total)
        except (OSError, MemoryError, OverflowError) as error:
            raise ProtocolError(f"no memory for a body of {total} bytes") from error
        self._streams[stream] = _Incoming(Frame(kind, header, memory), memoryview(memory))

    def _begin_piece(self, stream: int, header_bytes: int, size: int) -> None:
        incoming = self._streams.get(stream)
        if incoming is None or header_bytes or not size or size > PIECE_BYTES:
            raise ProtocolError(f"unexpected piece of stream {stream}")
        if incoming.filled + size > len(incoming.view):
            raise ProtocolError(f"stream {stream} is longer than it said")
        self._piece, self._piece_left = incoming, size

    def _copy_to_piece(self, size: int, frames: list[Frame]) -> None:
        if size:
            piece = self._piece
            assert piece is not None
            view = memoryview(self._buffer)[self._start : self._start + size]
            piece.view[piece.filled : piece.filled + size] = view
            view.release()
            self._start += size
            self._advance_piece(size, frames)

    def _advance_piece(self, size: int, frames: list[Frame]) -> None:
        piece = self._piece
        assert piece is not None
        piece.filled += size
        self._piece_left -= size
        if self._piece_left:
            return
        self._piece = None
        if piece.filled == len(piece.view):
            for number, incoming in self._streams.items():
                if incoming is piece:
                    del self._streams[number]
                    break
            piece.view.release()
            frames.append(piece.frame)

    def _compact(self) -> None:
        self._buffer[: self._end - self._start] = self._buffer[self._start : self._end]
        self._end -= self._start
        self._start = 0

    def _reserve(self, needed: int) -> None:
        if needed > len(self._buffer):
            grown = bytearray(needed + HEAD.size)
            grown[: self._end - self._start] = self._buffer[self._start : self._end]
            self._buffer = grown
            self._end -= self._start
            self._start = 0
        elif self._start + needed > len(self._buffer):
            self._compact()

    def _parse_header(self, packed: bytes) -> Header:
        if not packed:
            return {}
        try:
            header = self._load(packed)
        except (ValueError, EOFError, TypeError, RecursionError) as error:
            raise ProtocolError("the header cannot be read") from error
        if not isinstance(header, dict):
            raise ProtocolError("the header is not an object")
        return header
