"""A function that an initializer must precede, once in each process."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any

from asyncrt.errors import AsyncrtError

# What was done in this process: the namespace of the first initializer and what it set there, or
# why it failed, by executor.
_done: dict[str, tuple[dict[str, Any], dict[str, Any]] | InitializerError] = {}


class InitializerError(AsyncrtError):
    """The initializer of a pool raised."""


class Initialized:
    """Calls a function after the initializer of its executor.

    Functions of a script travel by value, each with variables of its own: what the initializer set
    where it ran first is set there too.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        executor_id: str,
        initializer: Callable[..., Any],
        initargs: tuple[Any, ...],
    ) -> None:
        self._function = function
        self._executor_id = executor_id
        self._initializer = initializer
        self._initargs = initargs
        self.__qualname__ = getattr(function, "__qualname__", type(function).__qualname__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        done = _done.get(self._executor_id)
        if done is None:
            done = _done[self._executor_id] = self._initialize()
        if isinstance(done, InitializerError):
            raise done
        mine, (first, changed) = _variables(self._initializer), done
        if mine is not first:
            mine.update(changed)
        return self._function(*args, **kwargs)

    def _initialize(self) -> tuple[dict[str, Any], dict[str, Any]] | InitializerError:
        variables = _variables(self._initializer)
        before = dict(variables)
        try:
            self._initializer(*self._initargs)
        except BaseException:  # noqa: BLE001 - the user's own; it breaks the pool, whatever it is
            return InitializerError(f"the initializer raised:\n{traceback.format_exc()}")
        missing = object()
        changed = {
            name: value
            for name, value in variables.items()
            if before.get(name, missing) is not value
        }
        return variables, changed


def _variables(fn: Any) -> dict[str, Any]:
    while isinstance(fn, functools.partial):
        fn = fn.func
    found: dict[str, Any] = getattr(fn, "__globals__", {})
    return found
