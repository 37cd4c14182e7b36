"""What only a fake cluster can be asked for, and how it cleans up."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from clusters import BACKGROUND, Cluster, config_map, job
from test_fakekubernetes import SLEEP, has, phases, pods_of, reason_of, until, until_pods

from asyncrt.backends.kubeapi import KubeApi
from asyncrt.errors import KubernetesError
from asyncrt.testing.fakekubernetes import FakeKubernetes
from asyncrt.testing.fakestore import matcher, merge_patch

pytestmark = pytest.mark.anyio

Object = dict[str, Any]


@pytest.fixture
async def fake() -> AsyncIterator[FakeKubernetes]:
    async with FakeKubernetes() as fake:
        yield fake


@pytest.fixture
def cluster(fake: FakeKubernetes, tmp_path: Path) -> Cluster:
    return Cluster(fake.kubeconfig(tmp_path / "config"), "default", fake)


@pytest.fixture
async def api(cluster: Cluster) -> AsyncIterator[KubeApi]:
    async with cluster.api() as api:
        yield api


async def run_one(api: KubeApi, cluster: Cluster, name: str = "one", **spec: Any) -> Object:
    """Return the pod of a Job that sleeps."""
    await api.request("POST", cluster.jobs, body=job(name, SLEEP, **spec))
    pods = await until_pods(api, cluster, name, lambda pods: phases(pods) == ["Running"])
    return pods[0]


def condition(pod: Object, kind: str) -> Object:
    found = [c for c in pod["status"].get("conditions") or () if c["type"] == kind]
    return found[0] if found else {}


async def test_images_fail_until_they_do_not(
    fake: FakeKubernetes, cluster: Cluster, api: KubeApi
) -> None:
    fake.fail_images("ErrImagePull", "manifest unknown")
    await api.request("POST", cluster.jobs, body=job("one", "pass"))
    for reason in ("ErrImagePull", "ImagePullBackOff"):
        told = lambda pods, reason=reason: any(reason_of(pod) == reason for pod in pods)  # noqa: E731
        (pod,) = await until_pods(api, cluster, "one", told)
        message = pod["status"]["containerStatuses"][0]["state"]["waiting"]["message"]
        assert "manifest unknown" in message
    fake.fail_images(None)
    await until(api, f"{cluster.jobs}/one", lambda job: has(job, "Complete") is not None)


async def test_pods_wait_for_a_node_and_can_be_deleted_meanwhile(
    fake: FakeKubernetes, cluster: Cluster, api: KubeApi
) -> None:
    fake.make_unschedulable("0/1 nodes are available: 1 Insufficient cpu.")
    await api.request("POST", cluster.jobs, body=job("one", "pass"))

    def told(pods: list[Object]) -> bool:
        return any(condition(pod, "PodScheduled").get("status") == "False" for pod in pods)

    (pod,) = await until_pods(api, cluster, "one", told)
    assert condition(pod, "PodScheduled")["reason"] == "Unschedulable"
    assert "Insufficient cpu" in condition(pod, "PodScheduled")["message"]
    events = await api.request("GET", cluster.core("events"))
    assert [event["reason"] for event in events["items"]] == ["FailedScheduling"]
    await api.request("DELETE", f"{cluster.core('pods')}/{pod['metadata']['name']}")
    fake.make_unschedulable(None)
    await until_pods(api, cluster, "one", lambda pods: phases(pods) in (["Succeeded"], []))


async def test_a_quota_is_told_by_events_of_the_job(
    fake: FakeKubernetes, cluster: Cluster, api: KubeApi
) -> None:
    fake.quota = "exceeded quota: small, requested: pods=1, used: pods=1, limited: pods=1"
    await api.request("POST", cluster.jobs, body=job("one", "pass"))
    found = await until(
        api, cluster.core("events"), lambda found: any(e["count"] > 1 for e in found["items"])
    )
    assert found["items"][0]["reason"] == "FailedCreate"
    assert found["items"][0]["involvedObject"]["kind"] == "Job"
    assert "exceeded quota" in found["items"][0]["message"]
    fake.quota = None
    await until(api, f"{cluster.jobs}/one", lambda job: has(job, "Complete") is not None)


async def test_a_memory_limit_kills_the_whole_container(
    fake: FakeKubernetes, cluster: Cluster, api: KubeApi
) -> None:
    pod = await run_one(api, cluster)
    fake.kill_for_memory(pod["metadata"]["name"])
    (pod,) = await until_pods(api, cluster, "one", lambda pods: phases(pods) == ["Failed"])
    ended = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (ended["reason"], ended["exitCode"]) == ("OOMKilled", 137)
    with pytest.raises(LookupError):
        fake.kill_for_memory("absent")


async def test_an_evicted_pod_says_so_before_it_goes(
    fake: FakeKubernetes, cluster: Cluster, api: KubeApi
) -> None:
    rule = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    pod = await run_one(api, cluster, podFailurePolicy={"rules": [rule]})
    fake.evict(pod["metadata"]["name"])
    evicted = fake.store.get("pods", "default", pod["metadata"]["name"])
    assert condition(evicted, "DisruptionTarget")["reason"] == "EvictionByEvictionAPI"
    assert evicted["metadata"]["deletionTimestamp"]
    # A disruption that the Job ignores is not a failure: the index runs again.
    uid = pod["metadata"]["uid"]
    await until_pods(
        api,
        cluster,
        "one",
        lambda pods: phases(pods) == ["Running"] and pods[0]["metadata"]["uid"] != uid,
    )


async def test_pods_of_a_lost_node_stay_and_nobody_confirms_their_end(
    fake: FakeKubernetes, cluster: Cluster, api: KubeApi
) -> None:
    pod = await run_one(api, cluster)
    (pid,) = fake.kubelet.pids
    path = f"{cluster.core('pods')}/{pod['metadata']['name']}"
    fake.lose_node()
    lost = await api.request("GET", path)
    assert lost["status"]["phase"] == "Running"
    assert condition(lost, "Ready")["status"] == "False"
    fake.evict_from_lost_node()
    evicted = await api.request("GET", path)
    assert condition(evicted, "DisruptionTarget")["reason"] == "DeletionByTaintManager"
    assert evicted["metadata"]["deletionTimestamp"]
    assert evicted["status"]["phase"] == "Running"
    await until_dead(pid)
    await api.request("DELETE", path, query={"gracePeriodSeconds": 0})
    assert path not in [p["metadata"]["name"] for p in await pods_of(api, cluster, "one")]


async def test_a_pod_that_ignores_sigterm_is_killed(
    fake: FakeKubernetes, cluster: Cluster, api: KubeApi
) -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}])\n"
        "print(child.pid, flush=True)\ntime.sleep(600)"
    )
    body = job("stubborn", code, pod={"terminationGracePeriodSeconds": 1})
    await api.request("POST", cluster.jobs, body=body)
    (pod,) = await until_pods(api, cluster, "stubborn", lambda p: phases(p) == ["Running"])
    path = f"{cluster.core('pods')}/{pod['metadata']['name']}"
    async with api.stream_lines(f"{path}/log", query={"follow": True}) as stream:
        child = int((await stream.receive())[0])
    await api.request("DELETE", f"{cluster.jobs}/stubborn", query=BACKGROUND)
    await until_pods(api, cluster, "stubborn", lambda pods: not pods)
    await until_dead(child)


async def test_leaving_ends_every_process_and_removes_every_file(tmp_path: Path) -> None:
    async with FakeKubernetes() as fake:
        cluster = Cluster(fake.kubeconfig(tmp_path / "config"), "default", fake)
        async with cluster.api() as api:
            await api.request("POST", cluster.jobs, body=job("many", SLEEP, completions=3))
            await until_pods(api, cluster, "many", lambda pods: phases(pods) == ["Running"] * 3)
        pids = fake.kubelet.pids
        directory = fake.kubelet.directory
        assert len(pids) == 3
        assert directory.is_dir()
    assert not any(is_alive(pid) for pid in pids)
    assert not directory.exists()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


async def until_dead(pid: int) -> None:
    with anyio.fail_after(10):
        while is_alive(pid):  # noqa: ASYNC110 - the kernel sets no event of ours
            await anyio.sleep(0.01)


async def test_environment_and_volumes_reach_the_process(cluster: Cluster, api: KubeApi) -> None:
    code = (
        "import os\n"
        "for name in ('PLAIN', 'BOTH', 'P_a', 'KEY', 'MAP', 'NODE', 'POD'):\n"
        "    print(name, os.environ.get(name))\n"
        "print(open('/config/sub/a').read(), os.listdir('/config'))\n"
        "open('/scratch/x', 'w').write('x')\nprint(os.path.exists('/scratch/x'))\n"
        "print(open('/one').read())"
    )
    await api.request("POST", cluster.core("configmaps"), body=config_map("map", a="1", b="2"))
    secret = {"metadata": {"name": "secret"}, "stringData": {"s": "hidden"}}
    await api.request("POST", cluster.core("secrets"), body=secret)
    env: list[Object] = [
        {"name": "PLAIN", "value": "p"},
        {"name": "BOTH", "value": "$(PLAIN)-$(ABSENT)-$$(PLAIN)"},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "secret", "key": "s"}}},
        {"name": "MAP", "valueFrom": {"configMapKeyRef": {"name": "map", "key": "b"}}},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {
            "name": "NONE",
            "valueFrom": {"configMapKeyRef": {"name": "x", "key": "y", "optional": True}},
        },
    ]
    items = [{"key": "a", "path": "sub/a"}]
    volumes = [
        {"name": "config", "configMap": {"name": "map", "items": items}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "one", "configMap": {"name": "map"}},
        {"name": "maybe", "secret": {"secretName": "absent", "optional": True}},
    ]
    mounts = [
        {"name": "config", "mountPath": "/config"},
        {"name": "scratch", "mountPath": "/scratch"},
        {"name": "one", "mountPath": "/one", "subPath": "b"},
    ]
    source = [{"prefix": "P_", "configMapRef": {"name": "map"}}]
    container = {"env": env, "envFrom": source, "volumeMounts": mounts}
    body = job("mounts", code, pod={"volumes": volumes}, container=container)
    await api.request("POST", cluster.jobs, body=body)
    ended = lambda pods: phases(pods) in (["Succeeded"], ["Failed"])  # noqa: E731
    pods = await until_pods(api, cluster, "mounts", ended)
    path = f"{cluster.core('pods')}/{pods[0]['metadata']['name']}/log"
    async with api.stream_lines(path) as stream:
        lines = [line.decode() async for line in stream]
    assert lines == [
        "PLAIN p",
        "BOTH p-$(ABSENT)-$(PLAIN)",
        "P_a 1",
        "KEY hidden",
        "MAP 2",
        "NODE fake-node",
        "POD None",
        "1 ['sub']",
        "True",
        "2",
    ]


async def test_a_missing_key_is_a_config_error(cluster: Cluster, api: KubeApi) -> None:
    await api.request("POST", cluster.core("configmaps"), body=config_map("map"))
    reference = {"configMapKeyRef": {"name": "map", "key": "absent"}}
    body = job("one", "pass", container={"env": [{"name": "A", "valueFrom": reference}]})
    await api.request("POST", cluster.jobs, body=body)
    (pod,) = await until_pods(
        api,
        cluster,
        "one",
        lambda pods: any(reason_of(pod) == "CreateContainerConfigError" for pod in pods),
    )
    message = pod["status"]["containerStatuses"][0]["state"]["waiting"]["message"]
    assert message == "couldn't find key absent in ConfigMap default/map"


async def test_too_many_failed_indexes_fail_the_job(cluster: Cluster, api: KubeApi) -> None:
    body = job("one", "raise SystemExit(1)", completions=3, maxFailedIndexes=1)
    await api.request("POST", cluster.jobs, body=body)
    failed = await until(api, f"{cluster.jobs}/one", lambda job: has(job, "Failed") is not None)
    assert (has(failed, "Failed") or {})["reason"] == "MaxFailedIndexesExceeded"


async def test_a_failure_policy_may_fail_the_job(cluster: Cluster, api: KubeApi) -> None:
    codes = {"operator": "NotIn", "values": [1]}
    rules = [{"action": "FailJob", "onExitCodes": codes}]
    body = job("one", "raise SystemExit(2)", podFailurePolicy={"rules": rules})
    await api.request("POST", cluster.jobs, body=body)
    failed = await until(api, f"{cluster.jobs}/one", lambda job: has(job, "Failed") is not None)
    assert (has(failed, "Failed") or {})["reason"] == "PodFailurePolicy"


async def test_a_job_shrinks_and_can_be_suspended(cluster: Cluster, api: KubeApi) -> None:
    path = f"{cluster.jobs}/one"
    grace = {"terminationGracePeriodSeconds": 0}
    await api.request("POST", cluster.jobs, body=job("one", SLEEP, completions=3, pod=grace))
    await until_pods(api, cluster, "one", lambda pods: phases(pods) == ["Running"] * 3)
    await api.request("PATCH", path, body={"spec": {"completions": 2, "parallelism": 2}})
    pods = await until_pods(api, cluster, "one", lambda pods: len(pods) == 2)
    label = "batch.kubernetes.io/job-completion-index"
    assert {pod["metadata"]["labels"][label] for pod in pods} == {"0", "1"}  # the highest went
    await api.request("PATCH", path, body={"spec": {"parallelism": 1}})
    await until_pods(api, cluster, "one", lambda pods: len(pods) == 1)
    await api.request("PATCH", path, body={"spec": {"suspend": True}})
    await until_pods(api, cluster, "one", lambda pods: not pods)


async def test_what_comes_after_its_owner_went_is_collected(cluster: Cluster, api: KubeApi) -> None:
    body = config_map("late")
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "gone", "uid": "gone"}
    body["metadata"]["ownerReferences"] = [owner]
    await api.request("POST", cluster.core("configmaps"), body=body)
    await until(api, cluster.core("configmaps"), lambda found: not found["items"])


async def test_updates_need_the_present_version(cluster: Cluster, api: KubeApi) -> None:
    path = cluster.core("configmaps")
    old = await api.request("POST", path, body={**config_map("one", a="1"), "immutable": False})
    new = await api.request("PUT", f"{path}/one", body={**old, "data": {"a": "2"}})
    assert new["data"] == {"a": "2"}
    stale = {"metadata": {"resourceVersion": old["metadata"]["resourceVersion"]}}
    for method, body in (("PUT", {**old, "data": {}}), ("PATCH", stale)):
        with pytest.raises(KubernetesError, match="has been modified") as caught:
            await api.request(method, f"{path}/one", body=body)
        assert caught.value.status == 409
    await api.request("PATCH", f"{path}/one", body={"immutable": True})
    with pytest.raises(KubernetesError, match="immutable"):
        await api.request("PATCH", f"{path}/one", body={"data": {"a": "3"}})
    with pytest.raises(KubernetesError) as caught:
        await api.request(
            "PATCH", f"{path}/one", body={}, content_type="application/json-patch+json"
        )
    assert caught.value.status == 415
    with pytest.raises(KubernetesError, match="Precondition failed"):
        await api.request("DELETE", f"{path}/one", body={"preconditions": {"uid": "other"}})
    await api.request("DELETE", path, query={"labelSelector": "test=watch"})
    assert (await api.request("GET", path))["items"] == []


async def test_a_body_that_is_none_is_refused(cluster: Cluster, api: KubeApi) -> None:
    with pytest.raises(KubernetesError) as caught:
        await api.request("POST", cluster.core("configmaps"), body=["a list"])
    assert caught.value.status == 400
    for path in ("/apis/apps/v1/namespaces/default/deployments", "/api/v1/pods/x/y/z"):
        with pytest.raises(KubernetesError) as caught:
            await api.request("GET", path)
        assert caught.value.status == 404


async def test_the_version_is_told_and_pods_can_be_made_without_a_job(
    cluster: Cluster, api: KubeApi
) -> None:
    assert (await api.request("GET", "/version"))["major"] == "1"
    container = {"name": "main", "image": "python", "command": ["python", "-c", "pass"]}
    body = {"metadata": {"generateName": "bare-"}, "spec": {"containers": [container]}}
    made = await api.request("POST", cluster.core("pods"), body=body)
    path = f"{cluster.core('pods')}/{made['metadata']['name']}"
    await until(api, f"{path}/status", lambda pod: pod["status"]["phase"] == "Succeeded")


async def test_a_process_that_ends_ends_its_port_forward(
    fake: FakeKubernetes, cluster: Cluster, api: KubeApi
) -> None:
    code = (
        "import socket\n"
        "listener = socket.create_server(('127.0.0.1', 9000))\n"
        "print('listening', flush=True)\n"
        "connection, _ = listener.accept()\nconnection.sendall(b'x' + connection.recv(9))"
    )
    await api.request("POST", cluster.jobs, body=job("one", code))
    (pod,) = await until_pods(api, cluster, "one", lambda pods: phases(pods) == ["Running"])
    path = f"{cluster.core('pods')}/{pod['metadata']['name']}"
    with pytest.raises(KubernetesError) as caught:
        await api.websocket(f"{path}/portforward")
    assert caught.value.status == 400
    async with api.stream_lines(f"{path}/log", query={"follow": True}) as stream:
        assert await stream.receive() == [b"listening"]
    socket = await api.websocket(f"{path}/portforward", query={"ports": 9000})
    await socket.send_bytes(b"\0y")
    messages = [await socket.receive() for _ in range(4)]
    assert messages[2].data == b"\0xy"
    assert messages[3].data in (1000, None)
    await socket.close()
    await until_pods(api, cluster, "one", lambda pods: phases(pods) == ["Succeeded"])
    async with api.stream_lines(f"{path}/log", query={"limitBytes": 4}) as stream:
        assert await stream.receive() == []  # no whole line


async def test_hollow_pods_run_without_a_process(tmp_path: Path) -> None:
    async with FakeKubernetes(hollow=True) as fake:
        cluster = Cluster(fake.kubeconfig(tmp_path / "config"), "default", fake)
        async with cluster.api() as api:
            await api.request("POST", cluster.jobs, body=job("many", "", completions=50))
            await until_pods(api, cluster, "many", lambda pods: phases(pods) == ["Running"] * 50)
            assert fake.kubelet.pids == []
            await api.request(
                "DELETE", f"{cluster.jobs}/many", query={"propagationPolicy": "Foreground"}
            )
            await until_pods(api, cluster, "many", lambda pods: not pods)


async def test_the_api_may_go_away_and_come_back(
    fake: FakeKubernetes, cluster: Cluster, api: KubeApi
) -> None:
    await run_one(api, cluster)
    pids = fake.kubelet.pids
    began = time.monotonic()
    await fake.restart()
    assert time.monotonic() - began < 10
    assert fake.kubelet.pids == pids
    assert len(await pods_of(api, cluster, "one")) == 1
    assert os.getpid() not in pids


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ("", "abc"),
        ("x", "ab"),
        ("!x", "c"),
        ("x=1", "a"),
        ("x == 1,y=2", "a"),
        ("x!=1", "bc"),
        ("x in (1, 2)", "ab"),
        ("x notin (1)", "bc"),
        ("x,x notin (1,3)", "b"),
    ],
)
def test_labels_select_as_documented(selector: str, found: str) -> None:
    labels: dict[str, dict[str, str]] = {"a": {"x": "1", "y": "2"}, "b": {"x": "2"}, "c": {}}
    matches = matcher({"labelSelector": selector})
    items = [{"metadata": {"name": name, "labels": labels[name]}} for name in labels]
    assert "".join(str(item["metadata"]["name"]) for item in items if matches(item)) == found


def test_fields_select_as_documented() -> None:
    item: Object = {"metadata": {"name": "a"}, "status": {"phase": "Running"}}
    assert matcher({"fieldSelector": "metadata.name=a,status.phase==Running"})(item)
    assert matcher({"fieldSelector": "status.phase!=Failed"})(item)
    assert not matcher({"fieldSelector": "spec.nodeName=n"})(item)
    with pytest.raises(Exception, match="unable to parse"):
        matcher({"labelSelector": "not a selector"})


def test_merge_patches_follow_rfc_7386() -> None:
    target = {"a": {"b": 1, "c": [1]}, "d": 2}
    assert merge_patch(target, {"a": {"b": None, "c": [2]}, "e": {"f": None}}) == {
        "a": {"c": [2]},
        "d": 2,
        "e": {},
    }
    assert merge_patch(1, {"a": 1}) == {"a": 1}
    assert merge_patch(target, "x") == "x"
