"""The sections of the configuration, as checked values.

A key that is ``None`` was not given. Keys whose values are secrets are left out of the ``repr``;
that mark is also what ``config show`` goes by.
"""

from __future__ import annotations

import os
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

from asyncrt.checks import (
    check_bool,
    check_count,
    check_no_credentials,
    check_seconds,
    check_text,
    is_int,
)
from asyncrt.errors import ConfigError
from asyncrt.k8snames import check_dns_label
from asyncrt.quantities import parse_cpu, parse_memory

# A number of MiB from here on (4 TiB) was meant as bytes.
_MOST_MEBIBYTES: Final = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class K8sConfig:
    """The section ``k8s``: the cluster, and what a worker is there.

    Attributes:
        kubecfg_path: The kubeconfig (option ``kubeconfig``).
        kubecfg_context: Its context (option ``context``).
        namespace: Where pods run (option ``namespace``).
        docker_server: Registry that the next two are for; ``None``: Docker Hub.
        docker_user: Account at the registry.
        docker_password: Its password or token.
        runtime: Container image (option ``runtime``).
        runtime_cpu: CPUs of a worker (option ``cpu``).
        runtime_memory: Memory of a worker, a number of MiB or a quantity (option ``memory``).
        runtime_timeout: Seconds that one attempt may run (option ``timeout``).
        runtime_arch: Architecture of the image, such as ``arm64``; ``None``: the nodes'.
        max_workers: Pods at most (option ``max_workers``).
        worker_processes: Calls that a pod runs at once (option ``slots``).
        container_security_context: Replaces the container's (option of that name).
        pod_security_context: Replaces the pod's (option of that name).
    """

    OPTIONS: ClassVar[Mapping[str, str]] = types.MappingProxyType(
        {
            "runtime": "runtime",
            "runtime_cpu": "cpu",
            "runtime_memory": "memory",
            "runtime_timeout": "timeout",
            "max_workers": "max_workers",
            "worker_processes": "slots",
            "kubecfg_path": "kubeconfig",
            "kubecfg_context": "context",
            "namespace": "namespace",
            "container_security_context": "container_security_context",
            "pod_security_context": "pod_security_context",
        }
    )

    kubecfg_path: Path | None = None
    kubecfg_context: str | None = None
    namespace: str | None = None
    docker_server: str | None = None
    docker_user: str | None = None
    docker_password: str | None = field(default=None, repr=False)
    runtime: str | None = None
    runtime_cpu: float | str | None = None
    runtime_memory: int | str | None = None
    runtime_timeout: float | None = None
    runtime_arch: str | None = None
    max_workers: int | None = None
    worker_processes: int | None = None
    container_security_context: Mapping[str, Any] | None = None
    pod_security_context: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _set_path(self, "k8s", "kubecfg_path")
        texts = ("kubecfg_context", "namespace", "docker_server", "docker_user", "runtime")
        for name in (*texts, "runtime_arch"):
            check_text(f"k8s.{name}", getattr(self, name), optional=True)
        if self.namespace is not None:
            check_dns_label("k8s.namespace", self.namespace)
        check_no_credentials("k8s.docker_server", self.docker_server)
        check_text("k8s.docker_password", self.docker_password, optional=True, secret=True)
        if self.runtime_cpu is not None:
            parse_cpu(self.runtime_cpu, key="k8s.runtime_cpu")
        _check_mebibytes("k8s.runtime_memory", self.runtime_memory)
        check_seconds("k8s.runtime_timeout", self.runtime_timeout, optional=True)
        for name in ("max_workers", "worker_processes"):
            check_count(f"k8s.{name}", getattr(self, name), optional=True)
        for name in ("container_security_context", "pod_security_context"):
            _set_mapping(self, "k8s", name)

    def options(self) -> dict[str, Any]:
        """Return what this section says about options, by their names."""
        return {
            option: f"{value}Mi" if key == "runtime_memory" and is_int(value) else value
            for key, option in self.OPTIONS.items()
            if (value := getattr(self, key)) is not None
        }


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """The section ``local``: workers on this machine, where they shall differ from other backends.

    Attributes:
        max_workers: Option ``max_workers``.
        slots: Option ``slots``.
        cpu: Option ``cpu``.
        memory: Option ``memory``.
    """

    OPTIONS: ClassVar[Mapping[str, str]] = types.MappingProxyType(
        {"max_workers": "max_workers", "slots": "slots", "cpu": "cpu", "memory": "memory"}
    )

    max_workers: int | None = None
    slots: int | None = None
    cpu: float | str | None = None
    memory: int | str | None = None

    def __post_init__(self) -> None:
        for name in ("max_workers", "slots"):
            check_count(f"local.{name}", getattr(self, name), optional=True)
        if self.cpu is not None:
            parse_cpu(self.cpu, key="local.cpu")
        if self.memory is not None:
            parse_memory(self.memory, key="local.memory")

    def options(self) -> dict[str, Any]:
        """Return what this section says about options, by their names."""
        return {
            option: value
            for key, option in self.OPTIONS.items()
            if (value := getattr(self, key)) is not None
        }


@dataclass(frozen=True, kw_only=True)
class S3Config:
    """The section ``s3``: an object store.

    Attributes:
        endpoint: URL of the store; ``None``: AWS.
        pod_endpoint: URL under which pods reach it; ``None``: the same.
        bucket: Where everything is kept.
        region: Region of the bucket.
        access_key_id: Account; ``None``: found as the AWS tools do.
        secret_access_key: Its secret.
        session_token: Goes with temporary credentials.
        path_style: Bucket in the path, not in the host name; ``None``: where ``endpoint`` is given.
        ca_bundle: PEM file of the authorities to trust; ``None``: the system's.
    """

    endpoint: str | None = None
    pod_endpoint: str | None = None
    bucket: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    path_style: bool | None = None
    ca_bundle: Path | None = None

    def __post_init__(self) -> None:
        for name in ("endpoint", "pod_endpoint"):
            _check_web_address(f"s3.{name}", getattr(self, name))
        for name in ("bucket", "region", "access_key_id"):
            check_text(f"s3.{name}", getattr(self, name), optional=True)
        for name in ("secret_access_key", "session_token"):
            check_text(f"s3.{name}", getattr(self, name), optional=True, secret=True)
        check_bool("s3.path_style", self.path_style, optional=True)
        _set_path(self, "s3", "ca_bundle")


@dataclass(frozen=True, kw_only=True)
class LocalStorageConfig:
    """The section ``local_storage``: a directory as the store.

    Attributes:
        path: The directory. It is made when it is first written to.
    """

    path: Path | None = None

    def __post_init__(self) -> None:
        _set_path(self, "local_storage", "path")


def _set_path(section: object, section_name: str, name: str) -> None:
    value = getattr(section, name)
    if value is None:
        return
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        key = f"{section_name}.{name}"
        raise ConfigError(f"{key} must be a path, not {value!r}", key=key, expected="a path")
    object.__setattr__(section, name, Path(value))


def _set_mapping(section: object, section_name: str, name: str) -> None:
    value = getattr(section, name)
    if value is None:
        return
    if not isinstance(value, Mapping) or not all(isinstance(item, str) for item in value):
        key = f"{section_name}.{name}"
        raise ConfigError(
            f"{key} must be a mapping, as in a pod's manifest, not {type(value).__name__}",
            key=key,
            expected="a mapping",
        )
    object.__setattr__(section, name, types.MappingProxyType(dict(value)))


def _check_mebibytes(key: str, value: Any) -> None:
    if value is None:
        return
    if not is_int(value):
        parse_memory(value, key=key)
        return
    if not 4 <= value < _MOST_MEBIBYTES:
        meant = value // 2**20 if value >= _MOST_MEBIBYTES else 256
        raise ConfigError(
            f"{key} is a number of MiB, and {value} is none that a worker can have; "
            f"did you mean {meant}?",
            key=key,
            expected="a number of MiB, or a quantity such as '512Mi'",
            suggestion=str(meant),
        )


def _check_web_address(key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, str):
        check_no_credentials(key, value)
        try:
            parts = urlsplit(value)
        except ValueError:  # such as an IPv6 address without its closing bracket
            pass
        else:
            if parts.scheme in {"http", "https"} and parts.netloc:
                return
    raise ConfigError(
        f"{key} must be a URL that begins with http:// or https://, not {value!r}",
        key=key,
        expected="a URL that begins with http:// or https://",
    )
