"""How a call ended, as a value: nothing is raised until somebody asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Success(Generic[R_co]):
    """The call returned.

    Attributes:
        value: What it returned.
    """

    value: R_co


@dataclass(frozen=True, slots=True)
class Failure:
    """The call failed for good.

    Attributes:
        index: The call's index within its run.
        error: The user's own exception, or a ``CallError``.
        attempts: Attempts that were made.
    """

    index: int
    error: Exception
    attempts: int
