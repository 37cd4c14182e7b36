"""Objects as bytes: what goes in comes out, aligned, and nothing large is copied without need."""

from __future__ import annotations

import collections
import dataclasses
import io
import pickle
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrt.worker.payload import SegmentSink, _SlicedReader, decode, encode
from asyncrt.worker.protocol import byte_length

MIB = 1 << 20

atoms = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary()
)
values = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=4), inner, max_size=4),
        st.frozensets(st.integers(), max_size=3),
        st.builds(bytearray, st.binary(max_size=20)),
    ),
    max_leaves=20,
)
array_shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple)


@dataclasses.dataclass
class Point:
    x: int
    y: Any


def joined(value: Any, *, base: int = 0, pickler: Any = cloudpickle.Pickler) -> bytearray:
    return bytearray(base) + b"".join(encode(value, pickler, base=base))


def round_trip(value: Any, *, base: int = 0, pickler: Any = cloudpickle.Pickler) -> Any:
    body = memoryview(joined(value, base=base, pickler=pickler))
    return decode(body, base, len(body))


@given(values, st.integers(0, 200))
def test_objects_of_built_in_types_come_out_as_they_went_in(value: Any, base: int) -> None:
    found = round_trip(value, base=base)
    assert found == value
    assert type(found) is type(value)


@given(values)
def test_objects_of_built_in_types_need_no_other_pickler(value: Any) -> None:
    def refuse(*_: Any, **__: Any) -> pickle.Pickler:
        raise AssertionError("asked for")

    assert pickle.loads(b"".join(encode(value, refuse))) == value


@given(
    array_shapes,
    st.sampled_from(["u1", "i4", "f8", "c16", "S3"]),
    st.sampled_from("CF"),
    st.integers(0, 100),
    st.integers(0, 3),
)
def test_arrays_come_out_as_they_went_in_aligned_and_as_views_of_the_body(
    shape: tuple[int, ...], dtype: str, order: Any, base: int, others: int
) -> None:
    array = np.zeros(shape, dtype, order=order)
    array[...] = np.arange(array.size).reshape(shape).astype("u1").astype(dtype)
    value = {"array": array, "text": "x" * others, "more": [array[..., None].copy()] * others}
    raw = np.zeros(base + byte_length(encode(value, cloudpickle.Pickler, base=base)) + 64, "u1")
    start = -raw.ctypes.data % 64  # as aligned as memory that is mapped
    body = memoryview(raw.data)[start : start + len(raw) - 64]
    body[:] = joined(value, base=base)
    found = decode(body, base, len(body))
    np.testing.assert_array_equal(found["array"], array)
    assert found["array"].dtype == array.dtype
    assert found["array"].flags.f_contiguous == array.flags.f_contiguous
    assert len(found["more"]) == others
    if array.size and array.ndim:
        assert found["array"].ctypes.data % 64 == 0
        assert np.shares_memory(found["array"], raw)


@pytest.mark.parametrize("writable", [True, False])
def test_a_received_array_is_writable_if_the_sent_one_was(writable: bool) -> None:
    array = np.arange(10)
    array.flags.writeable = writable
    assert round_trip(array).flags.writeable == writable


@pytest.mark.parametrize(
    "value",
    [
        Point(1, [2]),
        collections.OrderedDict(a=1),
        collections.Counter("aab"),
        {1, 2},
        range(5),
        1 + 2j,
        ValueError("odd"),
        [np.float64(1.5), np.arange(3), "x"],
        np.array(["a", None], dtype=object),
        np.array(["2026-01-01"], dtype="M8[D]"),
        np.arange(12).reshape(3, 4)[:, ::2],
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("pickler", [pickle.Pickler, cloudpickle.Pickler])
def test_other_objects_come_out_as_they_went_in(value: Any, pickler: Any) -> None:
    found = round_trip(value, pickler=pickler)
    assert type(found) is type(value)
    assert repr(found) == repr(value)


def test_functions_come_out_as_they_went_in() -> None:
    base = 5
    assert round_trip(lambda x: x + base)(2) == 7


def test_what_a_reduction_raises_passes_through() -> None:
    class Odd:
        def __reduce__(self) -> Any:
            raise ZeroDivisionError("odd")

    with pytest.raises(ZeroDivisionError, match="odd"):
        encode(Odd(), cloudpickle.Pickler)
    with pytest.raises(TypeError, match="lock"):
        encode(threading.Lock(), cloudpickle.Pickler)


# -- copies ---------------------------------------------------------------------------------------


def peak_of(action: Callable[[], Any]) -> tuple[int, Any]:
    """Return the most memory that an action held at once, and what it returned."""
    tracemalloc.start()
    try:
        found = action()
        return tracemalloc.get_traced_memory()[1], found
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: [1, data], lambda d: Point(1, d)])
def test_large_bytes_are_segments_as_they_are(wrap: Callable[[bytes], Any]) -> None:
    data = bytes(8 * MIB)
    value = wrap(data)
    peak, segments = peak_of(lambda: encode(value, cloudpickle.Pickler))
    assert any(segment is data for segment in segments)
    assert peak < MIB


def test_arrays_are_segments_as_they_are() -> None:
    array = np.zeros(8 * MIB, "u1")
    peak, segments = peak_of(lambda: encode(array, cloudpickle.Pickler))
    assert any(np.shares_memory(np.frombuffer(part, "u1"), array) for part in segments)
    assert peak < MIB


def test_received_arrays_are_not_copied() -> None:
    body = memoryview(joined(np.ones(8 * MIB, "u1")))
    peak, found = peak_of(lambda: decode(body, 0, len(body)))
    assert peak < MIB
    assert np.shares_memory(found, np.frombuffer(body, "u1"))


def test_received_bytes_are_copied_once() -> None:
    body = memoryview(joined(bytes(8 * MIB)))
    peak, found = peak_of(lambda: decode(body, 0, len(body)))
    assert len(found) == 8 * MIB
    assert peak < 8 * MIB + MIB


def test_small_writes_are_joined_and_keep_their_order_around_large_ones() -> None:
    sink = SegmentSink()
    large = bytes(70_000)
    for part in (b"a", b"b", large, b"c", bytearray(70_000)):
        assert sink.write(part) == len(part)
    segments = sink.finish()
    assert [len(segment) for segment in segments] == [2, 70_000, 70_001]
    assert segments[1] is large


# -- bad input ------------------------------------------------------------------------------------


def test_an_empty_payload_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        decode(memoryview(b"abc"), 1, 1)


def test_an_array_that_is_cut_off_is_an_error() -> None:
    body = memoryview(joined(np.ones(100)))
    with pytest.raises(ValueError, match="cut off"):
        decode(body, 0, len(body) - 1)


@given(st.integers(0, 400))
def test_a_payload_that_is_cut_off_never_passes_for_a_whole_one(size: int) -> None:
    whole = joined({"a": np.ones(30), "b": "text"})
    cut = memoryview(whole)[: min(size, len(whole) - 1)]
    with pytest.raises(Exception):  # noqa: B017, PT011 - pickle's own, of many types
        decode(cut, 0, len(cut))


# -- slices ---------------------------------------------------------------------------------------


@given(st.binary(max_size=3000).map(lambda data: data.replace(b"a", b"\n")), st.data())
def test_the_sliced_reader_reads_like_a_file(data: bytes, draws: st.DataObject) -> None:
    model, reader = io.BytesIO(data), _SlicedReader(memoryview(data))
    assert reader.readable()
    for _ in range(8):
        kind = draws.draw(st.sampled_from(["read", "readline", "readinto"]))
        size = draws.draw(st.integers(0, 900))
        if kind == "read":
            assert reader.read(size) == model.read(size)
        elif kind == "readline":
            assert reader.readline() == model.readline()
        else:
            ours, theirs = bytearray(size), bytearray(size)
            assert reader.readinto(ours) == model.readinto(theirs)
            assert ours == theirs
    assert reader.read() == model.read()
    assert reader.readinto(bytearray(5)) == 0


def test_the_sliced_reader_fills_memory_larger_than_a_slice() -> None:
    data = bytes(range(256)) * (3 * MIB // 256) + b"end"
    target = bytearray(len(data) + 10)
    assert _SlicedReader(memoryview(data)).readinto(target) == len(data)
    assert target[: len(data)] == data


@pytest.mark.parametrize("make", [bytes, bytearray, lambda size: "x" * size])
def test_payloads_larger_than_a_slice_come_out_as_they_went_in(make: Any) -> None:
    value = [make(3 * MIB + 7), {"after": 1}]
    found = round_trip(value)
    assert found == value
    assert type(found[0]) is type(value[0])


def test_arrow_tables_share_the_memory_of_what_was_received() -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"number": np.arange(100_000, dtype=float)})
    segments = encode(table, cloudpickle.Pickler)
    column = table["number"].chunk(0).buffers()[1]
    assert any(isinstance(each, memoryview) and each.nbytes == column.size for each in segments)
    body = memoryview(bytearray(b"".join(segments)))
    begin = np.frombuffer(body, dtype=np.uint8).ctypes.data
    copy = decode(body, 0, body.nbytes)
    assert copy.equals(table)
    address = copy["number"].chunk(0).buffers()[1].address
    assert begin <= address < begin + body.nbytes
