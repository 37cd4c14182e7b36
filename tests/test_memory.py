"""Memory limits, seen from inside."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asyncrt.backends.cgroup import make_memory_group
from asyncrt.worker import memory
from asyncrt.worker.memory import MemoryWatch, held_by

MIB = 1 << 20


class FakeFiles:
    """What the kernel would show."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
        self.files = files
        monkeypatch.setattr(memory, "_read", self.read)
        monkeypatch.setattr(os, "access", lambda path, _: path in files)

    def read(self, path: str) -> str:
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]


V1 = "/sys/fs/cgroup/memory"
LAYOUTS: dict[str, tuple[str, str, str]] = {
    "v1": ("4:memory:/a/b", f"{V1}/a/b/memory.oom_control", f"{V1}/a/b/memory.max_usage_in_bytes"),
    "v1 in a container": (
        "7:cpu,memory:/docker/1",
        f"{V1}/memory.oom_control",
        f"{V1}/memory.max_usage_in_bytes",
    ),
    "v2": ("0::/a", "/sys/fs/cgroup/a/memory.events", "/sys/fs/cgroup/a/memory.peak"),
    "v2 in a container": ("0::/", "/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory.peak"),
    "v2 beside v1": (
        "3:cpu:/x\n0::/a",
        "/sys/fs/cgroup/unified/a/memory.events",
        "/sys/fs/cgroup/unified/a/memory.peak",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kills_and_peak_are_read_from_the_cgroup_of_this_process(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cgroup, events, peak = LAYOUTS[layout]
    fake = FakeFiles(
        monkeypatch,
        {"/proc/self/cgroup": cgroup, events: "under_oom 0\noom_kill 2\n", peak: "12345\n"},
    )
    watch = MemoryWatch(100 * MIB, enforced=True)
    assert not watch.killed_since_last_asked(), "kills of before do not count"
    fake.files[events] = "under_oom 0\noom_kill 3\n"
    assert watch.killed_since_last_asked()
    assert not watch.killed_since_last_asked(), "each kill is told once"
    assert watch.peak_bytes() == 12345


@pytest.mark.parametrize("files", [{}, {"/proc/self/cgroup": "0::/a\n"}])
def test_without_a_cgroup_there_are_no_kills_and_no_peak(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeFiles(monkeypatch, files)
    watch = MemoryWatch(None, enforced=True)
    assert not watch.killed_since_last_asked()
    assert watch.peak_bytes() == 0


def test_files_that_vanish_or_say_nonsense_are_no_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    cgroup, events, peak = LAYOUTS["v2"]
    fake = FakeFiles(monkeypatch, {"/proc/self/cgroup": cgroup, events: "oom_kill x", peak: "max"})
    watch = MemoryWatch(None, enforced=True)
    assert watch.peak_bytes() == 0
    assert not watch.killed_since_last_asked()
    fake.files[events] = "low 0\n"
    assert not watch.killed_since_last_asked()
    del fake.files[events], fake.files[peak]
    assert not watch.killed_since_last_asked()
    assert watch.peak_bytes() == 0


@pytest.mark.parametrize(
    ("limit", "enforced", "must_poll"),
    [(None, False, False), (None, True, False), (MIB, True, False), (MIB, False, True)],
)
def test_only_a_limit_that_nobody_enforces_is_watched(
    limit: int | None, enforced: bool, must_poll: bool
) -> None:
    assert MemoryWatch(limit, enforced=enforced).must_poll is must_poll


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_the_memory_of_a_process_is_what_it_holds_now() -> None:
    before = held_by(os.getpid())
    data: Any = bytearray(64 * MIB)
    data[:: resource.getpagesize()] = b"x" * len(data[:: resource.getpagesize()])
    grown = held_by(os.getpid()) - before
    del data
    assert 60 * MIB < grown < 90 * MIB
    assert held_by(os.getpid()) - before < 30 * MIB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_process_over_the_limit_is_told_and_one_under_it_is_not() -> None:
    held = held_by(os.getpid())
    assert MemoryWatch(held // 2, enforced=False).over_limit(os.getpid())
    assert not MemoryWatch(held * 2, enforced=False).over_limit(os.getpid())
    assert not MemoryWatch(None, enforced=False).over_limit(os.getpid())


def test_a_process_that_is_gone_holds_nothing() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert held_by(gone.pid) == 0
    assert not MemoryWatch(1, enforced=False).over_limit(gone.pid)


def test_a_cgroup_that_was_made_limits_what_enters_it_and_is_removed(tmp_path: Path) -> None:
    group = make_memory_group(64 * MIB, f"asyncrt-test-{os.getpid()}")
    if group is None:
        pytest.skip("this user may make no memory cgroup")
    source = Path(memory.__file__).parents[2]
    code = (
        "import subprocess, sys\n"
        "from asyncrt.worker.memory import MemoryWatch\n"
        "watch = MemoryWatch(None, enforced=True)\n"
        "grow = 'x = bytearray(200 << 20); x[::4096] = b\"x\" * len(x[::4096])'\n"
        "done = subprocess.run([sys.executable, '-c', grow])\n"
        "print(done.returncode, watch.killed_since_last_asked(), watch.peak_bytes() >> 20)\n"
    )
    try:
        done = subprocess.run(
            [*group.enter_command(), sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(source)},
            check=True,
            timeout=60,
        )
    finally:
        group.remove()
    code_of_child, killed, peak = done.stdout.split()
    assert (code_of_child, killed) == ("-9", "True")
    assert 32 <= int(peak) <= 64
    assert not group.path.exists()


def test_without_a_limit_no_cgroup_is_made() -> None:
    assert make_memory_group(None, "asyncrt-test-none") is None
