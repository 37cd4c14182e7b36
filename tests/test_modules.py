"""Local modules travel with functions: workers here cannot see the project that they come from."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from project import Project, WatchedBackend, units_in
from raw_client import wait_gone

import asyncrt
from asyncrt.errors import ModulesError, SerializationError
from asyncrt.modules import TravellingModules
from asyncrt.options import CallSettings
from asyncrt.worker.protocol import Kind

pytestmark = pytest.mark.anyio

Import = Callable[[str], ModuleType]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere"
    path.mkdir()
    return path


@pytest.fixture
def load(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """Import modules of the project into this process; they are gone afterwards."""
    project.root.mkdir(exist_ok=True)
    monkeypatch.syspath_prepend(str(project.root))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a reload within a second sees the new
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(project.root)) or name.partition(".")[0] == "parts":
            del sys.modules[name]


def exists(file: str) -> bool:
    return Path(file).exists()


def write_shop(project: Project) -> None:
    """Write a project with all that Python projects have."""
    project.put("shop/__init__.py", "from .prices import price\n")
    project.put(
        "shop/prices.py",
        """\
        from importlib.resources import files
        from pathlib import Path

        from . import taxes
        from .deep.rules import round_up


        def price(net):
            import tools  # found though it is inside a function

            rate = float(files("shop.data").joinpath("rate.txt").read_text())
            label = (Path(__file__).parent / "data" / "label.txt").read_text().strip()
            return [label, round_up(taxes.add(net * rate)), tools.NAME]
        """,
    )
    project.put("shop/taxes.py", "def add(net):\n    return net * 1.5\n")
    project.put("shop/deep/__init__.py", "")
    project.put(
        "shop/deep/rules.py", "import math\nfrom ..taxes import add\nround_up = math.ceil\n"
    )
    project.put("shop/data/rate.txt", "2")
    project.put("shop/data/label.txt", "EUR\n")
    project.put("parts/wheel/__init__.py", "from parts.wheel.spokes import COUNT\n")
    project.put("parts/wheel/spokes.py", "COUNT = 36\n\ndef spokes(_):\n    return COUNT\n")
    project.put("parts/unused/__init__.py", "raise RuntimeError('nobody asked for this')\n")
    project.put("tools.py", "NAME = 'hammer'\n")


SHOP_MAIN = """
import shop.prices
from parts.wheel.spokes import spokes
from shop import price

class Item:
    def __init__(self, net):
        self.net = net

    def price(self):
        return price(self.net)

def priced(item):
    from tools import NAME
    return [NAME, item.price()]

async def main():
    async with asyncrt.Executor(backend=backend(), max_workers=1) as executor:
        print(json.dumps([
            await executor.map(price, [1]),
            await executor.map(spokes, [1]),
            await executor.map(shop.taxes.add, [2]),
            await executor.map(priced, [Item(1)]),
            await executor.map(lambda net: price(net)[1], [3]),
        ]))

if __name__ == "__main__":
    asyncio.run(main())
"""
SHOP_RESULT = [
    [["EUR", 3, "hammer"]],
    [36],
    [3.0],
    [["hammer", ["EUR", 3, "hammer"]]],
    [9],
]


def test_a_script_maps_over_functions_of_any_of_its_modules(
    project: Project, elsewhere: Path
) -> None:
    write_shop(project)
    script = project.script("run.py", SHOP_MAIN)
    assert json.loads(project.run(script, cwd=elsewhere)) == SHOP_RESULT
    assert [*elsewhere.iterdir()] == []


def test_a_module_that_is_run_with_m_does_too(project: Project, elsewhere: Path) -> None:
    write_shop(project)
    source = SHOP_MAIN.replace("import shop.prices\n", "import shop.prices\nfrom . import helper\n")
    source = source.replace("    from tools", "    from .helper import used\n    from tools")
    project.script("apps/run.py", source)
    project.put("apps/__init__.py", "")
    project.put("apps/helper.py", "used = True\n")
    told = project.run("-m", "apps.run", cwd=elsewhere, path=[project.root])
    assert json.loads(told) == SHOP_RESULT


def test_a_script_without_local_modules_sends_none(project: Project, elsewhere: Path) -> None:
    write_shop(project)
    source = """
    async def main():
        async with asyncrt.Executor(backend=backend(), max_workers=1) as executor:
            print(await executor.map(lambda _: [p for p in sys.path if ".modules/" in p], [1]))

    asyncio.run(main())
    """
    script = project.script("run.py", source)
    assert project.run(script, cwd=elsewhere) == "[[]]\n"


async def test_a_project_beside_site_packages_counts_as_local(
    project: Project, load: Import
) -> None:
    write_shop(project)
    price = load("shop").price
    async with asyncrt.Executor(backend=WatchedBackend(project.root)) as executor:
        assert await executor.map(price, [1, 2]) == [["EUR", 3, "hammer"], ["EUR", 6, "hammer"]]
        assert await executor.submit(load("parts.wheel.spokes").spokes, 0) == 36


@pytest.mark.parametrize("spawn", ["fork", "exec"])
@pytest.mark.parametrize("isolation", ["worker", "call"])
async def test_modules_are_sent_once_to_each_worker(
    project: Project, load: Import, spawn: str, isolation: Any
) -> None:
    project.put("lone.py", "import os\ndef where(_):\n    return os.getpid(), __file__\n")
    where = load("lone").where
    backend = WatchedBackend(project.root, spawn=spawn)
    async with asyncrt.Executor(backend=backend, max_workers=2, isolation=isolation) as executor:
        found = await executor.map(where, range(12), chunksize=1)
        found += await executor.map(where, range(12), chunksize=1)
        files = {file for _, file in found}
        assert not any(file.startswith(str(project.root)) for file in files)
        assert len(files) <= 2
        if isolation == "call":
            assert len({pid for pid, _ in found}) == 24
    sent = [units_in(stream.frames) for stream in backend.streams]
    assert all(units in ([], ["lone"]) for units in sent)  # a worker may have come too late
    assert len(backend.sent_units()) >= len(files)
    assert not any(exists(file) for file in files)


async def test_a_changed_module_travels_again_within_one_session(
    project: Project, load: Import
) -> None:
    project.put("versioned.py", "VERSION = 'one'\ndef version(_):\n    return VERSION\n")
    project.put("user.py", "import versioned\ndef ask(_):\n    return versioned.VERSION\n")
    user, versioned = load("user"), load("versioned")
    backend = WatchedBackend(project.root)
    async with asyncrt.Executor(backend=backend, max_workers=1) as executor:
        assert await executor.map(user.ask, range(3)) == ["one"] * 3
        assert await executor.map(user.ask, range(3)) == ["one"] * 3
        assert sorted(backend.sent_units()) == ["user", "versioned"]
        project.put("versioned.py", "VERSION = 'second'\ndef version(_):\n    return VERSION\n")
        importlib.reload(versioned)
        assert await executor.map(user.ask, range(3)) == ["second"] * 3
        assert await executor.submit(versioned.version, 0) == "second"
        assert sorted(backend.sent_units()) == ["user", "versioned", "versioned"]


@pytest.mark.parametrize("slots", [1, 2])
async def test_two_versions_on_one_warm_pool_do_not_mix(
    project: Project, load: Import, slots: int
) -> None:
    def source(version: str) -> str:
        return f"VERSION = '{version}'\ndef version(_):\n    return VERSION\n"

    project.put("mixed.py", source("a"))
    mixed = load("mixed")
    backend = WatchedBackend(project.root)
    async with asyncrt.Executor(backend=backend, max_workers=1, slots=slots) as executor:
        runs = []
        for number in range(8):
            project.put("mixed.py", source("ab"[number % 2]))
            importlib.reload(mixed)
            runs.append(executor.map(mixed.version, range(20), chunksize=2))
        results = await asyncio.gather(*runs)
        assert results == [["ab"[number % 2]] * 20 for number in range(8)]
        assert len(backend.sent_units()) == 2
        for number in range(4):
            project.put("mixed.py", source("ab"[number % 2]))
            importlib.reload(mixed)
            isolated = executor.map(mixed.version, range(4), isolation="call")
            assert await isolated == ["ab"[number % 2]] * 4
        assert len(backend.sent_units()) == 2


async def test_a_worker_that_was_cut_off_needs_no_module_again(
    project: Project, load: Import
) -> None:
    project.put("steady.py", "def double(number):\n    return 2 * number\n")
    double = load("steady").double
    backend = WatchedBackend(project.root)
    async with asyncrt.Executor(backend=backend, max_workers=1) as executor:
        assert await executor.submit(double, 1) == 2
        backend.streams[0].close()
        assert await executor.map(double, range(5)) == [0, 2, 4, 6, 8]
    assert len(backend.streams) == 2
    assert backend.sent_units() == ["steady"]


async def test_a_large_package_arrives_before_its_function_is_called(
    project: Project, load: Import
) -> None:
    project.put(
        "heavy/__init__.py",
        """\
        from pathlib import Path
        def size(name):
            return (Path(__file__).parent / name).stat().st_size
        """,
    )
    project.put("heavy/data.bin", os.urandom(5 << 20))
    project.put("heavy/tool.sh", "#!/bin/sh\n").chmod(0o755)
    size = load("heavy").size
    backend = WatchedBackend(project.root)
    async with asyncrt.Executor(backend=backend, max_workers=1) as executor:
        assert await executor.map(size, ["data.bin", "tool.sh"]) == [5 << 20, 10]
        heavy = load("heavy")

        def can_run(name: str) -> bool:
            return os.access(os.path.join(os.path.dirname(heavy.__file__ or ""), name), os.X_OK)

        assert await executor.map(can_run, ["data.bin", "tool.sh"]) == [False, True]


async def test_what_arguments_and_closures_need_travels(project: Project, load: Import) -> None:
    project.put("kinds.py", "class Kind:\n    def name(self, *_, **__):\n        return 'kind'\n")
    kind = load("kinds").Kind()

    def ask(_: int) -> Any:
        return kind.name()

    def given(_: int, *, kind: Any) -> Any:
        return kind[0].name()

    async with asyncrt.Executor(backend=WatchedBackend(project.root)) as executor:
        assert await executor.submit(ask, 1) == "kind"
        assert await executor.map(given, [1], kwargs={"kind": [kind]}) == ["kind"]
        assert await executor.map(kind.name, [1]) == ["kind"]
        assert await executor.map(functools.partial(given, kind=[kind]), [1]) == ["kind"]


async def test_include_modules_sends_what_no_import_names(project: Project, load: Import) -> None:
    project.put(
        "dynamic.py",
        "import importlib\ndef ask(name):\n    return importlib.import_module(name).VALUE\n",
    )
    project.put("hidden_one.py", "from hidden_two import VALUE\n")
    project.put("hidden_two.py", "VALUE = 2\n")
    ask = load("dynamic").ask
    async with asyncrt.Executor(backend=WatchedBackend(project.root)) as executor:
        with pytest.raises(ModuleNotFoundError) as caught:
            await executor.submit(ask, "hidden_one")
        hint = "send it with include_modules=['hidden_one']"
        assert any(hint in note for note in caught.value.__notes__)
        run = executor.map(ask, ["hidden_one"], include_modules=["hidden_one"])
        assert await run == [2]
        with pytest.raises(ModuleNotFoundError) as caught:
            await executor.submit(ask, "there_is_no_such_module")
        assert not any("include_modules" in note for note in caught.value.__notes__)


async def test_include_modules_sends_installed_ones(project: Project, load: Import) -> None:
    project.put("asks.py", "def where(_):\n    import iniconfig\n    return iniconfig.__file__\n")
    where = load("asks").where
    async with asyncrt.Executor(backend=WatchedBackend(project.root), max_workers=1) as executor:
        assert await executor.submit(where, 0) == importlib.import_module("iniconfig").__file__
        sender = executor.with_options(include_modules=["iniconfig"])
        assert ".modules/" in await sender.submit(where, 0)


async def test_exclude_modules_leaves_out(project: Project, load: Import) -> None:
    project.put("whole/__init__.py", "def ask(_):\n    from whole import part\n    return part\n")
    project.put("whole/part.py", "")
    project.put("whole/extra/file.txt", "")
    project.put("alone.py", "import whole\ndef ask(_):\n    return 1\n")
    ask, alone = load("whole").ask, load("alone").ask
    async with asyncrt.Executor(backend=WatchedBackend(project.root)) as executor:
        with pytest.raises(SerializationError) as caught:
            await executor.map(alone, [1], exclude_modules=["whole"])
        with pytest.raises(ImportError, match="cannot import name 'part'"):
            await executor.map(ask, [1], exclude_modules=["whole.part", "whole.extra"])
        assert caught.value.module == "whole"
        assert "cannot be loaded here: ModuleNotFoundError" in str(caught.value)
        assert "exclude_modules names 'whole'" in str(caught.value)


async def test_a_circular_import_is_no_matter_unless_it_fails(
    project: Project, load: Import
) -> None:
    project.put("one.py", "import two\ndef ask(_):\n    return two.ask()\n")
    project.put("two.py", "import one\ndef ask():\n    return 'two'\n")
    project.put("first.py", "import second\nVALUE = 1\ndef ask(_):\n    return second.VALUE\n")
    project.put("second.py", "from first import ask\nVALUE = 2\n")
    async with asyncrt.Executor(backend=WatchedBackend(project.root)) as executor:
        assert await executor.map(load("one").ask, [1]) == ["two"]
        load("second")
        with pytest.raises(SerializationError, match="circular import") as caught:
            await executor.map(load("first").ask, [1])
        assert "move what both need into a third module" in str(caught.value)


async def test_a_module_that_hides_the_standard_library_is_refused(
    project: Project, load: Import
) -> None:
    file = project.put("sched.py", "")
    project.put("hides.py", "import sched\ndef ask(_):\n    return 1\n")
    ask = load("hides").ask
    async with asyncrt.Executor(backend=WatchedBackend(project.root)) as executor:
        with pytest.raises(ModulesError, match="rename the file") as caught:
            executor.map(ask, [1])
        assert (caught.value.module, caught.value.paths) == ("sched", (str(file),))
        assert await executor.map(ask, [1], exclude_modules=["sched"]) == [1]


async def test_too_much_data_is_refused_and_named(project: Project, load: Import) -> None:
    project.put("fat/__init__.py", "def ask(_):\n    return 1\n")
    data = project.root / "fat/data.bin"
    with data.open("wb") as file:
        file.truncate(500 << 20)  # takes no room
    ask = load("fat").ask
    async with asyncrt.Executor(backend=WatchedBackend(project.root)) as executor:
        with pytest.raises(ModulesError, match=r"500\.0 MiB.*modules_limit=64\.0 MiB") as caught:
            executor.submit(ask, 1)
        assert f"{data} (500.0 MiB)" in str(caught.value)
        assert caught.value.paths[0] == str(data)
        assert caught.value.limit_bytes == 64 << 20
        data.write_bytes(bytes(3 << 20))
        with pytest.raises(ModulesError):
            executor.map(ask, [1], modules_limit="1Mi")
        assert await executor.map(ask, [1], modules_limit="4Mi") == [1]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("there_is_none", "there is no module 'there_is_none'"),
        ("sys", "or it is built in"),
        ("os", "hides the module 'os'"),
        ("spread", "'spread' is a namespace package"),
    ],
)
async def test_a_module_that_cannot_be_included_is_an_error(
    project: Project, load: Import, name: str, problem: str
) -> None:
    project.put("spread/inner.py", "")
    project.put("plain_one.py", "def ask(_):\n    return 1\n")
    ask = load("plain_one").ask
    async with asyncrt.Executor(backend=WatchedBackend(project.root)) as executor:
        with pytest.raises(ModulesError) as caught:
            executor.map(ask, [1], include_modules=[name])
        assert problem in str(caught.value)
        assert caught.value.module == name


async def test_modules_that_import_asyncrt_load_in_a_worker(project: Project, load: Import) -> None:
    project.put(
        "imports_us.py",
        """\
        import asyncrt.options
        from asyncrt import CallTimeoutError, Executor, Retry, current_call

        RETRY = Retry(attempts=2)

        def ask(_):
            import asyncrt
            return current_call().index, RETRY.attempts, asyncrt.Run.__name__
        """,
    )
    async with asyncrt.Executor(backend=WatchedBackend(project.root)) as executor:
        assert await executor.map(load("imports_us").ask, [1]) == [(0, 2, "Run")]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux shows them")
async def test_nothing_is_left_when_the_workers_parent_is_killed(
    project: Project, load: Import
) -> None:
    project.put("leaves.py", "import os\ndef where(_):\n    return os.getppid(), __file__\n")
    where = load("leaves").where
    async with asyncrt.Executor(backend=WatchedBackend(project.root), max_workers=1) as executor:
        server, file = await executor.submit(where, 0)
        assert exists(file)
        parent = psutil.Process(server).ppid()
        processes = [psutil.Process(pid) for pid in (server, parent)]
        os.kill(parent, signal.SIGKILL)
        assert wait_gone(processes) == []
        assert not exists(file)
        _, other = await executor.submit(where, 0)
        assert other != file
    assert not exists(str(Path(other).parents[2]))


def test_nothing_is_left_when_the_client_is_killed(project: Project, elsewhere: Path) -> None:
    write_shop(project)
    source = """
    import os, signal
    import shop

    def where(_):
        import psutil
        return shop.__file__, psutil.Process(os.getppid()).ppid()

    async def main():
        async with asyncrt.Executor(backend=backend(), max_workers=1) as executor:
            file, parent = await executor.submit(where, 0)
            print(file, parent, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(main())
    """
    script = project.script("run.py", source)
    file, parent = project.run(script, cwd=elsewhere, code=-signal.SIGKILL).split()
    with contextlib.suppress(psutil.NoSuchProcess):
        assert wait_gone([psutil.Process(int(parent))]) == []
    assert not Path(file).parents[3].exists()
    assert Path(file).parents[3].name.startswith("asyncrt-")


async def test_functions_and_modules_in_use_are_not_forgotten(
    project: Project, load: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncrt.link._MAX_FUNCTIONS", 4)
    project.put("kept.py", "def add(number, *, more):\n    return number + more\n")
    add = load("kept").add
    backend = WatchedBackend(project.root)
    async with asyncrt.Executor(backend=backend, max_workers=1) as executor:
        runs = [executor.map(add, range(4), kwargs={"more": more}) for more in range(12)]
        assert await asyncio.gather(*runs) == [
            [more, more + 1, more + 2, more + 3] for more in range(12)
        ]
        for more in range(12):
            assert await executor.map(add, [1], kwargs={"more": more}) == [1 + more]
    forgotten = {
        name
        for frame in backend.frames
        if frame.kind == Kind.FUNCTION
        for name in frame.header.get("forget", ())
    }
    assert forgotten
    assert backend.sent_units() == ["kept"]


# -- where the search begins, and when it is repeated ----------------------------------------------


def names_of(units: Any) -> list[str]:
    return [unit.name for unit in units]


class Proxy:
    """As some libraries have it: whatever it is asked fails."""

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no application context")


def test_files_are_looked_at_when_a_function_is_new_or_a_module_was_reloaded(
    project: Project, load: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    project.put("looked.py", "def ask(_):\n    return 1\n")
    looked = load("looked")
    modules, settings = TravellingModules(), CallSettings()
    first = modules.find(looked.ask, {}, settings)
    assert modules.find(looked.ask, {}, settings) is first
    project.put("looked.py", "def ask(_):\n    return 22\n")
    assert modules.find(looked.ask, {}, settings) is first
    importlib.reload(looked)
    second = modules.find(looked.ask, {}, settings)
    assert second[0].hash != first[0].hash
    project.put("looked.py", "def ask(_):\n    return 333\n")
    assert modules.find(looked.ask, {}, settings) is second
    monkeypatch.setattr("time.monotonic", lambda: 1000.1)
    third = modules.find(looked.ask, {}, settings)
    assert third[0].hash not in {first[0].hash, second[0].hash}
    project.put("looked.py", "def ask(_):\n    return 4444\n")

    def other(_: int) -> Any:
        return looked.ask

    found = modules.find(other, {}, settings)
    assert names_of(found) == ["looked", "project", "raw_client", "test_modules"]
    assert found[0].hash != third[0].hash


def test_what_is_remembered_is_bounded(
    project: Project, load: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncrt.modules._MOST_ENTRIES", 2)
    monkeypatch.setattr("asyncrt.modules._MOST_CODES", 2)
    modules = TravellingModules()
    for name in ("many_a", "many_b", "many_c"):
        project.put(f"{name}.py", "def ask(_):\n    return 1\n")
    for _ in range(3):
        for name in ("many_a", "many_b", "many_c"):
            assert names_of(modules.find(load(name).ask, {}, CallSettings())) == [name]


def test_values_that_cannot_be_looked_into_are_passed_by(project: Project, load: Import) -> None:
    project.put("held.py", "class Held:\n    pass\n")
    held = load("held").Held()

    def make() -> tuple[Callable[[], Any], Callable[[], Any]]:
        def early() -> Any:
            return late

        first = early
        modules = names_of(TravellingModules().find(first, {}, CallSettings()))
        assert "test_modules" in modules
        late = held
        return first, lambda: late

    early, _ = make()
    find = TravellingModules().find
    assert "held" in names_of(find(early, {}, CallSettings()))
    assert "held" in names_of(find(len, {"a": Proxy(), "b": {"c": [held]}}, CallSettings()))
    assert "held" in names_of(find(max, {"key": type(held)}, CallSettings()))
    assert names_of(find(max, {}, CallSettings())) == []
    assert names_of(find(max, {"a": 1, "b": "text"}, CallSettings())) == []


def test_a_function_that_no_module_has_brings_what_it_imports(
    project: Project, load: Import
) -> None:
    project.put("wanted_a.py", "")
    project.put("wanted_b.py", "class B:\n    pass\n")
    space: dict[str, Any] = {"__name__": "nowhere", "B": load("wanted_b").B}
    exec("def ask(_):\n    import wanted_a\n    return B", space)  # noqa: S102 - as a REPL does
    found = TravellingModules().find(space["ask"], {}, CallSettings())
    assert names_of(found) == ["wanted_a", "wanted_b"]
    del space["__name__"]
    exec("def ask(_):\n    import wanted_a", space)  # noqa: S102 - the same
    assert names_of(TravellingModules().find(space["ask"], {}, CallSettings())) == ["wanted_a"]
