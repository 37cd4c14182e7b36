"""What stands for the client's names where only the worker is: they can be imported, not used."""

from __future__ import annotations

from typing import Any


class Placeholder(type):
    """A class that serves in imports and annotations, and tells what is missing otherwise."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Placeholder:
        if bases:
            raise _missing(bases[0].__name__)
        return super().__new__(cls, name, (), {**namespace, "__module__": "asyncrt"})

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise _missing(cls.__name__)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # what tools ask of any class
            raise AttributeError(name)
        raise _missing(cls.__name__)

    def __getitem__(cls, _: Any) -> Placeholder:  # as in ``Run[int]``
        return cls


def _missing(name: str) -> ImportError:
    return ImportError(
        f"asyncrt.{name} belongs to the client, which is not installed in this image: only "
        "errors and current_call travel with the worker"
    )
