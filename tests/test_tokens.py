"""Tokens: each call is begun by the child or taken back by the parent, never both, never none."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrt.worker.tokens import MAX_CALLS, Tokens, take


@pytest.fixture
def tokens() -> Iterator[Tokens]:
    made = Tokens()
    yield made
    made.close()


def taken_until_end(tokens: Tokens) -> int:
    count = 0
    while take(tokens.child_fd):
        count += 1
    return count


def test_the_child_takes_one_token_for_each_call_and_then_the_end(tokens: Tokens) -> None:
    tokens.offer(3)
    assert [take(tokens.child_fd) for _ in range(4)] == [True, True, True, False]


def test_the_parent_knows_how_many_calls_nobody_has_begun(tokens: Tokens) -> None:
    assert tokens.left() == 0
    tokens.offer(2)
    assert tokens.left() == 2
    take(tokens.child_fd)
    assert tokens.left() == 1
    take(tokens.child_fd)
    assert tokens.left() == 0
    take(tokens.child_fd)
    assert tokens.left() == 0


def test_what_was_taken_back_is_not_begun_and_the_chunk_still_ends(tokens: Tokens) -> None:
    tokens.offer(5)
    take(tokens.child_fd)
    assert tokens.take_back() == 4
    assert tokens.left() == 0
    assert taken_until_end(tokens) == 0


def test_taking_back_nothing_takes_nothing(tokens: Tokens) -> None:
    assert tokens.take_back() == 0
    tokens.offer(1)
    assert taken_until_end(tokens) == 1
    assert tokens.take_back() == 0


def test_taking_back_when_only_the_end_is_left_leaves_the_end(tokens: Tokens) -> None:
    tokens.offer(1)
    take(tokens.child_fd)
    assert tokens.take_back() == 0
    assert taken_until_end(tokens) == 0


def test_the_largest_chunk_fits_without_blocking(tokens: Tokens) -> None:
    tokens.offer(MAX_CALLS)
    assert tokens.left() == MAX_CALLS
    assert tokens.take_back() == MAX_CALLS
    assert taken_until_end(tokens) == 0


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=5))
def test_chunks_follow_each_other_whatever_was_taken_back(chunks: list[tuple[int, int]]) -> None:
    tokens = Tokens()
    try:
        for calls, wanted in chunks:
            begun = min(calls, wanted)
            tokens.offer(calls)
            assert all(take(tokens.child_fd) for _ in range(begun))
            assert tokens.take_back() == calls - begun
            assert taken_until_end(tokens) == 0
    finally:
        tokens.close()


def test_parent_and_child_at_once_share_the_calls_out_exactly(tokens: Tokens) -> None:
    for _ in range(50):
        begun: list[int] = []
        tokens.offer(1000)
        child = threading.Thread(target=lambda begun=begun: begun.append(taken_until_end(tokens)))
        child.start()
        taken_back = tokens.take_back()
        child.join()
        assert begun[0] + taken_back == 1000
