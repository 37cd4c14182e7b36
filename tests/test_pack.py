"""The worker as one file: the same everywhere, small, and complete for what it is for."""

from __future__ import annotations

import ast
import marshal
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from importlib.util import source_hash
from pathlib import Path
from typing import Any

import pytest

import asyncrt
from asyncrt.pack import pack_worker, worker_program
from asyncrt.placeholder import Placeholder
from asyncrt.worker.settings import WorkerSettings

LARGEST_BYTES = 150 * 1024


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "worker.pyz"
    path.write_bytes(pack_worker())
    return path


def run_on(program: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code with nothing but the zipapp and the standard library."""
    return subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(program)!r})\n{code}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def meaning(source: bytes) -> str:
    """Return what a source says, and where, but for its docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body[0] = ast.Pass(lineno=0, col_offset=0)
    lines = [getattr(node, "lineno", 0) for node in ast.walk(tree)]
    return f"{ast.dump(tree)} {lines}"


def test_the_same_sources_give_the_same_bytes_in_every_process(program: Path) -> None:
    code = (
        "from asyncrt.pack import pack_worker; import sys; sys.stdout.buffer.write(pack_worker())"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert again.stdout == program.read_bytes() == pack_worker()


def test_executors_of_one_process_share_what_was_packed() -> None:
    assert worker_program() == pack_worker()
    assert worker_program() is worker_program()


def test_nothing_in_it_tells_when_or_by_whom_it_was_made(program: Path) -> None:
    with zipfile.ZipFile(program) as archive:
        for entry in archive.infolist():
            assert entry.date_time == (1980, 1, 1, 0, 0, 0)
            assert entry.external_attr == 0o644 << 16
            assert not entry.extra
        names = archive.namelist()
    assert names[1:] == sorted(names[1:])


def test_it_is_small(program: Path) -> None:
    assert program.stat().st_size <= LARGEST_BYTES


def test_it_holds_only_what_may_travel(program: Path) -> None:
    with zipfile.ZipFile(program) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
    package = Path(asyncrt.__file__).parent
    worker = {f"asyncrt/worker/{path.stem}" for path in (package / "worker").glob("*.py")}
    worker.remove("asyncrt/worker/nosync")  # it is the ``sync`` of a worker
    light = {f"asyncrt/{name}" for name in ("__init__", "errors", "inside", "placeholder", "sync")}
    modules = {name.rpartition(".")[0] for name in names}
    assert {name for name in modules if name.startswith("asyncrt/")} == worker | light
    others = {name for name in modules if not name.startswith("asyncrt/")}
    assert "cloudpickle/cloudpickle" in others
    assert {name.split("/")[0] for name in others} == {"__main__", "cloudpickle"}
    assert {name.rpartition(".")[2] for name in names} == {"py", "pyc"}


def test_what_travels_imports_nothing_but_the_standard_library_and_itself() -> None:
    allowed = sys.stdlib_module_names | {"asyncrt", "cloudpickle"}
    package = Path(asyncrt.__file__).parent
    light = [package / f"{name}.py" for name in ("errors", "inside", "placeholder")]
    for path in [*light, *(package / "worker").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            found: set[str] = set()
            if isinstance(node, ast.Import):
                found = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found = {str(node.module).split(".")[0]}
            assert found <= allowed, path


def test_its_bytecode_is_what_these_sources_compile_to(program: Path) -> None:
    package = Path(asyncrt.__file__).parent
    with zipfile.ZipFile(program) as archive:
        for name in archive.namelist():
            if name.startswith("asyncrt/") and name.endswith(".pyc"):
                path = name[:-1].replace("asyncrt/sync.py", "asyncrt/worker/nosync.py")
                source = (package.parent / path).read_bytes()
                assert archive.read(name)[8:16] == source_hash(source), name
            elif name.startswith("asyncrt/"):
                packed = archive.read(name)
                assert meaning(packed) == meaning((package.parent / name).read_bytes()), name


def test_errors_and_current_call_work_where_only_the_zipapp_is(program: Path) -> None:
    done = run_on(
        program,
        "import asyncrt, asyncrt.errors\n"
        "from asyncrt import CallTimeoutError, current_call, __version__\n"
        "assert issubclass(CallTimeoutError, asyncrt.CallError)\n"
        "try: current_call()\n"
        "except RuntimeError as error: print(error)\n"
        "print(__version__, asyncrt.__file__)",
    )
    assert done.returncode == 0, done.stderr
    said, where = done.stdout.splitlines()
    assert said == "current_call() works inside a call only"
    assert where.split() == [asyncrt.__version__, f"{program}/asyncrt/__init__.pyc"]


CLIENT_NAMES = ["Executor", "Run", "Retry", "connect", "load_config"]


def test_the_clients_names_can_be_imported_and_annotated_with(program: Path) -> None:
    done = run_on(
        program,
        f"from asyncrt import {', '.join(CLIENT_NAMES)}\n"
        "import asyncrt, inspect\n"
        "def use(run: Run[int], executor: Executor | None = None) -> asyncrt.Retry: ...\n"
        "assert inspect.signature(use).parameters['run'].annotation is Run\n"
        "assert not isinstance(3, Executor)\n"
        "assert repr(Run) == \"<class 'asyncrt.Run'>\"",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", CLIENT_NAMES)
@pytest.mark.parametrize("use", ["{}()", "{}.open", "class Own({}): pass"])
def test_the_clients_names_say_that_the_client_is_not_installed(
    program: Path, name: str, use: str
) -> None:
    done = run_on(program, f"from asyncrt import {name}\n{use.format(name)}")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: "), last
    assert f"asyncrt.{name} belongs to the client, which is not installed" in last


def test_a_placeholder_serves_in_annotations_only() -> None:
    stand_in: Any = Placeholder("Run", (), {})
    assert stand_in[int] is stand_in
    assert (stand_in | None).__args__ == (stand_in, type(None))
    assert not hasattr(stand_in, "__wrapped__")
    for use in (stand_in, lambda: stand_in.attach, lambda: type("Own", (stand_in,), {})):
        with pytest.raises(ImportError, match=r"asyncrt\.Run belongs to the client"):
            use()


def test_a_name_whose_home_is_missing_is_a_placeholder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(asyncrt), "Executor", None)  # put back at the end
    monkeypatch.setitem(sys.modules, "asyncrt.executor", None)
    assert type(asyncrt.__getattr__("Executor")) is Placeholder
    monkeypatch.setitem(sys.modules, "asyncrt.executor", types.ModuleType("asyncrt.executor"))
    with pytest.raises(AttributeError):
        asyncrt.__getattr__("Executor")


def code_in(value: types.CodeType) -> Iterator[types.CodeType]:
    yield value
    for constant in value.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_in(constant)


def test_its_bytecode_knows_every_line_and_no_column(program: Path) -> None:
    with zipfile.ZipFile(program) as archive:
        for name in archive.namelist():
            if not (name.startswith("asyncrt/") and name.endswith(".pyc")):
                continue
            place = name[:-1].replace("asyncrt/sync.py", "asyncrt/worker/nosync.py")
            source = Path(asyncrt.__file__).parent.parent / place
            compiled = compile(
                source.read_bytes(), str(source), "exec", dont_inherit=True, optimize=2
            )
            packed = marshal.loads(archive.read(name)[16:])
            for mine, its in zip(code_in(packed), code_in(compiled), strict=True):
                assert [*mine.co_lines()] == [*its.co_lines()], (name, mine)
                assert {(columns[2], columns[3]) for columns in mine.co_positions()} <= {
                    (None, None)
                }


def test_an_unknown_name_is_an_attribute_error_there_too(program: Path) -> None:
    done = run_on(program, "import asyncrt\nassert not hasattr(asyncrt, 'Exekutor')")
    assert done.returncode == 0, done.stderr


def test_it_runs_from_a_file_of_settings_and_serves_a_tcp_port(
    program: Path, tmp_path: Path
) -> None:
    settings = WorkerSettings(b"t" * 32, "0", "0", listen_port=0, orphan_timeout=0.0)
    (tmp_path / "settings.json").write_text(settings.to_json())
    done = subprocess.run(
        [sys.executable, "-I", str(program), "serve", str(tmp_path / "settings.json")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_settings_survive_their_text() -> None:
    settings = WorkerSettings(
        bytes(range(32)),
        "1",
        "2",
        memory_bytes=5,
        sys_path=("a", "b"),
        remove=("c",),
        remove_last=("d",),
    )
    text = settings.to_json()
    assert "\n" not in text
    assert WorkerSettings.from_json(text) == settings
    assert WorkerSettings.from_json(text.encode()) == settings


@pytest.mark.parametrize("text", ["", "{", "{}", '{"token": "zz"}'])
def test_other_texts_are_no_settings(text: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        WorkerSettings.from_json(text)
