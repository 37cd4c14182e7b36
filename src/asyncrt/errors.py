"""Every error that asyncrt raises, in one tree.

A class exists only where a caller would act differently. Facts are attributes, so that code never
parses a message, and every error survives pickle.

    AsyncrtError
    ├── ConfigError (ValueError)            a configuration file, variable or option is wrong
    ├── ExecutorClosedError (RuntimeError)  used before it was opened or after it was closed
    ├── NestedExecutorError (RuntimeError)  a call tried to submit calls
    ├── ProtocolError                       the peer broke the wire format
    │   └── AuthenticationError             the peer does not know the pool's token
    ├── WorkerStartError                    no worker could be started
    │   ├── ImageError                        its image cannot be pulled, or cannot run
    │   ├── PodRejectedError                  Kubernetes refuses the pod as it is
    │   └── StartTimeoutError (TimeoutError)  ... within ``start_timeout``
    │       ├── QuotaError                      a quota of the namespace is used up
    │       └── UnschedulableError              no node has room for it
    ├── KubernetesError                     the API server refused a request, or did not answer
    ├── RuntimeMismatchError                client and worker cannot exchange pickles
    ├── ModulesError                        a local module that the function needs cannot travel
    ├── RunCancelledError                   the run was cancelled before this call ended
    ├── RunDeadlineError (TimeoutError)     the run was not done at its ``deadline``
    └── CallError                           one call failed, the others are not touched
        ├── CallTimeoutError (TimeoutError)   an attempt ran longer than ``timeout``
        ├── CallExitedError                   the function raised what is not an Exception
        ├── OutOfMemoryError (MemoryError)    the worker's memory limit killed it
        ├── RemoteError                       its own exception could not travel; here is its text
        ├── SerializationError (TypeError)    a function, argument or result cannot be pickled
        ├── WorkerCrashedError                the process died: signal, exit code
        └── WorkerLostError                   the worker went away under it

What the user's function raises is none of these: it is raised as it is, type and all.

This module travels with the worker: it imports nothing but the standard library.
"""

from __future__ import annotations

from typing import Any


def _rebuild(cls: type[AsyncrtError], message: str, state: dict[str, Any]) -> AsyncrtError:
    # The builtin that gives the layout: __new__ of another base (MemoryError) refuses the class.
    builtin: Any = cls
    while builtin.__module__ != "builtins":
        builtin = builtin.__base__
    error: AsyncrtError = builtin.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class AsyncrtError(Exception):
    """Base of all errors of asyncrt."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The default cannot rebuild errors with keyword-only facts: it calls cls(*args).
        return _rebuild, (type(self), str(self), self.__dict__)


class ConfigError(AsyncrtError, ValueError):
    """A configuration file, an environment variable or an option is wrong.

    Attributes:
        source: The file, variable or argument that holds the value; ``None`` if not known.
        line: Line in the file, from 1; ``None`` outside files.
        key: The dotted key, for example ``k8s.runtime_memory``.
        expected: What would have been accepted.
        suggestion: The nearest valid key, if there is one near.
    """

    def __init__(
        self,
        message: str,
        *,
        source: str | None = None,
        line: int | None = None,
        key: str | None = None,
        expected: str | None = None,
        suggestion: str | None = None,
    ) -> None:
        super().__init__(message)
        self.source = source
        self.line = line
        self.key = key
        self.expected = expected
        self.suggestion = suggestion


class ExecutorClosedError(AsyncrtError, RuntimeError):
    """The executor is not open: not yet entered, or already closed."""


class NestedExecutorError(AsyncrtError, RuntimeError):
    """A call tried to open an executor, or to take one with it.

    A call that waits for other calls holds a worker while it does: a pool of such calls waits for
    ever. Submit from the client instead: map over what the first calls return, or ``map_reduce``.
    """


INSTEAD_OF_NESTING = (
    "a call that waits for other calls holds a worker while it does; return what is to be done and "
    "map over it at the client, or use map_reduce"
)


class ProtocolError(AsyncrtError):
    """The peer broke the wire format. The connection is closed, the calls go on elsewhere."""


class AuthenticationError(ProtocolError):
    """The peer could not prove that it knows the pool's token."""


class WorkerStartError(AsyncrtError):
    """No worker could be started.

    Attributes:
        log_tail: The last lines that the worker wrote, if any.
        exit_code: How it ended; ``None`` if it did not run at all.
        pod: Name of the pod; empty if there is none, as the next ones.
        node: Its node.
        image: Its image.
        reason: Kubernetes' word for what is wrong, such as ``ImagePullBackOff``.
        detail: What Kubernetes said, in full.
    """

    def __init__(
        self,
        message: str,
        *,
        log_tail: str = "",
        exit_code: int | None = None,
        pod: str = "",
        node: str = "",
        image: str = "",
        reason: str = "",
        detail: str = "",
    ) -> None:
        super().__init__(message)
        self.log_tail = log_tail
        self.exit_code = exit_code
        self.pod = pod
        self.node = node
        self.image = image
        self.reason = reason
        self.detail = detail


class ImageError(WorkerStartError):
    """The image cannot be pulled, or cannot run a worker. Another image, or credentials, help."""


class PodRejectedError(WorkerStartError):
    """Kubernetes refuses the pod as it is: another attempt is refused too."""


class StartTimeoutError(WorkerStartError, TimeoutError):
    """No worker was ready within ``start_timeout`` seconds."""


class QuotaError(StartTimeoutError):
    """A quota of the namespace was used up for ``start_timeout`` seconds."""


class UnschedulableError(StartTimeoutError):
    """No node had room for the pod within ``start_timeout`` seconds."""


class KubernetesError(AsyncrtError):
    """The Kubernetes API server refused a request, or could not be asked.

    Attributes:
        status: The HTTP status; 0 if there was no answer.
        reason: In Kubernetes' own word, such as ``Forbidden``; without an answer ``Unreachable``,
            ``TLS`` or ``Timeout``.
        verb: As in a Role: ``create``, ``list``, ``watch``, ...
        resource: As in a Role: ``pods``, ``pods/log``, ...
        name: Of the object; empty for a collection.
        namespace: Empty outside namespaces.
        detail: The server's (or the system's) own words.
        hint: What to do about it; empty if that is not known.
        retry_after: Seconds to wait before another try, if the server said so.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        reason: str = "",
        verb: str = "",
        resource: str = "",
        name: str = "",
        namespace: str = "",
        detail: str = "",
        hint: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.verb = verb
        self.resource = resource
        self.name = name
        self.namespace = namespace
        self.detail = detail
        self.hint = hint
        self.retry_after = retry_after


class RuntimeMismatchError(AsyncrtError):
    """Client and worker cannot exchange pickles.

    Attributes:
        client: Version here.
        worker: Version there.
        what: ``"Python"``, ``"cloudpickle"`` or ``"asyncrt"``.
    """

    def __init__(self, message: str, *, what: str, client: str, worker: str) -> None:
        super().__init__(message)
        self.what = what
        self.client = client
        self.worker = worker


class ModulesError(AsyncrtError):
    """A module that the function needs cannot travel to the workers.

    Attributes:
        module: Its dotted name; empty if it is about several.
        paths: The files that it is about.
        limit_bytes: The size that was exceeded; 0 if it is not about size.
    """

    def __init__(
        self, message: str, *, module: str = "", paths: tuple[str, ...] = (), limit_bytes: int = 0
    ) -> None:
        super().__init__(message)
        self.module = module
        self.paths = paths
        self.limit_bytes = limit_bytes


class RunCancelledError(AsyncrtError):
    """The run, or this call of it, was cancelled before it ended."""


class RunDeadlineError(AsyncrtError, TimeoutError):
    """The run was not done at its deadline. What was done by then stays on the run."""


class CallError(AsyncrtError):
    """One call failed. The others are not touched.

    Attributes:
        run_id: The run; empty where it is not known.
        index: The call's index within its run.
        attempt: The attempt that failed, from 1.
        worker: Name of the worker that had it; empty if none had.
    """

    def __init__(
        self, message: str, *, run_id: str = "", index: int = 0, attempt: int = 0, worker: str = ""
    ) -> None:
        super().__init__(message)
        self.run_id = run_id
        self.index = index
        self.attempt = attempt
        self.worker = worker


class CallTimeoutError(CallError, TimeoutError):
    """An attempt ran longer than its ``timeout`` and was killed.

    Attributes:
        timeout: The limit, seconds.
    """

    def __init__(self, message: str, *, timeout: float = 0.0, **facts: Any) -> None:
        super().__init__(message, **facts)
        self.timeout = timeout


class CallExitedError(CallError):
    """The function raised something that is not an ``Exception``, such as ``SystemExit``.

    Raised as it is, it would end the program that waits for the call.

    Attributes:
        type_name: Qualified name of what was raised.
    """

    def __init__(self, message: str, *, type_name: str = "", **facts: Any) -> None:
        super().__init__(message, **facts)
        self.type_name = type_name


class OutOfMemoryError(CallError, MemoryError):
    """The memory limit killed the process that ran the call.

    Attributes:
        limit_bytes: The limit; 0 if it is not known.
        peak_bytes: The most that was seen; 0 if it is not known.
    """

    def __init__(
        self, message: str, *, limit_bytes: int = 0, peak_bytes: int = 0, **facts: Any
    ) -> None:
        super().__init__(message, **facts)
        self.limit_bytes = limit_bytes
        self.peak_bytes = peak_bytes


class RemoteError(CallError):
    """The function raised an exception that cannot travel. Its facts, as text.

    Attributes:
        type_name: Qualified name of the exception's class.
        text: Its ``str()``.
        reason: Why it could not travel.
    """

    def __init__(
        self, message: str, *, type_name: str = "", text: str = "", reason: str = "", **facts: Any
    ) -> None:
        super().__init__(message, **facts)
        self.type_name = type_name
        self.text = text
        self.reason = reason


class SerializationError(CallError, TypeError):
    """A function, an argument or a result cannot be pickled, or cannot be loaded on the other side.

    Attributes:
        path: Where the culprit sits, for example ``args[0].session``; empty if not found.
        module: The module that could not be imported on the other side; empty if it is not that.
    """

    def __init__(self, message: str, *, path: str = "", module: str = "", **facts: Any) -> None:
        super().__init__(message, **facts)
        self.path = path
        self.module = module


class WorkerCrashedError(CallError):
    """The process that ran the call died.

    Attributes:
        exit_code: What it passed to ``exit``; ``None`` if a signal killed it.
        signal: The signal's number; ``None`` if it exited by itself.
        log_tail: The last lines that the call wrote.
    """

    def __init__(
        self,
        message: str,
        *,
        exit_code: int | None = None,
        signal: int | None = None,
        log_tail: str = "",
        **facts: Any,
    ) -> None:
        super().__init__(message, **facts)
        self.exit_code = exit_code
        self.signal = signal
        self.log_tail = log_tail


class WorkerLostError(CallError):
    """The worker went away under the call, more often than can be blamed on chance."""
