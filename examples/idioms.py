"""Idioms of the documentation of concurrent.futures. Only the import is another one.

    python examples/idioms.py [processes]

With ``processes``, they run on the standard library's ``ProcessPoolExecutor`` and print the same.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import os
import sys
import threading
import time
from typing import Any

if sys.argv[1:] == ["processes"]:
    from concurrent.futures import ProcessPoolExecutor
else:
    from asyncrt.sync import Executor as ProcessPoolExecutor  # type: ignore[assignment]

PRIMES = [112272535095293, 112582705942171, 115280095190773, 115797848077099, 1099726899285419]
PREFIX = "not set"


def is_prime(number: int) -> bool:
    if number < 2:
        return False
    if number == 2:
        return True
    if number % 2 == 0:
        return False
    return all(number % divisor for divisor in range(3, math.isqrt(number) + 1, 2))


def load(name: str) -> bytes:
    if name.startswith("missing"):
        raise FileNotFoundError(name)
    return name.encode() * 100


def set_prefix(text: str) -> None:
    global PREFIX  # noqa: PLW0603 - what initializers of pools do
    PREFIX = text


def with_prefix(text: str) -> str:
    return f"{PREFIX} {text}"


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def check_primes() -> None:
    with ProcessPoolExecutor() as executor:
        for number, prime in zip(PRIMES, executor.map(is_prime, PRIMES), strict=True):
            print(f"{number} is prime: {prime}")


def submit_and_result() -> None:
    with ProcessPoolExecutor(max_workers=1) as executor:
        future = executor.submit(pow, 323, 1235)
        print("323 ** 1235 has", len(str(future.result())), "digits")


def futures_to_names() -> None:
    names = ["one", "two", "missing"]
    found = []
    with ProcessPoolExecutor(max_workers=2) as executor:
        future_to_name = {executor.submit(load, name): name for name in names}
        for future in concurrent.futures.as_completed(future_to_name):
            name = future_to_name[future]
            try:
                data = future.result()
            except FileNotFoundError as error:
                found.append(f"{name} generated an exception: {error!r}")
            else:
                found.append(f"{name} has {len(data)} bytes")
    print(*sorted(found), sep="\n")


def the_first_that_completes() -> None:
    with ProcessPoolExecutor(max_workers=2) as executor:
        futures = {executor.submit(nap, seconds) for seconds in (0.01, 1.0)}
        done, not_done = concurrent.futures.wait(
            futures, return_when=concurrent.futures.FIRST_COMPLETED
        )
        print("first:", *[future.result() for future in done], "left:", len(not_done))


def a_done_callback() -> None:
    called = threading.Event()

    def report(future: concurrent.futures.Future[int]) -> None:
        print("called back with", future.result())
        called.set()

    with ProcessPoolExecutor(max_workers=1) as executor:
        executor.submit(abs, -7).add_done_callback(report)
        called.wait()


def map_with_a_timeout() -> None:
    with ProcessPoolExecutor(max_workers=1) as executor:
        try:
            print(list(executor.map(nap, [0.0, 1.0], timeout=0.2)))
        except TimeoutError:
            print("not done in time")


def an_exception_of_a_call() -> None:
    with ProcessPoolExecutor(max_workers=1) as executor:
        future = executor.submit(load, "missing.txt")
        print("exception:", repr(future.exception()))
        try:
            future.result()
        except FileNotFoundError as error:
            print("raised:", error)


def an_initializer() -> None:
    with ProcessPoolExecutor(2, initializer=set_prefix, initargs=("hello",)) as executor:
        print(*executor.map(with_prefix, ["world", "moon"]), sep=", ")


def cancel_what_waits() -> None:
    with ProcessPoolExecutor(max_workers=1) as executor:
        futures = [executor.submit(nap, 0.2) for _ in range(6)]
        print("cancelled:", futures[5].cancel(), "done:", futures[5].done())


def shut_down_and_cancel() -> None:
    executor = ProcessPoolExecutor(max_workers=1)
    futures = [executor.submit(nap, 0.2) for _ in range(6)]
    futures[0].result()
    executor.shutdown(cancel_futures=True)
    print("cancelled at the end:", futures[5].cancelled())


def chunks() -> None:
    with ProcessPoolExecutor() as executor:
        print("sum:", sum(executor.map(abs, range(-1000, 1000), chunksize=100)))


def several_inputs() -> None:
    with ProcessPoolExecutor() as executor:
        print("powers:", *executor.map(pow, [2, 3, 5], [10, 5, 3]))


def fire_and_forget() -> None:
    with ProcessPoolExecutor() as executor:
        executor.map(nap, [0.01] * 4)
    print("all ran before the block was left")


def after_shutdown() -> None:
    executor = ProcessPoolExecutor(max_workers=1)
    executor.shutdown()
    try:
        executor.submit(abs, -1)
    except RuntimeError:
        print("RuntimeError after shutdown")


def a_process_for_each_call() -> None:
    with ProcessPoolExecutor(1, max_tasks_per_child=1, **spawn()) as executor:
        pids = {executor.submit(os.getpid).result() for _ in range(2)}
    print("processes:", len(pids))


def spawn() -> dict[str, Any]:
    """Return the context that max_tasks_per_child needs in the standard library."""
    import multiprocessing  # noqa: PLC0415 - only here

    return {"mp_context": multiprocessing.get_context("spawn")}


async def in_an_event_loop() -> None:
    loop = asyncio.get_running_loop()
    executor = ProcessPoolExecutor(max_workers=2)
    print("run_in_executor:", await loop.run_in_executor(executor, pow, 2, 16))
    print("wrap_future:", await asyncio.wrap_future(executor.submit(pow, 2, 8)))
    await asyncio.to_thread(executor.shutdown)


def main() -> None:
    check_primes()
    submit_and_result()
    futures_to_names()
    the_first_that_completes()
    a_done_callback()
    map_with_a_timeout()
    an_exception_of_a_call()
    an_initializer()
    cancel_what_waits()
    shut_down_and_cancel()
    chunks()
    several_inputs()
    fire_and_forget()
    after_shutdown()
    a_process_for_each_call()
    asyncio.run(in_an_event_loop())


if __name__ == "__main__":
    main()
