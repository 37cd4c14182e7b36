"""What travels and what is refused, on the client's side."""

from __future__ import annotations

import asyncio
import functools
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncrt.errors import (
    CallError,
    CallExitedError,
    CallTimeoutError,
    OutOfMemoryError,
    RemoteError,
    SerializationError,
    WorkerStartError,
)
from asyncrt.serialize import (
    FunctionPacker,
    PackedFunction,
    build_failure,
    check_function,
    label_of,
    load_error,
    pack_arguments,
    pack_function,
)
from asyncrt.worker.child import load_function
from asyncrt.worker.payload import decode
from asyncrt.worker.protocol import byte_length
from asyncrt.worker.records import LENGTH, pack_raised

FACTOR = 3


def load(packed: PackedFunction) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Load a function as a worker does."""
    return load_function(b"".join(packed.segments))


def travel(fn: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that was packed and loaded, as a worker does."""
    loaded, fixed = load(pack_function(fn, {}))
    assert fixed == {}
    value = loaded(*arguments)
    return asyncio.run(value) if asyncio.iscoroutine(value) else value


def unpicklable(value: Any = None) -> Any:
    return threading.Lock() if value is None else value


class Multiplier:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, value: int) -> int:
        return value * self.factor

    def multiply(self, value: int) -> int:
        return value * self.factor

    @classmethod
    def make(cls, value: int) -> int:
        return cls(FACTOR)(value)

    @staticmethod
    def plain(value: int) -> int:
        return FACTOR * value


class Connection:
    """Holds what cannot be pickled, deep inside."""

    def __init__(self) -> None:
        self.state = {"items": [1, threading.Lock()]}


def triple(value: int) -> int:
    return FACTOR * value


async def triple_slowly(value: int) -> int:
    await asyncio.sleep(0)
    return FACTOR * value


def scaled(value: int, *, by: int) -> int:
    return value * by


# -- functions that travel -------------------------------------------------------------------------


def nested(factor: int) -> Callable[[int], int]:
    def inner(value: int) -> int:
        return value * factor

    return inner


@pytest.mark.parametrize(
    "fn",
    [
        triple,
        triple_slowly,
        lambda value: FACTOR * value,
        nested(FACTOR),
        functools.partial(scaled, by=FACTOR),
        functools.partial(functools.partial(scaled), by=FACTOR),
        Multiplier(FACTOR),
        Multiplier(FACTOR).multiply,
        Multiplier.make,
        Multiplier.plain,
        FACTOR.__mul__,
    ],
    ids=lambda fn: label_of(fn).rpartition(".")[2],
)
def test_every_kind_of_callable_travels(fn: Callable[..., Any]) -> None:
    assert travel(fn, 7) == 21


MAIN = """
import asyncio, functools, json, asyncrt

FACTOR = 3

def triple(value):
    return FACTOR * value

def recursive(value):
    return 0 if value == 0 else FACTOR + recursive(value - 1)

async def triple_slowly(value):
    await asyncio.sleep(0)
    return triple(value)

class Multiplier:
    def __init__(self, factor):
        self.factor = factor
    def __call__(self, value):
        return value * self.factor
    def multiply(self, value):
        return value * self.factor

def scaled(value, *, by):
    return value * by

class Number:
    def __init__(self, value):
        self.value = value
    def __eq__(self, other):
        return type(other) is Number and other.value == self.value

def number(value):
    return Number(FACTOR * value)

class Refused(Exception):
    pass

def refuse(value):
    raise Refused(value)

async def main():
    def inner(value):
        return value * FACTOR
    functions = [triple, recursive, triple_slowly, Multiplier(3), Multiplier(3).multiply, inner,
                 functools.partial(scaled, by=3), lambda value: value * FACTOR]
    async with asyncrt.Executor(max_workers=1) as executor:
        values = [await executor.submit(function, 7) for function in functions]
        same_type = await executor.submit(number, 7) == Number(21)
        try:
            await executor.submit(refuse, 7)
        except Refused as error:
            refused = error.args
    print(json.dumps([values, same_type, refused]))

asyncio.run(main())
"""


def test_functions_classes_and_errors_of_main_travel_both_ways(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(MAIN)
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert done.stderr == ""
    assert json.loads(done.stdout) == [[21] * 8, True, [7]]


def test_keyword_arguments_that_all_calls_share_travel_with_the_function() -> None:
    function, fixed = load(pack_function(scaled, {"by": 4}))
    assert function(5, **fixed) == 20


def test_the_same_function_has_the_same_name_and_another_one_another() -> None:
    assert pack_function(triple, {}).name == pack_function(triple, {}).name
    assert pack_function(scaled, {"by": 1}).name != pack_function(scaled, {"by": 2}).name


def test_a_function_whose_variable_has_changed_is_packed_anew() -> None:
    packer = FunctionPacker()
    factor = 2

    def multiply(value: int) -> int:
        return value * factor

    before = packer.pack(multiply, {})
    factor = 5
    after = packer.pack(multiply, {})
    assert [load(packed)[0](1) for packed in (before, after)] == [2, 5]


def test_a_function_whose_global_has_changed_is_packed_anew() -> None:
    packer = FunctionPacker()
    space: dict[str, Any] = {"__name__": "__main__", "factor": 2}
    exec("def multiply(value): return value * factor", space)  # noqa: S102 - as a notebook's cell does
    before = packer.pack(space["multiply"], {})
    space["factor"] = 5
    after = packer.pack(space["multiply"], {})
    assert [load(packed)[0](1) for packed in (before, after)] == [2, 5]


def test_a_function_that_is_nothing_but_its_code_is_packed_once() -> None:
    packer = FunctionPacker()
    square = lambda value: value * value  # noqa: E731 - it must be an object that is kept
    assert packer.pack(square, {}) is packer.pack(square, {})
    assert load(packer.pack(square, {}))[0](3) == 9
    square.__code__ = (lambda value: value + value).__code__
    assert load(packer.pack(square, {}))[0](3) == 6


def test_shared_keyword_arguments_are_never_mistaken_for_those_of_another_run() -> None:
    packer = FunctionPacker()
    function = lambda value, by=1: value * by  # noqa: E731 - it must be an object that is kept
    assert load(packer.pack(function, {"by": 2}))[1] == {"by": 2}
    assert load(packer.pack(function, {"by": 3}))[1] == {"by": 3}
    assert load(packer.pack(function, {}))[1] == {}


@pytest.mark.parametrize(
    ("fn", "label"),
    [
        (triple, "triple"),
        (Multiplier(1), "Multiplier"),
        (Multiplier(1).multiply, "Multiplier.multiply"),
        (functools.partial(functools.partial(triple), 1), "triple"),
        (len, "len"),
    ],
)
def test_a_callable_has_a_name_for_people(fn: Any, label: str) -> None:
    assert label_of(fn) == label


# -- functions that are refused --------------------------------------------------------------------


def generate(value: int) -> Iterator[int]:
    yield value


async def generate_slowly(value: int) -> AsyncIterator[int]:
    yield value


class Generates:
    def each(self, value: int) -> Iterator[int]:
        yield value


class GeneratesWhenCalled:
    def __call__(self, value: int) -> Iterator[int]:
        yield value


@pytest.mark.parametrize(
    "fn",
    [
        generate,
        generate_slowly,
        functools.partial(generate, 1),
        Generates().each,
        GeneratesWhenCalled(),
    ],
    ids=["plain", "async", "partial", "method", "callable object"],
)
def test_a_generator_function_is_refused(fn: Any) -> None:
    with pytest.raises(TypeError, match=r"is a generator function.*return a list"):
        check_function(fn)


def test_a_function_that_collects_what_a_generator_function_yields_travels() -> None:
    @functools.wraps(generate)
    def collect(value: int) -> list[int]:
        return list(generate(value))

    assert travel(collect, 3) == [3]


def test_a_class_whose_instances_generate_travels() -> None:
    assert isinstance(travel(GeneratesWhenCalled), GeneratesWhenCalled)


def test_a_coroutine_object_is_refused_and_closed() -> None:
    coroutine = triple_slowly(1)
    with pytest.raises(TypeError, match=r"pass triple_slowly, not triple_slowly\(\)"):
        check_function(coroutine)
    with pytest.raises(RuntimeError, match="cannot reuse"):
        coroutine.send(None)  # closed: else it would warn that nobody awaited it


@pytest.mark.parametrize("value", [None, 3, "triple", [triple]])
def test_what_cannot_be_called_is_refused_by_its_type(value: Any) -> None:
    with pytest.raises(TypeError, match=f"expected a function, not {type(value).__name__}"):
        pack_function(value, {})


# -- what cannot be pickled is named ---------------------------------------------------------------


def refusal(fn: Callable[..., Any], **fixed: Any) -> SerializationError:
    with pytest.raises(SerializationError) as caught:
        pack_function(fn, fixed)
    assert caught.value.__cause__ is not None
    return caught.value


def test_a_variable_of_a_closure_that_cannot_be_pickled_is_named() -> None:
    guard = threading.Lock()

    def work(value: int) -> int:
        with guard:
            return value

    error = refusal(work)
    assert error.path.endswith("work: variable 'guard'")
    assert str(error).startswith(f"{error.path} (a lock) cannot be pickled: ")


def test_an_object_deep_inside_a_variable_is_named() -> None:
    connection = Connection()

    def work(value: int) -> tuple[int, Connection]:
        return value, connection

    assert refusal(work).path.endswith("work: variable 'connection'.state['items'][1]")


def test_a_default_value_that_cannot_be_pickled_is_named() -> None:
    def work(value: int, guard: Any = threading.Lock()) -> int:  # noqa: B008 - what is tested
        return value

    assert refusal(work).path.endswith("work.__defaults__[1]".replace("[1]", "[0]"))


def test_an_argument_of_a_partial_that_cannot_be_pickled_is_named() -> None:
    assert refusal(functools.partial(triple, unpicklable())).path == "triple.args[0]"
    bad = functools.partial(scaled, by=unpicklable({"a": [threading.Lock()]}))
    assert refusal(bad).path == "scaled.keywords['by']['a'][0]"


def test_the_object_of_a_method_that_cannot_be_pickled_is_named() -> None:
    multiplier = Multiplier(1)
    multiplier.guard = threading.Lock()  # type: ignore[attr-defined]
    assert refusal(multiplier.multiply).path == "Multiplier.multiply.__self__.guard"
    assert refusal(multiplier).path == "Multiplier.guard"


def test_a_shared_keyword_argument_that_cannot_be_pickled_is_named() -> None:
    assert refusal(scaled, by=threading.Lock()).path == "kwargs['by']"


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (threading.Lock, "argument"),
        (lambda: (1, threading.Lock()), "argument[1]"),
        (lambda: {"a": {"b": [threading.Lock()]}}, "argument['a']['b'][0]"),
        (lambda: [Connection()], "argument[0].state['items'][1]"),
    ],
)
def test_what_cannot_be_pickled_in_an_argument_is_named(make: Callable[[], Any], path: str) -> None:
    with pytest.raises(SerializationError) as caught:
        pack_arguments(make(), 0)
    assert caught.value.path == path
    assert f"{path} (a lock) cannot be pickled" in str(caught.value)


def test_an_object_whose_own_reduction_raises_is_named() -> None:
    class Stubborn:
        def __reduce__(self) -> str:
            raise ZeroDivisionError("no way")

    with pytest.raises(SerializationError, match="no way") as caught:
        pack_arguments({"x": Stubborn()}, 0)
    assert caught.value.path == "argument['x']"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_object_that_refers_to_itself_ends_the_search() -> None:
    loop: list[Any] = [threading.Lock()]
    loop.insert(0, loop)
    with pytest.raises(SerializationError, match="lock"):
        pack_arguments(loop, 0)


# -- arguments -------------------------------------------------------------------------------------


def unpack(segments: list[Any]) -> Any:
    body = memoryview(b"".join(segments))
    (size,) = LENGTH.unpack_from(body, 0)
    assert size == len(body) - LENGTH.size == byte_length(segments) - LENGTH.size
    return decode(body, LENGTH.size, len(body))


@pytest.mark.parametrize("value", [None, 7, "text", b"x" * 100_000, [1, (2, {"a": {3}})]])
def test_arguments_arrive_as_they_were(value: Any) -> None:
    assert unpack(pack_arguments(value, 0)) == value


@pytest.mark.parametrize("base", [0, 1, 63, 1000])
def test_arrays_travel_without_a_copy_and_arrive_aligned(base: int) -> None:
    array = np.arange(1000, dtype=np.float64)
    segments = pack_arguments({"a": array}, base)
    (view,) = [
        part for part in segments if isinstance(part, memoryview) and part.nbytes == array.nbytes
    ]
    assert np.shares_memory(np.frombuffer(view), array)
    before = sum(len(part) for part in segments[: segments.index(view)])
    assert (base + before) % 64 == 0
    np.testing.assert_array_equal(unpack(pack_arguments({"a": array}, 0))["a"], array)


def test_large_bytes_travel_without_a_copy() -> None:
    data = bytes(1 << 20)
    assert any(part is data for part in pack_arguments([data], 0))


# -- errors that come home -------------------------------------------------------------------------


class UnloadableError(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__("code")
        self.code = code


def raised(error: BaseException, **more: Any) -> memoryview:
    facts = {"type": type(error).__qualname__, "text": str(error), "traceback": "trace", **more}
    packed = [] if more else [pickle.dumps(error)]
    return memoryview(pack_raised(facts, packed))


def home(payload: memoryview) -> Exception:
    error, trace = load_error(payload, pickle.loads, run_id="r", index=3, attempt=2, worker="w")
    assert trace == "trace"
    return error


def test_a_users_exception_comes_home_as_itself() -> None:
    error = home(raised(KeyError("x")))
    assert type(error) is KeyError
    assert error.args == ("x",)


def test_an_error_of_asyncrt_learns_which_call_it_was() -> None:
    error = home(raised(CallTimeoutError("slow", timeout=1.0)))
    assert isinstance(error, CallTimeoutError)
    assert (error.run_id, error.index, error.attempt, error.worker) == ("r", 3, 2, "w")


def test_an_exception_that_cannot_be_loaded_comes_home_as_text_with_the_reason() -> None:
    error = home(raised(UnloadableError(code=1)))
    assert isinstance(error, RemoteError)
    assert (error.type_name, error.text, error.index) == ("UnloadableError", "code", 3)
    assert error.reason.startswith("TypeError: ")
    assert "could not travel" in str(error)


def test_an_exception_that_the_worker_could_not_pack_comes_home_as_text_with_the_reason() -> None:
    error = home(raised(ValueError("x"), reason="pickle changes its type"))
    assert isinstance(error, RemoteError)
    assert error.reason == "pickle changes its type"


@pytest.mark.parametrize("stop", [StopIteration(1), StopAsyncIteration()])
def test_an_exception_that_a_coroutine_cannot_raise_comes_home_as_text(stop: Exception) -> None:
    error = home(raised(stop))
    assert isinstance(error, RemoteError)
    assert error.type_name == type(stop).__name__


def test_an_exit_comes_home_as_an_error_that_ends_nothing() -> None:
    error = home(raised(SystemExit(3), exit=True))
    assert isinstance(error, CallExitedError)
    assert error.type_name == "SystemExit"
    assert error.index == 3


def test_what_a_workers_parent_saw_becomes_the_error_of_that_name_with_its_facts() -> None:
    facts = {"run_id": "r", "index": 3, "attempt": 2, "worker": "w"}
    described = {"error": "OutOfMemoryError", "message": "too much", "limit_bytes": 7}
    error = build_failure({**described}, **facts)
    assert isinstance(error, OutOfMemoryError)
    assert (error.limit_bytes, error.index, str(error)) == (7, 3, "too much")


def test_an_error_that_is_no_calls_has_no_facts_of_a_call() -> None:
    error = build_failure({"error": "WorkerStartError", "message": "no"}, index=3)
    assert type(error) is WorkerStartError
    assert "index" not in vars(error)


def test_an_error_of_an_unknown_name_is_an_error_of_the_call() -> None:
    assert type(build_failure({"error": "FromTheFuture", "message": "?"}, index=1)) is CallError
