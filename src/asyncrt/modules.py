"""The local modules that a function needs: where the search begins, and when it is repeated."""

from __future__ import annotations

import functools
import itertools
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from typing import Any, Final

from asyncrt.errors import SerializationError
from asyncrt.importgraph import ImportGraph, compile_file, imported_names, namespace_of
from asyncrt.options import CallSettings
from asyncrt.units import Unit, UnitPacker

_LOOK_SECONDS: Final = 0.05
_MOST_ENTRIES: Final = 256
_MOST_CODES: Final = 4096
_MOST_VALUES: Final = 1000
_MAX_DEPTH: Final = 4
_PLAIN: Final = frozenset({bool, bytes, bytearray, complex, float, int, str, type(None)})


@dataclass(slots=True)
class _Found:
    """What was found for some roots.

    Attributes:
        looked_at: When, by ``time.monotonic()``.
        specs: The modules, each with how it was loaded: a reload gives another one.
    """

    units: tuple[Unit, ...]
    looked_at: float
    specs: list[tuple[str, Any]]


class TravellingModules:
    """Finds the modules that travel with functions.

    Files are looked at again when a function comes whose code is new, when a module was reloaded,
    and otherwise at most every 50 ms.
    """

    def __init__(self) -> None:
        self._graph = ImportGraph()
        self._packer = UnitPacker()
        self._found: dict[tuple[Any, ...], _Found] = {}
        self._codes: dict[int, tuple[types.CodeType, tuple[str, ...]]] = {}
        self._scripts: dict[str, set[str]] = {}

    def find(
        self, fn: Callable[..., Any], fixed: Mapping[str, Any], settings: CallSettings
    ) -> tuple[Unit, ...]:
        """Return the units that a function needs; the same object as long as they are the same.

        Args:
            fixed: Keyword arguments that travel with it.
            settings: Which modules to add, to leave out, and how large they may be.

        Raises:
            ModulesError: A module cannot travel.
        """
        inner = fn
        while isinstance(inner, functools.partial):
            inner = inner.func
        code = getattr(inner, "__code__", None)
        known = self._codes.get(id(code)) if isinstance(code, types.CodeType) else None
        roots = self._roots(fn, fixed)
        key = (roots, settings.include_modules, settings.exclude_modules,
               settings.modules_limit_bytes)  # fmt: skip
        found = self._found.get(key)
        now = time.monotonic()
        seen = code is None or (known is not None and known[0] is code)
        if (
            found is not None
            and seen
            and now - found.looked_at < _LOOK_SECONDS
            and all(_spec_of(name) is spec for name, spec in found.specs)
        ):
            return found.units
        if isinstance(code, types.CodeType) and id(code) not in self._codes:
            self._remember(code, ())
        return self._look(key, roots, settings, now)

    def _look(
        self, key: tuple[Any, ...], roots: tuple[str, ...], settings: CallSettings, now: float
    ) -> tuple[Unit, ...]:
        reached = self._graph.reach(
            [*roots, *self._main_roots()],
            include=settings.include_modules,
            exclude=settings.exclude_modules,
        )
        units = self._packer.pack(
            [reached.units[name] for name in sorted(reached.units)],
            exclude=frozenset(settings.exclude_modules),
            limit_bytes=settings.modules_limit_bytes,
        )
        before = self._found.get(key)
        if before is not None and before.units == units:
            units = before.units
        if len(self._found) >= _MOST_ENTRIES:
            self._found.clear()
        specs = [(name, _spec_of(name)) for name in reached.modules]
        self._found[key] = _Found(units, now, specs)
        return units

    # -- where the search begins ------------------------------------------------------------------

    def _roots(self, fn: Callable[..., Any], fixed: Mapping[str, Any]) -> tuple[str, ...]:
        names: set[str] = set()
        if type(fn) is types.FunctionType:
            home: Any = fn.__module__
            if isinstance(home, str):
                names.add(home)
            space = fn.__globals__
            refers = False
            if home == "__main__" or home not in sys.modules:
                names.update(self._names_in(fn.__code__, space.get("__package__") or ""))
                refers = any(name in space for name in fn.__code__.co_names)
            if not (refers or fn.__closure__ or fn.__defaults__ or fn.__kwdefaults__ or fixed):
                return tuple(names) if len(names) == 1 else tuple(sorted(names))
        elif type(fn) is types.BuiltinFunctionType and fn.__module__ == "builtins" and not fixed:
            return ()
        budget = [_MOST_VALUES]
        _add_modules_of(fn, names, budget, 0)
        if fixed:
            _add_modules_of(fixed, names, budget, 0)
        return tuple(sorted(names))

    def _main_roots(self) -> Sequence[str]:
        """Return what ``__main__`` imports: what it defines travels by value."""
        space = namespace_of("__main__")
        file = space.get("__file__")
        package = space.get("__package__") or ""
        names: set[str] = {package} if package else set()
        if isinstance(file, str) and self._graph.is_local(file):
            names |= self._imports_of_script(file, package)
        if not isinstance(file, str) or "get_ipython" in space or hasattr(sys, "ps1"):
            for value in tuple(space.values()):
                _add_modules_of(value, names, [_MOST_VALUES], _MAX_DEPTH - 1)
                self._add_imports_in(value, names, package)
        return tuple(names)

    def _imports_of_script(self, file: str, package: str) -> set[str]:
        """Return what a script imports. It is read once: what runs is what it was then."""
        names = self._scripts.get(file)
        if names is None:
            code = compile_file(file)
            names = set() if code is None else set(imported_names(code, package))
            self._scripts[file] = names
        return names

    def _add_imports_in(self, value: Any, names: set[str], package: str) -> None:
        """Add what functions of an interactive ``__main__`` import when they run."""
        parts = vars(value).values() if isinstance(value, type) else (value,)
        for part in parts:
            code = getattr(part, "__code__", None)
            if isinstance(code, types.CodeType) and getattr(part, "__module__", "") == "__main__":
                names.update(self._names_in(code, package))

    def _names_in(self, code: types.CodeType, package: str) -> tuple[str, ...]:
        known = self._codes.get(id(code))
        if known is None or known[0] is not code:
            return self._remember(code, tuple(imported_names(code, package)))
        return known[1]

    def _remember(self, code: types.CodeType, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(self._codes) >= _MOST_CODES:
            self._codes.clear()
        self._codes[id(code)] = code, names
        return names


def _spec_of(name: str) -> Any:
    return getattr(sys.modules.get(name), "__spec__", None)


def _add_modules_of(value: Any, names: set[str], budget: list[int], depth: int) -> None:
    """Add the modules that loading a pickled value would import, as far as that is easily seen."""
    budget[0] -= 1
    if depth > _MAX_DEPTH or budget[0] < 0 or type(value) in _PLAIN:
        return
    try:
        home, inside = _look_into(value)
        if isinstance(home, str):
            names.add(home)
        for part in itertools.islice(inside, max(0, budget[0])):
            _add_modules_of(part, names, budget, depth + 1)
    except Exception:  # noqa: BLE001 - a proxy may raise anything; then include_modules helps
        return


def _look_into(value: Any) -> tuple[Any, Iterable[Any]]:
    """Return the module that a value comes from, and what it is made of."""
    if isinstance(value, types.ModuleType):
        return value.__name__, ()
    if isinstance(value, functools.partial):
        return None, (value.func, value.args, value.keywords)
    if isinstance(value, types.MethodType):
        return None, (value.__self__, value.__func__)
    if isinstance(value, types.FunctionType):
        return value.__module__, (*_contents(value), value.__defaults__, value.__kwdefaults__)
    if isinstance(value, type | types.BuiltinFunctionType):
        return value.__module__, ()
    if isinstance(value, Mapping):
        return type(value).__module__, value.values()
    if isinstance(value, list | tuple | set | frozenset):
        return type(value).__module__, value
    return type(value).__module__, getattr(value, "__dict__", {}).values()


def _contents(fn: types.FunctionType) -> list[Any]:
    """Return what a function's closure holds, and the variables that it refers to, if by value."""
    found: list[Any] = []
    for cell in fn.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not bound yet
            continue
    if _is_by_value(fn):
        space = fn.__globals__
        found += [space[name] for name in fn.__code__.co_names if name in space]
    return found


def _is_by_value(fn: types.FunctionType) -> bool:
    """Whether a worker cannot find a function by its name, so that all it refers to is sent."""
    home = fn.__module__
    return home == "__main__" or home not in sys.modules or "<locals>" in fn.__qualname__


def explain_import(error: Exception, travelled: Sequence[Unit], excluded: Sequence[str]) -> str:
    """Return what to do about an import that failed in a worker; empty if there is nothing to say.

    Args:
        error: What a call raised, or why its function could not be loaded.
        travelled: The units that the function had there.
        excluded: What ``exclude_modules`` names.
    """
    if isinstance(error, SerializationError):
        module = error.module
    elif isinstance(error, ImportError):
        module = error.name or ""
    else:
        return ""
    if "circular import" in str(error):  # CPython's own words, and its only sign
        return (
            "modules import each other: move what both need into a third module, "
            "or import inside the function that needs it"
        )
    for name in excluded:
        if module == name or module.startswith(f"{name}."):
            return f"{module!r} did not travel with the function: exclude_modules names {name!r}"
    top = module.partition(".")[0]
    if not top or any(unit.name.partition(".")[0] == top for unit in travelled):
        return ""
    if PathFinder.find_spec(top) is None:
        if top not in sys.modules:
            return ""
        return (
            f"{top!r} has no file here that could travel: write it to one, or define in __main__ "
            "what the function needs"
        )
    return (
        f"{top!r} is here but did not travel with the function: "
        f"send it with include_modules=[{top!r}], or install it where the workers run"
    )
