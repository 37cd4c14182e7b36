"""Python objects to payloads and back, on the client's side."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import time
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import cloudpickle

import asyncrt.errors as error_tree
from asyncrt.errors import (
    AsyncrtError,
    CallError,
    CallExitedError,
    RemoteError,
    SerializationError,
)
from asyncrt.modules import TravellingModules
from asyncrt.options import CallSettings
from asyncrt.units import Unit
from asyncrt.worker.payload import encode
from asyncrt.worker.protocol import Buffer, byte_length
from asyncrt.worker.records import LENGTH, unpack_raised

_MAX_DEPTH: Final = 6
_MAX_ITEMS: Final = 1000
_SEARCH_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class PackedFunction:
    """A function as it travels, with the keyword arguments that all its calls share.

    Attributes:
        name: Content hash, under which a worker keeps it.
        segments: The payload.
        label: The function's own name, for people.
        modules: The local modules that it needs.
    """

    name: str
    segments: Sequence[Buffer]
    label: str
    modules: tuple[Unit, ...] = ()

    @property
    def hashes(self) -> list[str]:
        """The content hashes of all that a worker needs: its own, and those of its modules."""
        return [self.name, *(unit.hash for unit in self.modules)]


def check_function(fn: Any) -> None:
    """Refuse what cannot be run.

    Raises:
        TypeError: Not a function, or one whose result cannot travel.
    """
    if inspect.iscoroutine(fn):
        name = getattr(fn, "__name__", "function")
        fn.close()
        raise TypeError(f"expected a function, not a coroutine object: pass {name}, not {name}()")
    if not callable(fn):
        raise TypeError(f"expected a function, not {type(fn).__name__}: {fn!r:.100}")
    inner = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not inspect.isroutine(inner) and not isinstance(inner, type):
        inner = type(inner).__call__
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise TypeError(
            f"{label_of(fn)} is a generator function, whose result cannot travel: "
            "return a list, or map over smaller inputs"
        )


def label_of(fn: Any) -> str:
    """Return a name of a callable for people."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return str(getattr(fn, "__qualname__", None) or type(fn).__qualname__)


class FunctionPacker:
    """Pickles functions, and remembers those that cannot have changed.

    A function that refers to a variable is pickled anew each time: in a notebook it may have
    changed. One that is nothing but its code need not be, and pickling is a sixth of a round trip.
    """

    def __init__(self) -> None:
        self._packed: weakref.WeakKeyDictionary[
            types.FunctionType, tuple[types.CodeType, PackedFunction]
        ] = weakref.WeakKeyDictionary()
        self._modules = TravellingModules()

    def pack(
        self,
        fn: Callable[..., Any],
        fixed: Mapping[str, Any],
        settings: CallSettings = CallSettings(),
    ) -> PackedFunction:
        """Return a function as it travels, with the modules that it needs. See ``pack_function``.

        Raises:
            ModulesError: A module that it needs cannot travel.
        """
        modules = self._modules.find(fn, fixed, settings)
        if fixed or not isinstance(fn, types.FunctionType) or not _is_only_code(fn):
            return pack_function(fn, fixed, modules)
        known = self._packed.get(fn)
        if known is None or known[0] is not fn.__code__ or known[1].modules is not modules:
            known = self._packed[fn] = fn.__code__, pack_function(fn, fixed, modules)
        return known[1]


def _is_only_code(fn: types.FunctionType) -> bool:
    """Whether a function refers to nothing that can change but built-in names."""
    return not (
        fn.__closure__
        or fn.__defaults__
        or fn.__kwdefaults__
        or fn.__dict__
        or any(name in fn.__globals__ for name in fn.__code__.co_names)
        or any(isinstance(constant, types.CodeType) for constant in fn.__code__.co_consts)
    )


def pack_function(
    fn: Callable[..., Any], fixed: Mapping[str, Any], modules: tuple[Unit, ...] = ()
) -> PackedFunction:
    """Pickle a function, by value where a worker could not import it.

    Raises:
        TypeError: Not a function that can be run.
        SerializationError: It cannot be pickled; ``path`` tells which object inside cannot.
    """
    check_function(fn)
    try:
        segments = encode((fn, dict(fixed)), cloudpickle.Pickler)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise explain_unpicklable(fn, label_of(fn), error, fixed=fixed) from error  # noqa: ASYNC104 - of user code
    digest = hashlib.blake2b(digest_size=16)
    for segment in segments:
        digest.update(segment)
    for unit in modules:
        digest.update(unit.hash.encode())
    return PackedFunction(digest.hexdigest(), segments, label_of(fn), modules)


def pack_arguments(arguments: Any, base: int) -> list[Buffer]:
    """Return one call's arguments with their length in front.

    Args:
        arguments: The single argument, or a tuple, as the run's style says.
        base: Offset within the chunk's body.

    Raises:
        SerializationError: They cannot be pickled; ``path`` tells which object cannot.
    """
    try:
        segments = encode(arguments, cloudpickle.Pickler, base=base + LENGTH.size)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise explain_unpicklable(arguments, "argument", error) from error  # noqa: ASYNC104 - of user code
    segments.insert(0, LENGTH.pack(byte_length(segments)))
    return segments


def explain_unpicklable(
    value: Any, name: str, error: BaseException, *, fixed: Mapping[str, Any] | None = None
) -> SerializationError:
    """Return an error that names the object inside that cannot be pickled."""
    end = time.monotonic() + _SEARCH_SECONDS
    path, culprit = next(_find_culprits(value, name, 0, end), ("", None))
    if not path and fixed:
        path, culprit = next(_find_culprits(dict(fixed), "kwargs", 0, end), ("", None))
    where = f"{path} (a {type(culprit).__qualname__})" if path else name
    return SerializationError(f"{where} cannot be pickled: {text_of(error)}", path=path or name)


def text_of(error: BaseException) -> str:
    """Return what an exception says; its own ``__str__`` may raise anything."""
    try:
        return str(error)
    except BaseException as second:  # noqa: ASYNC103, BLE001 - the user's own __str__
        return f"<str() raised {type(second).__qualname__}>"  # noqa: ASYNC104 - of user code


def _find_culprits(value: Any, path: str, depth: int, end: float) -> Iterator[tuple[str, Any]]:
    """Yield the innermost objects that cannot be pickled, with their paths.

    Args:
        end: Value of ``time.monotonic()`` at which the search goes no deeper.
    """
    try:
        cloudpickle.dumps(value)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # noqa: ASYNC103, BLE001 - any object's own reduction may raise anything
        inner: Iterator[tuple[str, Any]] = iter(())
        if depth < _MAX_DEPTH and time.monotonic() < end:
            parts = itertools.islice(_parts(value, path), _MAX_ITEMS)
            inner = itertools.chain.from_iterable(
                _find_culprits(part, part_path, depth + 1, end) for part_path, part in parts
            )
        found = next(inner, None)
        yield found if found is not None else (path, value)  # noqa: ASYNC104 - of user code


def _parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, functools.partial):
        yield f"{path}.func", value.func
        yield f"{path}.args", value.args
        yield f"{path}.keywords", value.keywords
    elif isinstance(value, types.FunctionType):
        variables = inspect.getclosurevars(value)
        for name, part in (*variables.nonlocals.items(), *variables.globals.items()):
            yield f"{path}: variable {name!r}", part
        yield f"{path}.__defaults__", value.__defaults__
    elif isinstance(value, types.MethodType):
        yield f"{path}.__self__", value.__self__
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield f"{path}[{_short(key)}]", part
    elif isinstance(value, list | tuple | set | frozenset):
        for position, part in enumerate(value):
            yield f"{path}[{position}]", part
    else:
        for name, part in getattr(value, "__dict__", {}).items():
            yield f"{path}.{name}", part


def _short(key: Any) -> str:
    try:
        return f"{key!r:.40}"
    except Exception:  # noqa: BLE001 - the user's own __repr__
        return f"<{type(key).__qualname__}>"


def load_error(
    payload: memoryview, load: Callable[[memoryview], Any], **facts: Any
) -> tuple[Exception, str]:
    """Return the exception that a call raised, and its remote traceback.

    Args:
        load: Unpickles.
        facts: Run, index, attempt and worker, for errors that can hold them.
    """
    described, packed = unpack_raised(payload)
    text = f"{described['type']}: {described['text']}"
    trace: str = described["traceback"]
    if described.get("exit"):
        message = f"the function raised {text}"
        return CallExitedError(message, type_name=described["type"], **facts), trace
    reason = described.get("reason", "")
    if packed:
        try:
            error = load(packed)
        except BaseException as failure:  # noqa: ASYNC103, BLE001 - the exception's own constructor may raise
            reason = f"{type(failure).__qualname__}: {text_of(failure)}"
        else:
            if isinstance(error, CallError):
                error.__dict__.update(facts)
            if isinstance(error, Exception) and not isinstance(
                error, StopIteration | StopAsyncIteration
            ):
                return error, trace
            reason = "a coroutine cannot raise it"
    remote = RemoteError(
        f"{text} (the exception itself could not travel: {reason})",
        type_name=described["type"],
        text=described["text"],
        reason=reason,
        **facts,
    )
    return remote, trace


def build_failure(described: dict[str, Any], **facts: Any) -> AsyncrtError:
    """Return the error that a worker's parent described as facts."""
    name = described.pop("error")
    message = described.pop("message")
    kind = getattr(error_tree, name, CallError)
    if issubclass(kind, CallError):
        built: AsyncrtError = kind(message, **described, **facts)
        return built
    return kind(message)
