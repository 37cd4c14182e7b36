"""Plain modules and packages as they travel: what is in them, and what changes their hash."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from project import Project

from asyncrt.errors import ModulesError, ProtocolError
from asyncrt.importgraph import Located
from asyncrt.units import Unit, UnitPacker
from asyncrt.worker.modules import Library, conflict, install, remove

LIMIT = 1 << 20


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


@pytest.fixture(autouse=True)
def _same_path_and_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def located(project: Project, name: str, file: str) -> Located:
    path = project.root / file
    search = (str(path.parent),) if path.name == "__init__.py" else None
    return Located(name, str(path), search, None)


def pack(
    project: Project, name: str, file: str, *exclude: str, packer: UnitPacker | None = None
) -> Unit:
    packer = packer or UnitPacker()
    modules = [located(project, name, file)]
    (unit,) = packer.pack(modules, exclude=frozenset(exclude), limit_bytes=LIMIT)
    return unit


def unpack(unit: Unit, directory: Path) -> list[str]:
    """Unpack as a worker does; return the names of the files."""
    path = directory / unit.hash
    install({unit.name: str(path)}, {str(path): b"".join(unit.segments)})
    assert sys.path[1] == str(path)
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def write_package(project: Project) -> None:
    project.put("pack/__init__.py", "")
    project.put("pack/code.py", "VALUE = 1\n")
    project.put("pack/data/empty.txt", "")
    project.put("pack/run.sh", "#!/bin/sh\n").chmod(0o755)


def test_a_package_travels_with_all_its_files(project: Project, tmp_path: Path) -> None:
    write_package(project)
    for left in (".hidden", ".git/config", "code.pyc", "__pycache__/code.cpython-311.pyc"):
        project.put(f"pack/{left}", "x")
    project.put("pack/venv/pyvenv.cfg", "")
    project.put("pack/venv/bin/python", "")
    (project.root / "pack/loop").symlink_to(project.root / "pack")
    (project.root / "outside.txt").write_text("linked")
    (project.root / "pack/link.txt").symlink_to(project.root / "outside.txt")
    (project.root / "pack/dangling").symlink_to(project.root / "nowhere")
    os.mkfifo(project.root / "pack/pipe")
    unit = pack(project, "pack", "pack/__init__.py")
    assert unpack(unit, tmp_path / "worker") == [
        "pack/__init__.py",
        "pack/code.py",
        "pack/data/empty.txt",
        "pack/link.txt",
        "pack/run.sh",
    ]
    copy = tmp_path / "worker" / unit.hash / "pack"
    assert (copy / "link.txt").read_text() == "linked"
    assert os.access(copy / "run.sh", os.X_OK)
    assert not os.access(copy / "code.py", os.X_OK)
    assert [*(tmp_path / "worker").iterdir()] == [tmp_path / "worker" / unit.hash]


def test_what_is_excluded_stays(project: Project, tmp_path: Path) -> None:
    write_package(project)
    project.put("pack/data/deep.py", "")
    project.put("pack/code.txt", "")
    unit = pack(project, "pack", "pack/__init__.py", "pack.code", "pack.data")
    assert unpack(unit, tmp_path) == ["pack/__init__.py", "pack/code.txt", "pack/run.sh"]


@pytest.mark.parametrize(
    ("name", "file", "travels_as"),
    [
        ("plain", "plain.py", "plain.py"),
        ("space.plain", "space/plain.py", "space/plain.py"),
        ("other_name", "plain.py", "other_name.py"),
        ("fast", "fast.cpython-311-x86_64-linux-gnu.so", "fast.cpython-311-x86_64-linux-gnu.so"),
        ("plain", "without_suffix", "plain.py"),
    ],
)
def test_a_plain_module_travels_under_its_name(
    project: Project, tmp_path: Path, name: str, file: str, travels_as: str
) -> None:
    project.put(file, "")
    if file.endswith(".so") and sys.platform != "linux":
        pytest.skip("a suffix of Linux")
    assert unpack(pack(project, name, file), tmp_path) == [travels_as]


def test_the_hash_tells_contents_names_and_rights_and_nothing_else(
    project: Project, tmp_path: Path
) -> None:
    write_package(project)
    first = pack(project, "pack", "pack/__init__.py").hash
    os.utime(project.root / "pack/code.py", (1e9, 1e9))
    assert pack(project, "pack", "pack/__init__.py").hash == first
    twin = Project(tmp_path / "twin")
    write_package(twin)
    assert pack(twin, "pack", "pack/__init__.py").hash == first
    hashes = {first}
    (project.root / "pack/run.sh").chmod(0o644)
    hashes.add(pack(project, "pack", "pack/__init__.py").hash)
    (project.root / "pack/run.sh").rename(project.root / "pack/walk.sh")
    hashes.add(pack(project, "pack", "pack/__init__.py").hash)
    project.put("pack/code.py", "VALUE = 2\n")
    hashes.add(pack(project, "pack", "pack/__init__.py").hash)
    assert len(hashes) == 4


def test_files_are_read_again_only_when_they_changed(project: Project) -> None:
    write_package(project)
    packer = UnitPacker()
    file = project.root / "pack/code.py"
    for path in (project.root / "pack").rglob("*.*"):
        os.utime(path, (1e9, 1e9))
    first = pack(project, "pack", "pack/__init__.py", packer=packer)
    assert pack(project, "pack", "pack/__init__.py", packer=packer) is first
    file.touch()
    assert pack(project, "pack", "pack/__init__.py", packer=packer) is first
    file.write_text("VALUE = 3\n")
    changed = pack(project, "pack", "pack/__init__.py", packer=packer)
    assert changed.hash != first.hash
    stat = file.stat()
    file.write_text("VALUE = 4\n")  # of the same size, within the same tick of the file system
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert pack(project, "pack", "pack/__init__.py", packer=packer).hash != changed.hash


def test_what_cannot_be_read_is_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModulesError, match=r"gone\.py cannot be read") as caught:
        pack(project, "gone", "gone.py")
    assert caught.value.paths == (str(project.root / "gone.py"),)
    project.put("secret.py", "")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ModulesError, match="Permission denied") as caught:
        pack(project, "secret", "secret.py")
    assert caught.value.module == "secret"


def test_the_limit_counts_all_modules_together(project: Project) -> None:
    for name in ("one", "two"):
        project.put(f"{name}.py", b"#" * 700_000)
    both = [located(project, name, f"{name}.py") for name in ("one", "two")]
    with pytest.raises(ModulesError, match=r"1\.3 MiB in 2 files") as caught:
        UnitPacker().pack(both, exclude=frozenset(), limit_bytes=LIMIT)
    assert caught.value.limit_bytes == LIMIT
    assert len(UnitPacker().pack(both, exclude=frozenset(), limit_bytes=2 * LIMIT)) == 2


# -- the worker's side -----------------------------------------------------------------------------


def test_a_function_is_there_when_its_units_are(tmp_path: Path) -> None:
    library = Library(str(tmp_path))
    assert not library.has("f")
    library.add({"function": "f", "modules": {"m": "a1", "n": "b2"}}, b"packed")
    assert not library.has("f")
    library.add({"function": "a1", "unit": "m"}, b"unit m")
    assert not library.has("f")
    library.add({"function": "b2", "unit": "n"}, b"unit n")
    assert library.has("f")
    assert library.get("f") == b"packed"
    assert sorted(library.names) == ["a1", "b2", "f"]
    directories = {"m": str(tmp_path / "a1"), "n": str(tmp_path / "b2")}
    assert library.directories("f") == directories
    assert library.directories(None) == {}
    assert library.packed_units("f") == {
        directories["m"]: b"unit m", directories["n"]: b"unit n"
    }  # fmt: skip
    (tmp_path / "a1").mkdir()
    assert library.packed_units("f") == {directories["n"]: b"unit n"}
    assert library.has("f")
    library.forget("b2")
    library.forget("b2")
    assert not library.has("f")


@pytest.mark.parametrize("modules", [{"m": "../x"}, {"m": ""}, {"m": 3}, ["m"], None])
def test_a_hash_cannot_name_another_directory(tmp_path: Path, modules: Any) -> None:
    library = Library(str(tmp_path))
    with pytest.raises(ProtocolError):
        library.add({"function": "f", "modules": modules}, b"")
    assert library.names == []


@pytest.mark.parametrize(
    ("given", "wanted", "conflicts"),
    [
        ({}, {"m": "1"}, False),
        ({"m": "1"}, {"m": "1"}, False),
        ({"m": "1"}, {"n": "2"}, False),
        ({"m": "1"}, {}, False),
        ({"m": "1"}, {"m": "2"}, True),
        ({"m": "1"}, {"n": "2", "m": "3"}, True),
        ({"space.m": "1"}, {"space": "2"}, True),
        ({"space": "1"}, {"space.m": "2"}, True),
        ({"space": "1"}, {"spaces": "2"}, False),
    ],
)
def test_two_versions_are_a_conflict(
    given: dict[str, str], wanted: dict[str, str], conflicts: bool
) -> None:
    assert conflict(given, wanted) is conflicts


def test_a_unit_is_unpacked_by_one_of_several_children(project: Project, tmp_path: Path) -> None:
    project.put("raced.py", "VALUE = 1\n")
    unit = pack(project, "raced", "raced.py")
    path = tmp_path / unit.hash
    body = b"".join(unit.segments)
    path.mkdir()
    (path / "raced.py").write_text("VALUE = 'of the other child'\n")
    packed: dict[str, Any] = {str(path): body}
    install({"raced": str(path)}, packed)
    assert packed == {}
    assert (path / "raced.py").read_text() == "VALUE = 'of the other child'\n"


def test_a_child_that_is_overtaken_while_it_unpacks_uses_what_is_there(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.put("slow.py", "VALUE = 1\n")
    unit = pack(project, "slow", "slow.py")
    path = tmp_path / "worker" / unit.hash

    def rename(source: str, target: str) -> None:
        Path(target).mkdir()
        (Path(target) / "slow.py").touch()
        raise FileExistsError(target)

    monkeypatch.setattr(os, "rename", rename)
    assert unpack(unit, tmp_path / "worker") == ["slow.py"]
    assert [*path.parent.iterdir()] == [path]
    remove(str(path))

    def fail(source: str, target: str) -> None:
        raise PermissionError(13, "Permission denied", target)

    monkeypatch.setattr(os, "rename", fail)
    sys.path.remove(str(path))
    packed: dict[str, Any] = {str(path): b"".join(unit.segments)}
    for _ in range(2):  # the second call is told the same
        with pytest.raises(PermissionError):
            install({"slow": str(path)}, packed)
    assert [*path.parent.iterdir()] == []
    assert str(path) not in sys.path


def test_a_directory_that_somebody_removed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="was removed"):
        install({"m": str(tmp_path / "gone")}, {})


def test_a_module_that_was_found_elsewhere_before_is_loaded_anew(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    project.put("found/__init__.py", "from found.part import VALUE\n")
    project.put("found/part.py", "VALUE = 'travelled'\n")
    old = Project(tmp_path / "old")
    old.put("found/__init__.py", "from found.part import VALUE\n")
    old.put("found/part.py", "VALUE = 'old'\n")
    sys.path.append(str(old.root))
    try:
        assert importlib.import_module("found").VALUE == "old"
        unpack(pack(project, "found", "found/__init__.py"), tmp_path)
        assert importlib.import_module("found").VALUE == "travelled"
        part = importlib.import_module("found.part")
        monkeypatch.setattr(part, "__file__", "/lib/part.abi3.so")
        project.put("found/part.py", "VALUE = 'newer'\n")
        unpack(pack(project, "found", "found/__init__.py"), tmp_path)
        assert importlib.import_module("found").VALUE == "travelled"  # C cannot be loaded twice
    finally:
        for name in ("found", "found.part"):
            sys.modules.pop(name, None)


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    remove(str(tmp_path / "gone"))
