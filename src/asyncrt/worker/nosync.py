"""What stands for ``asyncrt.sync`` in a worker, where the client is not installed.

So a module whose functions run in a worker may import the sync face at its top, as one that uses
``ProcessPoolExecutor`` does.
"""

from __future__ import annotations

from typing import Any

from asyncrt.errors import AsyncrtError


class BrokenExecutorError(AsyncrtError, RuntimeError):
    """Is never raised here."""


class Executor:
    """Cannot be used inside a call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        raise ImportError(
            "asyncrt.sync belongs to the client, which is not installed in this image: only errors "
            "and current_call can be used inside a call"
        )


class Future(Executor):
    """Cannot be used inside a call."""


MapOptions = Options = dict
