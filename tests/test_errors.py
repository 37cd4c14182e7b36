"""The tree of errors: it is what its drawing says, and every fact survives pickle."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import pytest

import asyncrt
from asyncrt import errors
from asyncrt.errors import AsyncrtError, CallError, ConfigError

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, AsyncrtError)
]

FACTS: dict[str, Any] = {
    "attempt": 2,
    "client": "3.11",
    "detail": "0/1 nodes are available",
    "exit_code": 3,
    "expected": "seconds above 0",
    "image": "python:3.12-slim",
    "hint": "log in again",
    "index": 7,
    "key": "k8s.runtime_memory",
    "limit_bytes": 2**28,
    "module": "app.models",
    "line": 12,
    "log_tail": "last words",
    "node": "n-1",
    "name": "pool-0",
    "namespace": "team",
    "path": "args[0].session",
    "paths": ("/app/models.py",),
    "peak_bytes": 2**27,
    "pod": "asyncrt-p-0-abcde",
    "reason": "it holds a lock",
    "resource": "pods",
    "retry_after": 2.0,
    "run_id": "r-1",
    "signal": 11,
    "source": "config.yaml",
    "status": 403,
    "suggestion": "memory",
    "text": "no",
    "timeout": 1.5,
    "type_name": "app.Odd",
    "verb": "list",
    "what": "Python",
    "worker": "w-0",
}


def facts_of(cls: type[AsyncrtError]) -> dict[str, Any]:
    """Return a value for every fact that a class accepts."""
    names: set[str] = set()
    for base in cls.__mro__:
        if issubclass(base, AsyncrtError) and "__init__" in vars(base):
            names |= {
                parameter.name
                for parameter in inspect.signature(base).parameters.values()
                if parameter.kind is parameter.KEYWORD_ONLY
            }
    return {name: FACTS[name] for name in names}


def drawn_tree() -> dict[str, tuple[str | None, set[str]]]:
    """Return the name of each drawn class with its parent and its bases in parentheses."""
    drawn: dict[str, tuple[str | None, set[str]]] = {}
    above: dict[int, str] = {}
    for line in inspect.getdoc(errors).splitlines():  # type: ignore[union-attr]
        found = re.match(r"^((?:    |[│├└─ ])*)(\w+Error)(?: \((\w+)\))?(?:\s|$)", line)
        if found is None or not line.startswith("    "):
            continue
        depth = len(found[1]) // 4
        drawn[found[2]] = (above.get(depth - 1), {found[3]} - {None})
        above[depth] = found[2]
    return drawn


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_error_keeps_its_message_and_its_facts_through_pickle(cls: type[AsyncrtError]) -> None:
    facts = facts_of(cls)
    error = cls("what went wrong", **facts)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(error, protocol))
        assert type(again) is cls
        assert str(again) == "what went wrong"
        assert again.args == ("what went wrong",)
        assert {name: getattr(again, name) for name in facts} == facts


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_fact_is_described_in_the_docstring(cls: type[AsyncrtError]) -> None:
    described = "\n".join(base.__doc__ or "" for base in cls.__mro__)
    assert [name for name in facts_of(cls) if f"{name}:" not in described] == []


def test_notes_survive_pickle_and_copy() -> None:
    error = CallError("no", index=3)
    error.add_note("call 3, attempt 1")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert again.__notes__ == ["call 3, attempt 1"]
        assert again.index == 3


def test_error_with_keyword_facts_only_needs_a_message() -> None:
    error = ConfigError("no")
    assert (error.source, error.line, error.key) == (None, None, None)
    assert CallError("no").attempt == 0


def test_drawing_shows_every_class_under_its_parent_with_its_other_bases() -> None:
    real: dict[str, tuple[str | None, set[str]]] = {}
    for cls in CLASSES:
        ours = [base for base in cls.__bases__ if issubclass(base, AsyncrtError)]
        others = [base for base in cls.__bases__ if base not in (*ours, Exception)]
        real[cls.__name__] = (
            ours[0].__name__ if ours else None,
            {base.__name__ for base in others},
        )
    assert drawn_tree() == real


def test_every_error_is_a_public_name() -> None:
    assert {cls.__name__ for cls in CLASSES} <= set(asyncrt.__all__)
    assert all(getattr(asyncrt, cls.__name__) is cls for cls in CLASSES)
