"""What can be asked for: every option, its type, its default and its check, in one place.

Two groups. *Pool options* say what a worker is and how many there may be; a different value needs
other workers. *Call options* say how calls run on them. The names are the same in the constructor,
in ``with_options``, in ``map``, in the configuration file and (upper case, ``ASYNCRT_`` before) in
the environment.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal, TypedDict, get_type_hints

from asyncrt.checks import (
    check_bool,
    check_choice,
    check_count,
    check_module_names,
    check_no_credentials,
    check_number,
    check_seconds,
    check_text,
    is_int,
    is_number,
    nearest,
)
from asyncrt.errors import ConfigError
from asyncrt.podoptions import PodOptions, PodSettings
from asyncrt.quantities import parse_cpu, parse_limit, parse_memory

BACKENDS: Final = ("local", "docker", "k8s")


@dataclass(frozen=True, kw_only=True)
class Retry:
    """When a failed call is tried again.

    A lost worker is not the call's fault: such attempts come on top and are not counted here.

    Example:
        retry = asyncrt.Retry(attempts=5, on=(ConnectionError,), delay=0.5)
        async with asyncrt.Executor(retries=retry) as executor:
            assert await executor.submit(len, "abc") == 3

    Attributes:
        attempts: Attempts in all, the first one included.
        on: Exceptions that are worth another attempt.
        delay: Seconds before the second attempt; doubles with each further one.
        max_delay: Seconds that the delay never exceeds.
        jitter: Draw each delay evenly from zero to its value ("full jitter"), so that calls that
            failed together do not come back together.
    """

    attempts: int = 3
    on: tuple[type[Exception], ...] = (Exception,)
    delay: float = 0.1
    max_delay: float = 30.0
    jitter: bool = True

    def __post_init__(self) -> None:
        if not is_int(self.attempts) or self.attempts < 1:
            raise ConfigError(
                f"retries: attempts must be a whole number of at least 1, not {self.attempts!r}",
                key="retries",
                expected="a whole number from 1",
            )
        given: Any = self.on
        on = given if isinstance(given, tuple) else (given,)
        if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in on):
            raise ConfigError(
                f"retries: on must be exception classes, not {self.on!r}",
                key="retries",
                expected="exception classes",
            )
        object.__setattr__(self, "on", on)
        for name in ("delay", "max_delay"):
            check_seconds(f"retries.{name}", getattr(self, name), zero=True)
        check_bool("retries.jitter", self.jitter)

    def delay_before(self, attempt: int, *, draw: float) -> float:
        """Return the seconds to wait before an attempt.

        Args:
            attempt: The attempt to come, from 2.
            draw: A number from 0 to 1 for the jitter.
        """
        delay = min(self.max_delay, self.delay * 2.0 ** min(attempt - 2, 64))
        return delay * draw if self.jitter else delay


@dataclass(frozen=True, kw_only=True)
class Backups:
    """When a call that runs far longer than its siblings is started a second time elsewhere.

    The first copy that answers wins, the other one is killed. So the function may run twice at the
    same time: what it does outside (writes, requests) must bear that. A copy that fails or is lost
    while the other one runs is forgotten, not counted by ``Retry``: the other one tells how the
    attempt ends. Each attempt of a call has one copy at most.

    Example:
        async with asyncrt.Executor(backups=asyncrt.Backups(multiplier=2)) as executor:
            assert await executor.map(abs, [-1, 2]) == [1, 2]

    Attributes:
        multiplier: A call gets a copy when it has run this many times the median of those that
            have ended.
        quantile: Share of the run's calls that must have ended before: copies come near the end,
            when workers are free, and never while a call waits for its first one.
        min_seconds: Calls shorter than this get none.
        max_share: Copies in a run, at most, as a share of its calls (but one may be made).
    """

    multiplier: float = 3.0
    quantile: float = 0.75
    min_seconds: float = 0.1
    max_share: float = 0.1

    def __post_init__(self) -> None:
        check_number("backups.multiplier", self.multiplier, least=1.0)
        check_number("backups.quantile", self.quantile, least=0.0, most=1.0)
        check_seconds("backups.min_seconds", self.min_seconds, zero=True)
        check_number("backups.max_share", self.max_share, least=0.0, most=1.0)


class RunOptions(TypedDict, total=False):
    """Call options that mean the same on both faces."""

    ordered: bool
    retries: Retry | int | None
    deadline: float | None
    isolation: Literal["worker", "call"]
    backups: Backups | bool | None
    name: str | None
    include_modules: Sequence[str]
    exclude_modules: Sequence[str]
    modules_limit: str | int


class CommonCallOptions(RunOptions, total=False):
    """``CallOptions`` without the one that changes what a run gives."""

    max_in_flight: int | None
    chunksize: int | Literal["auto"]
    timeout: float | None


class CallOptions(CommonCallOptions, total=False):
    """Options of ``map``, ``starmap`` and ``with_options`` that need no other workers."""

    return_exceptions: bool


class PoolOptions(PodOptions, total=False):
    """Options of the workers, but how many there may be."""

    backend: Any
    runtime: str | None
    cpu: str | float | None
    memory: str | int | None
    slots: int
    env: Mapping[str, str]
    min_workers: int
    idle_timeout: float | None
    start_timeout: float
    orphan_timeout: float
    heartbeat_interval: float
    recycle_memory: str | int | None
    spill_dir: str | None
    spill_limit: str | int
    store: str | None
    echo: bool


class ExecutorOptions(CallOptions, PoolOptions, total=False):
    """Options of the constructor and of ``with_options``."""

    max_workers: int | None


@dataclass(frozen=True, kw_only=True)
class CallSettings:
    """Checked call options.

    Attributes:
        ordered: Iterate in input order, else in order of completion.
        return_exceptions: Put failures in place of results and let the other calls go on.
        max_in_flight: Calls taken from the input and not yet delivered, at most. ``None``: sized
            inputs are accepted whole, others are pulled 1,000 ahead.
        chunksize: Calls that travel together. ``"auto"`` measures: short calls are coalesced, long
            ones are not.
        retries: When a failed call is tried again; a number means ``Retry(attempts=number)``.
        timeout: Seconds that one attempt may run.
        deadline: Value of ``anyio.current_time()`` at which the run must be done.
        isolation: ``"worker"``: a process runs one call after the other. ``"call"``: each call gets
            a process of its own.
        backups: When a straggler is started a second time; ``True`` means ``Backups()``.
        name: Shown in logs and in ``run.id``.
        include_modules: Modules that travel with the function besides those that are found.
        exclude_modules: Modules that never do, nor do their submodules. They win.
        modules_limit_bytes: What all modules of a function may hold.
    """

    ordered: bool = True
    return_exceptions: bool = False
    max_in_flight: int | None = None
    chunksize: int | Literal["auto"] = "auto"
    retries: Retry = Retry(attempts=1)
    timeout: float | None = None
    deadline: float | None = None
    isolation: Literal["worker", "call"] = "worker"
    backups: Backups | None = None
    name: str | None = None
    include_modules: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] = ()
    modules_limit_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        for name in ("ordered", "return_exceptions"):
            check_bool(name, getattr(self, name))
        check_count("max_in_flight", self.max_in_flight, optional=True)
        if self.chunksize != "auto":
            check_count("chunksize", self.chunksize, expected="'auto' or a whole number from 1")
        retries: Any = self.retries
        if retries is None:
            object.__setattr__(self, "retries", Retry(attempts=1))
        elif is_int(retries):
            object.__setattr__(self, "retries", Retry(attempts=retries))
        elif not isinstance(retries, Retry):
            raise ConfigError(
                f"retries must be asyncrt.Retry(...) or a number of attempts, not {retries!r}",
                key="retries",
                expected="asyncrt.Retry(...) or a whole number from 1",
            )
        check_seconds("timeout", self.timeout, optional=True)
        if self.deadline is not None and not is_number(self.deadline):
            raise ConfigError(
                f"deadline must be a value of anyio.current_time(), not {self.deadline!r}",
                key="deadline",
                expected="a value of anyio.current_time()",
            )
        check_choice("isolation", self.isolation, ("worker", "call"))
        backups: Any = self.backups
        if isinstance(backups, bool):
            object.__setattr__(self, "backups", Backups() if backups else None)
        elif backups is not None and not isinstance(backups, Backups):
            raise ConfigError(
                f"backups must be asyncrt.Backups(...), true or false, not {backups!r}",
                key="backups",
                expected="asyncrt.Backups(...) or true or false",
            )
        check_text("name", self.name, optional=True)
        for name in ("include_modules", "exclude_modules"):
            check_module_names(name, getattr(self, name))
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def of_single_calls(self, name: str) -> CallSettings:
        """Return what of these holds for calls that are made one by one."""
        return replace(
            self,
            ordered=True,
            return_exceptions=False,
            max_in_flight=None,
            chunksize="auto",
            backups=None,
            name=name,
        )


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """Checked pool options: what a worker is, and how many there may be.

    Attributes:
        backend: ``"local"``, or a ``Backend`` of your own. (``"docker"`` and ``"k8s"`` are not
            built yet and say so.)
        runtime: Container image; ``None`` is the official image of the client's Python. The local
            backend runs on the client's own interpreter and refuses a value.
        cpu_millicores: CPUs of a worker (option ``cpu``); ``None``: no limit locally.
        memory_bytes: Memory of a worker (option ``memory``); ``None``: no limit locally.
        slots: Calls that a worker runs at once, each in a process of its own.
        env: Environment variables of the worker, over the inherited ones.
        min_workers: Workers that stay when there is nothing to do.
        max_workers: Workers at most; ``None``: the CPUs that this process may use (local).
        idle_timeout: Seconds without work after which a worker above ``min_workers`` stops;
            ``None``: never.
        start_timeout: Seconds that a worker may take until it is ready.
        orphan_timeout: Seconds after which a worker that no client is connected to ends.
        heartbeat_interval: Seconds between signs of life; three missed ones are a lost connection.
        recycle_memory_bytes: A process that holds more than this after a call is replaced (option
            ``recycle_memory``); ``None``: half of ``memory``, or never without one.
        spill_dir: Directory for large results that nobody has taken yet and that are more than
            ``spill_limit``: they wait in files there, and are loaded when they are asked for.
            ``None``: all results are in memory.
        spill_limit_bytes: Bytes of large results (over 1 MiB) that stay in memory (option
            ``spill_limit``).
        store: Where large objects lie, as a URL; not used in stream mode yet.
        echo: Show what calls print, as it comes, on this process's standard output and error.
        pod: The options that only Kubernetes understands.
    """

    backend: Any = "local"
    runtime: str | None = None
    cpu_millicores: int | None = None
    memory_bytes: int | None = None
    slots: int = 1
    # Not in the repr: credentials travel in the environment.
    env: Mapping[str, str] = field(default_factory=lambda: types.MappingProxyType({}), repr=False)
    min_workers: int = 0
    max_workers: int | None = None
    idle_timeout: float | None = 60.0
    start_timeout: float = 60.0
    orphan_timeout: float = 120.0
    heartbeat_interval: float = 10.0
    recycle_memory_bytes: int | None = None
    spill_dir: str | None = None
    spill_limit_bytes: int = 1 << 28
    store: str | None = None
    echo: bool = True
    pod: PodSettings = PodSettings()

    def __post_init__(self) -> None:
        if isinstance(self.backend, str):
            check_choice("backend", self.backend, BACKENDS)
        elif not callable(getattr(self.backend, "open_pool", None)):
            raise ConfigError(
                f"backend must be one of {', '.join(BACKENDS)} or an asyncrt.backends.Backend, "
                f"not {self.backend!r}",
                key="backend",
                expected=" | ".join(BACKENDS),
            )
        for name in ("runtime", "spill_dir", "store"):
            check_text(name, getattr(self, name), optional=True)
        check_no_credentials("store", self.store)
        for name in ("slots", "max_workers"):
            check_count(name, getattr(self, name), optional=name == "max_workers")
        if not is_int(self.min_workers) or self.min_workers < 0:
            raise ConfigError(
                f"min_workers must be a whole number from 0, not {self.min_workers!r}",
                key="min_workers",
                expected="a whole number from 0",
            )
        if self.max_workers is not None and self.min_workers > self.max_workers:
            raise ConfigError(
                f"min_workers={self.min_workers} is more than max_workers={self.max_workers}",
                key="min_workers",
                expected=f"at most {self.max_workers}",
            )
        check_seconds("idle_timeout", self.idle_timeout, optional=True, zero=True)
        for name in ("start_timeout", "orphan_timeout", "heartbeat_interval"):
            check_seconds(name, getattr(self, name))
        check_bool("echo", self.echo)
        env: Any = self.env
        if not isinstance(env, Mapping) or not all(
            isinstance(name, str) and isinstance(value, str) for name, value in env.items()
        ):
            raise ConfigError(
                "env must map names to strings", key="env", expected="a mapping of names to strings"
            )
        for name, value in env.items():
            if not name or "=" in name or "\0" in name + value:
                raise ConfigError(
                    f"env: {name!r} cannot be a variable: its name must not be empty or hold '=', "
                    "and neither name nor value a NUL",
                    key="env",
                    expected="names without '=' and NUL",
                )
        object.__setattr__(self, "env", types.MappingProxyType(dict(env)))

    def shape(self) -> tuple[Any, ...]:
        """Return what must be equal for two executors to share workers."""
        return self._shape

    @functools.cached_property
    def _shape(self) -> tuple[Any, ...]:
        env = tuple(sorted(self.env.items()))
        backend = self.backend if isinstance(self.backend, str) else id(self.backend)
        resources = (self.cpu_millicores, self.memory_bytes, self.slots, self.recycle_memory_bytes)
        return (backend, self.runtime, resources, env, self.pod.shape())

    def recycle_limit_bytes(self) -> int | None:
        """Return what a process may hold after a call before it is replaced."""
        if self.recycle_memory_bytes is None and self.memory_bytes is not None:
            return self.memory_bytes // 2
        return self.recycle_memory_bytes


CALL_OPTIONS: Final = frozenset(get_type_hints(CallOptions))
POOL_OPTIONS: Final = frozenset(get_type_hints(ExecutorOptions)) - CALL_OPTIONS
POD_OPTIONS: Final = frozenset(get_type_hints(PodOptions))  # of the pool's, those in its ``pod``

# Options that users write as quantities: the field that holds the number, and its parser.
_QUANTITIES: Final[Mapping[str, tuple[str, Callable[..., int]]]] = {
    "cpu": ("cpu_millicores", parse_cpu),
    "memory": ("memory_bytes", parse_memory),
    "recycle_memory": ("recycle_memory_bytes", parse_memory),
    "spill_limit": ("spill_limit_bytes", parse_limit),
    "modules_limit": ("modules_limit_bytes", parse_limit),
}


@dataclass(frozen=True)
class Settings:
    """Everything that an executor was asked for, checked."""

    pool: PoolSettings = PoolSettings()
    call: CallSettings = CallSettings()

    def updated(self, options: Mapping[str, Any], *, only_calls: bool = False) -> Settings:
        """Return a copy with options laid over.

        Args:
            options: Names and values as users write them.
            only_calls: Refuse pool options, as ``map`` does.

        Raises:
            ConfigError: An unknown name (with the nearest valid one) or a bad value.
        """
        check_names(options, only_calls=only_calls)
        pool: dict[str, Any] = {}
        call: dict[str, Any] = {}
        for name, value in options.items():
            target = call if name in CALL_OPTIONS else pool
            if name in _QUANTITIES:
                field_name, parse = _QUANTITIES[name]
                optional = value is None and target is pool
                target[field_name] = None if optional else parse(value, key=name)
            elif name not in POD_OPTIONS:
                target[name] = value
        pod = {name: value for name, value in options.items() if name in POD_OPTIONS}
        if pod:
            pool["pod"] = replace(self.pool.pod, **pod)
        return Settings(
            replace(self.pool, **pool) if pool else self.pool,
            replace(self.call, **call) if call else self.call,
        )


def check_names(options: Mapping[str, Any], *, only_calls: bool = False) -> None:
    """Refuse unknown option names.

    Raises:
        ConfigError: With the nearest valid name, or the place where the option belongs.
    """
    for name in options:
        if name in CALL_OPTIONS or (name in POOL_OPTIONS and not only_calls):
            continue
        if name in POOL_OPTIONS:
            raise ConfigError(
                f"{name} is an option of the workers, not of one run: "
                f"use executor.with_options({name}=...).map(...)",
                key=name,
                expected=f"one of {', '.join(sorted(CALL_OPTIONS))}",
            )
        valid = CALL_OPTIONS if only_calls else CALL_OPTIONS | POOL_OPTIONS
        near = nearest(name, valid)
        hint = f"; did you mean {near!r}?" if near else f"; valid are {', '.join(sorted(valid))}"
        raise ConfigError(
            f"unknown option {name!r}{hint}",
            key=name,
            expected=f"one of {', '.join(sorted(valid))}",
            suggestion=near,
        )


def option_defaults() -> dict[str, Any]:
    """Return every option's default by name, for documentation and ``config show``."""
    names = {field_name: name for name, (field_name, _) in _QUANTITIES.items()}
    pool, call = PoolSettings(), CallSettings()
    return {
        names.get(item.name, item.name): getattr(settings, item.name)
        for settings in (pool, pool.pod, call)
        for item in fields(settings)
        if item.name != "pod"
    }
