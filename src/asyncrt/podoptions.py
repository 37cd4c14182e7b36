"""What a pod is beyond its image, cpu and memory: the options that only Kubernetes understands."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, TypedDict, cast

from asyncrt.checks import check_seconds, check_text, is_int, nearest
from asyncrt.errors import ConfigError
from asyncrt.k8snames import (
    LONGEST_LABEL,
    check_annotations,
    check_dns_label,
    check_label_key,
    check_label_value,
    check_labels,
    check_subdomain,
    label_value,
)
from asyncrt.podpatch import check_pod_patch

GPU_RESOURCE: Final = "nvidia.com/gpu"
MOUNT_FIELDS: Final = frozenset(
    {"mountPropagation", "readOnly", "recursiveReadOnly", "subPath", "subPathExpr"}
)
# Checked here, since a server drops fields that it does not know, and a volume without a source is
# an empty directory to it. Those that Kubernetes has not removed (1.34).
_SOURCES: Final = frozenset(
    {
        "azureFile",
        "cephfs",
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "fc",
        "flexVolume",
        "hostPath",
        "image",
        "iscsi",
        "nfs",
        "persistentVolumeClaim",
        "portworxVolume",
        "projected",
        "rbd",
        "secret",
        "vsphereVolume",
    }
)
_TOLERATION_FIELDS: Final = ("effect", "key", "operator", "tolerationSeconds", "value")
_EFFECTS: Final = ("NoExecute", "NoSchedule", "PreferNoSchedule")
_AFFINITIES: Final = ("nodeAffinity", "podAffinity", "podAntiAffinity")
# Where the worker's own volumes are mounted: see asyncrt.backends.manifest.
_TAKEN_PATHS: Final = ("/asyncrt", "/tmp")  # noqa: S108 - a path in the pod
_LARGEST_UID: Final = 2**31 - 1
_RESERVED_LABELS: Final = re.compile(
    r"asyncrt\.dev/.*|app\.kubernetes\.io/managed-by|batch\.kubernetes\.io/.*"
    r"|controller-uid|job-name"
)


class PodOptions(TypedDict, total=False):
    """Options of the workers that other backends than Kubernetes ignore. See ``PodSettings``."""

    gpu: int | Mapping[str, int] | None
    secrets: Sequence[str] | Mapping[str, str | None]
    service_account: str | None
    image_pull_secrets: Sequence[str]
    node_selector: Mapping[str, str]
    tolerations: Sequence[Mapping[str, Any]]
    affinity: Mapping[str, Any] | None
    volumes: Mapping[str, Mapping[str, Any]]
    priority_class: str | None
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    queue: str | None
    run_as_user: int | None
    pod_security_context: Mapping[str, Any] | None
    container_security_context: Mapping[str, Any] | None
    pod_patch: Mapping[str, Any] | None
    namespace: str | None
    context: str | None
    kubeconfig: str | Path | None
    owner: str | None
    ttl: float


def _nothing() -> Mapping[str, Any]:
    return types.MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class PodSettings:
    """Checked options of pods. Mappings and lists in them are frozen copies.

    Attributes:
        gpu: GPUs of a worker, as ``nvidia.com/gpu``; a mapping (``{"amd.com/gpu": 1}``) names the
            resources.
        secrets: Names of Secrets whose keys become environment variables. In a mapping, a Secret
            with a path is mounted there as files instead.
        service_account: Account whose token pods get; ``None``: no token at all.
        image_pull_secrets: Names of Secrets with credentials of registries.
        node_selector: Labels that a node must have.
        tolerations: Taints that do not matter, as Kubernetes writes them.
        affinity: As Kubernetes writes it.
        volumes: What is mounted, by path: a volume's source as Kubernetes writes it, and beside it
            ``readOnly`` or ``subPath``.
        priority_class: Name of a PriorityClass.
        labels: Labels of Job and pods, besides asyncrt's own.
        annotations: Annotations of Job and pods.
        queue: Name of a Kueue LocalQueue.
        run_as_user: Uid of the worker; ``None``: the image's (or the one that OpenShift gives).
        pod_security_context: Replaces the pod's; ``None``: one that the Pod Security Standard
            *restricted* accepts.
        container_security_context: The same for the container.
        pod_patch: Strategic-merge patch of the pod template, for everything else.
        namespace: Where pods run; ``None``: the context's.
        context: Context of the kubeconfig; ``None``: the current one.
        kubeconfig: Path; ``None``: where ``kubectl`` looks for it.
        owner: Whose the objects are, a label's value; ``None``: user and host, see
            ``default_owner``.
        ttl: Seconds until Kubernetes removes a Job that is done.
    """

    gpu: int | Mapping[str, int] | None = None
    secrets: Sequence[str] | Mapping[str, str | None] = ()
    service_account: str | None = None
    image_pull_secrets: Sequence[str] = ()
    node_selector: Mapping[str, str] = field(default_factory=_nothing)
    tolerations: Sequence[Mapping[str, Any]] = ()
    affinity: Mapping[str, Any] | None = None
    volumes: Mapping[str, Mapping[str, Any]] = field(default_factory=_nothing)
    priority_class: str | None = None
    labels: Mapping[str, str] = field(default_factory=_nothing)
    annotations: Mapping[str, str] = field(default_factory=_nothing)
    queue: str | None = None
    run_as_user: int | None = 10001
    pod_security_context: Mapping[str, Any] | None = None
    container_security_context: Mapping[str, Any] | None = None
    pod_patch: Mapping[str, Any] | None = None
    namespace: str | None = None
    context: str | None = None
    kubeconfig: str | Path | None = None
    owner: str | None = None
    ttl: float = 300.0

    def __post_init__(self) -> None:
        _check_gpu(self.gpu)
        _check_secrets(self.secrets)
        _check_names("image_pull_secrets", self.image_pull_secrets)
        for name in ("service_account", "priority_class", "queue"):
            if getattr(self, name) is not None:
                check_subdomain(name, getattr(self, name))
        for name in ("queue", "owner"):  # they become labels
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name), optional=False)
                check_label_value(name, getattr(self, name))
        if self.namespace is not None:
            check_dns_label("namespace", self.namespace)
        check_text("context", self.context, optional=True)
        _check_path("kubeconfig", self.kubeconfig)
        check_labels("node_selector", self.node_selector)
        _check_own_labels(self.labels)
        check_annotations("annotations", self.annotations)
        _check_tolerations(self.tolerations)
        for name in ("affinity", "pod_security_context", "container_security_context"):
            value = getattr(self, name)
            if value is not None:
                _check_mapping(name, value, _AFFINITIES if name == "affinity" else None)
        _check_volumes(self.volumes)
        _check_user(self.run_as_user)
        if self.pod_patch is not None:
            check_pod_patch(self.pod_patch)
        check_seconds("ttl", self.ttl, zero=True)
        for item in fields(self):
            object.__setattr__(self, item.name, _frozen(getattr(self, item.name)))

    def shape(self) -> str:
        """Return a text that is equal where pods are equal."""
        values = {item.name: thawed(getattr(self, item.name)) for item in fields(self)}
        return json.dumps(values, sort_keys=True, default=os.fspath)

    def extended_resources(self) -> dict[str, int]:
        """Return the counts of GPUs by the names of their resources."""
        if isinstance(self.gpu, Mapping):
            return dict(self.gpu)
        return {GPU_RESOURCE: self.gpu} if self.gpu else {}

    def environment_secrets(self) -> list[str]:
        """Return the names of the Secrets whose keys become environment variables."""
        if isinstance(self.secrets, Mapping):
            return [name for name, path in self.secrets.items() if path is None]
        return list(self.secrets)

    def mounted_secrets(self) -> dict[str, str]:
        """Return the names of the Secrets that are mounted, with their paths."""
        if isinstance(self.secrets, Mapping):
            return {name: path for name, path in self.secrets.items() if path is not None}
        return {}


def default_owner() -> str:
    """Return who runs this process, as a label's value: user and host."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a uid without a name, as in many containers
        user = f"uid-{os.getuid()}"
    return owner_label(user, platform.node())


def owner_label(user: str, host: str) -> str:
    """Return a label's value that is another one for every other user and host.

    Labels have no ``@``. What is changed further, or cut, is told apart by a hash.
    """
    wanted = f"{user}_at_{host}"
    label = label_value(wanted)
    if label == wanted and "_at_" not in user + host:
        return label
    digest = hashlib.sha256(f"{user}@{host}".encode()).hexdigest()[:8]
    return f"{label[: LONGEST_LABEL - 9].rstrip('-_.') or 'owner'}-{digest}"


def thawed(value: Any) -> Any:
    """Return a frozen value as dicts and lists, which JSON and manifests are made of."""
    if isinstance(value, Mapping):
        return {name: thawed(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [thawed(item) for item in value]
    return value


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return types.MappingProxyType({name: _frozen(item) for name, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return value


def _check_gpu(gpu: object) -> None:
    expected = 'a whole number from 1, or a mapping such as {"amd.com/gpu": 1}'
    counts = gpu if isinstance(gpu, Mapping) else {GPU_RESOURCE: gpu}
    for name, count in counts.items() if gpu is not None else ():
        check_label_key("gpu", name)
        # Names without a domain, and those of this one, are resources that every node has.
        if "/" not in name or name.partition("/")[0].endswith("kubernetes.io"):
            raise ConfigError(
                f"gpu[{name!r}] must be the resource of a device plugin, such as 'amd.com/gpu'",
                key="gpu",
                expected=expected,
            )
        if not is_int(count) or cast("int", count) < 1:
            what = f"gpu[{name!r}]" if isinstance(gpu, Mapping) else "gpu"
            raise ConfigError(
                f"{what} must be {expected}, not {count!r}: GPUs cannot be shared by fractions",
                key="gpu",
                expected=expected,
            )


def _check_names(key: str, names: object) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence):
        near = f"[{names!r}]" if isinstance(names, str) else None
        hint = f"; did you mean {near}?" if near else ""
        raise ConfigError(
            f"{key} must be a list of names, not {names!r}{hint}",
            key=key,
            expected="a list of names",
            suggestion=near,
        )
    for name in names:
        check_subdomain(key, name, what=f"[{name!r}]")


def _check_secrets(secrets: object) -> None:
    if not isinstance(secrets, Mapping):
        _check_names("secrets", secrets)
        return
    for name, path in secrets.items():
        check_subdomain("secrets", name, what=f"[{name!r}]")
        if path is not None:
            _check_mount("secrets", path, what=f"[{name!r}]")
    mounted = [path for path in secrets.values() if path is not None]
    if len(set(mounted)) < len(mounted):
        raise ConfigError(
            "secrets: two of them have the same path", key="secrets", expected="different paths"
        )


def _check_mount(key: str, path: object, *, what: str = "") -> None:
    if not isinstance(path, str) or not path.startswith("/") or path == "/" or ":" in path:
        raise ConfigError(
            f"{key}{what} must be an absolute path without ':', such as '/data', not {path!r}",
            key=key,
            expected="an absolute path without ':'",
        )
    taken = path.rstrip("/")
    if taken in _TAKEN_PATHS or taken.startswith("/asyncrt/"):
        raise ConfigError(
            f"{key}{what}: {path!r} is where the worker's own files are; choose another path",
            key=key,
            expected="another path",
        )


def _check_volumes(volumes: object) -> None:
    rule = (
        "one source of a volume, as Kubernetes writes it "
        '({"persistentVolumeClaim": {"claimName": "data"}}), and fields of its mount '
        f"({', '.join(sorted(MOUNT_FIELDS))})"
    )
    _check_mapping("volumes", volumes, None)
    for path, volume in cast("Mapping[str, Any]", volumes).items():
        _check_mount("volumes", path)
        what = f"[{path!r}]"
        _check_mapping("volumes", volume, tuple(sorted(_SOURCES | MOUNT_FIELDS)), what=what)
        sources = set(volume) & _SOURCES
        if len(sources) != 1 or not isinstance(volume[min(sources)], Mapping):
            raise ConfigError(
                f"volumes{what} must be {rule}, not {volume!r}", key="volumes", expected=rule
            )


def _check_own_labels(labels: Any) -> None:
    check_labels("labels", labels)
    for name in labels:
        if _RESERVED_LABELS.fullmatch(name):
            hint = "; for the label of the owner there is the option owner" * name.endswith("owner")
            raise ConfigError(
                f"labels: {name!r} is set by asyncrt or by Kubernetes; choose another key{hint}",
                key="labels",
                expected="labels with keys of your own",
            )


def _check_tolerations(tolerations: object) -> None:
    key = "tolerations"
    if isinstance(tolerations, str | Mapping) or not isinstance(tolerations, Sequence):
        raise ConfigError(
            f"{key} must be a list of mappings, not {tolerations!r}",
            key=key,
            expected="a list of mappings",
        )
    for number, item in enumerate(tolerations):
        _check_mapping(key, item, _TOLERATION_FIELDS, what=f"[{number}]")
        problem = _problem_of_toleration(item)
        if problem:
            raise ConfigError(
                f"{key}[{number}]{problem}", key=key, expected="a toleration of Kubernetes"
            )


def _problem_of_toleration(item: Mapping[str, Any]) -> str | None:
    """Return which rule of Kubernetes a toleration breaks.

    https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/
    """
    operator = item.get("operator", "Equal")
    if operator not in ("Equal", "Exists"):
        return f".operator must be 'Equal' or 'Exists', not {operator!r}"
    if not item.get("key") and operator == "Equal":
        return " has no key: then its operator must be 'Exists', which tolerates every taint"
    if operator == "Exists" and item.get("value"):
        return f".value must be empty with operator 'Exists', not {item['value']!r}"
    effect = item.get("effect")
    if effect and effect not in _EFFECTS:
        return f".effect must be one of {', '.join(_EFFECTS)}, not {effect!r}"
    if item.get("tolerationSeconds") is not None:
        if effect != "NoExecute":
            return ".tolerationSeconds needs effect 'NoExecute'"
        if not is_int(item["tolerationSeconds"]):
            return f".tolerationSeconds must be a whole number, not {item['tolerationSeconds']!r}"
    return None


def _check_mapping(
    key: str, value: object, names: tuple[str, ...] | None, *, what: str = ""
) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(
            f"{key}{what} must be a mapping, as in a pod's manifest, not {value!r}",
            key=key,
            expected="a mapping",
        )
    for name in value:
        if names is not None and name not in names:
            near = nearest(name, names)
            hint = f"did you mean {near!r}?" if near else f"valid are {', '.join(names)}"
            raise ConfigError(
                f"{key}{what} has no field {name!r}; {hint}",
                key=key,
                expected=f"one of {', '.join(names)}",
                suggestion=near,
            )


def _check_path(key: str, path: object) -> None:
    if path is not None and (not isinstance(path, str | os.PathLike) or not os.fspath(path)):
        raise ConfigError(f"{key} must be a path, not {path!r}", key=key, expected="a path")


def _check_user(user: object) -> None:
    if user is not None and (not is_int(user) or not 0 <= cast("int", user) <= _LARGEST_UID):
        raise ConfigError(
            f"run_as_user must be a uid from 0 to {_LARGEST_UID}, or None, not {user!r}",
            key="run_as_user",
            expected="a uid, or None",
        )
