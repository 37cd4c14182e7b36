"""Every ``Example:`` in a docstring of the public names runs as it stands."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

import asyncrt

pytestmark = pytest.mark.anyio


def _examples() -> Iterator[Any]:
    yield from _examples_in("asyncrt", asyncrt)
    for name in asyncrt.__all__:
        value = getattr(asyncrt, name)
        if inspect.ismodule(value):  # the sync face: its examples would block the event loop
            continue
        yield from _examples_in(name, value)
        if inspect.isclass(value):
            for member_name, member in inspect.getmembers(value, inspect.isfunction):
                if not member_name.startswith("_"):
                    yield from _examples_in(f"{name}.{member_name}", member)


def _examples_in(name: str, value: object) -> Iterator[Any]:
    lines = iter((inspect.getdoc(value) or "").splitlines())
    for line in lines:
        if line == "Example:":
            code = []
            for following in lines:
                if following and not following.startswith(" "):
                    break
                code.append(following)
            yield pytest.param(textwrap.dedent("\n".join(code)), id=name)


EXAMPLES = list(_examples())


@pytest.mark.parametrize("code", EXAMPLES)
async def test_example_runs(code: str) -> None:
    body = textwrap.indent(code, "    ")
    namespace: dict[str, Any] = {"asyncrt": asyncrt}
    exec(f"async def example():\n{body}", namespace)  # noqa: S102 - our own docstrings
    await namespace["example"]()


def test_the_main_names_have_examples() -> None:
    found = {param.id for param in EXAMPLES}
    assert {"asyncrt", "Executor", "Executor.map", "Executor.submit", "Run", "Retry"} <= found
