"""What tests of the sync face run in workers, which import this module: it needs no client."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from desk import RefusedError, wait_at

STATE: dict[str, Any] = {}


class Referable:
    """Can be referred to weakly."""


async def add_one(number: int) -> int:
    await asyncio.sleep(0)
    return number + 1


def die(code: int) -> None:
    os._exit(code)


def keywords(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return args, kwargs


def recall(name: str) -> Any:
    return STATE.get(name)


def remember(name: str, value: int) -> None:
    STATE[name] = STATE.get(name, 0) + value


def wait_and_refuse(port: int, number: int) -> int:
    wait_at(port, number)
    raise RefusedError(number)


def wait_and_square(port: int, number: int) -> int:
    wait_at(port, number)
    return number * number
