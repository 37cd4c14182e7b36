"""What Kubernetes says of pods and Jobs, and what that means: one table, no clock and no I/O.

A *verdict* is ``None`` (all is well, or it is not known yet), ``Waiting`` (with the words of the
scheduler or the kubelet, for people) or ``Failed`` (with the error that the user gets). Pods, Jobs
and events are the plain JSON of the API. Waiting turns into failure after a time that Kubernetes
does not tell, so the caller keeps a ``Memory`` of when each problem was first seen.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from asyncrt.backends.manifest import CONTAINER
from asyncrt.backends.podhints import IMAGE_HINTS, POD_HINTS, hint_for
from asyncrt.errors import (
    AsyncrtError,
    ImageError,
    OutOfMemoryError,
    PodRejectedError,
    QuotaError,
    StartTimeoutError,
    UnschedulableError,
    WorkerLostError,
    WorkerStartError,
)
from asyncrt.quantities import parse_limit

Object = Mapping[str, Any]

_IMAGE_PROBLEMS: Final = frozenset(
    {
        "ErrImageNeverPull",
        "ErrImagePull",
        "ImageInspectError",
        "ImagePullBackOff",
        "InvalidImageName",
        "RegistryUnavailable",
        "SignatureValidationFailed",
    }
)
_PERMANENT_IMAGE_PROBLEMS: Final = frozenset({"ErrImageNeverPull", "InvalidImageName"})
_CONTAINER_PROBLEMS: Final = frozenset(
    {
        "CreateContainerConfigError",
        "CreateContainerError",
        "PostStartHookError",
        "PreCreateHookError",
        "PreStartHookError",
        "RunContainerError",
    }
)
# Nothing ran: the image has no such program, or it is for another machine.
_CANNOT_RUN: Final = frozenset({"ContainerCannotRun", "StartError"})
_VOLUME_EVENTS: Final = ("FailedMount", "FailedAttachVolume", "FailedMapVolume")
_CREATE_EVENTS: Final = ("FailedCreate", "SuccessfulCreate")
_ABSENT_VOLUME: Final = re.compile(r"(secret|configmap|persistentvolumeclaim) \S+ not found")
# What a node says to a pod that the scheduler gave it: another pod may have better luck.
_NODE_REFUSALS: Final = re.compile(
    r"Evicted|NodeAffinity|NodeLost|NodeName|NodePorts|NodeShutdown|OutOf.+|Preempting|Shutdown"
    r"|TaintToleration|Terminated|UnexpectedAdmissionError|UnexpectedPredicateFailureType"
)

_SCHEDULER_TAIL: Final = re.compile(
    r"[.,]?\s*(no new claims to deallocate,?\s*)?preemption: .*$", re.DOTALL
)
_POD_NAME: Final = re.compile(r'[Pp]ods? "[^"]*" (is )?')
# An API server, a webhook or etcd that is in trouble; not an answer about the pod.
_TRANSIENT: Final = re.compile(
    r"Internal error occurred|etcdserver|connection refused|context deadline exceeded|timeout"
    r"|too many requests|server is currently unable|the object has been modified"
)

_LONGEST_MESSAGE: Final = 300  # of one group in a summary

Memory = dict[tuple[str, str], float]
"""When each problem of a pod or Job (by uid) was first seen; kept by the caller, one for all."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing has failed, and nothing happens until something outside changes.

    Attributes:
        what: ``"pending"``, ``"starting"``, ``"not created"`` or ``"suspended"``.
        reason: Kubernetes' word, such as ``Unschedulable``.
        message: What Kubernetes said, as far as it helps.
        count: Pods that wait so.
    """

    what: str
    reason: str
    message: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Failed:
    """It will not work any more.

    Attributes:
        error: For the user.
        retry: Whether another pod, exactly like this one, may work.
    """

    error: AsyncrtError
    retry: bool


Verdict = Waiting | Failed | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a problem may last until it is a failure. All are seconds.

    Attributes:
        start_timeout: What only waits: for a node, a quota, a volume.
        image: A failing pull; the kubelet tries again after 10 s.
        config: A Secret or ConfigMap that is not there. (The pool's own ones are created after its
            Job.)
    """

    start_timeout: float
    image: float = 15.0
    config: float = 15.0


def judge_pod(
    pod: Object,
    events: Iterable[Object] = (),
    *,
    now: float,
    memory: Memory,
    patience: Patience,
    ready: bool = False,
    deleted: bool = False,
    log_tail: str = "",
) -> Verdict:
    """Say what a pod's state means.

    Args:
        pod: As it was last seen.
        events: Those about it (``involvedObject`` is the pod), in any order.
        now: The clock of ``memory``.
        ready: Its worker has said hello. Then a failure hits calls; before, only a start.
        deleted: It is gone (the watch said DELETED), and not because the caller wanted it.
        log_tail: The last lines that the worker itself wrote, if they are known.
    """
    uid = pod["metadata"]["uid"]
    memory.setdefault((uid, "pod"), now)
    case = _Case(pod, _by_age(events), now, memory, patience, ready, log_tail)
    verdict: Verdict = case.judge_end(deleted=deleted) or case.judge_node()
    if verdict is None and not case.over:
        verdict = case.judge_start()
    if deleted or case.over:
        for key in [key for key in memory if key[0] == uid]:
            del memory[key]
    return verdict


def judge_job(
    job: Object,
    events: Iterable[Object] = (),
    *,
    missing: int,
    now: float,
    memory: Memory,
    patience: Patience,
    deleted: bool = False,
) -> Verdict:
    """Say what a Job's state means for pods that it has not created.

    Args:
        events: Those about the Job itself.
        missing: Pods that were asked for and do not exist. With none, all is well: events of the
            past stay.
        deleted: It is gone, and not because the caller wanted it.
    """
    uid, name = job["metadata"]["uid"], job["metadata"]["name"]
    if missing <= 0:
        memory.pop((uid, "create"), None)
        return None
    conditions = _true_conditions(job)
    ended = next(
        (
            conditions[kind]
            for kind in ("Failed", "FailureTarget", "Complete")
            if kind in conditions
        ),
        None,
    )
    if deleted or ended is not None:
        reason = "Deleted" if ended is None else ended.get("reason") or ended["type"]
        said = f": {reason}: {ended['message']}" if ended and ended.get("message") else ""
        how = "was deleted by somebody" if deleted else "has ended"
        error = WorkerStartError(
            f"Job {name} {how}, so it starts no more pods{said}",
            reason=reason,
            detail=(ended or {}).get("message", ""),
        )
        return Failed(error, retry=True)
    if "Suspended" in conditions:
        said = "the Job is suspended; a queue (Kueue) or a person has to resume it"
        return Waiting("suspended", "Suspended", said, missing)
    tries = [event for event in _by_age(events) if event.get("reason") in _CREATE_EVENTS]
    if not tries or tries[-1]["reason"] != "FailedCreate":
        memory.pop((uid, "create"), None)
        return None
    since = memory.setdefault((uid, "create"), now)
    return judge_refusal(
        tries[-1].get("message", ""), waited=now - since, patience=patience, count=missing
    )


def judge_refusal(message: str, *, waited: float, patience: Patience, count: int = 1) -> Verdict:
    """Say what it means that the API server does not create a Job or its pods.

    Args:
        message: Of the ``FailedCreate`` event, or of the answer with status 403 or 422.
        waited: Seconds since it was first said.
        count: Objects that it is said of.
    """
    said = _POD_NAME.sub("", message.removeprefix("Error creating: ")).strip()
    said = said.removeprefix("forbidden: ")
    if "exceeded quota" in message:
        if waited < patience.start_timeout:
            return Waiting("not created", "FailedCreate", said, count)
        error: WorkerStartError = QuotaError(
            f"the namespace's quota did not allow a worker within {patience.start_timeout:g} s: "
            f"{said}",
            reason="FailedCreate",
            detail=message,
        )
        return Failed(error, retry=True)
    if _TRANSIENT.search(message):
        if waited < patience.start_timeout:
            return Waiting("not created", "FailedCreate", said, count)
        error = StartTimeoutError(
            f"no pod was created within start_timeout={patience.start_timeout:g} s: {said}",
            reason="FailedCreate",
            detail=message,
        )
        return Failed(error, retry=True)
    error = PodRejectedError(
        f"Kubernetes refuses the workers' pods: {said}{hint_for(POD_HINTS, message)}",
        reason="FailedCreate",
        detail=message,
    )
    return Failed(error, retry=False)


def summary(waits: Iterable[Waiting]) -> str:
    """Return one line that says what is waited for; empty if nothing is.

    Example:
        ``3 pods pending: 0/1 nodes are available: 1 Insufficient cpu``
    """
    counts: Counter[tuple[str, str]] = Counter()
    for wait in waits:
        message = " ".join(wait.message.split())
        counts[wait.what, message[:_LONGEST_MESSAGE]] += wait.count
    return "; ".join(
        f"{count} pod{'s' if count != 1 else ''} {what}{f': {message}' if message else ''}"
        for (what, message), count in counts.most_common()
    )


class _Case:
    """One look at one pod."""

    def __init__(
        self,
        pod: Object,
        events: Sequence[Object],
        now: float,
        memory: Memory,
        patience: Patience,
        ready: bool,
        log_tail: str,
    ) -> None:
        self._events = events
        self._now = now
        self._memory = memory
        self._patience = patience
        self._ready = ready
        self._log_tail = log_tail
        self._spec: Object = pod["spec"]
        self._status: Object = pod.get("status") or {}
        self._uid: str = pod["metadata"]["uid"]
        self._facts = {
            "pod": pod["metadata"]["name"],
            "node": self._spec.get("nodeName") or "",
            "image": next(
                (item["image"] for item in self._spec["containers"] if item["name"] == CONTAINER),
                "",
            ),
        }
        self._state: Object = self._container_status().get("state") or {}

    @property
    def over(self) -> bool:
        """Whether its worker has ended."""
        return self._status.get("phase") in ("Failed", "Succeeded") or "terminated" in self._state

    def judge_end(self, *, deleted: bool) -> Failed | None:
        """Say what the end of the worker means, if it has ended."""
        terminated: Object = self._state.get("terminated") or {}
        code, reason = terminated.get("exitCode"), terminated.get("reason", "")
        if reason == "OOMKilled" and code != 0:
            return self._out_of_memory()
        if reason in _CANNOT_RUN:
            said = terminated.get("message", "")
            return self._failed(ImageError, "cannot run a worker", reason, said, retry=False)
        disruption = self._condition("DisruptionTarget")
        if disruption.get("status") == "True" and (self.over or deleted):
            return self._lost(disruption.get("reason", ""), disruption.get("message", ""))
        if self._status.get("phase") == "Failed" and self._status.get("reason"):
            return self._judge_failed_pod(self._status["reason"])
        if reason == "ContainerStatusUnknown":
            return self._lost(reason, terminated.get("message", ""))
        if terminated and (code != 0 or not self._ready):
            return self._ended(code, terminated.get("message", ""))
        if self._status.get("phase") == "Failed":
            return self._judge_init_containers() or self._lost("Failed", "it did not say why")
        if deleted and not self.over:
            return self._lost("Deleted", "it was deleted while it ran")
        return None

    def judge_node(self) -> Failed | None:
        """Say whether its node is gone."""
        if self._status.get("reason") == "NodeLost" or self._status.get("phase") == "Unknown":
            return self._lost("NodeLost", self._status.get("message", ""))
        # The node's controller says both. A node that came back makes its pods Ready again.
        last = self._last_event("NodeNotReady")
        running = self._status.get("phase") == "Running" and not self.over
        if last is not None and running and self._condition("Ready").get("status") == "False":
            return self._lost("NodeNotReady", last.get("message", ""))
        return None

    def judge_start(self) -> Verdict:
        """Say what keeps it from running, if it does not."""
        if "running" in self._state or self._status.get("phase") == "Running":
            return None
        scheduled = self._condition("PodScheduled")
        if scheduled.get("status") == "False":
            return self._judge_unscheduled(scheduled)
        for waiting in self._waiting():
            reason = waiting.get("reason", "")
            if reason in _IMAGE_PROBLEMS:
                return self._judge_image(reason, waiting.get("message", ""))
            if reason in _CONTAINER_PROBLEMS:
                return self._judge_container(reason, waiting.get("message", ""))
        return self._judge_volumes() or self._still_starting()

    def _judge_failed_pod(self, reason: str) -> Failed:
        said = self._status.get("message", "")
        if _NODE_REFUSALS.fullmatch(reason):
            return self._lost(reason, said)
        if self._ready:
            return self._lost(reason, said)
        return self._failed(PodRejectedError, "was rejected by its node", reason, said, retry=False)

    def _judge_init_containers(self) -> Failed | None:
        for status in self._status.get("initContainerStatuses") or ():
            ended = (status.get("state") or {}).get("terminated") or {}
            if ended.get("exitCode"):
                said = f"its init container {status['name']!r} ended with code {ended['exitCode']}"
                reason = ended.get("reason", "Error")
                return self._failed(
                    WorkerStartError, said, reason, ended.get("message", ""), retry=True
                )
        return None

    def _judge_unscheduled(self, condition: Object) -> Verdict:
        reason, message = condition.get("reason", ""), condition.get("message", "")
        said = _SCHEDULER_TAIL.sub("", message)
        if self._age("pod") < self._patience.start_timeout:
            return Waiting("pending", reason, said)
        return self._failed(
            UnschedulableError,
            f"had no node within start_timeout={self._patience.start_timeout:g} s",
            reason,
            message,
            said=said,
            retry=False,
        )

    def _judge_image(self, reason: str, message: str) -> Verdict:
        # Up to 1.31, "Back-off pulling image" says no more; the event of the pull does.
        pull = self._last_event("Failed", containing="pull image")
        if pull is not None and "rpc error" not in message:
            message = pull.get("message", message)
        age = self._age("image")
        if reason not in _PERMANENT_IMAGE_PROBLEMS and age < self._limit(self._patience.image):
            return Waiting("starting", reason, message)
        return self._failed(ImageError, "cannot pull its image", reason, message, retry=False)

    def _judge_container(self, reason: str, message: str) -> Verdict:
        if self._age("config") < self._limit(self._patience.config):
            return Waiting("starting", reason, f"{reason}: {message}")
        return self._failed(
            PodRejectedError, "cannot create its container", reason, message, retry=False
        )

    def _judge_volumes(self) -> Verdict:
        # Only the newest event: older ones stay when the volumes are there at last.
        last = self._events[-1] if self._events else {}
        mounted = self._condition("PodReadyToStartContainers").get("status") == "True"
        if mounted or last.get("reason") not in _VOLUME_EVENTS:
            return None
        reason, message = last["reason"], last.get("message", "")
        absent = _ABSENT_VOLUME.search(message) is not None
        limit = self._limit(self._patience.config) if absent else self._patience.start_timeout
        if self._age("volume") < limit:
            return Waiting("starting", reason, message)
        return self._failed(PodRejectedError, "cannot mount a volume", reason, message, retry=False)

    def _still_starting(self) -> Verdict:
        last = self._events[-1] if self._events else None
        reason = last.get("reason", "") if last else ""
        said = last.get("message", "") if last else ""
        if self._age("pod") < self._patience.start_timeout:
            # What succeeded is no reason to wait: of it, only what takes its time is told.
            told = said if last and (last.get("type") == "Warning" or reason == "Pulling") else ""
            return Waiting("starting", reason, told)
        return self._failed(
            StartTimeoutError,
            f"did not run within start_timeout={self._patience.start_timeout:g} s",
            reason,
            said,
            retry=True,
        )

    def _out_of_memory(self) -> Failed:
        limit = self._memory_limit()
        shown = f"its memory limit of {limit}" if limit else "a memory limit"
        if not self._ready:
            said = f"was killed by {shown} before it was ready; ask for more memory"
            return self._failed(WorkerStartError, said, "OOMKilled", "", retry=False)
        error = OutOfMemoryError(
            f"{self._name()} was killed by {shown}; ask for more with memory=...",
            limit_bytes=parse_limit(limit, key="memory") if limit else 0,
            worker=self._facts["pod"],
        )
        return Failed(error, retry=False)

    def _ended(self, code: int | None, message: str) -> Failed:
        how = f"ended with code {code}"
        if code is not None and code > 128:
            how += f" (signal {code - 128})"
        if self._ready:
            return self._lost("Error", f"its worker {how}")
        if "exec format error" in self._log_tail:
            return self._failed(ImageError, "cannot run", "Error", self._log_tail, retry=False)
        said = f"{how} before it was ready; does its image have Python 3.11 or newer?"
        return self._failed(WorkerStartError, said, "Error", message, code=code, retry=True)

    def _lost(self, reason: str, message: str) -> Failed:
        """Return the failure of a pod that went away through no fault of its own."""
        if not self._ready:
            return self._failed(WorkerStartError, "went away", reason, message, retry=True)
        said = f": {message}" if message else ""
        error = WorkerLostError(
            f"{self._name()} went away: {reason}{said}", worker=self._facts["pod"]
        )
        return Failed(error, retry=True)

    def _failed(
        self,
        kind: type[WorkerStartError],
        what: str,
        reason: str,
        detail: str,
        *,
        retry: bool,
        said: str | None = None,
        code: int | None = None,
    ) -> Failed:
        said = detail if said is None else said
        named = f": {reason}" if reason and reason not in said else ""
        image = f" ({self._facts['image']})" if kind is ImageError else ""
        hints = {ImageError: IMAGE_HINTS, PodRejectedError: POD_HINTS}.get(kind, ())
        hint = hint_for(hints, f"{reason} {detail}")
        error = kind(
            f"{self._name()} {what}{image}{named}{f': {said}' if said else ''}{hint}",
            reason=reason,
            detail=detail,
            exit_code=code,
            log_tail=self._log_tail,
            **self._facts,
        )
        return Failed(error, retry=retry)

    def _name(self) -> str:
        node = self._facts["node"]
        return f"pod {self._facts['pod']}{f' on node {node}' if node else ''}"

    def _condition(self, kind: str) -> Object:
        found = [item for item in self._status.get("conditions") or () if item["type"] == kind]
        return found[0] if found else {}

    def _age(self, problem: str) -> float:
        return self._now - self._memory.setdefault((self._uid, problem), self._now)

    def _limit(self, seconds: float) -> float:
        return min(seconds, self._patience.start_timeout)

    def _container_status(self) -> Object:
        for status in self._status.get("containerStatuses") or ():
            if status.get("name") == CONTAINER:
                found: Object = status
                return found
        return {}

    def _waiting(self) -> Iterable[Object]:
        """Return what its containers wait for, init containers first, since they run first."""
        kinds = ("initContainerStatuses", "containerStatuses")
        for status in (item for kind in kinds for item in self._status.get(kind) or ()):
            waiting = (status.get("state") or {}).get("waiting")
            if waiting:
                yield waiting

    def _memory_limit(self) -> str:
        for container in self._spec["containers"]:
            if container["name"] == CONTAINER:
                limits = (container.get("resources") or {}).get("limits") or {}
                return str(limits.get("memory", ""))
        return ""

    def _last_event(self, *reasons: str, containing: str = "") -> Object | None:
        for event in reversed(self._events):
            if event.get("reason") in reasons and containing in event.get("message", ""):
                return event
        return None


def _true_conditions(job: Object) -> dict[str, Object]:
    conditions = (job.get("status") or {}).get("conditions") or ()
    return {item["type"]: item for item in conditions if item["status"] == "True"}


def _by_age(events: Iterable[Object]) -> list[Object]:
    """Return events, the newest last. Those of one second stay in their order."""
    return sorted(events, key=_last_seen)


def _last_seen(event: Object) -> str:
    series = event.get("series") or {}
    for moment in (series.get("lastObservedTime"), event.get("lastTimestamp")):
        if moment:
            return str(moment).rstrip("Z")  # so that fractions of a second sort after its beginning
    created = (event.get("metadata") or {}).get("creationTimestamp")
    return str(event.get("eventTime") or created or "").rstrip("Z")
