"""Nothing hangs, nothing is lost silently. Each docstring quotes the sentence it tests."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from desk import Wait, open_desk, square

from asyncrt import Executor
from asyncrt.errors import ConfigError, RemoteError, SerializationError

pytestmark = pytest.mark.anyio


@pytest.fixture
async def executor() -> AsyncIterator[Executor]:
    async with Executor(max_workers=1, echo=False) as executor:
        yield executor


def generate(number: int) -> Iterator[int]:
    yield number


async def coroutine(number: int) -> int:
    return number


async def test_an_unpicklable_function_names_the_object_inside(executor: Executor) -> None:
    """An unpicklable function or argument names the object inside that cannot be pickled."""
    guard = {"lock": threading.Lock()}

    def work(number: int) -> tuple[int, object]:
        return number, guard

    for start in (lambda: executor.map(work, [1]), lambda: executor.submit(work, 1)):
        with pytest.raises(SerializationError) as caught:
            start()
        assert caught.value.path.endswith("work: variable 'guard'['lock']")


async def test_an_unpicklable_argument_names_the_object_inside(executor: Executor) -> None:
    """An unpicklable function or argument names the object inside that cannot be pickled."""
    run = executor.map(square, [1, {"a": [threading.Lock()]}])
    with pytest.raises(SerializationError) as caught:
        await run
    assert (caught.value.path, caught.value.index) == ("argument['a'][0]", 1)
    assert caught.value.run_id == run.id


@pytest.mark.parametrize("chunksize", [1, 3, 100, "auto"])
async def test_an_unpicklable_argument_fails_its_own_call_only(
    executor: Executor, chunksize: Any
) -> None:
    """An unpicklable function or argument names the object inside that cannot be pickled."""
    inputs: list[Any] = list(range(20))
    for index in (0, 7, 19):
        inputs[index] = threading.Lock()
    run = executor.map(square, inputs, return_exceptions=True, chunksize=chunksize)
    results = await run
    assert [index for index, result in enumerate(results) if result != index**2] == [0, 7, 19]
    assert {type(results[index]) for index in (0, 7, 19)} == {SerializationError}
    stats = run.stats
    assert (stats.succeeded, stats.failed, stats.pending, stats.sent) == (17, 3, 0, 0)


@pytest.mark.parametrize("fn", [generate, functools.partial(generate, 1)])
async def test_a_generator_function_is_an_error_before_anything_starts(
    executor: Executor, fn: Callable[..., Any]
) -> None:
    """A generator function ... are errors before anything starts."""
    with pytest.raises(TypeError, match="is a generator function"):
        executor.map(fn, [1])


async def test_a_generator_that_was_not_seen_before_fails_its_call(executor: Executor) -> None:
    """A generator function ... are errors before anything starts."""
    with pytest.raises(SerializationError, match="a generator cannot travel"):
        await executor.submit(lambda: (number for number in range(3)))


async def test_a_coroutine_object_is_an_error_before_anything_starts(executor: Executor) -> None:
    """A coroutine object instead of a function ... are errors before anything starts."""
    with pytest.raises(TypeError, match=r"pass coroutine, not coroutine\(\)"):
        executor.submit(coroutine(1))  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_workers": 0}, "max_workers must be a whole number from 1"),
        ({"timeout": -1}, "timeout must be seconds above 0"),
        ({"start_timeout": -0.5}, "start_timeout must be seconds above 0"),
        ({"idle_timeout": -1}, "idle_timeout must be seconds"),
        ({"memory": "1Gb"}, "1Gb"),
        ({"max_worker": 3}, "did you mean 'max_workers'"),
        ({"chunk_size": 3}, "did you mean 'chunksize'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_a_bad_option_is_an_error_before_anything_starts(
    executor: Executor, options: dict[str, Any], message: str
) -> None:
    """`max_workers=0`, negative timeouts, memory "1Gb", unknown options (with the nearest valid
    name) are errors before anything starts.
    """
    for use in (Executor, executor.with_options):
        with pytest.raises(ConfigError, match=message) as caught:
            use(**options)
        assert caught.value.key in options


async def test_a_bad_option_of_map_is_an_error_before_anything_starts(executor: Executor) -> None:
    """Unknown options (with the nearest valid name) are errors before anything starts."""
    pulled: list[int] = []

    def source() -> Iterator[int]:
        pulled.append(1)
        yield 1

    bad: list[Any] = [{"retry": 3}, {"timeout": 0}, {"memory": "1Gi"}]
    for options in bad:
        with pytest.raises(ConfigError):
            executor.map(square, source(), **options)
    assert pulled == []


async def test_no_input_or_one_that_cannot_be_iterated_is_an_error(executor: Executor) -> None:
    """Nothing hangs, nothing is lost silently."""
    with pytest.raises(TypeError, match="at least one iterable"):
        executor.map(square)
    with pytest.raises(TypeError, match="expected an iterable of arguments, not int"):
        executor.map(square, 3)  # type: ignore[call-overload]


@pytest.mark.parametrize("return_exceptions", [False, True])
async def test_an_exception_in_the_input_ends_the_run_and_cancels_what_was_started(
    executor: Executor, *, return_exceptions: bool
) -> None:
    """An exception in the input iterator ends the run with that exception and cancels what was
    started.
    """
    async with open_desk() as desk:
        fail = threading.Event()

        def broken() -> Iterator[int]:
            yield 1
            fail.wait()
            raise ZeroDivisionError("in the input")

        run = executor.map(Wait(desk), broken(), return_exceptions=return_exceptions)
        await desk.arrived(1)
        fail.set()
        with pytest.raises(ZeroDivisionError, match="in the input"):
            await run
        await desk.killed(1)
        assert run.state == "failed"


async def test_an_exception_in_an_async_input_ends_an_iteration(executor: Executor) -> None:
    """An exception in the input iterator ends the run with that exception..."""

    async def broken() -> AsyncIterator[int]:
        yield 1
        raise ZeroDivisionError("in the input")

    with pytest.raises(ZeroDivisionError):
        async for _ in executor.map(square, broken()):
            pass
    assert await executor.map(square, [3]) == [9]


async def test_an_unpicklable_result_fails_that_call_only(executor: Executor) -> None:
    """An unpicklable result or exception fails that call only, with the reason."""
    zero, one, two = await executor.map(
        lambda number: __import__("threading").Lock() if number % 2 else number,
        range(3),
        return_exceptions=True,
    )
    assert (zero, two) == (0, 2)
    assert isinstance(one, SerializationError)
    assert "cannot pickle '_thread.lock' object" in str(one)
    assert one.index == 1


async def test_an_unpicklable_exception_fails_that_call_only(executor: Executor) -> None:
    """An unpicklable result or exception fails that call only, with the reason."""

    def raise_for_odd(number: int) -> int:
        import threading

        if number % 2:
            raise ValueError("no", threading.Lock())
        return number

    zero, one, two = await executor.map(raise_for_odd, range(3), return_exceptions=True)
    assert (zero, two) == (0, 2)
    assert isinstance(one, RemoteError)
    assert one.type_name == "ValueError"
    assert "cannot pickle" in one.reason


async def test_an_infinite_input_with_an_unpicklable_item_ends(executor: Executor) -> None:
    """Nothing hangs, nothing is lost silently."""
    items = itertools.chain([1, threading.Lock()], itertools.count())
    with pytest.raises(SerializationError):
        await executor.map(square, items)
