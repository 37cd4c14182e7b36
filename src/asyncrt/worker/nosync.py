"""What stands for ``asyncrt.sync`` in a worker, where the client is not installed.

So a module whose functions run in a worker may import the sync face at its top, as one that uses
``ProcessPoolExecutor`` does.
"""

from __future__ import annotations

from typing import Any

from asyncrt.errors import INSTEAD_OF_NESTING, AsyncrtError, NestedExecutorError


class BrokenExecutorError(AsyncrtError, RuntimeError):
    """Is never raised here."""


class Executor:
    """Cannot be used inside a call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        raise NestedExecutorError(f"a call cannot open an executor: {INSTEAD_OF_NESTING}")


class Future(Executor):
    """Cannot be used inside a call."""


MapOptions = Options = dict
