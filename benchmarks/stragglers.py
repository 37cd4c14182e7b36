"""What backups are worth when some calls take far longer than their siblings.

    python benchmarks/stragglers.py [--rounds 5]

200 calls of 0.1 s on 2 workers with 32 slots each. In each round one of them, drawn at random,
takes 20 times as long on its first attempt, as on a slow node or behind a slow disk. Each round
runs the same calls with and without ``backups``, in turns. The calls sleep: 2 CPUs are enough.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import random
import statistics
import time

import asyncrt

CALLS = 200
SECONDS = 0.1
TIMES_SLOWER = 20
SLOTS = 32


def work(straggler: int) -> int:
    """Sleep; for very long if this is the straggler's first attempt."""
    call = asyncrt.current_call()
    slow = call.index == straggler and call.attempt == 1
    time.sleep(SECONDS * (TIMES_SLOWER if slow else 1))
    return call.index


async def measure(
    executor: asyncrt.Executor, straggler: int, *, backups: bool
) -> tuple[float, int]:
    """Return the seconds of a map, and how many copies were made."""
    began = time.perf_counter()
    run = executor.map(work, [straggler] * CALLS, backups=backups)
    assert await run == list(range(CALLS))
    return time.perf_counter() - began, run.stats.copies_dropped


async def main(rounds: int) -> None:
    """Print a table, one line a round, and the medians."""
    draw = random.Random(1)
    without: list[float] = []
    with_backups: list[float] = []
    print("| round | straggler | without backups | with backups | copies | with : without |")
    print("|---|---|---|---|---|---|")
    async with asyncrt.Executor(max_workers=2, min_workers=2, slots=SLOTS) as executor:
        await executor.map(work, [-1] * CALLS)  # all processes are there
        for number in range(1, rounds + 1):
            straggler = draw.randrange(CALLS)
            slow, _ = await measure(executor, straggler, backups=False)
            fast, copies = await measure(executor, straggler, backups=True)
            without.append(slow)
            with_backups.append(fast)
            print(
                f"| {number} | call {straggler} | {slow:.2f} s | {fast:.2f} s | {copies} "
                f"| {fast / slow:.2f} x |"
            )
    ratios = [fast / slow for fast, slow in zip(with_backups, without, strict=True)]
    print(
        f"| median | | {statistics.median(without):.2f} s "
        f"| {statistics.median(with_backups):.2f} s | | {statistics.median(ratios):.2f} x |"
    )
    print(f"\nPython {platform.python_version()}, {platform.system()} {platform.release()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    asyncio.run(main(parser.parse_args().rounds))
