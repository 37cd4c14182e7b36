"""Find the first primes above a billion billion: endless input, results in order, stop when done.

Input may be an async generator that never ends. It is pulled no further ahead than the workers
need, results come in the order of the input, and leaving the block cancels what is under way.
"""

import asyncio
from collections.abc import AsyncIterator

import asyncrt

WANTED = 10
START = 10**18


def is_prime(number: int) -> bool:
    """Tell whether an odd number above 37 is prime (Miller and Rabin; exact below 3.1 * 10**23)."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        power = pow(base, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def judge(number: int) -> tuple[int, bool]:
    """Return a number with the verdict on it. Runs in a worker."""
    return number, is_prime(number)


async def odd_numbers(start: int) -> AsyncIterator[int]:
    """Yield the odd numbers from a start, for ever. Could as well read a queue or a socket."""
    number = start | 1
    while True:
        yield number
        number += 2


async def main() -> None:
    found = 0
    async with asyncrt.Executor() as executor, executor.map(judge, odd_numbers(START)) as run:
        async for number, prime in run:
            if prime:
                found += 1
                print(f"{found:3}. prime above {START:,}: {number:,}", flush=True)
            if found == WANTED:
                break


if __name__ == "__main__":
    asyncio.run(main())
