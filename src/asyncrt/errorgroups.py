"""Task groups raise groups of exceptions; users get the one that matters."""

from __future__ import annotations


def innermost(error: BaseException) -> BaseException:
    """Return the first exception of a group, however deep; any other exception as it is."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
