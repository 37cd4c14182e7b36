"""Which modules a module imports, without importing anything.

Read from code objects: CPython 3.11 fails when two threads build syntax trees at once
(https://github.com/python/cpython/issues/106905), and user code may do so beside this.
"""

from __future__ import annotations

import functools
import importlib.machinery
import os
import site
import sys
import sysconfig
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from asyncrt.errors import ModulesError

_NEVER: Final = frozenset({"__main__", "asyncrt", "cloudpickle"})  # the worker has its own
# ``test`` is CPython's own suite: no program uses it, and images leave it out.
_STANDARD: Final = sys.stdlib_module_names - {"test"}
_INSTALLED: Final = frozenset({"site-packages", "dist-packages"})
_FRESH_SECONDS: Final = 2.0  # bytecode is valid by whole seconds: a younger source is compiled


@dataclass(frozen=True, slots=True)
class Located:
    """A module, loaded or not.

    Attributes:
        name: Its dotted name.
        file: Where its code is; ``None`` for a namespace package.
        search: Where its submodules are; ``None`` if it is no package.
        spec: How it was, or would be, imported; ``None`` if that is not known.
    """

    name: str
    file: str | None
    search: tuple[str, ...] | None
    spec: importlib.machinery.ModuleSpec | None


@dataclass(slots=True)
class Reached:
    """What can be reached from some modules.

    Attributes:
        modules: Those that travel, by name, without namespace packages.
        units: The outermost module of each of them that is no namespace package.
    """

    modules: dict[str, Located] = field(default_factory=dict)
    units: dict[str, Located] = field(default_factory=dict)


class ImportGraph:
    """Follows imports through local modules; remembers what each file imports."""

    def __init__(self) -> None:
        self._imports: dict[str, tuple[tuple[int, int], tuple[str, ...]]] = {}
        self._local: dict[str, bool] = {}

    def reach(
        self, roots: Sequence[str], *, include: Sequence[str], exclude: Sequence[str]
    ) -> Reached:
        """Return the local modules that some modules import, themselves included.

        Args:
            include: Modules that travel even if they are not local.
            exclude: Modules that never travel, nor do their submodules.

        Raises:
            ModulesError: One of ``include`` is not there; one hides a standard module.
        """
        walk = _Walk(self, frozenset(exclude))
        for name in include:
            walk.force(name)
        walk.follow(list(roots))
        return walk.reached

    def is_local(self, file: str) -> bool:
        """Whether a file is neither the standard library's nor installed."""
        directory = os.path.dirname(file)
        known = self._local.get(directory)
        if known is None:
            known = self._local[directory] = _is_local_directory(directory)
        return known and os.path.isfile(file)

    def imports_of(self, located: Located) -> tuple[str, ...]:
        """Return the names that a module may import, absolute: modules, and what is in them."""
        file = located.file
        try:
            stat = os.stat(file or "")
        except OSError:
            return ()
        key = stat.st_mtime_ns, stat.st_size
        fresh = 0 <= time.time() - stat.st_mtime <= _FRESH_SECONDS
        known = self._imports.get(file or "")
        if known is not None and known[0] == key and not fresh:
            return known[1]
        code = _code_of(located, fresh=fresh)
        is_package = located.search is not None
        package = located.name if is_package else located.name.rpartition(".")[0]
        names = () if code is None else tuple(imported_names(code, package))
        self._imports[file or ""] = key, names
        return names


class _Walk:
    """One walk through the graph."""

    def __init__(self, graph: ImportGraph, exclude: frozenset[str]) -> None:
        self.reached = Reached()
        self._graph = graph
        self._exclude = exclude
        self._located: dict[str, Located | None] = {}
        self._entered: dict[str, bool] = {}
        self._seen: set[str] = set()
        self._todo: list[str] = []

    def force(self, name: str) -> None:
        """Take a module whatever it is."""
        located = self._locate(name)
        if located is None or (located.file is None and located.search is None):
            raise ModulesError(
                f"include_modules: there is no module {name!r} that could be sent: it is not "
                "found on sys.path, or it is built in",
                module=name,
            )
        if located.file is None:
            raise ModulesError(
                f"include_modules: {name!r} is a namespace package: name the modules inside",
                module=name,
                paths=located.search or (),
            )
        if not os.path.isfile(located.file):
            raise ModulesError(
                f"include_modules: {name!r} is not a file of its own ({located.file}): "
                "unpack what it is in, or install it where the workers run",
                module=name,
                paths=(located.file,),
            )
        self._visit(name, forced=True)

    def follow(self, names: list[str]) -> None:
        """Go through modules, what they import, what that imports, and so on."""
        self._todo += names
        while self._todo:
            name = self._todo.pop()
            if name not in self._seen:
                self._seen.add(name)
                self._visit(name, forced=False)

    def _visit(self, name: str, *, forced: bool) -> None:
        unit: Located | None = None
        for prefix in _prefixes(name):
            if prefix in self._exclude or prefix in _NEVER:
                return
            located = self._locate(prefix)
            if located is None:
                return
            if located.file is not None:
                if not self._enters(located, forced=forced):
                    return
                unit = unit or located
                self.reached.modules[prefix] = located
                self.reached.units[unit.name] = unit
            elif located.search is None:
                return

    def _enters(self, located: Located, *, forced: bool) -> bool:
        """Whether a module travels. The first time, its imports are noted."""
        entered = self._entered.get(located.name)
        if entered or (entered is not None and not forced):
            return entered
        file = located.file or ""
        entered = self._entered[located.name] = forced or self._graph.is_local(file)
        if entered:
            if located.name in _STANDARD:
                raise ModulesError(
                    f"{file} hides the module {located.name!r} of the standard library: rename "
                    f"the file, or leave it out with exclude_modules=[{located.name!r}]",
                    module=located.name,
                    paths=(file,),
                )
            self._todo += self._graph.imports_of(located)
        return entered

    def _locate(self, name: str) -> Located | None:
        if name not in self._located:
            parent = name.rpartition(".")[0]
            outer = self._locate(parent) if parent else None
            if parent and (outer is None or outer.search is None or _is_attribute(parent, name)):
                self._located[name] = None
            else:
                search = None if outer is None else outer.search
                self._located[name] = _loaded(name) or _find(name, search)
        return self._located[name]


def _prefixes(name: str) -> Iterator[str]:
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)
    yield name


def _is_attribute(parent: str, name: str) -> bool:
    """Whether a name of a loaded package is something in it, and no module."""
    inside = namespace_of(parent).get(name.rpartition(".")[2])
    return (
        inside is not None and not isinstance(inside, types.ModuleType) and name not in sys.modules
    )


def namespace_of(name: str) -> dict[str, Any]:
    """Return what is in a loaded module; nothing if it is not loaded, or something odd."""
    found = getattr(sys.modules.get(name), "__dict__", None)
    return found if isinstance(found, dict) else {}


def _loaded(name: str) -> Located | None:
    namespace = namespace_of(name)
    if not namespace:
        return None
    file, search, spec = (namespace.get(f"__{key}__") for key in ("file", "path", "spec"))
    return Located(
        name,
        os.path.abspath(file) if isinstance(file, str) else None,
        None if search is None else tuple(search),
        spec if isinstance(spec, importlib.machinery.ModuleSpec) else None,
    )


def _find(name: str, search: Sequence[str] | None) -> Located | None:
    """Ask the finders as an import would, without running the packages around the module."""
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, search, None)
        except Exception:  # noqa: BLE001, S112 - finders are anybody's; an import would tell
            continue
        if spec is not None:
            file = os.path.abspath(spec.origin) if spec.has_location and spec.origin else None
            inside = spec.submodule_search_locations
            return Located(name, file, None if inside is None else tuple(inside), spec)
    return None


def _code_of(located: Located, *, fresh: bool) -> types.CodeType | None:
    """Return a module's code; ``None`` if it is in C, or wrong, as an import will tell."""
    file = located.file or ""
    is_source = file.endswith(tuple(importlib.machinery.SOURCE_SUFFIXES))
    loader: Any = None if located.spec is None else located.spec.loader
    get_code = getattr(loader, "get_code", None)
    if get_code is not None and located.spec is not None and not (fresh and is_source):
        try:
            code = get_code(located.spec.name)
        except Exception:  # noqa: BLE001 - loaders are anybody's
            return None
        return code if isinstance(code, types.CodeType) else None
    return compile_file(file) if is_source else None


def compile_file(file: str) -> types.CodeType | None:
    """Return the code of a source file; ``None`` if it is wrong."""
    try:
        return compile(Path(file).read_bytes(), file, "exec", dont_inherit=True)
    except (OSError, SyntaxError, ValueError):
        return None


def imported_names(code: types.CodeType, package: str) -> Iterator[str]:
    """Yield the names that code imports, at any depth, absolute.

    Args:
        package: What relative imports begin from; empty if there is no package.
    """
    import modulefinder  # noqa: PLC0415 - 5 ms that a program pays when it first sends a function

    scan: Any = modulefinder.ModuleFinder().scan_opcodes
    todo = [code]
    while todo:
        current = todo.pop()
        todo += (item for item in current.co_consts if isinstance(item, types.CodeType))
        for what, details in scan(current):
            if what == "store":
                continue
            level, listed, name = (0, *details) if what == "absolute_import" else details
            if level:
                base = package.split(".")
                if not package or level > len(base):
                    continue
                base = base[: len(base) - level + 1]
                name = ".".join([*base, name] if name else base)
            yield name
            for item in listed or ():
                if item != "*":
                    yield f"{name}.{item}"


def _is_local_directory(directory: str) -> bool:
    both = {directory, os.path.realpath(directory)}
    return not any(
        _INSTALLED.intersection(Path(path).parts) or _is_under(path, _library_directories())
        for path in both
    )


def _is_under(path: str, directories: Sequence[str]) -> bool:
    return any(path == outer or path.startswith(outer + os.sep) for outer in directories)


@functools.cache
def _library_directories() -> tuple[str, ...]:
    """Return where the standard library, installed packages and installed scripts are."""
    names = ("stdlib", "platstdlib", "purelib", "platlib", "scripts")
    found = [sysconfig.get_path(name) for name in names]
    found += [os.path.dirname(os.__file__), site.getusersitepackages(), *site.getsitepackages()]
    return tuple({*found, *map(os.path.realpath, found)})
