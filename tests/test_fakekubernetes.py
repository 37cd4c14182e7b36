"""What the fake cluster does is what a real one does: the same tests, on both."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import anyio
import cloudpickle
import pytest
from clusters import BACKGROUND, Cluster, config_map, job

import asyncrt
from asyncrt.backends.kubeapi import KubeApi
from asyncrt.errors import KubernetesError
from asyncrt.pack import pack_worker
from asyncrt.worker.settings import WorkerSettings

pytestmark = pytest.mark.anyio

Object = dict[str, Any]
SLEEP = "import time; time.sleep(600)"


async def until(
    api: KubeApi, path: str, condition: Callable[[Object], bool], *, query: Any = None
) -> Object:
    """Return an object when it is as it should be."""
    with anyio.fail_after(90):
        while True:
            found = await api.request("GET", path, query=query)
            if condition(found):
                return found
            await anyio.sleep(0.05)


async def pods_of(api: KubeApi, cluster: Cluster, name: str) -> list[Object]:
    query = {"labelSelector": f"batch.kubernetes.io/job-name={name}"}
    items: list[Object] = (await api.request("GET", cluster.core("pods"), query=query))["items"]
    return items


async def until_pods(
    api: KubeApi, cluster: Cluster, name: str, condition: Callable[[list[Object]], bool]
) -> list[Object]:
    """Return the pods of a Job when they are as they should be."""
    query = {"labelSelector": f"batch.kubernetes.io/job-name={name}"}
    found = await until(
        api, cluster.core("pods"), lambda found: condition(found["items"]), query=query
    )
    items: list[Object] = found["items"]
    return items


def phases(pods: list[Object]) -> list[str]:
    return sorted(pod["status"].get("phase", "") for pod in pods)


def has(job: Object, kind: str) -> Object | None:
    conditions = job["status"].get("conditions") or []
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), None)


async def test_a_job_completes_and_takes_all_it_owns_with_it(cluster: Cluster) -> None:
    async with cluster.api() as api:
        made = await api.request("POST", cluster.jobs, body=job("one", "pass", completions=3))
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "one"}
        body = config_map("owned")
        body["metadata"]["ownerReferences"] = [{**owner, "uid": made["metadata"]["uid"]}]
        await api.request("POST", cluster.core("configmaps"), body=body)
        done = await until(api, f"{cluster.jobs}/one", lambda job: has(job, "Complete") is not None)
        assert done["status"]["succeeded"] == 3
        assert done["status"]["completedIndexes"] == "0-2"
        await api.request("DELETE", f"{cluster.jobs}/one", query=BACKGROUND)
        await until_pods(api, cluster, "one", lambda pods: not pods)
        maps = cluster.core("configmaps")
        query = {"labelSelector": "test"}
        await until(api, maps, lambda found: not found["items"], query=query)


async def test_a_job_that_is_deleted_without_a_word_leaves_its_pods(cluster: Cluster) -> None:
    async with cluster.api() as api:
        await api.request("POST", cluster.jobs, body=job("orphans", SLEEP))
        await until_pods(api, cluster, "orphans", lambda pods: phases(pods) == ["Running"])
        await api.request("DELETE", f"{cluster.jobs}/orphans")
        (pod,) = await until_pods(
            api,
            cluster,
            "orphans",
            lambda pods: not any(pod["metadata"].get("ownerReferences") for pod in pods),
        )
        path = f"{cluster.core('pods')}/{pod['metadata']['name']}"
        await api.request("DELETE", path, query={"gracePeriodSeconds": 0})


async def test_an_index_that_fails_is_tried_as_often_as_the_job_says(cluster: Cluster) -> None:
    code = "import os, sys; sys.exit(3 if os.environ['JOB_COMPLETION_INDEX'] == '1' else 0)"
    body = job("partly", code, completions=3, backoffLimitPerIndex=1, maxFailedIndexes=3)
    async with cluster.api() as api:
        await api.request("POST", cluster.jobs, body=body)
        failed = await until(api, f"{cluster.jobs}/partly", lambda j: has(j, "Failed") is not None)
        assert failed["status"]["failedIndexes"] == "1"
        assert failed["status"]["completedIndexes"] in ("0,2", "0-2")
        assert failed["status"]["failed"] == 2
        reason = has(failed, "Failed") or {}
        assert reason["reason"] == "FailedIndexes"
        codes = [
            pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"]
            for pod in await pods_of(api, cluster, "partly")
        ]
        assert sorted(codes) == [0, 0, 3, 3]


async def test_an_exit_code_may_fail_an_index_at_once(cluster: Cluster) -> None:
    rule = {"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [42]}}
    body = job(
        "final",
        "import sys; sys.exit(42)",
        backoffLimitPerIndex=5,
        podFailurePolicy={"rules": [rule]},
    )
    async with cluster.api() as api:
        await api.request("POST", cluster.jobs, body=body)
        await until(api, f"{cluster.jobs}/final", lambda j: has(j, "Failed") is not None)
        assert len(await pods_of(api, cluster, "final")) == 1


async def test_an_indexed_job_grows_when_both_numbers_are_patched_together(
    cluster: Cluster,
) -> None:
    async with cluster.api() as api:
        path = f"{cluster.jobs}/grows"
        await api.request("POST", cluster.jobs, body=job("grows", SLEEP))
        await until_pods(api, cluster, "grows", lambda pods: phases(pods) == ["Running"])
        with pytest.raises(KubernetesError, match="immutable") as caught:
            await api.request("PATCH", path, body={"spec": {"completions": 3}})
        assert caught.value.status == 422
        await api.request("PATCH", path, body={"spec": {"completions": 3, "parallelism": 3}})
        pods = await until_pods(api, cluster, "grows", lambda pods: phases(pods) == ["Running"] * 3)
        label = "batch.kubernetes.io/job-completion-index"
        assert {pod["metadata"]["labels"][label] for pod in pods} == {"0", "1", "2"}
        with pytest.raises(KubernetesError, match="immutable"):
            await api.request(
                "PATCH", path, body={"spec": {"template": {"spec": {"hostname": "x"}}}}
            )
        await api.request("DELETE", path, query=BACKGROUND)


async def test_a_deadline_ends_a_job_and_its_pods(cluster: Cluster) -> None:
    async with cluster.api() as api:
        body = job("late", SLEEP, activeDeadlineSeconds=3, pod={"terminationGracePeriodSeconds": 0})
        await api.request("POST", cluster.jobs, body=body)
        late = await until(api, f"{cluster.jobs}/late", lambda j: has(j, "Failed") is not None)
        assert (has(late, "Failed") or {})["reason"] == "DeadlineExceeded"
        await until_pods(api, cluster, "late", lambda pods: "Running" not in phases(pods))


async def test_a_deadline_can_be_pushed_forward(cluster: Cluster) -> None:
    async with cluster.api() as api:
        await api.request("POST", cluster.jobs, body=job("pushed", SLEEP, activeDeadlineSeconds=1))
        patch = {"spec": {"activeDeadlineSeconds": 600}}
        patched = await api.request("PATCH", f"{cluster.jobs}/pushed", body=patch)
        assert patched["spec"]["activeDeadlineSeconds"] == 600
        await until_pods(api, cluster, "pushed", lambda pods: phases(pods) == ["Running"])
        await api.request("DELETE", f"{cluster.jobs}/pushed", query=BACKGROUND)


async def test_what_is_done_goes_away_after_its_ttl(cluster: Cluster) -> None:
    async with cluster.api() as api:
        await api.request(
            "POST", cluster.jobs, body=job("brief", "pass", ttlSecondsAfterFinished=1)
        )
        query = {"fieldSelector": "metadata.name=brief"}
        await until(api, cluster.jobs, lambda found: not found["items"], query=query)
        await until_pods(api, cluster, "brief", lambda pods: not pods)


async def test_a_deleted_pod_is_told_first_and_killed_after_its_grace(cluster: Cluster) -> None:
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n    print('bye', flush=True); sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('ready', flush=True)\ntime.sleep(600)"
    )
    async with cluster.api() as api:
        await api.request("POST", cluster.jobs, body=job("polite", code))
        (pod,) = await until_pods(api, cluster, "polite", lambda p: phases(p) == ["Running"])
        path = f"{cluster.core('pods')}/{pod['metadata']['name']}"
        async with api.stream_lines(f"{path}/log", query={"follow": True}) as stream:
            lines = aiter(stream)
            assert await anext(lines) == b"ready"
            gone = await api.request("DELETE", path)
            assert gone["metadata"]["deletionTimestamp"]
            assert await anext(lines) == b"bye"
        query = {"fieldSelector": f"metadata.name={pod['metadata']['name']}"}
        await until(api, cluster.core("pods"), lambda found: not found["items"], query=query)
        await api.request("DELETE", f"{cluster.jobs}/polite", query=BACKGROUND)


async def test_a_missing_secret_is_told_by_an_event_and_waited_for(cluster: Cluster) -> None:
    mount = {"name": "settings", "mountPath": "/settings"}
    body = job(
        "waits",
        "print(open('/settings/word').read())",
        pod={"volumes": [{"name": "settings", "secret": {"secretName": "late"}}]},
        container={"volumeMounts": [mount]},
    )
    async with cluster.api() as api:
        await api.request("POST", cluster.jobs, body=body)
        query = {"fieldSelector": "reason=FailedMount"}
        events = cluster.core("events")
        found = await until(api, events, lambda found: bool(found["items"]), query=query)
        assert 'secret "late" not found' in found["items"][0]["message"]
        (pod,) = await pods_of(api, cluster, "waits")
        waiting = pod["status"]["containerStatuses"][0]["state"]["waiting"]
        assert waiting["reason"] == "ContainerCreating"
        secret = {"metadata": {"name": "late"}, "data": {"word": base64.b64encode(b"hi").decode()}}
        await api.request("POST", cluster.core("secrets"), body=secret)
        if cluster.fake is not None:  # a real kubelet tries again after up to two minutes
            pods = await until_pods(api, cluster, "waits", lambda p: phases(p) == ["Succeeded"])
            path = f"{cluster.core('pods')}/{pods[0]['metadata']['name']}/log"
            async with api.stream_lines(path) as stream:
                assert [line async for line in stream] == [b"hi"]
        await api.request("DELETE", f"{cluster.jobs}/waits", query=BACKGROUND)


async def test_a_missing_secret_of_the_environment_is_a_config_error(cluster: Cluster) -> None:
    body = job("refers", "pass", container={"envFrom": [{"secretRef": {"name": "absent"}}]})
    async with cluster.api() as api:
        await api.request("POST", cluster.jobs, body=body)

        def told(pods: list[Object]) -> bool:
            return any(reason_of(pod) == "CreateContainerConfigError" for pod in pods)

        (pod,) = await until_pods(api, cluster, "refers", told)
        waiting = pod["status"]["containerStatuses"][0]["state"]["waiting"]
        assert 'secret "absent" not found' in waiting["message"]
        assert pod["status"]["phase"] == "Pending"
        await api.request("DELETE", f"{cluster.jobs}/refers", query=BACKGROUND)


def reason_of(pod: Object) -> str:
    statuses = pod["status"].get("containerStatuses") or [{}]
    return str(statuses[0].get("state", {}).get("waiting", {}).get("reason", ""))


async def test_a_program_that_is_not_there_is_a_start_error(cluster: Cluster) -> None:
    async with cluster.api() as api:
        body = job("lacks", "pass", container={"command": ["no-such-program"]})
        await api.request("POST", cluster.jobs, body=body)
        (pod,) = await until_pods(api, cluster, "lacks", lambda p: phases(p) == ["Failed"])
        ended = pod["status"]["containerStatuses"][0]["state"]["terminated"]
        assert (ended["reason"], ended["exitCode"]) == ("StartError", 128)
        assert "executable file not found in $PATH" in ended["message"]


async def test_an_image_name_that_is_none_is_told(cluster: Cluster) -> None:
    async with cluster.api() as api:
        body = job("odd", "pass", container={"image": "Not/AnImage"})
        await api.request("POST", cluster.jobs, body=body)
        told = lambda pods: any(reason_of(pod) == "InvalidImageName" for pod in pods)  # noqa: E731
        await until_pods(api, cluster, "odd", told)
        await api.request("DELETE", f"{cluster.jobs}/odd", query=BACKGROUND)


async def test_the_log_of_a_pod_that_waits_is_refused(cluster: Cluster) -> None:
    mount = {"name": "none", "mountPath": "/none"}
    body = job(
        "mute",
        "pass",
        pod={"volumes": [{"name": "none", "configMap": {"name": "absent"}}]},
        container={"volumeMounts": [mount]},
    )
    async with cluster.api() as api:
        await api.request("POST", cluster.jobs, body=body)
        told = lambda pods: any(reason_of(pod) == "ContainerCreating" for pod in pods)  # noqa: E731
        (pod,) = await until_pods(api, cluster, "mute", told)
        path = f"{cluster.core('pods')}/{pod['metadata']['name']}"
        with pytest.raises(KubernetesError, match="ContainerCreating") as caught:
            async with api.stream_lines(f"{path}/log"):
                pytest.fail("a log was opened")
        assert caught.value.status == 400
        with pytest.raises(KubernetesError) as caught:
            await api.websocket(f"{path}/portforward", query={"ports": 9000})
        assert caught.value.status == 500
        await api.request("DELETE", f"{cluster.jobs}/mute", query=BACKGROUND)


async def test_the_last_words_of_a_failure_are_its_termination_message(cluster: Cluster) -> None:
    body = job(
        "cries",
        "import sys; sys.exit('it broke')",
        container={"terminationMessagePolicy": "FallbackToLogsOnError"},
    )
    async with cluster.api() as api:
        await api.request("POST", cluster.jobs, body=body)
        (pod,) = await until_pods(api, cluster, "cries", lambda p: phases(p) == ["Failed"])
        ended = pod["status"]["containerStatuses"][0]["state"]["terminated"]
        assert (ended["exitCode"], ended["reason"]) == (1, "Error")
        assert ended["message"].strip() == "it broke"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"template": {"spec": {"restartPolicy": "Always"}}}, "restartPolicy"),
        ({"completions": None}, "spec.completions: Required value"),
        ({"completionMode": "NonIndexed"}, "backoffLimitPerIndex"),
    ],
)
async def test_a_job_that_makes_no_sense_is_refused(
    change: Object, words: str, cluster: Cluster
) -> None:
    body = job("senseless", "pass")
    template = change.pop("template", None)
    body["spec"].update(change)
    if template:
        body["spec"]["template"]["spec"].update(template["spec"])
    async with cluster.api() as api:
        with pytest.raises(KubernetesError, match=words) as caught:
            await api.request("POST", cluster.jobs, body=body)
        assert caught.value.status == 422
        assert (await api.request("GET", cluster.jobs))["items"] == []


async def test_pages_lead_through_a_list_and_old_ones_expire(cluster: Cluster) -> None:
    path = cluster.core("configmaps")
    async with cluster.api() as api:
        for name in ("a", "b", "c"):
            await api.request("POST", path, body=config_map(name))
        query: dict[str, Any] = {"limit": 2, "labelSelector": "test in (watch, other)"}
        first = await api.request("GET", path, query=query)
        assert [item["metadata"]["name"] for item in first["items"]] == ["a", "b"]
        assert first["kind"] == "ConfigMapList"
        assert "kind" not in first["items"][0]
        query["continue"] = first["metadata"]["continue"]
        second = await api.request("GET", path, query=query)
        assert [item["metadata"]["name"] for item in second["items"]] == ["c"]
        assert not second["metadata"].get("continue")
        if cluster.fake is not None:  # a real one compacts every five minutes
            cluster.fake.compact()
            with pytest.raises(KubernetesError) as caught:
                await api.request("GET", path, query=query)
            assert (caught.value.status, caught.value.reason) == (410, "Expired")


async def test_the_worker_runs_in_a_pod_and_answers_through_port_forward(cluster: Cluster) -> None:
    settings = WorkerSettings(
        token=b"0" * 32,
        asyncrt_version=asyncrt.__version__,
        cloudpickle_version=cloudpickle.__version__,
        listen_port=9000,
    )
    text = base64.b64encode(settings.to_json().encode()).decode()
    archive = base64.b64encode(await anyio.to_thread.run_sync(pack_worker)).decode()
    program = {"metadata": {"name": "program"}, "binaryData": {"worker.pyz": archive}}
    secret = {"metadata": {"name": "settings"}, "data": {"settings.json": text}}
    mounts = [
        {"name": "program", "mountPath": "/asyncrt"},
        {"name": "settings", "mountPath": "/asyncrt-settings"},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - of the pod
    ]
    volumes = [
        {"name": "program", "configMap": {"name": "program"}},
        {"name": "settings", "secret": {"secretName": "settings"}},
        {"name": "tmp", "emptyDir": {}},
    ]
    command = ["python3", "/asyncrt/worker.pyz", "serve", "/asyncrt-settings/settings.json"]
    body = job(
        "worker",
        "",
        completions=2,
        pod={"volumes": volumes},
        container={"command": command, "volumeMounts": mounts},
    )
    async with cluster.api() as api:
        await api.request("POST", cluster.core("configmaps"), body=program)
        await api.request("POST", cluster.core("secrets"), body=secret)
        await api.request("POST", cluster.jobs, body=body)
        pods = await until_pods(
            api, cluster, "worker", lambda pods: phases(pods) == ["Running"] * 2
        )
        for pod in pods:  # both listen on the same port, each at its own loopback
            assert await first_words(api, cluster, pod)
        await api.request("DELETE", f"{cluster.jobs}/worker", query=BACKGROUND)
        await until_pods(api, cluster, "worker", lambda pods: not pods)


async def first_words(api: KubeApi, cluster: Cluster, pod: Object) -> bytes:
    """Return what a worker says first: its challenge."""
    path = f"{cluster.core('pods')}/{pod['metadata']['name']}/portforward"
    with anyio.fail_after(60):
        while True:
            socket = await api.websocket(path, query={"ports": 9000})
            try:
                for _ in range(2):
                    await socket.receive_bytes()
                message = await socket.receive_bytes()
                if message[0] == 0:
                    return message[1:]
            finally:
                await socket.close()
            await anyio.sleep(0.05)
