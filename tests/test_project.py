"""The project as a whole: what it exports, what it loads, and that what it shows does run."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import asyncrt

ROOT = Path(__file__).parents[1]
HEAVY = {"kubernetes_asyncio", "aiodocker", "aiobotocore", "yaml", "anyio"}
README_SNIPPETS = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S
)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PROGRESS = re.compile(r"\s*\d+ %  [\d,]+ of [\d,]+ files  [\d,]+ files/s")


def run_python(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in a process of its own, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        timeout=100,
        check=False,
    )


def loaded_by(statement: str, *, cwd: Path) -> set[str]:
    """Return the modules that a statement loads in a fresh interpreter."""
    code = (
        "import sys; before = set(sys.modules)\n"
        f"{statement}\n"
        "print(*sorted(set(sys.modules) - before), sep='\\n')"
    )
    finished = run_python("-c", code, cwd=cwd)
    assert finished.returncode == 0, finished.stderr
    return set(finished.stdout.split())


def top_level(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("name", asyncrt.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(asyncrt, name) is not None


def test_all_is_exactly_what_the_package_offers_to_type_checkers() -> None:
    tree = ast.parse(Path(asyncrt.__file__).read_text())
    offered = {
        alias.asname or alias.name
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert sorted(asyncrt.__all__) == sorted(offered | {"__version__"})
    assert dir(asyncrt) == sorted(asyncrt.__all__)


def test_all_holds_every_error_class() -> None:
    errors = importlib.import_module("asyncrt.errors")
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, asyncrt.AsyncrtError)
    }
    assert defined <= set(asyncrt.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Exekutor'"):
        _ = asyncrt.Exekutor


def test_importing_asyncrt_loads_nothing_heavy(tmp_path: Path) -> None:
    loaded = loaded_by("import asyncrt", cwd=tmp_path)
    assert "asyncrt" in loaded
    assert not top_level(loaded) & HEAVY


def test_the_executor_is_usable_without_the_clients_of_other_backends(tmp_path: Path) -> None:
    loaded = top_level(loaded_by("from asyncrt import Executor", cwd=tmp_path))
    assert not loaded & {"kubernetes_asyncio", "aiodocker", "aiobotocore", "aiohttp"}


def test_importing_the_worker_loads_only_what_travels_with_it(tmp_path: Path) -> None:
    loaded = loaded_by("import asyncrt.worker", cwd=tmp_path)
    # Of other packages nothing: the worker's parent does not even load cloudpickle, for speed.
    assert top_level(loaded) - sys.stdlib_module_names == {"asyncrt"}
    travelling = ("asyncrt.worker", "asyncrt.inside", "asyncrt.errors")
    assert [
        name for name in loaded if name.startswith("asyncrt.") and not name.startswith(travelling)
    ] == []


def test_the_sources_of_what_travels_import_only_the_standard_library_and_cloudpickle() -> None:
    package = Path(asyncrt.__file__).parent
    sources = [*package.glob("worker/**/*.py"), package / "inside.py", package / "errors.py"]
    allowed = sys.stdlib_module_names | {"asyncrt", "cloudpickle"}
    foreign = [
        f"{source.relative_to(package)}: {name}"
        for source in sources
        for node in ast.walk(ast.parse(source.read_text()))
        for name in imported_names(node)
        if name.partition(".")[0] not in allowed
    ]
    assert foreign == []


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return []


def test_the_readme_has_snippets() -> None:
    assert len(README_SNIPPETS) >= 2


@pytest.mark.parametrize("number", range(len(README_SNIPPETS)))
def test_readme_snippet_runs_as_it_stands(number: int, tmp_path: Path) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(README_SNIPPETS[number])
    finished = run_python(script, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert finished.stdout


@pytest.mark.parametrize("link", re.findall(r"\]\(([^):#]+)\)", (ROOT / "README.md").read_text()))
def test_what_the_readme_links_to_exists(link: str) -> None:
    assert (ROOT / link).exists()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs_without_a_warning(example: Path, tmp_path: Path) -> None:
    finished = run_python(example, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert [line for line in finished.stderr.splitlines() if not PROGRESS.fullmatch(line)] == []
    assert finished.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_importing_an_example_starts_nothing(example: Path, tmp_path: Path) -> None:
    # A worker may have to import the file that its function comes from.
    finished = run_python("-c", f"import runpy; runpy.run_path({str(example)!r})", cwd=tmp_path)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_the_quickstart_adds_up(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "package").mkdir(parents=True)
    (project / "package" / "long.py").write_text("word = other_word\n" * 30)
    (project / "short.py").write_text("word\n" * 10)
    (project / "empty.py").touch()
    (project / "notes.txt").write_text("not counted\n")
    finished = run_python(ROOT / "examples" / "quickstart.py", project, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    table = [line.strip() for line in finished.stdout.splitlines()]
    assert table.index("30  package/long.py") < table.index("10  short.py")
    assert any(line.startswith("40  in all 3 files, in ") for line in table)
    assert "40  word" in table
    assert "30  other_word" in table
    assert "70  in all, 2 different ones" in table
    assert len(finished.stderr.splitlines()) == 3


def test_the_quickstart_says_when_there_is_nothing_to_count(tmp_path: Path) -> None:
    finished = run_python(ROOT / "examples" / "quickstart.py", tmp_path, cwd=tmp_path)
    assert finished.returncode == 1
    assert finished.stderr == f"There are no Python files in {tmp_path}.\n"
