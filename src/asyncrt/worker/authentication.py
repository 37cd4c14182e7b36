"""Proof by both sides that they know the pool's token, which never travels.

HMAC-SHA256 over a nonce of each side and the prover's role, so that an answer can be neither
replayed nor reflected.
"""

from __future__ import annotations

import hmac
import os
from typing import Any

from asyncrt.errors import AuthenticationError


def new_nonce() -> str:
    """Return a nonce that was never used."""
    return os.urandom(16).hex()


def prove(token: bytes, role: str, worker_nonce: str, client_nonce: str) -> str:
    """Return the proof that a role (``"client"`` or ``"worker"``) gives."""
    text = f"asyncrt {role} {worker_nonce} {client_nonce}".encode()
    return hmac.digest(token, text, "sha256").hex()


def verify(proof: Any, token: bytes, role: str, worker_nonce: str, client_nonce: str) -> None:
    """Check the other side's proof.

    Raises:
        AuthenticationError: It does not know the token.
    """
    expected = prove(token, role, worker_nonce, client_nonce)
    if not isinstance(proof, str) or not hmac.compare_digest(proof.encode(), expected.encode()):
        raise AuthenticationError(f"the {role} does not know the pool's token")
