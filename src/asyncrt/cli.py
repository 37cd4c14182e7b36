"""The command line. It has no logic of its own: it calls the library and says what came back.

Exit codes: 0 it worked, 1 it did not, 2 the command line or the configuration is wrong, 130 it was
ended by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar, cast

import click

import asyncrt
from asyncrt.errors import AsyncrtError, ConfigError

if TYPE_CHECKING:
    from asyncrt.config import Config

Command = TypeVar("Command", bound=Callable[..., Any])

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_META: Final = f"{__name__}."


class _ReportedError(click.ClickException):
    """An error that is told in one line, without a traceback."""

    def __init__(self, error: Exception) -> None:
        super().__init__(" ".join(str(error).split()))

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.message}", file=file, err=file is None)


class _ReportedConfigError(_ReportedError):
    exit_code = 2


@contextmanager
def _errors_reported() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise _ReportedConfigError(error) from error
    except AsyncrtError as error:
        raise _ReportedError(error) from error


def _remember(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.meta[f"{_META}{parameter.name}"] = value


def _common_options(command: Command) -> Command:
    """Add the options that are accepted before and after the name of a command."""
    for add in (
        click.option(
            "-b",
            "--backend",
            metavar="NAME",
            help="Where workers run: local, docker or k8s.",
            expose_value=False,
            callback=_remember,
        ),
        click.option(
            "-c",
            "--config",
            metavar="FILE",
            help="Configuration file, instead of the one that is found.",
            expose_value=False,
            callback=_remember,
        ),
    ):
        command = add(command)
    return command


def _load(context: click.Context) -> tuple[Config, dict[str, Any]]:
    """Return the configuration, and the options that the command line gives."""
    backend = context.meta.get(f"{_META}backend")
    options = {} if backend is None else {"backend": backend}
    return asyncrt.load_config(context.meta.get(f"{_META}config")), options


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@_common_options
@click.version_option(asyncrt.__version__, prog_name="asyncrt")
def commands() -> None:
    """Run Python functions on Kubernetes pods, or on this machine."""


@commands.command()
@_common_options
@click.option("--map", "count", metavar="N", type=click.IntRange(min=1), help="Also map N calls.")
@click.pass_context
def hello(context: click.Context, count: int | None) -> None:
    """Run a function on a worker, and say how long each step took."""
    with _errors_reported():
        config, options = _load(context)
        backend = config.settings(options).pool.backend
        click.echo(f"asyncrt {asyncrt.__version__}, Python {platform.python_version()}")
        click.echo(f"backend {backend}, configuration {config.path or 'none'}")
        code = _run(lambda: _say_hello(config, options, count))
    context.exit(code)


async def _say_hello(config: Config, options: dict[str, Any], count: int | None) -> int:
    # Nested, they travel by value: the worker does not have this module. (And is not measured.)
    def greet(name: str) -> str:  # pragma: no cover
        return f"hello {name}, from process {os.getpid()} on {platform.node()}"

    def square(number: int) -> int:  # pragma: no cover
        return number * number

    watch = _Stopwatch()
    async with asyncrt.Executor(config=config, **options) as executor:
        watch.say("opened")
        watch.say(await executor.submit(greet, "world"))
        good = True
        if count is not None:
            squares = await executor.map(square, range(count))
            right = sum(value == number**2 for number, value in enumerate(squares))
            good = right == count == len(squares)
            watch.say(f"mapped {count} calls, {right} right answers", calls=count)
    watch.say("closed")
    return 0 if good else 1


class _Stopwatch:
    """Says what was done, and how long it took since the last word."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def say(self, what: str, *, calls: int | None = None) -> None:
        now = time.perf_counter()
        took = now - self._since
        rate = f"  ({calls / took:,.0f} calls/s)" if calls else ""
        click.echo(f"{took:9.3f} s  {what}{rate}")
        self._since = now


def _run(body: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run a coroutine and return its exit code.

    SIGINT and SIGTERM cancel it, so that it takes its workers down; a second one ends the program
    at once.
    """
    import asyncio  # noqa: PLC0415 - takes longer than all else of `asyncrt --help`

    received: list[signal.Signals] = []

    async def until_signal() -> int:
        loop = asyncio.get_running_loop()
        task = cast("asyncio.Task[int]", asyncio.current_task())

        def stop(number: signal.Signals) -> None:
            received.append(number)
            for each in _SIGNALS:
                loop.remove_signal_handler(each)
            task.cancel()

        for number in _SIGNALS:
            loop.add_signal_handler(number, stop, number)
        return await body()

    try:
        return asyncio.run(until_signal())
    # No task is left that would have to end as cancelled.
    except (asyncio.CancelledError, AsyncrtError):  # noqa: ASYNC103
        if not received:
            raise
        click.echo(f"stopped by {received[0].name}", err=True)
        return 128 + received[0]  # noqa: ASYNC104


@commands.group()
def config() -> None:
    """Look at the configuration."""


@config.command()
@_common_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def show(context: click.Context, *, as_json: bool) -> None:
    """Print every value that holds and where it comes from. Secrets are masked."""
    with _errors_reported():
        loaded, options = _load(context)
        values = loaded.effective(options)
    if as_json:
        document = {
            "file": None if loaded.path is None else str(loaded.path),
            "ignored": list(loaded.notes),
            "values": {
                key: {"value": item.value, "origin": item.origin} for key, item in values.items()
            },
        }
        click.echo(json.dumps(document, indent=2))
        return
    click.echo(f"file: {loaded.path or 'none'}")
    texts = {key: json.dumps(item.value) for key, item in values.items()}
    key_width, text_width = max(map(len, texts)), max(map(len, texts.values()))
    for key, item in values.items():
        click.echo(f"{key:{key_width}}  {texts[key]:{text_width}}  {item.origin}")
    for note in loaded.notes:
        click.echo(f"ignored: {note}")


def main() -> None:
    """Run the command line and end the process."""
    try:
        code = commands.main(prog_name="asyncrt", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:  # Ctrl-C outside of `_run`
        code = 128 + signal.SIGINT
    sys.exit(code)


if __name__ == "__main__":
    main()
