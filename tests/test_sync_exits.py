"""However a program with sync executors ends, it ends, and nothing of it is left."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from desk import square, wait_at
from processes import carrying
from syncdesk import SyncDesk, open_sync_desk, until

from asyncrt.errors import ExecutorClosedError
from asyncrt.sync import Executor

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

TESTS = Path(__file__).parent


@pytest.fixture
def desk() -> Iterator[SyncDesk]:
    with open_sync_desk() as desk:
        yield desk


class Program:
    """A script that uses sync executors, in a process of its own."""

    def __init__(self, tmp_path: Path, source: str, *arguments: object) -> None:
        self.directory = tmp_path / "tmp"
        self.directory.mkdir()
        script = tmp_path / "program.py"
        head = f"""
            import os, sys, threading, time
            sys.path.insert(0, {str(TESTS)!r})
            from desk import square, wait_at
            from asyncrt.sync import Executor
        """
        script.write_text(textwrap.dedent(head) + textwrap.dedent(source))
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", str(script), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(self.directory)},
        )

    def end(self) -> tuple[str, str]:
        """Wait for the end; return what it wrote. Its workers and files are gone, too."""
        out, err = self.process.communicate(timeout=60)
        until(lambda: not self.family())
        assert list(self.directory.iterdir()) == []
        return out, err

    def family(self) -> list[psutil.Process]:
        """Return every process that carries this program's TMPDIR."""
        return carrying("TMPDIR", str(self.directory))


# -- the interpreter exits -------------------------------------------------------------------------


def test_an_executor_that_nobody_closed_does_not_hang_the_exit(
    tmp_path: Path, desk: SyncDesk
) -> None:
    program = Program(
        tmp_path,
        """
        executor = Executor(2)
        futures = [executor.submit(wait_at, int(sys.argv[1]), number) for number in range(2)]
        results = executor.map(square, range(100))
        input_read = sys.stdin  # the desk lets nobody go: only the exit ends these calls
        wait = threading.Event()
        executor.submit(square, 1).cancel()
        while not all(future.running() for future in futures):
            time.sleep(0.01)
        """,
        desk.port,
    )
    desk.arrived(0, 1)
    desk.killed(0, 1)
    out, err = program.end()
    assert program.process.returncode == 0
    assert out == ""
    assert err.count("calls of executors that nobody closed were cancelled") == 1
    assert "use 'with" in err


def test_an_idle_executor_that_nobody_closed_is_not_worth_a_word(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
        executors = [Executor(1) for _ in range(3)]
        print([executor.submit(square, 3).result() for executor in executors])
        """,
    )
    assert program.end() == ("[9, 9, 9]\n", "")
    assert program.process.returncode == 0


def test_the_program_does_not_exit_before_pending_futures_are_done(
    tmp_path: Path, desk: SyncDesk
) -> None:
    """Regardless of the value of wait, the entire Python program will not exit until all pending
    futures are done executing."""
    program = Program(
        tmp_path,
        """
        def done(future):
            print("done", future.result())

        executor = Executor(1)
        futures = [executor.submit(wait_at, int(sys.argv[1]), number) for number in range(3)]
        for future in futures:
            future.add_done_callback(done)
        executor.shutdown(wait=False)
        print("main ends", flush=True)
        """,
        desk.port,
    )
    desk.arrived(0)
    stdout = program.process.stdout
    assert stdout is not None
    assert stdout.readline() == "main ends\n"
    assert program.process.poll() is None
    desk.release()
    out, err = program.end()
    assert (out, err, program.process.returncode) == ("done None\n" * 3, "", 0)


def test_a_dropped_executor_is_waited_for_like_one_that_was_shut_down(
    tmp_path: Path, desk: SyncDesk
) -> None:
    program = Program(
        tmp_path,
        """
        future = Executor(1).submit(wait_at, int(sys.argv[1]), 0)
        future.add_done_callback(lambda future: print("done"))
        """,
        desk.port,
    )
    desk.arrived(0)
    desk.release()
    assert program.end() == ("done\n", "")


def test_submitting_while_the_interpreter_exits_is_a_runtime_error(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
        import atexit
        used, unused = Executor(1), Executor(1)
        used.submit(square, 2).result()

        @atexit.register
        def at_exit():
            for executor in (used, unused):
                try:
                    executor.submit(square, 1)
                except RuntimeError as error:
                    print(type(error).__name__, error)

        def late():
            threading.main_thread().join()
            try:
                unused.submit(square, 1)
            except RuntimeError as error:
                print("thread:", type(error).__name__)

        threading.Thread(target=late).start()
        """,
    )
    out, err = program.end()
    lines = out.splitlines()
    assert lines[0] == "thread: ExecutorClosedError"
    assert "ExecutorClosedError cannot schedule new calls after" in lines[1]
    assert "ExecutorClosedError cannot schedule new calls after interpreter shutdown" in lines[2]
    assert err == ""


def test_ctrl_c_in_result_kills_what_runs(tmp_path: Path, desk: SyncDesk) -> None:
    program = Program(
        tmp_path,
        """
        with Executor(2) as executor:
            futures = [executor.submit(wait_at, int(sys.argv[1]), number) for number in range(2)]
            futures[0].result()
        """,
        desk.port,
    )
    desk.arrived(0, 1)
    program.process.send_signal(signal.SIGINT)
    desk.killed(0, 1)
    _, err = program.end()
    assert program.process.returncode == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("how", ["executor.shutdown()", "executor.shutdown(wait=False)", "del x"])
def test_ctrl_c_while_the_end_is_waited_for_kills_what_runs(
    tmp_path: Path, desk: SyncDesk, how: str
) -> None:
    program = Program(
        tmp_path,
        f"""
        executor = x = Executor(1)
        future = executor.submit(wait_at, int(sys.argv[1]), 0)
        print("waits", flush=True)
        {how}
        del executor
        """,
        desk.port,
    )
    desk.arrived(0)
    stdout = program.process.stdout
    assert stdout is not None
    stdout.readline()
    until(lambda: is_in_wait(program.process.pid))
    program.process.send_signal(signal.SIGINT)
    desk.killed(0)
    program.end()


def is_in_wait(pid: int) -> bool:
    """Whether the main thread of a process sleeps in a lock."""
    return Path(f"/proc/{pid}/wchan").read_text().startswith(("futex", "0")) and (
        psutil.Process(pid).status() == psutil.STATUS_SLEEPING
    )


# -- executors that nobody closes ------------------------------------------------------------------


def what_there_is() -> dict[str, Any]:
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "processes": len(psutil.Process().children(recursive=True)),
        "files": len(os.listdir("/proc/self/fd")),
        "directories": sorted(Path(tempfile.gettempdir()).glob("asyncrt-*")),
    }


@pytest.mark.timeout(300)
def test_executors_that_are_dropped_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gc.collect()
    before = what_there_is()
    for number in range(300):
        executor = Executor(1, echo=False)
        if number % 10 == 0:
            assert executor.submit(square, 3).result() == 9
        else:
            future = executor.submit(square, 3)
            del future
        del executor
    gc.collect()
    until(lambda: what_there_is() == before)


def test_a_dropped_executor_ends_when_its_calls_have_ended(desk: SyncDesk) -> None:
    executor = Executor(1, echo=False)
    future = executor.submit(wait_at, desk.port, 1)
    desk.arrived(1)
    del executor
    desk.release()
    assert future.result() is None
    until(lambda: "asyncrt-loop" not in {thread.name for thread in threading.enumerate()})


def test_no_reference_keeps_an_executor_alive(desk: SyncDesk) -> None:
    del desk
    executor = Executor(1, echo=False)
    future = executor.submit(square, 3)
    results = executor.map(square, range(3))
    assert future.result() == 9
    gc.collect()
    gc.disable()
    try:
        del executor
        until(lambda: "asyncrt-loop" not in {thread.name for thread in threading.enumerate()})
    finally:
        gc.enable()
    assert list(results) == [0, 1, 4]


# -- forks -----------------------------------------------------------------------------------------


def in_fork(body: Any) -> int:
    """Run something in a fork; return its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_fork_is_told_to_make_an_executor_of_its_own(desk: SyncDesk) -> None:
    with Executor(1, echo=False) as executor:
        done = executor.submit(square, 2)
        assert done.result() == 4
        pending = executor.submit(wait_at, desk.port, 1)
        results = executor.map(square, range(3))
        desk.arrived(1)

        def child() -> None:
            for use in (
                lambda: executor.submit(square, 1),
                lambda: executor.map(square, [1]),
                lambda: executor.with_options(timeout=1).submit(square, 1),
                pending.result,
                lambda: pending.exception(timeout=1),
                pending.cancel,
                lambda: next(results),
                executor.shutdown,
            ):
                with pytest.raises(ExecutorClosedError, match="make a new"):
                    use()
            assert done.result() == 4

        assert in_fork(child) == 0
        desk.release()
        assert pending.result() is None
        assert list(results) == [0, 1, 4]
        assert executor.submit(square, 5).result() == 25


def test_a_fork_can_have_its_own_and_exits_cleanly(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
        executor = Executor(1)
        assert executor.submit(square, 2).result() == 4
        pid = os.fork()
        if pid == 0:
            with Executor(1) as mine:
                print("child", mine.submit(square, 3).result(), flush=True)
            unclosed = Executor(1)
            print("child", unclosed.submit(square, 4).result(), flush=True)
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        print("parent", executor.submit(square, 5).result())
        """,
    )
    assert program.end() == ("child 9\nchild 16\nparent 25\n", "")
    assert program.process.returncode == 0


def test_a_fork_that_goes_on_does_not_hold_up_the_parent(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
        executor = Executor(1)
        assert executor.submit(square, 2).result() == 4
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
        began = time.monotonic()
        executor.shutdown()
        print(time.monotonic() - began < 4)
        os.write(writing, b"x")
        """,
    )
    assert program.end() == ("True\n", "")
