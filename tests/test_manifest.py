"""The objects of a pool on Kubernetes, whole."""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from raw_client import SECONDS, RawClient

from asyncrt.backends.manifest import (
    MOST_COMPLETIONS,
    PROGRAM_PATH,
    SETTINGS_PATH,
    PoolIdentity,
    config_map_manifest,
    deadline_patch,
    default_image,
    growth_patch,
    job_manifest,
    role_manifest,
    secret_manifest,
    worker_settings,
)
from asyncrt.errors import ConfigError
from asyncrt.options import Settings
from asyncrt.pack import pack_worker
from asyncrt.worker.settings import WorkerSettings

DATA = Path(__file__).parent / "data"
IDENTITY = PoolIdentity(executor="e-1", pool="thumbs-5f2c", owner="alice_at_laptop")
UID = "8f0d4f0e-4a0b-4a53-9d4c-6a2f3a1f0e11"
LABELS = {
    "app.kubernetes.io/managed-by": "asyncrt",
    "asyncrt.dev/owner": "alice_at_laptop",
    "asyncrt.dev/executor": "e-1",
    "asyncrt.dev/pool": "thumbs-5f2c",
}
OWNED = {
    "name": "asyncrt-thumbs-5f2c",
    "labels": LABELS,
    "ownerReferences": [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "asyncrt-thumbs-5f2c", "uid": UID}
    ],
}


def job(**options: Any) -> dict[str, Any]:
    """Return the Job of a pool that has these options."""
    pool = Settings().updated({"backend": "k8s", "runtime": "python:3.12-slim", **options}).pool
    return job_manifest(IDENTITY, pool, workers=3, deadline=119.5)


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["spec"]["template"]["spec"]
    return found


def worker_of(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = pod_of(manifest)["containers"][0]
    return found


def written(name: str) -> Any:
    return json.loads((DATA / name).read_text())


def test_job_of_a_pool_with_the_defaults() -> None:
    assert job(cpu=0.5, memory="256Mi") == written("job_default.json")


def test_job_of_a_pool_with_every_option() -> None:
    manifest = job(
        runtime="registry.example.com/team/image:1",
        cpu=2,
        memory="1.5Gi",
        gpu={"amd.com/gpu": 2},
        env={"LANG": "C.UTF-8", "HOME": "/data"},
        secrets={"db": None, "tls": "/etc/tls"},
        service_account="worker",
        image_pull_secrets=["registry"],
        node_selector={"disk": "ssd"},
        tolerations=[{"key": "spot", "operator": "Exists"}],
        affinity={
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [
                        {"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}
                    ]
                }
            }
        },
        volumes={
            "/data": {
                "persistentVolumeClaim": {"claimName": "data"},
                "readOnly": True,
                "subPath": "a",
            },
            "/scratch": {"emptyDir": {"sizeLimit": "1Gi"}},
        },
        priority_class="low",
        labels={"team": "red"},
        annotations={"example.com/note": "a text"},
        queue="team-red",
        run_as_user=2000,
        container_security_context={"readOnlyRootFilesystem": False},
        pod_patch={
            "metadata": {"annotations": {"example.com/note": None}},
            "spec": {
                "dnsPolicy": "Default",
                "containers": [
                    {"name": "worker", "resources": {"limits": {"cpu": "2"}}},
                    {"name": "proxy", "image": "registry.example.com/proxy:1"},
                ],
            },
        },
        ttl=60,
    )
    assert manifest == written("job_every_option.json")


def test_manifests_are_json_and_share_nothing_with_the_options() -> None:
    tolerations = [{"key": "spot", "operator": "Exists"}]
    manifest = job(tolerations=tolerations, annotations={"a": "b"})
    json.dumps(manifest)
    manifest["metadata"]["annotations"]["a"] = "changed"
    assert manifest["spec"]["template"]["metadata"]["annotations"] == {"a": "b"}
    pod_of(manifest)["tolerations"][0]["key"] = "changed"
    assert tolerations[0]["key"] == "spot"


def test_without_cpu_and_memory_nothing_is_requested() -> None:
    assert worker_of(job())["resources"] == {}


@pytest.mark.parametrize(
    ("memory", "quantity"),
    [("2Gi", "2Gi"), ("1.5Gi", "1536Mi"), ("512M", "512000000")],
)
def test_memory_is_request_and_limit(memory: str, quantity: str) -> None:
    assert worker_of(job(memory=memory))["resources"] == {
        "requests": {"memory": quantity},
        "limits": {"memory": quantity},
    }


def test_number_of_gpus_is_a_limit_of_the_usual_resource() -> None:
    assert worker_of(job(gpu=1))["resources"] == {"limits": {"nvidia.com/gpu": "1"}}


def test_image_is_that_of_this_python_if_none_is_named() -> None:
    version = ".".join(map(str, sys.version_info[:2]))
    assert worker_of(job(runtime=None))["image"] == default_image() == f"python:{version}-slim"


def test_values_of_the_environment_reach_the_worker_as_they_are() -> None:
    # Kubernetes: `$(NAME)` is replaced, `$$` is `$`.
    environment = worker_of(job(env={"A": "$(HOME) $$ $"}))["env"]
    assert environment[-1] == {"name": "A", "value": "$$(HOME) $$$$ $$"}


@pytest.mark.parametrize("name", ["", "1A", "A B", "A=B", "Ä"])
def test_variable_that_kubernetes_would_refuse_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a variable") as caught:
        job(env={name: "x"})
    assert caught.value.key == "env"


def test_image_or_openshift_chooses_the_user_if_none_is_named() -> None:
    assert pod_of(job(run_as_user=None))["securityContext"] == {
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert pod_of(job(run_as_user=0))["securityContext"]["runAsNonRoot"] is False
    own = {"fsGroup": 5}
    assert pod_of(job(pod_security_context=own))["securityContext"] == own


def test_secrets_by_name_become_environment_variables() -> None:
    assert worker_of(job(secrets=["a", "b"]))["envFrom"] == [
        {"secretRef": {"name": "a"}},
        {"secretRef": {"name": "b"}},
    ]


def test_patch_may_exchange_the_python_that_runs_the_worker() -> None:
    command = ["/opt/python", PROGRAM_PATH, "serve", SETTINGS_PATH]
    patch = {"spec": {"containers": [{"name": "worker", "command": command}]}}
    assert worker_of(job(pod_patch=patch))["command"] == command


@pytest.mark.parametrize(
    ("patch", "problem"),
    [
        (
            {"spec": {"containers": [{"name": "worker", "$patch": "delete"}]}},
            "pod_patch removes the container 'worker'",
        ),
        ({"spec": {"containers": None}}, "pod_patch removes the container 'worker'"),
        ({"spec": {"$patch": "delete"}}, "pod_patch removes the container 'worker'"),
        ({"spec": {"restartPolicy": "OnFailure"}}, "it must be 'Never'"),
        ({"metadata": {"labels": None}}, "pod_patch changes labels of asyncrt"),
        ({"metadata": {"labels": {"asyncrt.dev/pool": "x"}}}, "changes labels of asyncrt"),
    ],
)
def test_patch_that_takes_away_what_a_worker_needs_is_refused(
    patch: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        job(pod_patch=patch)
    assert caught.value.key == "pod_patch"


# The other objects


def test_secret_holds_what_a_worker_is_told_and_belongs_to_the_job() -> None:
    options = {"slots": 2, "memory": "256Mi", "orphan_timeout": 30, "heartbeat_interval": 5}
    worker = worker_settings(Settings().updated(options).pool, token=b"secret")
    manifest = secret_manifest(IDENTITY, worker, job_uid=UID)
    data = manifest.pop("data")
    assert manifest == {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": OWNED,
        "type": "Opaque",
        "immutable": True,
    }
    assert list(data) == ["settings.json"]
    told = WorkerSettings.from_json(base64.b64decode(data["settings.json"]))
    assert told == worker
    assert (told.token, told.slots, told.memory_bytes) == (b"secret", 2, 2**28)
    assert (told.orphan_timeout, told.heartbeat_interval, told.recycle_bytes) == (30, 5, 2**27)
    assert (told.listen_fd, told.memory_enforced, told.lifeline) == (-1, True, False)
    assert told.listen_port > 1024


def test_config_map_holds_the_program_and_belongs_to_the_job() -> None:
    program = pack_worker()
    assert config_map_manifest(IDENTITY, program, job_uid=UID) == {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": OWNED,
        "immutable": True,
        "binaryData": {"worker.pyz": base64.b64encode(program).decode()},
    }


def test_program_that_no_config_map_holds_is_refused() -> None:
    assert config_map_manifest(IDENTITY, bytes(2**20), job_uid=UID)["binaryData"]
    with pytest.raises(ValueError, match="a ConfigMap holds 1 MiB"):
        config_map_manifest(IDENTITY, bytes(2**20 + 1), job_uid=UID)


def test_mounted_files_are_those_of_secret_and_config_map() -> None:
    manifest = job()
    mounts = {item["name"]: item["mountPath"] for item in worker_of(manifest)["volumeMounts"]}
    assert f"{mounts['asyncrt-program']}/worker.pyz" == PROGRAM_PATH
    assert f"{mounts['asyncrt-settings']}/settings.json" == SETTINGS_PATH


def test_worker_starts_from_what_secret_and_config_map_hold(tmp_path: Path) -> None:
    pool = Settings().updated({"orphan_timeout": 60}).pool
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]  # a free one, so that tests can run side by side
    worker = worker_settings(pool, token=b"secret")._replace(listen_port=port)
    secret = secret_manifest(IDENTITY, worker, job_uid=UID)["data"]
    program = config_map_manifest(IDENTITY, pack_worker(), job_uid=UID)["binaryData"]
    for name, content in {**secret, **program}.items():
        (tmp_path / name).write_bytes(base64.b64decode(content))
    [interpreter, *arguments] = worker_of(job())["command"]
    assert interpreter == "python3"
    local = [tmp_path / Path(item).name if item.startswith("/") else item for item in arguments]
    with subprocess.Popen([sys.executable, *local], cwd=tmp_path) as process:
        try:
            client = connected(port)
            client.shake_hands()
            assert client.run(abs, -2, -3).values == {0: 2, 1: 3}
            client.close()
        finally:
            process.terminate()
            assert process.wait(SECONDS) == 0


def connected(port: int) -> RawClient:
    """Return a client of a worker that may not listen yet, as port-forward may find it."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return RawClient(("127.0.0.1", port), b"secret", {})
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_nothing_secret_is_in_the_job() -> None:
    assert "token" not in json.dumps(job()).lower().replace("automountserviceaccounttoken", "")


def test_job_grows_in_both_numbers_at_once() -> None:
    assert growth_patch(7) == {"spec": {"completions": 7, "parallelism": 7}}
    assert growth_patch(MOST_COMPLETIONS)
    with pytest.raises(ValueError, match="100000 indexes at most"):
        growth_patch(MOST_COMPLETIONS + 1)


def test_deadline_counts_from_the_start_of_the_job() -> None:
    assert deadline_patch(elapsed=100.2, lease=120) == {"spec": {"activeDeadlineSeconds": 221}}


def test_role_is_what_the_backend_does_and_no_more() -> None:
    assert role_manifest("jobs") == {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "asyncrt", "namespace": "jobs"},
        "rules": [
            {
                "apiGroups": ["batch"],
                "resources": ["jobs"],
                "verbs": ["create", "delete", "get", "list", "patch", "watch"],
            },
            {
                "apiGroups": [""],
                "resources": ["pods"],
                "verbs": ["delete", "get", "list", "watch"],
            },
            {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
            {"apiGroups": [""], "resources": ["pods/portforward"], "verbs": ["create", "get"]},
            {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["create", "delete"]},
            {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create", "delete", "patch"]},
            {"apiGroups": [""], "resources": ["events"], "verbs": ["get", "list", "watch"]},
        ],
    }
    assert role_manifest(name="mine")["metadata"] == {"name": "mine"}


# Names


def test_names_of_pods_stay_dns_labels() -> None:
    longest = PoolIdentity(executor="e", pool="p" * 49, owner="me")
    assert len(f"{longest.name}-{MOST_COMPLETIONS - 1}") == 63
    with pytest.raises(ConfigError, match="is too long: with its prefix it may have 57") as caught:
        PoolIdentity(executor="e", pool="p" * 50, owner="me")
    assert caught.value.expected == "at most 49 characters"


@pytest.mark.parametrize(
    ("ids", "key"),
    [
        ({"pool": "A"}, "pool"),
        ({"executor": "a b"}, "executor"),
        ({"owner": "me@home"}, "owner"),
    ],
)
def test_ids_that_cannot_be_names_or_labels_are_refused(ids: dict[str, str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PoolIdentity(**{"executor": "e", "pool": "p", "owner": "me", **ids})
    assert caught.value.key == key
