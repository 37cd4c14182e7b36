"""asyncrt on this machine, beside ProcessPoolExecutor, dask.distributed and Ray.

    python benchmarks/local.py [--rounds 3] [--without dask,ray]

Every peer has 2 workers and the same functions. A round opens each peer, measures and closes it,
one after the other; figures are medians over the rounds, ratios are within a round. Machines are
noisy: only the ratios mean something.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import asyncrt
import asyncrt.sync
from asyncrt.pack import pack_worker

WORKERS = 2
CALLS = 10_000
MANY = 100_000
ARRAY = np.ones(12_500_000)  # 100 MB


def identity(value: Any) -> Any:
    """Return the argument: a call that costs nothing but the way there and back."""
    return value


@dataclass
class Figures:
    """What was measured of one peer, by name of the measure, one value a round."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        """Record a value."""
        self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float | None:
        """Return the median over the rounds, if it was measured."""
        found = self.values.get(name)
        return statistics.median(found) if found else None


@contextlib.contextmanager
def timed(figures: Figures, name: str, *, calls: int = 0) -> Iterator[None]:
    """Record seconds, or calls a second."""
    began = time.perf_counter()
    yield
    took = time.perf_counter() - began
    figures.add(name, calls / took if calls else took)


def median_of(times: int, once: Callable[[int], Any]) -> float:
    """Return the median seconds of a repeated blocking action."""
    taken = []
    for number in range(times):
        began = time.perf_counter()
        once(number)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


async def median_of_async(times: int, once: Callable[[int], Awaitable[Any]]) -> float:
    """Return the median seconds of a repeated awaited action."""
    taken = []
    for number in range(times):
        began = time.perf_counter()
        await once(number)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


async def measure_asyncrt(figures: Figures) -> None:
    """Measure this library."""
    async with asyncrt.Executor(max_workers=WORKERS) as executor:
        await executor.map(identity, range(WORKERS * 10), chunksize=1)

        async def submit(number: int) -> None:
            assert await executor.submit(identity, number) == number

        figures.add("submit", await median_of_async(1000, submit))
        with timed(figures, "map", calls=CALLS):
            results = await executor.map(identity, range(CALLS), chunksize=1)
        assert results == list(range(CALLS))
        with timed(figures, "map chunked", calls=CALLS):
            results = await executor.map(identity, range(CALLS))
        assert results == list(range(CALLS))
        with timed(figures, "map many", calls=MANY):
            results = await executor.map(identity, range(MANY))
        del results

        async def array(_: int) -> None:
            assert (await executor.submit(identity, ARRAY)).nbytes == ARRAY.nbytes

        figures.add("array", await median_of_async(5, array))
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        run = executor.map(identity, range(MANY))
        results = await run
        after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        size = sys.getsizeof(results) + sum(sys.getsizeof(result) for result in results)
        figures.add("bytes a call", (peak - before - size) / MANY)
        del run, after


def measure_sync(figures: Figures) -> None:
    """Measure the sync face of this library."""
    with asyncrt.sync.Executor(WORKERS) as executor:
        list(executor.map(identity, range(WORKERS * 10)))
        figures.add(
            "submit", median_of(1000, lambda number: executor.submit(identity, number).result())
        )
        with timed(figures, "map", calls=CALLS):
            assert list(executor.map(identity, range(CALLS))) == list(range(CALLS))
        with timed(figures, "map chunked", calls=CALLS):
            chunked = list(executor.map(identity, range(CALLS), chunksize="auto"))
        assert chunked == list(range(CALLS))
        with timed(figures, "map many", calls=MANY):
            list(executor.map(identity, range(MANY), chunksize="auto"))
        figures.add("array", median_of(5, lambda _: executor.submit(identity, ARRAY).result()))


def measure_processes(figures: Figures) -> None:
    """Measure ``concurrent.futures.ProcessPoolExecutor``."""
    with ProcessPoolExecutor(WORKERS) as executor:
        list(executor.map(identity, range(WORKERS * 10)))
        figures.add(
            "submit", median_of(1000, lambda number: executor.submit(identity, number).result())
        )
        with timed(figures, "map", calls=CALLS):
            assert list(executor.map(identity, range(CALLS))) == list(range(CALLS))
        with timed(figures, "map chunked", calls=CALLS):
            chunked = list(executor.map(identity, range(CALLS), chunksize=500))
        assert chunked == list(range(CALLS))
        with timed(figures, "map many", calls=MANY):
            list(executor.map(identity, range(MANY), chunksize=2000))
        figures.add("array", median_of(5, lambda _: executor.submit(identity, ARRAY).result()))


def measure_dask(figures: Figures) -> None:
    """Measure ``dask.distributed``."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=WORKERS,
            threads_per_worker=1,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        client.gather(client.map(identity, range(WORKERS * 10), pure=False))

        def submit(number: int) -> None:
            assert client.submit(identity, number, pure=False).result() == number

        figures.add("submit", median_of(200, submit))
        with timed(figures, "map", calls=CALLS // 5):
            client.gather(client.map(identity, range(CALLS // 5), pure=False))
        with timed(figures, "map chunked", calls=CALLS):
            client.gather(client.map(identity, range(CALLS), pure=False, batch_size=500))
        figures.add(
            "array", median_of(3, lambda _: client.submit(identity, ARRAY, pure=False).result())
        )


def measure_ray(figures: Figures) -> None:
    """Measure Ray."""
    import ray

    ray.init(
        num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, configure_logging=False
    )
    try:
        remote = ray.remote(identity)
        ray.get([remote.remote(number) for number in range(WORKERS * 10)])

        def submit(number: int) -> None:
            assert ray.get(remote.remote(number)) == number

        figures.add("submit", median_of(500, submit))
        with timed(figures, "map", calls=CALLS):
            ray.get([remote.remote(number) for number in range(CALLS)])
        figures.add("array", median_of(3, lambda _: ray.get(remote.remote(ARRAY))))
    finally:
        ray.shutdown()


def measure_start(figures: Figures, bare: Figures) -> None:
    """Measure what ``import asyncrt`` costs, and how soon a worker says hello."""

    def run(code: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - began

    bare_start = statistics.median(run("pass") for _ in range(15))
    bare.add("start", bare_start)
    loaded = statistics.median(run("import asyncrt") for _ in range(15))
    figures.add("import", loaded - bare_start)

    async def until_hello() -> float:
        from asyncrt.backends.local import LocalBackend
        from asyncrt.options import PoolSettings
        from asyncrt.worker.protocol import Decoder, Limits

        class Listener:
            """Notes when the challenge comes; hello follows it by one round trip."""

            def __init__(self) -> None:
                self.heard = asyncio.Event()
                self._decoder = Decoder(Limits())

            def get_buffer(self) -> memoryview:
                return self._decoder.get_buffer()

            def received(self, size: int) -> None:
                if self._decoder.received(size):
                    self.heard.set()

            def writable(self) -> None: ...

            def closed(self, error: Exception | None) -> None: ...

        async with LocalBackend().open_pool(PoolSettings(), token=os.urandom(32)) as pool:
            taken = []
            for _ in range(15):
                began = time.perf_counter()
                worker = await pool.start_worker()
                listener = Listener()
                stream = await worker.connect(listener)
                await listener.heard.wait()
                taken.append(time.perf_counter() - began)
                stream.close()
                worker.kill()
                await worker.wait_exit()
            return statistics.median(taken)

    figures.add("hello", asyncio.run(until_hello()) - bare_start)


@dataclass(frozen=True)
class Measure:
    """One row of the table.

    Attributes:
        scale: Factor from the recorded value to the shown one.
    """

    name: str
    title: str
    unit: str
    scale: float
    more_is_better: bool


MEASURES = (
    Measure("submit", "`submit` round trip, p50", "us", 1e6, False),
    Measure("map", "map of 10,000 trivial calls, one by one", "calls/s", 1, True),
    Measure("map chunked", "the same, chunked (asyncrt: `auto`)", "calls/s", 1, True),
    Measure("map many", "map of 100,000 trivial calls, chunked", "calls/s", 1, True),
    Measure("array", "100 MB numpy argument and result", "ms", 1e3, False),
)


def show(figures: dict[str, Figures], start: Figures, bare: Figures, size: int) -> None:
    """Print the table, then the targets with what was seen."""
    peers = list(figures)
    print(f"| measure | {' | '.join(peers)} | asyncrt : processes |")
    print(f"|---|{'---|' * len(peers)}---|")
    ratios: dict[str, float] = {}
    sync_ratios: dict[str, float] = {}
    for measure in MEASURES:
        cells = []
        for peer in peers:
            value = figures[peer].median(measure.name)
            shown = "" if value is None else f"{value * measure.scale:,.0f} {measure.unit}"
            cells.append(shown)
        for name, found in (("asyncrt", ratios), ("asyncrt.sync", sync_ratios)):
            pairs = zip(
                figures[name].values[measure.name],
                figures["processes"].values[measure.name],
                strict=True,
            )
            found[measure.name] = statistics.median(ours / theirs for ours, theirs in pairs)
        better = "faster" if (ratios[measure.name] > 1) == measure.more_is_better else "slower"
        cells.append(f"{ratios[measure.name]:.2f} x ({better})")
        print(f"| {measure.title} | {' | '.join(cells)} |")
    own = figures["asyncrt"]
    ahead = all(
        (own.median("submit") or 0) < (figures[peer].median("submit") or 0)
        for peer in peers
        if peer in ("dask", "ray")
    )
    rows = [
        ("`submit` p50 <= 2 x processes", ratios["submit"] <= 2, f"{ratios['submit']:.2f} x"),
        ("`submit` ahead of Dask and Ray", ahead, "see the table"),
        ("map one by one >= processes", ratios["map"] >= 1, f"{ratios['map']:.2f} x"),
        (
            "sync `submit` p50 <= 2.5 x processes",
            sync_ratios["submit"] <= 2.5,
            f"{sync_ratios['submit']:.2f} x",
        ),
        (
            "sync map one by one >= 0.8 x processes",
            sync_ratios["map"] >= 0.8,
            f"{sync_ratios['map']:.2f} x",
        ),
    ]
    for name in ("map chunked", "map many"):
        rate = own.median(name) or 0
        rows.append((f"{name} >= 100,000 calls/s", rate >= 100_000, f"{rate:,.0f} calls/s"))
    rows.append(("100 MB array >= processes", ratios["array"] <= 1, f"{1 / ratios['array']:.2f} x"))
    each = own.median("bytes a call") or 0
    rows.append(("client memory <= 1 KiB a call", each <= 1024, f"{each:.0f} bytes"))
    imported = (start.median("import") or 0) * 1e3
    rows.append(("`import asyncrt` <= 30 ms", imported <= 30, f"{imported:.1f} ms"))
    hello = (start.median("hello") or 0) * 1e3
    rows.append(("hello <= 60 ms after `python -c pass`", hello <= 60, f"{hello:.1f} ms"))
    rows.append(("zipapp <= 150 KiB", size <= 150 * 1024, f"{size / 1024:.0f} KiB"))
    print("\n| target | seen | |\n|---|---|---|")
    for title, met, seen in rows:
        print(f"| {title} | {seen} | {'met' if met else '**missed**'} |")
    bare_start = (bare.median("start") or 0) * 1e3
    print(
        f"\n{os.cpu_count()} CPUs, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}; `python -c pass` takes {bare_start:.0f} ms."
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without", default="", help="peers to leave out: dask,ray")
    arguments = parser.parse_args()
    without = set(filter(None, arguments.without.split(",")))
    peers: dict[str, Callable[[Figures], None]] = {
        "asyncrt": lambda figures: asyncio.run(measure_asyncrt(figures)),
        "asyncrt.sync": measure_sync,
        "processes": measure_processes,
        "dask": measure_dask,
        "ray": measure_ray,
    }
    figures = {name: Figures() for name in peers if name not in without}
    start, bare = Figures(), Figures()
    for number in range(arguments.rounds):
        for name, mine in figures.items():
            print(f"round {number + 1}: {name}", file=sys.stderr)
            peers[name](mine)
        measure_start(start, bare)
    show(figures, start, bare, len(pack_worker()))


if __name__ == "__main__":
    main()
