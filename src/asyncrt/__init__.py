"""Run Python functions on Kubernetes pods, or on this machine, from one asyncio event loop.

Example:
    async with asyncrt.Executor() as executor:
        squares = await executor.map(lambda number: number**2, range(100))
    assert squares[9] == 81

Names are loaded when they are first used: ``import asyncrt`` costs a few milliseconds, and inside a
call, where the client is not installed, the part that travels with the worker still works. The
other names can be imported there, too, and fail when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncrt import sync
    from asyncrt.call import Call
    from asyncrt.config import Config, load_config
    from asyncrt.errors import (
        AsyncrtError,
        AuthenticationError,
        CallError,
        CallExitedError,
        CallTimeoutError,
        ConfigError,
        ExecutorClosedError,
        ImageError,
        KubernetesError,
        ModulesError,
        NestedExecutorError,
        OutOfMemoryError,
        PodRejectedError,
        ProtocolError,
        QuotaError,
        RemoteError,
        RunCancelledError,
        RunDeadlineError,
        RuntimeMismatchError,
        SerializationError,
        StartTimeoutError,
        UnschedulableError,
        WorkerCrashedError,
        WorkerLostError,
        WorkerStartError,
    )
    from asyncrt.executor import Executor, connect
    from asyncrt.inside import CurrentCall, current_call
    from asyncrt.options import Backups, CallOptions, ExecutorOptions, Retry
    from asyncrt.outcome import Failure, Success
    from asyncrt.run import Run

__version__ = "0.1.0"

_HOMES = {
    "Backups": "options",
    "Call": "call",
    "CallOptions": "options",
    "Config": "config",
    "CurrentCall": "inside",
    "Executor": "executor",
    "ExecutorOptions": "options",
    "Failure": "outcome",
    "Retry": "options",
    "Run": "run",
    "Success": "outcome",
    "connect": "executor",
    "current_call": "inside",
    "load_config": "config",
    "AsyncrtError": "errors",
    "AuthenticationError": "errors",
    "CallError": "errors",
    "CallExitedError": "errors",
    "CallTimeoutError": "errors",
    "ConfigError": "errors",
    "ExecutorClosedError": "errors",
    "ImageError": "errors",
    "KubernetesError": "errors",
    "NestedExecutorError": "errors",
    "ModulesError": "errors",
    "OutOfMemoryError": "errors",
    "PodRejectedError": "errors",
    "ProtocolError": "errors",
    "QuotaError": "errors",
    "RemoteError": "errors",
    "RunCancelledError": "errors",
    "RunDeadlineError": "errors",
    "RuntimeMismatchError": "errors",
    "SerializationError": "errors",
    "StartTimeoutError": "errors",
    "UnschedulableError": "errors",
    "WorkerCrashedError": "errors",
    "WorkerLostError": "errors",
    "WorkerStartError": "errors",
}

__all__ = [
    "AsyncrtError",
    "AuthenticationError",
    "Backups",
    "Call",
    "CallError",
    "CallExitedError",
    "CallOptions",
    "CallTimeoutError",
    "Config",
    "ConfigError",
    "CurrentCall",
    "Executor",
    "ExecutorClosedError",
    "ExecutorOptions",
    "Failure",
    "ImageError",
    "KubernetesError",
    "NestedExecutorError",
    "ModulesError",
    "OutOfMemoryError",
    "PodRejectedError",
    "ProtocolError",
    "QuotaError",
    "RemoteError",
    "Retry",
    "Run",
    "RunCancelledError",
    "RunDeadlineError",
    "RuntimeMismatchError",
    "SerializationError",
    "StartTimeoutError",
    "Success",
    "UnschedulableError",
    "WorkerCrashedError",
    "WorkerLostError",
    "WorkerStartError",
    "__version__",
    "connect",
    "current_call",
    "load_config",
    "sync",
]


def __getattr__(name: str) -> Any:
    if name == "sync":
        return import_module("asyncrt.sync")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'asyncrt' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"asyncrt.{home}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("asyncrt."):
            raise
        from asyncrt.placeholder import Placeholder  # noqa: PLC0415 - needed in such images only

        value = Placeholder(name, (), {})
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
