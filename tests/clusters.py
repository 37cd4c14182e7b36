"""The clusters that the tests of the Kubernetes client run on: the fake one, and a real one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from asyncrt.backends.kubeapi import KubeApi, open_kube_api
from asyncrt.errors import KubernetesError
from asyncrt.testing.fakekubernetes import FakeKubernetes

IMAGE = "python:3.11-slim"
BACKGROUND = {"propagationPolicy": "Background"}


@dataclass(frozen=True)
class Cluster:
    """A cluster, and a namespace of it that is ours.

    Attributes:
        fake: ``None`` if it is a real one.
    """

    kubeconfig: Path
    namespace: str
    fake: FakeKubernetes | None

    @property
    def jobs(self) -> str:
        return f"/apis/batch/v1/namespaces/{self.namespace}/jobs"

    def core(self, resource: str) -> str:
        return f"/api/v1/namespaces/{self.namespace}/{resource}"

    @asynccontextmanager
    async def api(self) -> AsyncIterator[KubeApi]:
        async with open_kube_api(kubeconfig=self.kubeconfig, namespace=self.namespace) as api:
            yield api


@asynccontextmanager
async def open_cluster(kind: str, directory: Path) -> AsyncIterator[Cluster]:
    """Open ``fake`` or ``real``; skip the test if there is no real one."""
    if kind == "fake":
        async with FakeKubernetes(namespaces=("default", "team")) as fake:
            yield Cluster(fake.kubeconfig(directory / "kubeconfig"), "team", fake)
        return
    path = os.environ.get("ASYNCRT_TEST_KUBECONFIG")
    if not path:
        pytest.skip("$ASYNCRT_TEST_KUBECONFIG names no cluster")
    namespace = f"asyncrt-test-{secrets.token_hex(4)}"
    async with open_kube_api(kubeconfig=path) as api:
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
        await api.request("POST", "/api/v1/namespaces", body=body)
        try:
            yield Cluster(Path(path), namespace, None)
        finally:
            jobs = f"/apis/batch/v1/namespaces/{namespace}/jobs"
            with contextlib.suppress(KubernetesError):
                await api.request("DELETE", jobs, query=BACKGROUND)
            await api.request("DELETE", f"/api/v1/namespaces/{namespace}")


def job(name: str, code: str, *, completions: int = 1, **spec: Any) -> dict[str, Any]:
    """Return an Indexed Job whose pods run Python code."""
    container = {
        "name": "main",
        "image": IMAGE,
        "command": ["python", "-c", code],
        "resources": {"requests": {"cpu": "10m"}},
        **spec.pop("container", {}),
    }
    pod = {"restartPolicy": "Never", "containers": [container], **spec.pop("pod", {})}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": {"test": name}},
        "spec": {
            "completionMode": "Indexed",
            "completions": completions,
            "parallelism": completions,
            "backoffLimitPerIndex": 0,
            "template": {"metadata": {"labels": {"test": name}}, "spec": pod},
            **spec,
        },
    }


def config_map(name: str, **data: str) -> dict[str, Any]:
    """Return a config map."""
    return {"metadata": {"name": name, "labels": {"test": "watch"}}, "data": data}
