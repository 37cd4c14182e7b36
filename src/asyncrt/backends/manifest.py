"""What a pool of workers is on Kubernetes: its objects, as pure functions of its settings.

A pool is one Indexed Job with a Secret (the worker's settings, the token among them) and a
ConfigMap (the worker's program), all of one name. **The Job is created first**, then the two others
with its uid as their owner; pods wait for them (the kubelet tries a mount again after half a
second). So a client may die between any two requests: what exists then belongs to the Job, whose
``activeDeadlineSeconds`` nobody pushes forward any more, and ``ttlSecondsAfterFinished`` removes it
all. The other order would leave a Secret that nothing owns. The Job has all its pods from the
start, not none at first: Kueue reserves what a Job asks for when it is created.

``maxFailedIndexes`` is left out on purpose: without it any number of indexes may fail, with it
there may be at most ``completions`` of them, which grow.
(https://kubernetes.io/docs/concepts/workloads/controllers/job/#backoff-limit-per-index)
"""

from __future__ import annotations

import base64
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import cloudpickle

import asyncrt
from asyncrt.errors import ConfigError
from asyncrt.k8snames import check_dns_label, check_label_value
from asyncrt.options import PoolSettings
from asyncrt.podoptions import MOUNT_FIELDS, PodSettings, thawed
from asyncrt.podpatch import merge_pod_patch
from asyncrt.worker.settings import WorkerSettings

CONTAINER: Final = "worker"
# On the pod's own loopback address: only port-forward and the pod's other containers reach it.
LISTEN_PORT: Final = 27182
PROGRAM_PATH: Final = "/asyncrt/program/worker.pyz"
SETTINGS_PATH: Final = "/asyncrt/settings/settings.json"

LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
LABEL_OWNER: Final = "asyncrt.dev/owner"
LABEL_EXECUTOR: Final = "asyncrt.dev/executor"
LABEL_POOL: Final = "asyncrt.dev/pool"
LABEL_QUEUE: Final = "kueue.x-k8s.io/queue-name"

# Beyond it the API wants `maxFailedIndexes`, which a pool cannot have: a new Job is needed.
MOST_COMPLETIONS: Final = 100_000
_MOST_PROGRAM_BYTES: Final = 2**20
# A pod's hostname is the Job's name, '-' and its index, and a DNS label: 63 characters at most.
_LONGEST_JOB_NAME: Final = 63 - len(f"-{MOST_COMPLETIONS - 1}")
# Before 1.34; newer servers take more.
_VARIABLE: Final = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
# The worker gives running calls 5 s after SIGTERM, and says goodbye.
_GRACE_SECONDS: Final = 10


@dataclass(frozen=True, kw_only=True)
class PoolIdentity:
    """Which pool it is, and whose.

    Attributes:
        executor: Id of the executor; its pools are watched together.
        pool: Id of the pool, unique in the namespace for good.
        owner: See ``PodSettings.owner``.

    Raises:
        ConfigError: An id or an owner that cannot be a label, or a pool's that is too long.
    """

    executor: str
    pool: str
    owner: str

    def __post_init__(self) -> None:
        check_label_value("executor", self.executor)
        check_label_value("owner", self.owner)
        check_dns_label("pool", self.pool)
        if len(self.name) > _LONGEST_JOB_NAME:
            raise ConfigError(
                f"pool {self.pool!r} is too long: with its prefix it may have {_LONGEST_JOB_NAME} "
                "characters, so that the names of pods are DNS labels",
                key="pool",
                expected=f"at most {_LONGEST_JOB_NAME - len('asyncrt-')} characters",
            )

    @property
    def name(self) -> str:
        """The name of Job, Secret and ConfigMap."""
        return f"asyncrt-{self.pool}"

    def labels(self) -> dict[str, str]:
        """Return the labels of everything that belongs to the pool."""
        return {
            LABEL_MANAGED_BY: "asyncrt",
            LABEL_OWNER: self.owner,
            LABEL_EXECUTOR: self.executor,
            LABEL_POOL: self.pool,
        }


def default_image() -> str:
    """Return the official image of this interpreter's version of Python."""
    return f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"


def worker_settings(settings: PoolSettings, *, token: bytes) -> WorkerSettings:
    """Return what the pool's workers are told when they start."""
    return WorkerSettings(
        token=token,
        asyncrt_version=asyncrt.__version__,
        cloudpickle_version=cloudpickle.__version__,
        listen_port=LISTEN_PORT,
        slots=settings.slots,
        memory_bytes=settings.memory_bytes,
        recycle_bytes=settings.recycle_limit_bytes(),
        heartbeat_interval=settings.heartbeat_interval,
        orphan_timeout=settings.orphan_timeout,
    )


def job_manifest(
    identity: PoolIdentity, settings: PoolSettings, *, workers: int, deadline: float
) -> dict[str, Any]:
    """Return the Job of a pool.

    Args:
        workers: Pods to begin with.
        deadline: Seconds after which Kubernetes ends the Job if nobody pushes that forward.

    Raises:
        ConfigError: ``pod_patch`` takes away what a worker needs, or ``env`` has a name that
            Kubernetes would refuse.
    """
    pod = settings.pod
    labels = dict(pod.labels) | identity.labels()
    metadata: dict[str, Any] = {"labels": labels} | _given(annotations=thawed(pod.annotations))
    queue = {LABEL_QUEUE: pod.queue} if pod.queue else {}
    template = {"metadata": thawed(metadata), "spec": _pod_spec(identity, settings)}
    if pod.pod_patch is not None:
        template = merge_pod_patch(template, pod.pod_patch)
        _check_patched(template, identity)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": identity.name, **metadata, "labels": labels | queue},
        "spec": {
            "completionMode": "Indexed",
            "completions": workers,
            "parallelism": workers,
            "backoffLimitPerIndex": 0,
            "podReplacementPolicy": "Failed",
            "activeDeadlineSeconds": math.ceil(deadline),
            "ttlSecondsAfterFinished": math.ceil(pod.ttl),
            "template": template,
        },
    }


def growth_patch(workers: int) -> dict[str, Any]:
    """Return the merge patch that gives a Job more indexes.

    Kubernetes takes it only with both numbers equal, in one request.

    Args:
        workers: Indexes in all, those that have ended included; never less than there are.

    Raises:
        ValueError: More than ``MOST_COMPLETIONS``: the pool needs another Job.
    """
    if workers > MOST_COMPLETIONS:
        raise ValueError(f"a Job with backoffLimitPerIndex has {MOST_COMPLETIONS} indexes at most")
    return {"spec": {"completions": workers, "parallelism": workers}}


def deadline_patch(*, elapsed: float, lease: float) -> dict[str, Any]:
    """Return the merge patch that pushes a Job's deadline forward.

    Args:
        elapsed: Seconds since the Job's ``status.startTime``, from which Kubernetes counts.
        lease: Seconds from now until the Job ends if nobody pushes again.
    """
    return {"spec": {"activeDeadlineSeconds": math.ceil(elapsed + lease)}}


def secret_manifest(
    identity: PoolIdentity, worker: WorkerSettings, *, job_uid: str
) -> dict[str, Any]:
    """Return the Secret that tells workers their settings.

    Args:
        job_uid: The Job that it shall vanish with.
    """
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _owned_metadata(identity, job_uid),
        "type": "Opaque",
        "immutable": True,  # the kubelet need not watch it
        "data": {"settings.json": _base64(worker.to_json().encode())},
    }


def config_map_manifest(identity: PoolIdentity, program: bytes, *, job_uid: str) -> dict[str, Any]:
    """Return the ConfigMap with the worker's program.

    Args:
        program: See ``asyncrt.pack.pack_worker``.
        job_uid: The Job that it shall vanish with.

    Raises:
        ValueError: It is too large for a ConfigMap.
    """
    if len(program) > _MOST_PROGRAM_BYTES:
        raise ValueError(f"the worker is {len(program)} bytes, a ConfigMap holds 1 MiB")
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _owned_metadata(identity, job_uid),
        "immutable": True,
        "binaryData": {"worker.pyz": _base64(program)},
    }


def role_manifest(namespace: str | None = None, *, name: str = "asyncrt") -> dict[str, Any]:
    """Return the least Role with which everything works. Nothing cluster-wide is needed.

    Args:
        namespace: Where it holds; ``None``: where it is applied.
    """
    rules = [
        ("batch", "jobs", ["create", "delete", "get", "list", "patch", "watch"]),
        ("", "pods", ["delete", "get", "list", "watch"]),
        ("", "pods/log", ["get"]),
        # With `get` the stream is opened up to Kubernetes 1.34, with `create` from 1.35 on.
        ("", "pods/portforward", ["create", "get"]),
        # Nobody needs to read Secrets or ConfigMaps: the Job's deletion removes them.
        ("", "configmaps", ["create", "delete"]),
        ("", "secrets", ["create", "delete", "patch"]),
        ("", "events", ["get", "list", "watch"]),
    ]
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": name} | _given(namespace=namespace),
        "rules": [
            {"apiGroups": [group], "resources": [resource], "verbs": verbs}
            for group, resource, verbs in rules
        ],
    }


def _owned_metadata(identity: PoolIdentity, job_uid: str) -> dict[str, Any]:
    # No `blockOwnerDeletion`: with the admission plugin OwnerReferencesPermissionEnforcement
    # (OpenShift has it) that needs a right to the Job's finalizers.
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": identity.name, "uid": job_uid}
    return {"name": identity.name, "labels": identity.labels(), "ownerReferences": [owner]}


def _pod_spec(identity: PoolIdentity, settings: PoolSettings) -> dict[str, Any]:
    pod = settings.pod
    volumes, mounts = _volumes(identity, pod)
    container = {
        "name": CONTAINER,
        "image": settings.runtime or default_image(),
        "imagePullPolicy": "IfNotPresent",
        # Not `python`, which Debian and others do not have; and no shell, which images may lack.
        "command": ["python3", PROGRAM_PATH, "serve", SETTINGS_PATH],
        "env": _environment(settings.env),
        "resources": _resources(settings),
        "securityContext": _container_security(pod),
        # The fallback to the log would publish what calls print.
        "terminationMessagePolicy": "File",
        "volumeMounts": mounts,
    } | _given(envFrom=[{"secretRef": {"name": name}} for name in pod.environment_secrets()])
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": pod.service_account is not None,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "securityContext": _pod_security(pod),
        "containers": [container],
        "volumes": volumes,
    } | _given(
        serviceAccountName=pod.service_account,
        imagePullSecrets=[{"name": name} for name in pod.image_pull_secrets],
        nodeSelector=thawed(pod.node_selector),
        tolerations=thawed(pod.tolerations),
        affinity=thawed(pod.affinity),
        priorityClassName=pod.priority_class,
    )


def _environment(env: Mapping[str, str]) -> list[dict[str, str]]:
    for name in env:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(
                f"env: {name!r} cannot be a variable's name on Kubernetes: it takes letters, "
                "digits, '_', '-' and '.', and no digit first",
                key="env",
                expected="names of letters, digits, '_', '-' and '.'",
            )
    # The uid has no name and no home in most images; `getpass` and others fail without one.
    variables = {"HOME": "/tmp", "USER": "asyncrt", "LOGNAME": "asyncrt"} | dict(env)  # noqa: S108
    # Kubernetes replaces `$(NAME)` in values; `$$` is a plain `$` to it.
    return [{"name": name, "value": value.replace("$", "$$")} for name, value in variables.items()]


def _resources(settings: PoolSettings) -> dict[str, Any]:
    """Return requests and limits.

    Memory has both, equal: what is above the request is what the node kills for. CPU has a request
    only: a limit would throttle the worker's start (which is all CPU) and its heartbeats, while the
    node's other CPUs are idle.
    """
    memory = {} if settings.memory_bytes is None else {"memory": _quantity(settings.memory_bytes)}
    cpu = {} if settings.cpu_millicores is None else {"cpu": f"{settings.cpu_millicores}m"}
    gpus = {name: str(count) for name, count in settings.pod.extended_resources().items()}
    return _given(requests=cpu | memory, limits=memory | gpus)


def _quantity(size_bytes: int) -> str:
    for suffix, unit in (("Gi", 2**30), ("Mi", 2**20)):
        if size_bytes % unit == 0:
            return f"{size_bytes // unit}{suffix}"
    return str(size_bytes)


def _pod_security(pod: PodSettings) -> dict[str, Any]:
    if pod.pod_security_context is not None:
        return dict(thawed(pod.pod_security_context))
    user = pod.run_as_user
    return {
        "runAsNonRoot": user != 0,
        **({} if user is None else {"runAsUser": user, "runAsGroup": user}),
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security(pod: PodSettings) -> dict[str, Any]:
    if pod.container_security_context is not None:
        return dict(thawed(pod.container_security_context))
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def _volumes(
    identity: PoolIdentity, pod: PodSettings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return volumes and their mounts."""
    program, settings = (path.rpartition("/")[0] for path in (PROGRAM_PATH, SETTINGS_PATH))
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("asyncrt-program", {"configMap": {"name": identity.name}}, _read_only(program)),
        ("asyncrt-settings", {"secret": {"secretName": identity.name}}, _read_only(settings)),
        ("tmp", {"emptyDir": {}}, {"mountPath": "/tmp"}),  # noqa: S108 - a path in the pod
    ]
    for number, (name, path) in enumerate(pod.mounted_secrets().items()):
        found.append((f"secret-{number}", {"secret": {"secretName": name}}, _read_only(path)))
    for number, (path, volume) in enumerate(pod.volumes.items()):
        fields = thawed(volume)
        source = {name: value for name, value in fields.items() if name not in MOUNT_FIELDS}
        mount = {name: value for name, value in fields.items() if name in MOUNT_FIELDS}
        found.append((f"volume-{number}", source, {"mountPath": path, **mount}))
    return (
        [{"name": name, **source} for name, source, _ in found],
        [{"name": name, **mount} for name, _, mount in found],
    )


def _read_only(path: str) -> dict[str, Any]:
    return {"mountPath": path, "readOnly": True}


def _check_patched(template: Mapping[str, Any], identity: PoolIdentity) -> None:
    """Refuse a patch that takes away what a worker needs.

    Raises:
        ConfigError: It names what is missing.
    """
    spec = template.get("spec", {})
    names = [container.get("name") for container in spec.get("containers", ())]
    labels = template.get("metadata", {}).get("labels") or {}
    problem = None
    if CONTAINER not in names:
        problem = f"removes the container {CONTAINER!r}, which runs the calls"
    elif spec.get("restartPolicy") != "Never":
        problem = "changes restartPolicy: it must be 'Never', a worker cannot begin a second time"
    elif not identity.labels().items() <= labels.items():
        problem = "changes labels of asyncrt, by which pods are found"
    if problem:
        raise ConfigError(
            f"pod_patch {problem}", key="pod_patch", expected="a patch that leaves this as it is"
        )


def _given(**values: Any) -> dict[str, Any]:
    """Return those that are not empty."""
    return {name: value for name, value in values.items() if value}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
