"""A real worker process, started from the packed zipapp and driven by hand."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from raw_client import Gate, RawClient, RawWorker, pack_arguments, running_worker, wait_gone

from asyncrt.errors import ProtocolError
from asyncrt.pack import worker_program
from asyncrt.worker.protocol import HEAD, MORE, VERSION, Kind, encode_head

MIB = 1 << 20
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
Start = Callable[..., AbstractContextManager[RawWorker]]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worker") / "worker.pyz"
    path.write_bytes(worker_program())
    return path


@pytest.fixture
def start(program: Path) -> Start:
    return lambda **settings: running_worker(program, **settings)


@pytest.fixture(params=["fork", "exec"])
def worker(request: pytest.FixtureRequest, start: Start) -> Iterator[RawWorker]:
    """Yield a worker of each way to make children. The main cases run on both."""
    with start(spawn=request.param) as started:
        yield started


@pytest.fixture
def client(worker: RawWorker) -> RawClient:
    """Return a client of a worker whose child is there already."""
    client = worker.connect()
    client.run(lambda _: None, None)
    client.inbox.clear()
    return client


@pytest.fixture
def forking(start: Start) -> Iterator[RawWorker]:
    with start() as started:
        yield started


@pytest.fixture
def gates(tmp_path: Path) -> Callable[[], Gate]:
    numbers = iter(range(100))
    return lambda: Gate(tmp_path / f"gate-{next(numbers)}")


# -- calls ----------------------------------------------------------------------------------------


def test_calls_are_run_in_order_and_answered(client: RawClient) -> None:
    report = client.run(lambda x: x * x, *range(50))
    assert report.values == {position: position**2 for position in range(50)}
    starts = [report.times[position][0] for position in range(50)]
    assert starts == sorted(starts)
    assert all(started <= ended for started, ended in report.times.values())


@pytest.mark.parametrize(
    ("style", "arguments"),
    [("one", (3, 4)), ("star", (3, 4)), ("call", ((3,), {"b": 4}))],
)
def test_each_style_of_arguments_reaches_the_function(
    forking: RawWorker, style: str, arguments: Any
) -> None:
    def collect(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    expected = {"one": (((3, 4),), {}), "star": ((3, 4), {}), "call": ((3,), {"b": 4})}
    report = forking.connect().run(collect, arguments, style=style)
    assert report.values == {0: expected[style]}


def test_a_call_knows_its_run_index_attempt_and_deadline(forking: RawWorker) -> None:
    def inspect(_: Any) -> Any:
        import time

        from asyncrt import current_call

        call = current_call()
        scratch = call.scratch()
        (scratch / "file").write_text("x")
        left = None if call.deadline is None else call.deadline - time.monotonic()
        return call.run_id, call.index, call.attempt, left, str(scratch)

    report = forking.connect().run(
        inspect, 0, 0, run="r-77", attempt=3, indexes=[9, 4], timeout=60.0
    )
    for position, index in enumerate([9, 4]):
        run, found, attempt, left, scratch = report.values[position]
        assert (run, found, attempt) == ("r-77", index, 3)
        assert 50 < left <= 60
        assert not os.path.exists(scratch)


def test_exceptions_and_unpicklable_results_fail_their_call_only(client: RawClient) -> None:
    def sometimes(x: int) -> Any:
        if x == 1:
            raise KeyError("odd")
        if x == 2:
            import threading

            return threading.Lock()
        if x == 3:
            raise SystemExit(4)
        return x

    report = client.run(sometimes, *range(5))
    assert report.values == {0: 0, 4: 4}
    assert [report.raised[position]["type"] for position in (1, 2, 3)] == [
        "KeyError",
        "asyncrt.errors.SerializationError",
        "SystemExit",
    ]
    assert "sometimes" in report.raised[1]["traceback"]


def test_large_bodies_pass_both_ways_and_small_frames_overtake_them(client: RawClient) -> None:
    data = os.urandom(5 * MIB)
    array = np.arange(2 * MIB, dtype="u4")
    report = client.run(lambda x: x, data, array, [1])
    assert report.values[0] == data
    np.testing.assert_array_equal(report.values[1], array)
    assert report.values[2] == [1]


@pytest.mark.parametrize("size", [10, 100_000, 3 * MIB])
def test_arrays_can_be_changed_in_place_whatever_their_size(forking: RawWorker, size: int) -> None:
    def increase(array: Any) -> Any:
        array += 1
        return array

    found = forking.connect().run(increase, np.zeros(size, "u1")).values[0]
    found += 1
    assert found.min() == found.max() == 2


def test_a_child_is_used_again_and_a_function_is_loaded_once(client: RawClient) -> None:
    def load_counted() -> Any:
        class Counted:
            def __setstate__(self, state: Any) -> None:
                print("loaded", flush=True)

            def __getstate__(self) -> Any:
                return 1

            def __call__(self, _: Any) -> int:
                import os

                return os.getpid()

        return Counted()

    client.function("f", load_counted())
    pids = set()
    for chunk in range(3):
        client.calls(chunk, "f", [0, 0])
        pids |= set(client.report(chunk).values.values())
    assert len(pids) == 1
    assert b"".join(bytes(log.body) for log in client.logs()).count(b"loaded") == 1


def test_functions_that_the_client_forgets_are_dropped(forking: RawWorker) -> None:
    client = forking.connect()
    client.function("f", lambda _: "first")
    client.calls(1, "f", [0])
    assert client.report(1).values == {0: "first"}
    client.function("g", lambda _: "other", forget=["f"])
    again = forking.open_connection()
    assert again.shake_hands()["functions"] == ["g"]
    again.calls(2, "f", [0])  # waits for its function
    again.function("f", lambda _: "second")
    assert again.report(2).values == {0: "second"}


def test_a_chunk_waits_for_its_function_and_others_pass_it(forking: RawWorker) -> None:
    client = forking.connect()
    client.calls(1, "late", [1])
    client.function("early", lambda x: -x)
    client.calls(2, "early", [2])
    assert client.report(2).values == {0: -2}
    client.function("late", lambda x: x)
    assert client.report(1).values == {0: 1}


def test_two_slots_run_two_calls_at_once(start: Start, gates: Callable[[], Gate]) -> None:
    here, there = gates(), gates()
    with start(slots=2) as worker:
        client = worker.connect()
        assert client.hello["slots"] == 2
        client.function("meet", lambda pair: (pair[0].open(), pair[1].wait()))
        client.calls(1, "meet", [(here, there)])

        def other(pair: Any) -> Any:
            return pair[0].wait(), pair[1].open()

        client.function("other", other)
        client.calls(2, "other", [(here, there)])
        assert client.report(1).done
        assert client.report(2).done


def test_a_call_that_runs_for_longer_than_a_moment_is_announced(
    client: RawClient, gates: Callable[[], Gate]
) -> None:
    gate = gates()
    client.function("f", lambda gate: gate and gate.wait())
    client.calls(1, "f", [None, gate, None])
    started = client.wait_for(Kind.STARTED).header
    assert (started["chunk"], started["position"]) == (1, 1)
    gate.open(b"go")
    assert client.report(1).values == {0: None, 1: b"go", 2: None}


def test_outcomes_before_a_long_call_are_told_while_it_runs(
    client: RawClient, gates: Callable[[], Gate]
) -> None:
    gate = gates()
    client.function("f", lambda gate: gate and gate.wait())
    client.calls(1, "f", [None, None, gate])
    assert client.wait_for(Kind.RESULT).header["parts"] == [[1, 0, 2]]
    gate.open()
    assert client.wait_for(Kind.RESULT).header["parts"] == [[1, 2, 1]]


# -- cancel, revoke, timeout, hold -----------------------------------------------------------------


def test_a_running_call_that_is_cancelled_dies_and_the_rest_is_given_back(
    client: RawClient, gates: Callable[[], Gate]
) -> None:
    gate = gates()
    client.function("f", lambda gate: gate and gate.wait())
    client.calls(1, "f", [None, gate, None, None])
    client.wait_for(Kind.STARTED)
    client.send(Kind.CANCEL, {"chunk": 1})
    report = client.report(1)
    assert report.values == {0: None}
    assert report.failed[1]["error"] == "RunCancelledError"
    assert report.revoked == {2, 3}
    assert client.run(lambda x: x, 5).values == {0: 5}


def test_cancelling_positions_that_do_not_run_leaves_the_running_call(
    forking: RawWorker, gates: Callable[[], Gate]
) -> None:
    gate = gates()
    client = forking.connect()
    client.function("f", lambda gate: gate and gate.wait())
    client.calls(1, "f", [gate, None])
    client.wait_for(Kind.STARTED)
    client.send(Kind.CANCEL, {"chunk": 1, "positions": [1]})
    assert client.wait_for(Kind.REVOKED).header["parts"] == [[1, 1, 1]]
    gate.open(b"went on")
    assert client.wait_for(Kind.RESULT).header["parts"] == [[1, 0, 1]]


def test_a_queued_chunk_that_is_cancelled_is_given_back_whole(
    forking: RawWorker, gates: Callable[[], Gate]
) -> None:
    gate = gates()
    client = forking.connect()
    client.function("f", lambda gate: gate.wait())
    client.calls(1, "f", [gate])
    client.calls(2, "f", [gate, gate])
    client.send(Kind.CANCEL, {"chunk": 2})
    assert client.report(2).revoked == {0, 1}
    gate.open(b"x")
    assert client.report(1).values == {0: b"x"}


def test_a_chunk_that_was_cancelled_before_it_came_does_not_run(forking: RawWorker) -> None:
    client = forking.connect()
    client.send(Kind.CANCEL, {"chunk": 8})
    client.function("f", lambda x: x)
    client.calls(8, "f", [1, 2])
    assert client.report(8).revoked == {0, 1}
    client.calls(9, "f", [1])
    assert client.report(9).values == {0: 1}


@pytest.mark.parametrize("header", [{"chunk": 1}, {}], ids=["one chunk", "everything"])
def test_revoking_takes_back_what_has_not_begun_and_leaves_what_runs(
    client: RawClient, gates: Callable[[], Gate], header: dict[str, Any]
) -> None:
    gate = gates()
    client.function("f", lambda gate: gate and gate.wait())
    client.calls(1, "f", [gate, None, None])
    client.calls(2, "f", [None], timeout=100.0)  # so that it is not merged with the first
    client.wait_for(Kind.STARTED)
    client.send(Kind.REVOKE, header)
    if header:
        assert client.wait_for(Kind.REVOKED).header["parts"] == [[1, 1, 2]]
        gate.open(b"kept")
        assert client.report(2).values == {0: None}
        return
    assert client.report(2).revoked == {0}
    gate.open(b"kept")
    report = client.report(1)
    assert report.values == {0: b"kept"}
    assert report.revoked == {1, 2}


def test_an_attempt_over_its_timeout_is_killed_and_told(client: RawClient) -> None:
    def maybe_for_ever(x: int) -> int:
        while x == 1:
            pass
        return x

    report = client.run(maybe_for_ever, *range(3), timeout=0.3)
    assert report.values == {0: 0}
    assert report.failed[1]["error"] == "CallTimeoutError"
    assert report.failed[1]["timeout"] == 0.3
    assert report.revoked == {2}
    started, ended = report.times[1]
    assert 0.3 <= ended - started < 5


def test_calls_that_were_thought_to_be_short_are_given_back(
    forking: RawWorker, gates: Callable[[], Gate]
) -> None:
    gate = gates()
    client = forking.connect()
    client.function("f", lambda gate: gate and gate.wait())
    client.calls(1, "f", [None, gate, None], hold=0.05)
    client.calls(2, "f", [None], hold=0.05)
    client.calls(3, "f", [None])
    assert client.report(2).revoked == {0}
    assert client.reports[1].revoked == {2}
    gate.open(b"x")
    assert client.report(1).values == {0: None, 1: b"x"}
    assert client.report(3).values == {0: None}


def test_what_comes_behind_a_long_call_is_given_back_too(
    forking: RawWorker, gates: Callable[[], Gate]
) -> None:
    gate = gates()
    client = forking.connect()
    client.function("f", lambda gate: gate and gate.wait())
    client.calls(1, "f", [gate], hold=0.05)
    client.wait_for(Kind.STARTED)
    client.calls(2, "f", [None], hold=0.05)
    assert client.report(2).revoked == {0}
    gate.open(b"x")
    assert client.report(1).values == {0: b"x"}


# -- deaths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("os._exit(3)", {"exit_code": 3}),
        ("os._exit(0)", {"exit_code": 0}),
        ("os.kill(os.getpid(), 11)", {"signal": 11}),
        ("os.kill(os.getpid(), 9)", {"signal": 9}),
        ("__import__('ctypes').string_at(0)", {"signal": 11}),
    ],
)
def test_a_crash_costs_one_call_and_keeps_the_outcomes_before_it(
    forking: RawWorker, how: str, expected: dict[str, int]
) -> None:
    def crash(x: int) -> int:
        import os

        if x == 3:
            print("last words")
            eval(how, {"os": os})  # noqa: S307 - the test's own text
        return x

    report = forking.connect().run(crash, *range(6))
    assert report.values == {0: 0, 1: 1, 2: 2}
    failure = report.failed.pop(3)
    assert not report.failed
    assert failure["error"] == "WorkerCrashedError"
    assert failure.items() >= expected.items()
    assert failure["log_tail"] == "last words\n"
    assert report.revoked == {4, 5}


def test_after_a_crash_another_child_goes_on(client: RawClient) -> None:
    def crash(x: int) -> int:
        import os

        if x:
            os._exit(7)
        return os.getpid()

    first = client.run(crash, 0).values[0]
    assert client.run(crash, 1).failed[0]["exit_code"] == 7
    second = client.run(crash, 0).values[0]
    assert first != second
    assert not psutil.pid_exists(first)


def test_what_a_call_started_is_killed_with_its_child(client: RawClient) -> None:
    def leave(_: Any) -> Any:
        import subprocess

        found = subprocess.Popen(["/bin/sleep", "600"])
        print(found.pid, flush=True)
        import os

        os._exit(1)

    assert client.run(leave, 0).failed[0]["exit_code"] == 1
    pid = int(bytes(client.logs()[0].body))
    assert wait_gone([psutil.Process(pid)] if psutil.pid_exists(pid) else []) == []


def test_a_call_that_forks_and_lets_the_copy_return_is_answered_once(client: RawClient) -> None:
    def fork(x: int) -> int:
        import os

        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
        return x

    assert client.run(fork, 1, 2).values == {0: 1, 1: 2}
    assert client.run(lambda x: x, 3).values == {0: 3}


def test_the_death_of_the_server_ends_the_worker_and_all_that_ran(
    worker: RawWorker, gates: Callable[[], Gate]
) -> None:
    client, gate = worker.connect(), gates()

    def block(gate: Gate) -> None:
        import subprocess

        subprocess.Popen(["/bin/sleep", "600"])
        gate.open(b"runs")
        while True:
            pass

    client.function("f", block)
    client.calls(1, "f", [gate])
    assert gate.wait() == b"runs"
    processes = worker.processes()
    assert len(processes) == 4
    worker.server().kill()
    assert worker.wait() == 70
    assert wait_gone(processes) == []


def test_the_death_of_the_parent_ends_everything(
    worker: RawWorker, gates: Callable[[], Gate]
) -> None:
    client, gate = worker.connect(), gates()

    def block(gate: Gate) -> None:
        import subprocess

        subprocess.Popen(["/bin/sleep", "600"])
        gate.open(b"runs")
        while True:
            pass

    client.function("f", block)
    client.calls(1, "f", [gate])
    assert gate.wait() == b"runs"
    processes = worker.processes()
    worker.process.kill()
    assert worker.wait() == -signal.SIGKILL
    assert wait_gone(processes) == []


@LINUX
def test_memory_is_watched_where_no_cgroup_enforces_it(start: Start) -> None:
    def grow(megabytes: int) -> int:
        import signal

        data = bytearray(megabytes << 20)
        data[::4096] = b"x" * len(data[::4096])
        if megabytes > 100:
            signal.pause()
        return megabytes

    with start(memory_bytes=200 * MIB, memory_enforced=False) as worker:
        report = worker.connect().run(grow, 10, 300, 10)
        assert report.values == {0: 10}
        assert report.failed[1]["error"] == "OutOfMemoryError"
        assert report.failed[1]["limit_bytes"] == 200 * MIB
        assert report.revoked == {2}


# -- fresh children -------------------------------------------------------------------------------


def test_isolated_calls_each_get_a_process_of_their_own(client: RawClient) -> None:
    client.function("f", lambda _: __import__("os").getpid())
    pids = set()
    for chunk in range(4):
        client.calls(chunk, "f", [0], fresh=True)
        pids.add(client.report(chunk).values[0])
    assert len(pids) == 4


@LINUX
def test_a_child_that_holds_more_than_the_limit_is_replaced(start: Start) -> None:
    def keep(megabytes: int) -> int:
        import builtins
        import os

        data = bytearray(megabytes << 20)
        data[::4096] = b"x" * len(data[::4096])
        builtins.kept = data  # type: ignore[attr-defined]
        return os.getpid()

    with start(recycle_bytes=150 * MIB) as worker:
        client = worker.connect()
        leaking = client.run(keep, 200).values[0]
        assert client.run(keep, 1).values[0] != leaking
        assert wait_gone([psutil.Process(leaking)] if psutil.pid_exists(leaking) else []) == []


def slow_module(directory: Path, *, thread: bool) -> Path:
    """Write a module that counts its imports in a file, and return that file."""
    counter = directory / "imports"
    counter.touch()
    text = f"import threading\nwith open({str(counter)!r}, 'a') as file: file.write('x')\n"
    if thread:
        text += "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    (directory / "slow_module.py").write_text(text + "def work(x): return x\n")
    return counter


def call_fresh(client: RawClient, chunk: int) -> None:
    client.calls(chunk, "f", [chunk], fresh=True)
    assert client.report(chunk).values == {0: chunk}


def send_work(client: RawClient, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(directory))
    client.function("f", importlib.import_module("slow_module").work)
    monkeypatch.delitem(sys.modules, "slow_module")


def test_fresh_children_of_one_function_do_not_import_again_and_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = slow_module(tmp_path, thread=False)
    with start(sys_path=(*sys.path, str(tmp_path))) as worker:
        client = worker.connect()
        send_work(client, tmp_path, monkeypatch)
        counter.write_text("")
        for chunk in range(50):
            before = counter.stat().st_size
            call_fresh(client, chunk)
            if chunk > 1 and counter.stat().st_size == before:
                break
        else:
            pytest.fail("the template is never used")
        for chunk in range(100, 110):
            call_fresh(client, chunk)
        assert counter.stat().st_size == before


def test_a_function_that_starts_a_thread_is_never_forked(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = slow_module(tmp_path, thread=True)
    with start(sys_path=(*sys.path, str(tmp_path))) as worker:
        client = worker.connect()
        send_work(client, tmp_path, monkeypatch)
        counter.write_text("")
        for chunk in range(10):
            call_fresh(client, chunk)
        pid = client.run(lambda _: __import__("os").getpid(), 0).values[0]
        others = [process for process in worker.server().children() if process.pid != pid]
        assert wait_gone(others) == [], "the template is there"
        assert counter.stat().st_size == 11, "each child imports, and the template did once"


def with_template(client: RawClient, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fresh calls run until the template serves."""
    counter = slow_module(directory, thread=False)
    send_work(client, directory, monkeypatch)
    for chunk in range(50):
        before = counter.stat().st_size
        call_fresh(client, chunk)
        if chunk > 1 and counter.stat().st_size == before:
            return
    pytest.fail("the template is never used")


def test_the_death_of_a_template_costs_the_call_of_its_child_only(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gates: Callable[[], Gate]
) -> None:
    gate = gates()
    with start(sys_path=(*sys.path, str(tmp_path))) as worker:
        client = worker.connect()
        with_template(client, tmp_path, monkeypatch)

        def block(gate: Any) -> Any:
            import os

            gate.open(str(os.getppid()).encode())
            return gate.wait()

        client.function("block", block)
        client.calls(1000, "block", [gate])
        template = psutil.Process(int(gate.wait()))
        assert template.pid != worker.server().pid, "the child is of the template"
        template.kill()
        assert client.report(1000).failed[0]["error"] == "WorkerCrashedError"
        assert client.run(lambda x: x, 1).values == {0: 1}


def test_what_a_child_of_a_template_started_ends_with_the_worker(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(sys_path=(*sys.path, str(tmp_path))) as worker:
        client = worker.connect()
        with_template(client, tmp_path, monkeypatch)

        def leave(_: Any) -> int:
            import subprocess

            return subprocess.Popen(["/bin/sleep", "600"]).pid

        pid = client.run(leave, 0).values[0]
        assert psutil.pid_exists(pid)
        worker.hang_up()
        assert worker.wait() == 0
        assert wait_gone([psutil.Process(pid)] if psutil.pid_exists(pid) else []) == []


# -- logs -----------------------------------------------------------------------------------------


def texts_by_index(client: RawClient, stream: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for log in client.logs():
        if log.header["stream"] == stream:
            index = log.header["index"]
            assert log.header["run"] == "r-1"
            found[index] = found.get(index, "") + bytes(log.body).decode()
    return found


def test_what_calls_print_is_told_apart_also_when_they_write_by_other_means(
    client: RawClient,
) -> None:
    def talk(x: int) -> None:
        import os
        import sys

        print("print", x)
        os.write(1, b"raw\n")
        os.system("echo system")  # noqa: S605, S607 - what users do
        print("no newline", end="")
        print("error", x, file=sys.stderr)

    client.run(talk, *range(20), indexes=100)
    inbox = list(client.inbox)
    assert texts_by_index(client, "out") == {
        100 + x: f"print {x}\nraw\nsystem\nno newline" for x in range(20)
    }
    client.inbox.extend(inbox)
    assert texts_by_index(client, "err") == {100 + x: f"error {x}\n" for x in range(20)}


def test_a_call_may_print_more_than_a_pipe_holds_again_and_again(client: RawClient) -> None:
    def talk(x: int) -> int:
        print("x" * x)
        return x

    for _ in range(3):
        assert client.run(talk, 1, 2 * MIB).values == {0: 1, 1: 2 * MIB}
    assert sum(len(log.body) for log in client.logs()) == 3 * (2 * MIB + 3)


def test_logs_come_before_the_outcome_and_also_while_the_call_runs(
    client: RawClient, gates: Callable[[], Gate]
) -> None:
    gate = gates()

    def talk(gate: Gate) -> None:
        print("before")
        gate.wait()
        print("after")

    client.function("f", talk)
    client.calls(1, "f", [gate])
    assert bytes(client.wait_for(Kind.LOG).body) == b"before\n"
    gate.open()
    assert bytes(client.wait_for(Kind.LOG, Kind.RESULT).body) == b"after\n"


def test_logs_of_the_time_without_a_client_are_told_to_the_next_one(
    forking: RawWorker, gates: Callable[[], Gate]
) -> None:
    begin, end = gates(), gates()

    def talk(pair: Any) -> None:
        pair[0].wait()
        print("alone")
        pair[1].open()

    client = forking.connect()
    client.function("f", talk)
    client.calls(1, "f", [(begin, end)])
    client.wait_for(Kind.STARTED)
    disconnect(forking, client)
    begin.open()
    end.wait()
    again = forking.connect()
    assert bytes(again.wait_for(Kind.LOG).body) == b"alone\n"


def test_with_echo_the_worker_prints_what_its_calls_print(start: Start) -> None:
    def talk(_: Any) -> None:
        import sys

        print("to be echoed", file=sys.stderr)

    with start(echo=True) as worker:
        worker.connect().run(talk, 0)
        assert worker.stderr.read_bytes() == b"to be echoed\n"


# -- the connection -------------------------------------------------------------------------------


def disconnect(worker: RawWorker, client: RawClient) -> None:
    """Close a connection; return when the worker has noticed, as far as another one can tell."""
    client.close()
    probe = worker.open_connection()
    probe.wait_for(Kind.CHALLENGE)  # it was accepted after the end of the other was there to read
    probe.close()


def test_a_wrong_token_is_refused_and_the_worker_goes_on(forking: RawWorker) -> None:
    stranger = forking.open_connection()
    stranger.answer(stranger.wait_for(Kind.CHALLENGE), b"wrong" * 6)
    assert stranger.read_to_end() == []
    assert forking.connect().run(lambda x: x, 1).values == {0: 1}
    assert "does not know the pool's token" in forking.stderr.read_text()


def test_a_stranger_does_not_push_the_client_out(forking: RawWorker) -> None:
    client = forking.connect()
    stranger = forking.open_connection()
    stranger.wait_for(Kind.CHALLENGE)
    stranger.send(Kind.QUIT, {})
    assert stranger.read_to_end() == []
    assert client.run(lambda x: x, 1).values == {0: 1}


def test_an_answer_that_was_overheard_does_not_work_again(forking: RawWorker) -> None:
    client = forking.open_connection()
    challenge = client.wait_for(Kind.CHALLENGE)
    nonce = client.answer(challenge, forking.token)
    client.wait_for(Kind.HELLO)
    stranger = forking.open_connection()
    assert stranger.wait_for(Kind.CHALLENGE).header["nonce"] != challenge.header["nonce"]
    from asyncrt.worker.authentication import prove

    proof = prove(forking.token, "client", challenge.header["nonce"], nonce)
    stranger.send(Kind.RESPONSE, {"nonce": nonce, "proof": proof})
    assert stranger.read_to_end() == []


UNAUTHENTICATED = {
    "a long header": HEAD.pack(VERSION, 2, 0, 0, 4097, 0),
    "a body": HEAD.pack(VERSION, 2, 0, 0, 2, 5) + b"{}",
    "a body in pieces": HEAD.pack(VERSION, 2, MORE, 1, 0, 1 << 30),
    "calls": encode_head(Kind.CALLS, {"chunk": 1}, 0),
    "an answer without a nonce": encode_head(Kind.RESPONSE, {"proof": "x"}, 0),
    "an answer without a proof": encode_head(Kind.RESPONSE, {"nonce": "x"}, 0),
    "an answer that is no text": encode_head(Kind.RESPONSE, {"nonce": "\ud800", "proof": "é"}, 0),
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("data", UNAUTHENTICATED.values(), ids=UNAUTHENTICATED)
def test_nothing_but_a_small_answer_is_read_before_the_challenge_is_met(
    forking: RawWorker, data: bytes
) -> None:
    stranger = forking.open_connection()
    stranger.wait_for(Kind.CHALLENGE)
    stranger.socket.sendall(data)
    assert stranger.read_to_end() == []
    assert forking.connect().run(lambda x: x, 1).values == {0: 1}


VALID: dict[str, Any] = {
    "chunk": 1,
    "run": "r",
    "function": "f",
    "count": 1,
    "indexes": 0,
    "attempt": 1,
    "style": "one",
}
MALFORMED = {
    "garbage": b"\x00" * 64,
    "a header that is no object": HEAD.pack(VERSION, 6, 0, 0, 2, 0) + b"[]",
    "a piece of nothing": HEAD.pack(VERSION, Kind.PIECE, 0, 3, 0, 5),
    "an endless body": HEAD.pack(VERSION, 6, MORE, 3, 0, 1 << 50),
    "calls without anything": encode_head(Kind.CALLS, {}, 0),
    "no cancel": encode_head(Kind.CANCEL, {}, 0),
    "a cancel of a list": encode_head(Kind.CANCEL, {"chunk": []}, 0),
    "no acknowledgement": encode_head(Kind.ACKNOWLEDGE, {}, 0),
    "an acknowledgement of text": encode_head(Kind.ACKNOWLEDGE, {"sequence": "x"}, 0),
    "no resumption": encode_head(Kind.RESUME, {}, 0),
    "no function": encode_head(Kind.FUNCTION, {}, 0),
    "a function under a list": encode_head(Kind.FUNCTION, {"function": []}, 0),
    **{
        f"calls with {field}={value!r}": encode_head(Kind.CALLS, {**VALID, field: value}, 0)
        for field, value in [
            ("count", 0),
            ("count", -1),
            ("count", 1.5),
            ("count", "x"),
            ("count", 1 << 20),
            ("chunk", []),
            ("chunk", "x"),
            ("function", []),
            ("timeout", "x"),
            ("timeout", []),
            ("hold", "x"),
            ("timeout", float("nan")),
            ("run", None),
            ("indexes", [1, 2]),
        ]
    },
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_frame_costs_the_connection_but_not_the_worker(
    forking: RawWorker, data: bytes
) -> None:
    client = forking.connect()
    client.function("f", lambda _: __import__("os").getpid())
    client.calls(50, "f", [0])
    child = client.report(50).values[0]
    client.socket.sendall(data)
    client.read_to_end()
    again = forking.connect(sequence=client.received)
    again.calls(51, "f", [0])
    assert again.report(51).values == {0: child}


def test_a_chunk_that_its_child_cannot_read_costs_that_chunk_only(forking: RawWorker) -> None:
    client = forking.connect()
    client.function("f", lambda x: x)
    client.counts[1] = 3
    client.send(Kind.CALLS, {**VALID, "count": 3}, pack_arguments([7]))
    report = client.report(1)
    assert report.values == {0: 7}
    assert report.failed[1]["error"] == "WorkerCrashedError"
    assert client.run(lambda x: x, 1).values == {0: 1}


def test_unknown_frames_are_skipped(forking: RawWorker) -> None:
    client = forking.connect()
    client.send(200, {"what": "ever"}, [b"body"])
    assert client.run(lambda x: x, 1).values == {0: 1}


def test_a_heartbeat_is_answered_while_a_call_runs(
    forking: RawWorker, gates: Callable[[], Gate]
) -> None:
    gate, client = gates(), forking.connect()
    client.function("f", lambda gate: gate.wait())
    client.calls(1, "f", [gate])
    client.send(Kind.HEARTBEAT, {"time": 12.5})
    assert client.wait_for(Kind.HEARTBEAT).header["echo"] == 12.5
    gate.open()
    client.report(1)


def test_a_client_that_falls_silent_is_dropped_and_may_come_again(start: Start) -> None:
    with start(heartbeat_interval=0.05) as worker:
        silent = worker.connect()
        silent.read_to_end()
        with pytest.raises(EOFError):
            silent.read()
        assert worker.connect().run(lambda x: x, 1).values == {0: 1}


def test_calls_go_on_while_nobody_is_connected_and_are_told_to_the_next_client(
    worker: RawWorker, gates: Callable[[], Gate]
) -> None:
    begin, end = gates(), gates()
    client = worker.connect()
    client.function("f", lambda pair: (pair[0].wait(), pair[1].open(), "done")[-1])
    client.function("g", lambda x: x)
    client.calls(1, "f", [(begin, end)])
    client.calls(2, "g", [5])
    client.wait_for(Kind.STARTED)
    disconnect(worker, client)
    begin.open()
    end.wait()
    again = worker.open_connection()
    state = again.shake_hands()
    assert set(state["chunks"]) == {1, 2}
    assert state["functions"] == ["f", "g"]
    assert again.report(1).values == {0: "done"}
    assert again.report(2).values == {0: 5}


def test_reports_are_sent_again_until_they_are_acknowledged(forking: RawWorker) -> None:
    client = forking.connect()
    client.function("f", lambda x: x)
    for chunk in (1, 2, 3):
        client.calls(chunk, "f", [chunk])
        client.report(chunk)
    last = client.received
    client.send(Kind.ACKNOWLEDGE, {"sequence": last - 2})
    for sequence, chunks in ((0, [2, 3]), (last - 1, [3]), (last, [])):
        again = forking.open_connection()
        assert again.shake_hands(sequence=sequence)["chunks"] == chunks
        for chunk in chunks:
            assert again.report(chunk).values == {0: chunk}


def test_calls_carry_an_acknowledgement_too(forking: RawWorker) -> None:
    client = forking.connect()
    client.function("f", lambda x: x)
    client.calls(1, "f", [1])
    client.report(1)
    client.calls(2, "f", [2], acknowledge=client.received)
    client.report(2)
    assert forking.open_connection().shake_hands()["chunks"] == [2]


def test_a_new_connection_takes_over_from_one_that_still_looks_alive(forking: RawWorker) -> None:
    old = forking.connect()
    new = forking.open_connection()
    challenge = new.wait_for(Kind.CHALLENGE)
    os.kill(forking.process.pid, signal.SIGSTOP)  # so that the worker sees both at once
    new.answer(challenge, forking.token)
    old.send(Kind.HEARTBEAT, {"time": 1})
    os.kill(forking.process.pid, signal.SIGCONT)
    new.wait_for(Kind.HELLO)
    assert all(frame.kind == Kind.HEARTBEAT for frame in old.read_to_end())
    new.send(Kind.RESUME, {"sequence": 0})
    assert new.run(lambda x: x, 1).values == {0: 1}


def test_a_large_result_survives_a_connection_that_breaks_in_the_middle_of_it(
    forking: RawWorker,
) -> None:
    client = forking.connect()
    data = os.urandom(6 * MIB)
    client.function("f", lambda x: x)
    client.calls(1, "f", [data])
    client.socket.recv(100_000)
    client.close()
    assert forking.connect().report(1).values == {0: data}


# -- the end --------------------------------------------------------------------------------------


def test_a_worker_that_no_client_comes_to_ends_with_code_0(start: Start) -> None:
    with start(orphan_timeout=0.2) as worker:
        assert worker.wait() == 0


def test_a_worker_whose_client_does_not_come_again_ends_with_code_0_and_kills_its_calls(
    start: Start,
) -> None:
    with start(orphan_timeout=0.3) as worker:
        client = worker.connect()

        def for_ever(_: Any) -> None:
            while True:
                pass

        client.function("f", for_ever)
        client.calls(1, "f", [0])
        client.wait_for(Kind.STARTED)
        processes = worker.processes()
        client.close()
        assert worker.wait() == 0
        assert wait_gone(processes) == []


def test_a_stranger_does_not_keep_an_orphan_alive(start: Start) -> None:
    with start(orphan_timeout=0.3) as worker:
        stranger = worker.open_connection()
        stranger.wait_for(Kind.CHALLENGE)
        assert worker.wait() == 0


def test_the_end_of_the_lifeline_ends_the_worker_in_the_middle_of_a_call(
    worker: RawWorker, gates: Callable[[], Gate]
) -> None:
    gate, client = gates(), worker.connect()
    client.function("f", lambda gate: (gate.open(), threading.Event().wait()))
    client.calls(1, "f", [gate])
    gate.wait()
    processes = worker.processes()
    worker.hang_up()
    assert worker.wait() == 0
    assert wait_gone(processes) == []


def test_without_a_lifeline_the_end_of_standard_input_means_nothing(start: Start) -> None:
    with start(lifeline=False) as worker:
        worker.hang_up()
        client = worker.connect()
        assert client.run(lambda x: x, 1).values == {0: 1}
        client.send(Kind.QUIT, {})
        assert worker.wait() == 0


def test_quit_ends_the_worker_at_once(worker: RawWorker, gates: Callable[[], Gate]) -> None:
    gate, client = gates(), worker.connect()
    client.function("f", lambda gate: (gate.open(), threading.Event().wait()))
    client.calls(1, "f", [gate])
    gate.wait()
    client.send(Kind.QUIT, {})
    assert worker.wait() == 0


def test_a_child_with_a_thread_that_never_ends_does_not_keep_the_worker(worker: RawWorker) -> None:
    client = worker.connect()
    client.function("f", lambda _: threading.Thread(target=threading.Event().wait).start())
    for chunk in (1, 2):
        client.calls(chunk, "f", [0], fresh=True)
        assert client.report(chunk).values == {0: None}
    client.send(Kind.QUIT, {})
    assert worker.wait() == 0


def test_drain_finishes_what_is_there_takes_no_more_and_ends_when_all_is_acknowledged(
    client: RawClient, worker: RawWorker, gates: Callable[[], Gate]
) -> None:
    gate = gates()
    client.function("f", lambda gate: gate and gate.wait())
    client.calls(1, "f", [gate])
    client.calls(2, "f", [None])
    client.send(Kind.DRAIN, {})
    client.calls(3, "f", [None])
    assert client.report(3).revoked == {0}
    gate.open(b"x")
    assert client.report(1).values == {0: b"x"}
    assert client.report(2).values == {0: None}
    client.send(Kind.ACKNOWLEDGE, {"sequence": client.received})
    assert worker.wait() == 0


def test_a_draining_worker_keeps_its_results_for_a_client_that_was_cut_off(
    forking: RawWorker, gates: Callable[[], Gate]
) -> None:
    begin, end = gates(), gates()
    client = forking.connect()
    client.function("f", lambda pair: (pair[0].wait(), pair[1].open(), "kept")[-1])
    client.calls(1, "f", [(begin, end)])
    client.send(Kind.DRAIN, {})
    client.wait_for(Kind.STARTED)
    disconnect(forking, client)
    begin.open()
    end.wait()
    again = forking.connect()
    assert again.report(1).values == {0: "kept"}
    again.send(Kind.ACKNOWLEDGE, {"sequence": again.received})
    assert forking.wait() == 0


@pytest.mark.parametrize("draining", [False, True])
def test_sigterm_says_goodbye_gives_back_the_rest_and_waits_for_what_runs(
    client: RawClient, worker: RawWorker, gates: Callable[[], Gate], draining: bool
) -> None:
    gate = gates()
    client.function("f", lambda gate: gate and gate.wait())
    client.calls(1, "f", [gate, None])
    client.calls(2, "f", [None])
    client.wait_for(Kind.STARTED)
    if draining:
        client.send(Kind.DRAIN, {})
        client.send(Kind.HEARTBEAT, {})
        client.wait_for(Kind.HEARTBEAT)
    worker.process.terminate()
    goodbye = client.wait_for(Kind.GOODBYE).header
    assert goodbye["reason"] == "SIGTERM"
    assert 0 < goodbye["grace"] <= 5
    assert client.report(2).revoked == {0}
    gate.open(b"finished")
    report = client.report(1)
    assert report.values == {0: b"finished"}
    assert report.revoked == {1}
    client.send(Kind.ACKNOWLEDGE, {"sequence": client.received})
    assert worker.wait() == 0


def test_sigterm_ends_an_idle_worker_at_once(start: Start) -> None:
    with start() as worker:
        client = worker.connect()
        worker.process.terminate()
        assert client.wait_for(Kind.GOODBYE).header["reason"] == "SIGTERM"
        assert worker.wait() == 0


def test_what_does_not_end_within_the_grace_is_killed(start: Start) -> None:
    def stubborn(_: Any) -> None:
        import signal
        import time

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)

    with start() as worker:
        client = worker.connect()
        client.function("f", stubborn)
        client.calls(1, "f", [0])
        client.wait_for(Kind.STARTED)
        worker.process.terminate()
        client.wait_for(Kind.GOODBYE)
        assert worker.wait() == 0


def test_a_client_that_speaks_another_version_is_told_by_the_end_of_the_connection(
    forking: RawWorker,
) -> None:
    stranger = forking.open_connection()
    stranger.wait_for(Kind.CHALLENGE)
    stranger.socket.sendall(HEAD.pack(VERSION + 1, 2, 0, 0, 0, 0))
    assert stranger.read_to_end() == []
    assert ProtocolError.__name__ in forking.stderr.read_text()
