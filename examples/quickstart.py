"""Count the lines and words of every source file of Python's standard library.

Run it with ``python examples/quickstart.py``, or on another directory with
``python examples/quickstart.py path/to/project``.
"""

import asyncio
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import asyncrt

LARGEST = 15
MOST_COMMON = 10


def count(name: str, source: bytes) -> tuple[str, int, Counter[str]]:
    """Return a file's name, its number of lines, and how often it says each word.

    This runs in a worker. It gets the text, not a path, since a worker on a cluster has none of
    this machine's files.
    """
    text = source.decode("utf-8", errors="replace")
    return name, text.count("\n"), Counter(re.findall(r"[A-Za-z_]{2,}", text))


def source_files(directory: Path) -> list[Path]:
    """Return the Python files below a directory, without those of installed packages."""
    installed = {"site-packages", "dist-packages", ".venv"}
    return sorted(
        path
        for path in directory.rglob("*.py")
        if path.is_file() and installed.isdisjoint(path.relative_to(directory).parts)
    )


class Progress:
    """Says on standard error how far the work is: in one line, or per tenth without a terminal."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._started = time.perf_counter()
        self._terminal = sys.stderr.isatty()
        self._steps = 100 if self._terminal else 10

    def advance(self) -> None:
        before = self._steps * self._done // self._total
        self._done += 1
        if self._steps * self._done // self._total == before:
            return
        percent = 100 * self._done // self._total
        rate = self._done / (time.perf_counter() - self._started)
        line = f"{percent:3} %  {self._done:,} of {self._total:,} files  {rate:,.0f} files/s"
        if self._terminal:
            # Written over the line before, which may have been longer.
            print(f"\r{line:<60}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr)

    def close(self) -> None:
        if self._terminal:
            print(file=sys.stderr)


async def main(directory: Path) -> None:
    paths = source_files(directory)
    if not paths:
        sys.exit(f"There are no Python files in {directory}.")
    names = [str(path.relative_to(directory)) for path in paths]
    # A generator: files are read as the workers take them, and never lie in memory all at once.
    sources: Iterator[bytes] = (path.read_bytes() for path in paths)

    print(f"Counting {len(paths):,} files in {directory}", flush=True)
    lines: Counter[str] = Counter()
    words: Counter[str] = Counter()
    progress = Progress(len(paths))
    started = time.perf_counter()
    async with asyncrt.Executor() as executor:
        async with executor.map(count, names, sources, ordered=False) as run:
            async for name, lines_of_file, words_of_file in run:
                lines[name] = lines_of_file
                words.update(words_of_file)
                progress.advance()
        progress.close()
    seconds = time.perf_counter() - started

    print(f"\n{'lines':>10}  file")
    for name, lines_of_file in lines.most_common(LARGEST):
        print(f"{lines_of_file:10,}  {name}")
    print(f"{lines.total():10,}  in all {len(lines):,} files, in {seconds:.1f} s")

    print(f"\n{'times':>10}  word")
    for word, times in words.most_common(MOST_COMMON):
        print(f"{times:10,}  {word}")
    print(f"{words.total():10,}  in all, {len(words):,} different ones")

    print(
        "\nThe same file will run on a cluster: ASYNCRT_BACKEND=k8s python examples/quickstart.py"
        "\n(the Kubernetes backend comes in a later version; this one runs on this machine)"
    )


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1] if len(sys.argv) > 1 else sysconfig.get_path("stdlib"))))
