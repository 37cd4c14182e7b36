"""Which modules a module imports: read, never run."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from project import Project

from asyncrt.errors import ModulesError
from asyncrt.importgraph import ImportGraph, Located, compile_file, imported_names


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.syspath_prepend(str(tmp_path))
    return Project(tmp_path)


def reach(*roots: str, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> set[str]:
    return set(ImportGraph().reach(roots, include=include, exclude=exclude).modules)


def names_in(source: str, package: str = "") -> list[str]:
    return sorted(imported_names(compile(source, "source", "exec"), package))


@pytest.mark.parametrize(
    ("source", "package", "names"),
    [
        ("import a.b as c, d", "", ["a.b", "d"]),
        ("from a import b, c as d", "", ["a", "a.b", "a.c"]),
        ("from a import *", "", ["a"]),
        ("from . import a", "p.q", ["p.q", "p.q.a"]),
        ("from .a import b", "p.q", ["p.q.a", "p.q.a.b"]),
        ("from ..a import b", "p.q", ["p.a", "p.a.b"]),
        ("from ...a import b", "p.q", []),
        ("from . import a", "", []),
        ("def f():\n class C:\n  g = lambda: __import__('x')\n  import y", "", ["y"]),
        ("try:\n import a\nexcept ImportError:\n import b", "", ["a", "b"]),
        ("async def f():\n import a\n return [i async for i in g()]", "", ["a"]),
    ],
)
def test_imports_are_seen_at_any_depth(source: str, package: str, names: list[str]) -> None:
    assert names_in(source, package) == names


def test_a_walk_follows_local_modules_only_and_runs_none(project: Project) -> None:
    project.put("walk_a.py", "import json, numpy, asyncrt, walk_b.inner\nraise RuntimeError\n")
    project.put("walk_b/__init__.py", "from . import other\nraise RuntimeError\n")
    project.put("walk_b/inner.py", "from walk_space.deep import thing\nimport walk_missing\n")
    project.put("walk_b/other.py", "")
    project.put("walk_b/unused.py", "import walk_never\n")
    project.put("walk_space/deep.py", "import walk_a\n")
    found = ImportGraph().reach(["walk_a"], include=(), exclude=())
    assert set(found.modules) == {
        "walk_a", "walk_b", "walk_b.inner", "walk_b.other", "walk_space.deep"
    }  # fmt: skip
    assert set(found.units) == {"walk_a", "walk_b", "walk_space.deep"}
    assert not any(name.startswith("walk_") for name in sys.modules)


def test_excluded_modules_are_not_entered(project: Project) -> None:
    project.put("out_a.py", "import out_b.one, out_b.two, out_c\n")
    project.put("out_b/__init__.py", "")
    project.put("out_b/one.py", "import out_d")
    project.put("out_b/two.py", "")
    project.put("out_c.py", "")
    project.put("out_d.py", "")
    assert reach("out_a", exclude=("out_b.one", "out_c")) == {"out_a", "out_b", "out_b.two"}
    assert reach("out_a", exclude=("out_a",)) == set()
    assert reach("out_a", include=("out_c",), exclude=("out_c", "out_b")) == {"out_a"}


def test_an_included_module_brings_the_local_modules_that_it_imports(project: Project) -> None:
    project.put("in_a/__init__.py", "")
    project.put("in_a/sub.py", "import in_b, json\n")
    project.put("in_b.py", "")
    assert reach(include=("in_a.sub", "iniconfig")) >= {"in_a", "in_a.sub", "in_b", "iniconfig"}
    assert reach("iniconfig") == set()


def test_a_module_in_an_archive_cannot_be_included(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("zipped_one.py", "")
    monkeypatch.syspath_prepend(str(tmp_path / "archive.zip"))
    assert reach("zipped_one") == set()
    with pytest.raises(ModulesError, match="is not a file of its own") as caught:
        reach(include=("zipped_one",))
    assert caught.value.paths == (str(tmp_path / "archive.zip" / "zipped_one.py"),)


def test_what_is_installed_or_standard_is_not_local(tmp_path: Path) -> None:
    graph = ImportGraph()
    for module in (json, np, pytest, os):
        assert not graph.is_local(str(module.__file__))
    local = tmp_path / "local.py"
    assert not graph.is_local(str(local))
    local.touch()
    assert graph.is_local(str(local))
    installed = tmp_path / "venv/lib/site-packages/thing.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    assert not graph.is_local(str(installed))
    (tmp_path / "link").symlink_to(installed.parent)
    assert not graph.is_local(str(tmp_path / "link/thing.py"))


def test_a_changed_file_is_read_again(project: Project) -> None:
    graph = ImportGraph()
    path = project.put("again.py", "import json\n")
    old = path.stat().st_mtime - 1000
    os.utime(path, (old, old))
    located = Located("again", str(path), None, importlib.machinery.PathFinder.find_spec("again"))
    assert graph.imports_of(located) == ("json",)
    assert graph.imports_of(located) is graph.imports_of(located)
    project.put("again.py", "import copy\n")
    assert graph.imports_of(located) == ("copy",)
    path.unlink()
    assert graph.imports_of(located) == ()


def test_what_cannot_be_read_imports_nothing(project: Project, tmp_path: Path) -> None:
    graph = ImportGraph()
    wrong = project.put("wrong.py", "import :\n")
    assert graph.imports_of(Located("wrong", str(wrong), None, None)) == ()
    assert compile_file(str(tmp_path / "missing.py")) is None
    old = wrong.stat().st_mtime - 1000
    os.utime(wrong, (old, old))
    spec = importlib.machinery.PathFinder.find_spec("wrong")
    assert graph.imports_of(Located("wrong", str(wrong), None, spec)) == ()
    binary = project.put("binary.so", b"\x7fELF")
    loader = importlib.machinery.ExtensionFileLoader("binary", str(binary))
    spec = importlib.machinery.ModuleSpec("binary", loader)
    assert graph.imports_of(Located("binary", str(binary), None, spec)) == ()
    assert graph.imports_of(Located("binary", str(binary), None, None)) == ()


def test_odd_things_among_the_modules_are_passed_by(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finder:
        def find_spec(self, name: str, path: Any, target: Any) -> None:
            raise RuntimeError(name)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.setitem(sys.modules, "odd_none", None)
    monkeypatch.setitem(sys.modules, "odd_bare", ModuleType("odd_bare"))
    project.put("odd.py", "import odd_none, odd_bare, odd_bare.inner, sys.inner, odd_file\n")
    project.put("odd_file.py", "import odd_file.inner\n")
    assert reach("odd") == {"odd", "odd_file"}


def test_a_name_in_a_loaded_package_is_no_module(project: Project) -> None:
    project.put("named/__init__.py", "VALUE = 1\n")
    project.put("named/VALUE.py", "import json\n")
    project.put("named/user.py", "from named import VALUE\n")
    try:
        importlib.import_module("named.user")
        assert reach("named.user") == {"named", "named.user"}
    finally:
        for name in ("named", "named.user"):
            sys.modules.pop(name, None)
