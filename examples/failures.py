"""Show what each kind of failure looks like: an exception, a flaky call, a hang, a crash.

Whatever a function does, it costs its own call. The workers and the executor go on.
"""

import asyncio
import os
import threading

import asyncrt


def invert(number: int) -> float:
    """Return one over a number. Zero has no inverse."""
    return 1 / number


def connect_somehow(host: str) -> str:
    """Fail twice, as a flaky service does, and then succeed."""
    attempt = asyncrt.current_call().attempt
    if attempt < 3:
        raise ConnectionError(f"{host} is not ready")
    return f"connected to {host} at attempt {attempt}"


def loop_for_ever(_: int) -> None:
    """Never return, never wait: what no cooperative cancellation can stop."""
    while True:
        pass


def crash(exit_code: int) -> None:
    """End the process on the spot, as a bug in a C extension would."""
    os._exit(exit_code)


def describe(error: BaseException) -> str:
    """Return an error's type and message, and the notes that say where it happened."""
    lines = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
    return "\n".join(f"    {line}" for text in lines for line in text.splitlines())


async def main() -> None:
    async with asyncrt.Executor(max_workers=2) as executor:
        print("An exception is raised as it is, and ends the run:")
        try:
            await executor.map(invert, [4, 2, 0])
        except ZeroDivisionError as error:
            print(describe(error))

        print("\nWith return_exceptions it takes the place of the result, and the others go on:")
        for result in await executor.map(invert, [4, 2, 0, 1], return_exceptions=True):
            print(describe(result) if isinstance(result, Exception) else f"    {result}")

        print("\nWith retries a flaky call gets another attempt:")
        retries = asyncrt.Retry(attempts=3, on=(ConnectionError,), delay=0.05)
        for answer in await executor.map(connect_somehow, ["db-1", "db-2"], retries=retries):
            print(f"    {answer}")

        print("\nA call that hangs is killed after its timeout:")
        try:
            await executor.map(loop_for_ever, [0], timeout=0.5)
        except asyncrt.CallTimeoutError as error:
            print(describe(error))
            print(f"    as an attribute: timeout={error.timeout}")

        print("\nA crash costs one call, and says how the process ended:")
        try:
            await executor.map(crash, [7])
        except asyncrt.WorkerCrashedError as error:
            print(describe(error))
            print(f"    as attributes: exit_code={error.exit_code} signal={error.signal}")

        print("\nWhat cannot be pickled is named:")
        try:
            await executor.map(str, [{"name": "report", "lock": threading.Lock()}])
        except asyncrt.SerializationError as error:
            print(describe(error))

        print("\nThe executor still works after all of that:")
        print(f"    {await executor.map(invert, [1, 2, 4])}")


if __name__ == "__main__":
    asyncio.run(main())
