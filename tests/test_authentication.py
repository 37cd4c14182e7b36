"""The challenge: who knows the token is let in, and nobody else, whatever he has overheard."""

from __future__ import annotations

from typing import Any

import pytest

from asyncrt.errors import AuthenticationError, ProtocolError
from asyncrt.worker.authentication import new_nonce, prove, verify

TOKEN = b"t" * 32


def test_a_proof_of_the_token_is_accepted() -> None:
    worker, client = new_nonce(), new_nonce()
    for role in ("client", "worker"):
        verify(prove(TOKEN, role, worker, client), TOKEN, role, worker, client)


@pytest.mark.parametrize(
    "proof",
    [
        prove(b"another", "client", "w", "c"),
        prove(TOKEN, "worker", "w", "c"),
        prove(TOKEN, "client", "old", "c"),
        prove(TOKEN, "client", "w", "old"),
        prove(TOKEN, "client", "c", "w"),
        prove(TOKEN, "client", "w", "c").upper(),
        prove(TOKEN, "client", "w", "c")[:-1],
        "",
        "é",
        None,
        b"bytes",
        7,
        [],
    ],
)
def test_anything_else_is_refused(proof: Any) -> None:
    with pytest.raises(AuthenticationError, match="client"):
        verify(proof, TOKEN, "client", "w", "c")


def test_an_answer_can_be_neither_replayed_nor_reflected() -> None:
    worker, client = new_nonce(), new_nonce()
    overheard = prove(TOKEN, "client", worker, client)
    with pytest.raises(AuthenticationError):
        verify(overheard, TOKEN, "client", new_nonce(), client)
    with pytest.raises(AuthenticationError):
        verify(overheard, TOKEN, "worker", worker, client)


def test_nonces_differ() -> None:
    assert len({new_nonce() for _ in range(1000)}) == 1000


def test_the_refusal_is_a_broken_protocol_and_does_not_tell_the_proof() -> None:
    with pytest.raises(ProtocolError) as caught:
        verify("no", TOKEN, "client", "w", "c")
    assert prove(TOKEN, "client", "w", "c") not in str(caught.value)
