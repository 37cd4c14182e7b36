"""Outcomes as bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrt.worker.records import (
    RECORD,
    Outcome,
    iterate_records,
    pack_failure,
    pack_raised,
    unpack_raised,
)

times = st.floats(0, 1e9)
records = st.lists(
    st.tuples(times, times, st.sampled_from(list(Outcome)), st.binary(max_size=40)), max_size=6
)


def packed(found: list[tuple[float, float, Outcome, bytes]]) -> bytes:
    return b"".join(
        RECORD.pack(started, ended, len(payload), outcome) + payload
        for started, ended, outcome, payload in found
    )


@given(records)
def test_records_come_out_as_they_went_in(
    sent: list[tuple[float, float, Outcome, bytes]],
) -> None:
    body = memoryview(packed(sent))
    found = [
        (started, ended, Outcome(outcome), bytes(body[begin:end]))
        for started, ended, outcome, begin, end in iterate_records(body, len(sent))
    ]
    assert found == sent


@given(records.filter(bool), st.data())
def test_records_that_are_cut_off_are_an_error(
    sent: list[tuple[float, float, Outcome, bytes]], data: st.DataObject
) -> None:
    whole = packed(sent)
    end = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ValueError, match="cut off"):
        list(iterate_records(memoryview(whole)[:end], len(sent)))


@given(records)
def test_asking_for_more_records_than_there_are_is_an_error(
    sent: list[tuple[float, float, Outcome, bytes]],
) -> None:
    with pytest.raises(ValueError, match="cut off"):
        list(iterate_records(memoryview(packed(sent)), len(sent) + 1))


def test_a_payload_of_one_record_is_aligned_like_its_body() -> None:
    assert RECORD.size == 32


@given(
    st.dictionaries(st.text(max_size=5), st.one_of(st.text(), st.integers(), st.none())),
    st.lists(st.binary(max_size=20), max_size=3),
)
def test_a_raised_exception_keeps_its_facts_and_its_pickle(
    facts: dict[str, Any], segments: list[bytes]
) -> None:
    found, pickled = unpack_raised(memoryview(pack_raised(facts, segments)))
    assert found == facts
    assert bytes(pickled) == b"".join(segments)


def test_a_failure_is_facts_only() -> None:
    packed = pack_failure("WorkerCrashedError", "it died", signal=11, log_tail="a\nb")
    assert json.loads(packed) == {
        "error": "WorkerCrashedError",
        "message": "it died",
        "signal": 11,
        "log_tail": "a\nb",
    }
