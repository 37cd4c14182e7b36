"""In a notebook: an executor lives across cells, and an interrupt stops its cell only."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

pytestmark = [
    pytest.mark.anyio,
    # Of Jupyter's own, not of asyncrt.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


class Notebook:
    """A kernel, and cells that are run in it one after the other."""

    def __init__(self) -> None:
        self.notebook = nbformat.v4.new_notebook()  # type: ignore[no-untyped-call]
        self.client = NotebookClient(self.notebook, timeout=30)

    async def run(self, source: str) -> str:
        """Run a cell and return what it printed."""
        cell = nbformat.v4.new_code_cell(source)  # type: ignore[no-untyped-call]
        self.notebook.cells.append(cell)
        await self.client.async_execute_cell(cell, len(self.notebook.cells) - 1)
        return "".join(output.get("text", "") for output in cell.outputs)


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


async def test_an_executor_lives_across_cells(notebook: Notebook) -> None:
    async with notebook.client.async_setup_kernel():
        await notebook.run("import asyncrt\nexecutor = await asyncrt.connect(max_workers=1)")
        await notebook.run("factor = 2\ndef multiply(number): return number * factor")
        map_cell = "print(await executor.map(multiply, range(3)))"
        assert await notebook.run(map_cell) == "[0, 2, 4]\n"
        await notebook.run("factor = 5")
        assert await notebook.run(map_cell) == "[0, 5, 10]\n"
        await notebook.run("await executor.aclose()")
        children = await notebook.run(
            "import psutil\nprint(psutil.Process().children(recursive=True))"
        )
        assert children == "[]\n"


async def test_an_interrupted_cell_cancels_its_run_only(notebook: Notebook) -> None:
    async with notebook.client.async_setup_kernel():
        await notebook.run("import asyncrt\nexecutor = await asyncrt.connect(max_workers=2)")
        pid = int(await notebook.run("import os\nprint(os.getpid())"))
        await notebook.run(
            "def nap(seconds):\n    import time\n    time.sleep(seconds)\n    return 7"
        )
        await notebook.run("other = executor.submit(nap, 0.5)")
        cell = asyncio.ensure_future(
            notebook.run("run = executor.map(nap, [600])\nprint('begun', flush=True)\nawait run")
        )
        while not any(o.get("text") for c in notebook.notebook.cells[-1:] for o in c.outputs):
            done, _ = await asyncio.wait({cell}, timeout=0.01)
            assert not done
        began = time.monotonic()
        os.kill(pid, 2)  # as Jupyter's stop button does
        with pytest.raises(CellExecutionError, match=r"KeyboardInterrupt|CancelledError"):
            await cell
        assert time.monotonic() - began < 1.5
        assert await notebook.run("print(await other)") == "7\n"
        assert await notebook.run("print(await executor.map(abs, [-1, -2]))") == "[1, 2]\n"
        assert "cancelled" in await notebook.run("print(run.state)")
        await notebook.run("await executor.aclose()")
        assert psutil.Process(pid).children(recursive=True) == []


async def test_a_local_module_travels_and_travels_again_when_it_is_reloaded(
    notebook: Notebook, tmp_path: Path
) -> None:
    (tmp_path / "beside.py").write_text("VERSION = 'first'\n")
    async with notebook.client.async_setup_kernel(cwd=str(tmp_path)):
        await notebook.run(
            "import sys, asyncrt\n"
            "from asyncrt.backends.local import LocalBackend\n"
            "sys.dont_write_bytecode = True\n"
            f"others = [p for p in sys.path if p and {str(tmp_path)!r} not in p]\n"
            "backend = LocalBackend(sys_path=others)\n"
            "executor = await asyncrt.connect(backend=backend, max_workers=1)"
        )
        await notebook.run(
            "def ask(_):\n    import beside\n"
            "    return beside.VERSION, '.modules/' in beside.__file__"
        )
        map_cell = "print(await executor.map(ask, range(2)))"
        assert await notebook.run(map_cell) == "[('first', True), ('first', True)]\n"
        await notebook.run("import beside, importlib\ndef short(_): return beside.VERSION")
        assert await notebook.run("print(await executor.submit(short, 0))") == "first\n"
        (tmp_path / "beside.py").write_text("VERSION = 'the second'\n")
        await notebook.run("importlib.reload(beside)")
        assert await notebook.run(map_cell) == "[('the second', True), ('the second', True)]\n"
        assert await notebook.run("print(await executor.submit(short, 0))") == "the second\n"
        (tmp_path / "late.py").write_text("import beside\nclass Late:\n    size = 7\n")
        await notebook.run("from late import Late")
        late = "print(await executor.map(lambda late: late.size, [Late()]))"
        assert await notebook.run(late) == "[7]\n"
        await notebook.run("await executor.aclose()")
