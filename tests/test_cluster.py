"""What other tests rely on: pods run on the cluster, accounts are confined, nothing is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cluster_fixtures import Cluster, ClusterApi, NamespaceMaker, NodeControls, RefusedError

pytestmark = [pytest.mark.anyio, pytest.mark.cluster]

RESTRICTED_CONTAINER = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
RESTRICTED_POD = {
    "runAsNonRoot": True,
    "runAsUser": 10001,
    "seccompProfile": {"type": "RuntimeDefault"},
}
POD_READER = {
    "kind": "Role",
    "metadata": {"name": "of-no-meaning", "namespace": "elsewhere"},
    "rules": [{"apiGroups": [""], "resources": ["pods", "pods/log"], "verbs": ["get", "list"]}],
}


def restricted_pod(image: str, *command: str) -> dict[str, Any]:
    return {
        "metadata": {"name": "tested"},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": RESTRICTED_POD,
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "command": list(command),
                    "resources": {"requests": {"cpu": "10m"}},
                    "securityContext": RESTRICTED_CONTAINER,
                }
            ],
        },
    }


def indexed_job(image: str, pods: int) -> dict[str, Any]:
    template = restricted_pod(image, "python", "-c", "import time; time.sleep(600)")
    return {
        "metadata": {"name": "sleepers"},
        "spec": {
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            "template": {"spec": template["spec"]},
        },
    }


def main_state(pod: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = pod["status"]["containerStatuses"][0]["state"]
    return state


async def run_pod(api: ClusterApi, namespace: str, pod: dict[str, Any]) -> dict[str, Any]:
    await api.create(f"/api/v1/namespaces/{namespace}/pods", pod)
    return await api.wait_for_pod(namespace, "tested", "Succeeded", "Failed")


async def test_a_restricted_pod_runs_the_clients_python(
    real_cluster: Cluster, make_namespace: NamespaceMaker
) -> None:
    namespace = make_namespace()
    async with real_cluster.connect() as api:
        pod = restricted_pod(real_cluster.images.python, "python", "-c", "pass")
        ended = await run_pod(api, namespace.name, pod)
    assert ended["status"]["phase"] == "Succeeded", main_state(ended)


async def test_the_other_python_is_another_one(
    real_cluster: Cluster, make_namespace: NamespaceMaker
) -> None:
    minor = (
        real_cluster.images.other_python.removeprefix("python:").removesuffix("-slim").split(".")[1]
    )
    check = f"import sys; sys.exit(sys.version_info.minor != {minor})"
    async with real_cluster.connect() as api:
        pod = restricted_pod(real_cluster.images.other_python, "python", "-c", check)
        ended = await run_pod(api, make_namespace().name, pod)
    assert ended["status"]["phase"] == "Succeeded", main_state(ended)


async def test_the_image_without_python_can_be_pulled_and_runs_none(
    real_cluster: Cluster, make_namespace: NamespaceMaker
) -> None:
    async with real_cluster.connect() as api:
        pod = restricted_pod(real_cluster.images.no_python, "python", "-c", "pass")
        ended = await run_pod(api, make_namespace().name, pod)
    assert ended["status"]["phase"] == "Failed"
    assert '"python"' in main_state(ended)["terminated"]["message"]


async def test_pod_security_refuses_a_pod_that_is_not_restricted(
    real_cluster: Cluster, make_namespace: NamespaceMaker
) -> None:
    namespace = make_namespace()
    pod = restricted_pod(real_cluster.images.python, "python", "-c", "pass")
    del pod["spec"]["securityContext"]
    async with real_cluster.connect() as api:
        with pytest.raises(RefusedError, match="PodSecurity") as refused:
            await api.create(f"/api/v1/namespaces/{namespace.name}/pods", pod)
        assert await api.items(f"/api/v1/namespaces/{namespace.name}/pods") == []
    assert (refused.value.status, refused.value.reason) == (403, "Forbidden")


async def test_the_account_may_do_what_its_role_says_and_nothing_else(
    real_cluster: Cluster, make_namespace: NamespaceMaker
) -> None:
    namespace = make_namespace(POD_READER)
    async with real_cluster.connect(namespace.kubeconfig) as api:
        assert await api.items(f"/api/v1/namespaces/{namespace.name}/pods") == []
        for path in (
            f"/api/v1/namespaces/{namespace.name}/secrets",
            "/api/v1/namespaces/kube-system/secrets",
            "/api/v1/namespaces/kube-system/pods",
        ):
            with pytest.raises(RefusedError, match=namespace.service_account) as refused:
                await api.items(path)
            assert refused.value.status == 403


async def test_an_account_without_a_role_may_do_nothing(
    real_cluster: Cluster, make_namespace: NamespaceMaker
) -> None:
    namespace = make_namespace()
    async with real_cluster.connect(namespace.kubeconfig) as api:
        with pytest.raises(RefusedError) as refused:
            await api.items(f"/api/v1/namespaces/{namespace.name}/pods")
    assert refused.value.reason == "Forbidden"


async def test_leaving_a_namespace_with_running_jobs_leaves_nothing(
    real_cluster: Cluster, tmp_path: Path
) -> None:
    async with real_cluster.connect() as api:
        async with real_cluster.open_namespace(tmp_path) as namespace:
            jobs = f"/apis/batch/v1/namespaces/{namespace.name}/jobs"
            pods = f"/api/v1/namespaces/{namespace.name}/pods"
            await api.create(jobs, indexed_job(real_cluster.images.python, 3))
            await api.wait_for(pods, lambda found: len(found) == 3 and all(map(is_running, found)))
        assert await api.items(pods) == []
        assert await api.items(jobs) == []
        await api.wait_for(
            "/api/v1/namespaces",
            lambda found: not found,
            fieldSelector=f"metadata.name={namespace.name}",
        )


def is_running(pod: dict[str, Any]) -> bool:
    return bool(pod.get("status", {}).get("phase") == "Running")


async def test_patches_of_both_kinds_change_an_object(
    real_cluster: Cluster, make_namespace: NamespaceMaker
) -> None:
    path = f"/api/v1/namespaces/{make_namespace().name}/configmaps"
    async with real_cluster.connect() as api:
        await api.create(path, {"metadata": {"name": "it"}, "data": {"a": "1"}})
        await api.patch(f"{path}/it", {"data": {"b": "2"}})
        changed = await api.patch(f"{path}/it", [{"op": "remove", "path": "/data/a"}], kind="json")
        assert changed["data"] == {"b": "2"}
        await api.delete(f"{path}/it")
        await api.delete(f"{path}/it")  # there is none: as good
        assert "it" not in {found["metadata"]["name"] for found in await api.items(path)}


@pytest.mark.timeout(240)
async def test_the_node_runs_pods_again_after_its_parts_were_restarted(
    real_cluster: Cluster, make_namespace: NamespaceMaker, own_node: NodeControls
) -> None:
    namespace = make_namespace()
    for part in ("kubelet", "apiserver"):
        await own_node.restart(part)
    await own_node.repair()
    async with real_cluster.connect() as api:
        pod = restricted_pod(real_cluster.images.python, "python", "-c", "pass")
        ended = await run_pod(api, namespace.name, pod)
    assert ended["status"]["phase"] == "Succeeded", main_state(ended)
