"""The controllers of a fake cluster: Indexed Jobs, their deadline and TTL, garbage collection."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Iterable
from typing import Final

from asyncrt.testing.fakestore import (
    ApiError,
    Change,
    Object,
    Store,
    random_suffix,
    timestamp,
)

INDEX_LABEL: Final = "batch.kubernetes.io/job-completion-index"
_MANY: Final = 2_147_483_647
_SYNC_SECONDS: Final = 0.01  # the real one waits a second, to count many pods at once


def default_job(job: Object) -> None:
    """Fill in what the API server fills in, and refuse what it refuses.

    Raises:
        ApiError: 422.
    """
    spec, metadata = job["spec"], job["metadata"]
    name, uid = metadata["name"], metadata["uid"]
    template = spec.get("template") or {}
    pod = template.get("spec") or {}
    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        raise invalid_job(
            name,
            'spec.template.spec.restartPolicy: Required value: valid values: "OnFailure", "Never"',
        )
    if not pod.get("containers"):
        raise invalid_job(name, "spec.template.spec.containers: Required value")
    indexed = spec.setdefault("completionMode", "NonIndexed") == "Indexed"
    if indexed and spec.get("completions") is None:
        raise invalid_job(
            name,
            "spec.completions: Required value: when completion mode is Indexed",
        )
    if spec.get("backoffLimitPerIndex") is not None and not indexed:
        raise invalid_job(
            name, "spec.backoffLimitPerIndex: Invalid value: requires indexed completion mode"
        )
    spec.setdefault("parallelism", 1)
    spec.setdefault("completions", 1)
    spec.setdefault("backoffLimit", 6 if spec.get("backoffLimitPerIndex") is None else _MANY)
    spec.setdefault("suspend", False)
    spec.setdefault("podReplacementPolicy", "TerminatingOrFailed")
    labels = {
        "batch.kubernetes.io/controller-uid": uid,
        "batch.kubernetes.io/job-name": name,
        "controller-uid": uid,
        "job-name": name,
    }
    spec.setdefault("selector", {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}})
    meta = spec["template"].setdefault("metadata", {})
    meta["labels"] = {**(meta.get("labels") or {}), **labels}
    job["status"] = {}


def invalid_job(name: str, what: str) -> ApiError:
    """Return the refusal of a Job."""
    return ApiError(
        422,
        "Invalid",
        f'Job.batch "{name}" is invalid: {what}',
        {"name": name, "group": "batch", "kind": "Job"},
    )


def check_job_change(before: Object, after: Object) -> None:
    """Refuse changes of what is immutable.

    https://kubernetes.io/docs/concepts/workloads/controllers/job/#elastic-indexed-jobs

    Raises:
        ApiError: 422.
    """
    name, old, new = before["metadata"]["name"], before["spec"], after["spec"]
    for field in ("template", "selector", "completionMode", "backoffLimitPerIndex"):
        if old.get(field) != new.get(field):
            raise invalid_job(name, f"spec.{field}: Invalid value: field is immutable")
    if old["completions"] != new["completions"] and (
        new["completionMode"] != "Indexed" or new["completions"] != new["parallelism"]
    ):
        raise invalid_job(
            name, f"spec.completions: Invalid value: {new['completions']}: field is immutable"
        )


class Controllers:
    """What the controller manager does, at once instead of every few seconds.

    Args:
        delete_pod: Deletes a pod as the API server does.
        check_quota: Raises the refusal of a pod, if one is due.
        record: Stores an event: object, type, reason, message.
        retry_seconds: Pause before a failed index is started again (10, in a real cluster).
    """

    def __init__(
        self,
        store: Store,
        *,
        delete_pod: Callable[[Object], object],
        check_quota: Callable[[str, str], None],
        record: Callable[[Object, str, str, str], None],
        retry_seconds: float,
    ) -> None:
        self._store = store
        self._delete_pod = delete_pod
        self._check_quota = check_quota
        self._record = record
        self._retry_seconds = retry_seconds
        self._timers: set[asyncio.TimerHandle] = set()
        self._dirty: dict[tuple[str, str], None] = {}
        self._failures: dict[str, dict[str, Object]] = {}
        self._started: dict[str, float] = {}
        self._retry_at: dict[tuple[str, int], float] = {}
        self._scheduled = False
        self._unsubscribe = store.subscribe(self._on_change)

    def close(self) -> None:
        """Stop."""
        self._unsubscribe()
        for timer in self._timers:
            timer.cancel()

    def delete(self, resource: str, item: Object, policy: str) -> None:
        """Delete an object and what it owns, by a propagation policy."""
        uid = item["metadata"]["uid"]
        if policy == "Orphan":
            for kind, dependent in self._store.dependents(uid):
                self._store.update(kind, dependent, _without_owner(uid))
        elif policy == "Foreground":
            self._delete_dependents(uid)
        self._store.remove(resource, item)

    def _delete_dependents(self, uid: str) -> None:
        for resource, item in self._store.dependents(uid):
            if resource == "pods":
                self._delete_pod(item)
            else:
                self.delete(resource, item, "Background")

    def _on_change(self, change: Change) -> None:
        item = change.after or change.before
        assert item is not None
        metadata = item["metadata"]
        if change.after is None:
            self._soon(lambda: self._delete_dependents(metadata["uid"]))
        elif change.before is None and any(
            not self._store.exists(owner["uid"]) for owner in metadata.get("ownerReferences") or ()
        ):
            # Its owner was gone before it came: the garbage collector takes it as well.
            self._soon(lambda: self._collect(change.resource, item))
        if change.resource == "jobs" and change.after is not None:
            self._mark(metadata["namespace"], metadata["name"])
        elif change.resource == "pods":
            for owner in metadata.get("ownerReferences") or ():
                if owner["kind"] == "Job":
                    self._remember_failure(owner["uid"], item)
                    self._mark(metadata["namespace"], owner["name"])

    def _collect(self, resource: str, item: Object) -> None:
        if resource == "pods":
            self._delete_pod(item)
        else:
            self.delete(resource, item, "Background")

    def _remember_failure(self, job_uid: str, pod: Object) -> None:
        """Keep failed pods in mind even after somebody deleted them, as the Job's status does."""
        phase = pod["status"].get("phase")
        gone_early = self._store.find("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
        if phase in ("Failed", "Succeeded") or gone_early is None:
            self._failures.setdefault(job_uid, {})[pod["metadata"]["uid"]] = pod

    def _mark(self, namespace: str, name: str) -> None:
        self._dirty[namespace, name] = None
        if not self._scheduled:
            self._scheduled = True
            self._soon(self._reconcile_all, _SYNC_SECONDS)

    def _soon(self, function: Callable[[], None], delay: float = 0.0) -> None:
        def run() -> None:
            self._timers.discard(timer)
            function()

        timer = asyncio.get_running_loop().call_later(delay, run)
        self._timers.add(timer)

    def _reconcile_all(self) -> None:
        self._scheduled = False
        dirty, self._dirty = self._dirty, {}
        for namespace, name in dirty:
            job = self._store.find("jobs", namespace, name)
            if job is not None and not job["metadata"].get("deletionTimestamp"):
                self._reconcile(job)

    def _reconcile(self, job: Object) -> None:
        if _is_finished(job):
            return
        uid, spec, metadata = job["metadata"]["uid"], job["spec"], job["metadata"]
        if not job["status"].get("startTime"):
            self._start(job)
            return
        present = [item for resource, item in self._store.dependents(uid) if resource == "pods"]
        ended = self._failures.get(uid, {})
        active = [
            pod
            for pod in present
            if pod["status"].get("phase") in (None, "Pending", "Running")
            and not pod["metadata"].get("deletionTimestamp")
        ]
        terminating = [
            pod
            for pod in present
            if pod["metadata"].get("deletionTimestamp")
            and pod["status"].get("phase") in ("Pending", "Running")
        ]
        completed = {
            index_of(pod) for pod in ended.values() if pod["status"].get("phase") == "Succeeded"
        }
        verdict = _Verdict(job, [p for p in ended.values() if index_of(p) not in completed])
        deadline = spec.get("activeDeadlineSeconds")
        started = self._started_at(job)
        if deadline is not None and time.monotonic() - started >= deadline:
            verdict.end = ("DeadlineExceeded", "Job was active longer than specified deadline")
        elif deadline is not None:
            remaining = deadline - (time.monotonic() - started)
            self._soon(lambda: self._mark(metadata["namespace"], metadata["name"]), remaining)
        completions = spec["completions"]
        done = {index for index in completed if index < completions}
        failed = {index for index in verdict.failed_indexes if index < completions}
        if verdict.end is None and len(done | failed) == completions and not active:
            verdict.end = ("FailedIndexes", "Job has failed indexes") if failed else ("", "")
        self._set_status(job, active, terminating, done, failed, ended, verdict.end)
        if verdict.end is not None:
            for pod in active:
                self._delete_pod(pod)
            self._start_ttl(job)
            return
        self._adjust(job, active, terminating, done | failed, verdict)

    def _start(self, job: Object) -> None:
        self._started[job["metadata"]["uid"]] = time.monotonic()
        self._store.update("jobs", job, lambda item: item["status"].update(startTime=timestamp()))

    def _started_at(self, job: Object) -> float:
        return self._started.setdefault(job["metadata"]["uid"], time.monotonic())

    def _adjust(
        self,
        job: Object,
        active: list[Object],
        terminating: list[Object],
        ended: set[int],
        verdict: _Verdict,
    ) -> None:
        """Create the pods that are missing, delete those that are too many."""
        spec, metadata = job["spec"], job["metadata"]
        if spec["suspend"]:
            for pod in active:
                self._delete_pod(pod)
            return
        by_index = {index_of(pod) for pod in active}
        for pod in active:
            if index_of(pod) >= spec["completions"]:
                self._delete_pod(pod)
        busy = by_index
        if spec["podReplacementPolicy"] == "Failed":
            busy = by_index | {index_of(pod) for pod in terminating}
        wanted = min(spec["parallelism"], spec["completions"] - len(ended))
        for pod in sorted(active, key=index_of, reverse=True)[: max(0, len(active) - wanted)]:
            self._delete_pod(pod)
        room = wanted - len(active)
        for index in range(spec["completions"]):
            if room <= 0:
                return
            if index in busy or index in ended:
                continue
            tries = verdict.failures.get(index, 0)
            if tries and not self._may_retry(job, index, tries):
                continue
            try:
                self._check_quota(metadata["namespace"], metadata["name"])
                self._store.create("pods", metadata["namespace"], make_pod(job, index, tries))
            except ApiError as error:
                self._record(job, "Warning", "FailedCreate", f"Error creating: {error}")
                self._soon(
                    lambda: self._mark(metadata["namespace"], metadata["name"]),
                    self._retry_seconds,
                )
                return
            room -= 1

    def _may_retry(self, job: Object, index: int, tries: int) -> bool:
        key = (f"{job['metadata']['uid']}/{tries}", index)
        now = time.monotonic()
        at = self._retry_at.setdefault(key, now + self._retry_seconds)
        if now >= at:
            return True
        metadata = job["metadata"]
        self._soon(lambda: self._mark(metadata["namespace"], metadata["name"]), at - now)
        return False

    def _set_status(
        self,
        job: Object,
        active: list[Object],
        terminating: list[Object],
        done: set[int],
        failed: set[int],
        ended: dict[str, Object],
        end: tuple[str, str] | None,
    ) -> None:
        def change(item: Object) -> None:
            status = item["status"]
            ready = sum(1 for pod in active if _is_ready(pod))
            status.update(
                active=len(active),
                ready=ready,
                terminating=len(terminating),
                succeeded=len(done),
                failed=sum(1 for p in ended.values() if p["status"].get("phase") != "Succeeded"),
                completedIndexes=ranges(done),
                uncountedTerminatedPods={},
            )
            if item["spec"].get("backoffLimitPerIndex") is not None:
                status["failedIndexes"] = ranges(failed)
            if end is not None:
                _finish(status, *end)

        self._store.update("jobs", job, change)

    def _start_ttl(self, job: Object) -> None:
        ttl = job["spec"].get("ttlSecondsAfterFinished")
        if ttl is not None:
            self._soon(lambda: self.delete("jobs", job, "Foreground"), ttl)


class _Verdict:
    """What the pods of a Job that failed mean for it, by its failure policy."""

    def __init__(self, job: Object, failed: Iterable[Object]) -> None:
        self.end: tuple[str, str] | None = None
        self.failures: dict[int, int] = {}
        self.failed_indexes: set[int] = set()
        spec = job["spec"]
        per_index = spec.get("backoffLimitPerIndex")
        counted = 0
        for pod in failed:
            index = index_of(pod)
            action = _policy_action(spec, pod)
            if action == "Ignore":
                continue
            if action == "FailJob":
                self.end = ("PodFailurePolicy", f"Pod {pod['metadata']['name']} failed")
            if action == "FailIndex":
                self.failed_indexes.add(index)
            counted += 1
            self.failures[index] = self.failures.get(index, 0) + 1
            if per_index is not None and self.failures[index] > per_index:
                self.failed_indexes.add(index)
        most = spec.get("maxFailedIndexes")
        if most is not None and len(self.failed_indexes) > most:
            self.end = (
                "MaxFailedIndexesExceeded",
                "Job has exceeded the specified maximal number of failed indexes",
            )
        elif counted > spec["backoffLimit"] and self.end is None:
            self.end = ("BackoffLimitExceeded", "Job has reached the specified backoff limit")


def _policy_action(spec: Object, pod: Object) -> str:
    codes = [
        status["state"]["terminated"]["exitCode"]
        for status in pod["status"].get("containerStatuses") or ()
        if "terminated" in status.get("state", {})
    ]
    conditions = {
        (condition["type"], condition["status"])
        for condition in pod["status"].get("conditions") or ()
    }
    for rule in (spec.get("podFailurePolicy") or {}).get("rules") or ():
        on_codes = rule.get("onExitCodes")
        if on_codes is not None:
            among = any(code in on_codes["values"] for code in codes if code != 0)
            if among if on_codes["operator"] == "In" else any(codes) and not among:
                return str(rule["action"])
        for pattern in rule.get("onPodConditions") or ():
            if (pattern["type"], pattern.get("status", "True")) in conditions:
                return str(rule["action"])
    return "Count"


def make_pod(job: Object, index: int, tries: int) -> Object:
    """Return the pod of an index, as the Job controller makes it."""
    metadata, template = job["metadata"], copy.deepcopy(job["spec"]["template"])
    name, meta, spec = metadata["name"], template["metadata"], template["spec"]
    labels = {**(meta.get("labels") or {}), INDEX_LABEL: str(index)}
    annotations = {**(meta.get("annotations") or {}), INDEX_LABEL: str(index)}
    if job["spec"].get("backoffLimitPerIndex") is not None:
        annotations["batch.kubernetes.io/job-index-failure-count"] = str(tries)
    spec.setdefault("hostname", f"{name}-{index}")
    for container in spec["containers"]:
        field = {"fieldPath": f"metadata.labels['{INDEX_LABEL}']"}
        container.setdefault("env", []).append(
            {"name": "JOB_COMPLETION_INDEX", "valueFrom": {"fieldRef": field}}
        )
    return {
        "metadata": {
            "name": f"{name}-{index}-{random_suffix()}",
            "generateName": f"{name}-{index}-",
            "labels": labels,
            "annotations": annotations,
            "ownerReferences": [
                {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    "name": name,
                    "uid": metadata["uid"],
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": spec,
        "status": {"phase": "Pending", "qosClass": "Burstable"},
    }


def index_of(pod: Object) -> int:
    """Return a pod's completion index."""
    return int((pod["metadata"].get("annotations") or {}).get(INDEX_LABEL, 0))


def ranges(indexes: Iterable[int]) -> str:
    """Return indexes as a Job's status writes them, such as ``0-2,5``."""
    intervals: list[list[int]] = []
    for index in sorted(indexes):
        if intervals and intervals[-1][1] == index - 1:
            intervals[-1][1] = index
        else:
            intervals.append([index, index])
    return ",".join(
        str(first) if first == last else f"{first}{',' if last == first + 1 else '-'}{last}"
        for first, last in intervals
    )


def _finish(status: Object, reason: str, message: str) -> None:
    now = timestamp()
    kinds = ("FailureTarget", "Failed") if reason else ("SuccessCriteriaMet", "Complete")
    status["conditions"] = [
        {
            "type": kind,
            "status": "True",
            "reason": reason or "CompletionsReached",
            "message": message or "Reached expected number of succeeded pods",
            "lastProbeTime": now,
            "lastTransitionTime": now,
        }
        for kind in kinds
    ]
    status["active"] = status["ready"] = 0
    if not reason:
        status["completionTime"] = now


def _is_finished(job: Object) -> bool:
    return any(
        condition["type"] in ("Complete", "Failed") and condition["status"] == "True"
        for condition in job["status"].get("conditions") or ()
    )


def _is_ready(pod: Object) -> bool:
    return any(
        condition["type"] == "Ready" and condition["status"] == "True"
        for condition in pod["status"].get("conditions") or ()
    )


def _without_owner(uid: str) -> Callable[[Object], None]:
    def change(item: Object) -> None:
        owners = item["metadata"]["ownerReferences"]
        item["metadata"]["ownerReferences"] = [o for o in owners if o["uid"] != uid]

    return change
