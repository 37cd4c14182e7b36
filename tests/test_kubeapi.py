"""Requests, streams and websockets of the API client, on the fake and on a real cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.lowlevel
import msgspec
import pytest
from clusters import BACKGROUND, Cluster, config_map, job

from asyncrt.backends.kubeapi import KubeApi, LineStream, open_kube_api
from asyncrt.backends.kubeerrors import describe_request
from asyncrt.errors import KubernetesError
from asyncrt.testing.fakekubernetes import FakeKubernetes

pytestmark = pytest.mark.anyio


@pytest.fixture
async def fake() -> AsyncIterator[FakeKubernetes]:
    async with FakeKubernetes() as fake:
        yield fake


@pytest.fixture
async def api(fake: FakeKubernetes, tmp_path: Path) -> AsyncIterator[KubeApi]:
    async with open_kube_api(kubeconfig=fake.kubeconfig(tmp_path / "config")) as api:
        yield api


MAPS = "/api/v1/namespaces/default/configmaps"
PODS = "/api/v1/namespaces/default/pods"


async def test_objects_are_made_read_changed_listed_and_deleted(cluster: Cluster) -> None:
    path = cluster.core("configmaps")
    async with cluster.api() as api:
        made = await api.request("POST", path, body=config_map("one", key="1"))
        assert made["metadata"]["uid"]
        patched = await api.request("PATCH", f"{path}/one", body={"data": {"key": None, "b": "2"}})
        assert patched["data"] == {"b": "2"}
        assert await api.request("GET", f"{path}/one") == patched
        listed = await api.request("GET", path, query={"labelSelector": "test=watch"})
        assert [item["metadata"]["name"] for item in listed["items"]] == ["one"]
        await api.request("DELETE", f"{path}/one")
        with pytest.raises(KubernetesError) as caught:
            await api.request("GET", f"{path}/one")
    error = caught.value
    assert (error.status, error.reason, error.verb) == (404, "NotFound", "get")
    assert (error.resource, error.name) == ("configmaps", "one")
    assert error.namespace == cluster.namespace
    assert 'configmaps "one" not found' in error.detail


async def test_what_exists_is_not_made_again(cluster: Cluster) -> None:
    path = cluster.core("secrets")
    async with cluster.api() as api:
        await api.request("POST", path, body=config_map("twice"))
        with pytest.raises(KubernetesError) as caught:
            await api.request("POST", path, body=config_map("twice"))
    assert (caught.value.status, caught.value.reason) == (409, "AlreadyExists")
    assert caught.value.verb == "create"


async def test_an_invalid_name_is_refused_with_the_servers_words(cluster: Cluster) -> None:
    async with cluster.api() as api:
        with pytest.raises(KubernetesError, match="RFC 1123") as caught:
            await api.request("POST", cluster.core("configmaps"), body=config_map("Not A Name"))
    assert (caught.value.status, caught.value.reason) == (422, "Invalid")


async def test_a_namespace_that_does_not_exist_is_named_with_the_fix(cluster: Cluster) -> None:
    async with cluster.api() as api:
        with pytest.raises(KubernetesError, match='namespaces "absent" not found') as caught:
            await api.request(
                "POST", "/api/v1/namespaces/absent/configmaps", body=config_map("one")
            )
    assert caught.value.status == 404
    assert "kubectl create namespace absent" in caught.value.hint


async def test_a_token_that_is_not_accepted_says_so(cluster: Cluster, tmp_path: Path) -> None:
    if cluster.fake is not None:
        path = cluster.fake.kubeconfig(tmp_path / "expired", token="expired")  # noqa: S106 - a fake
    else:
        pytest.skip("a real cluster may let anonymous users in")
    async with open_kube_api(kubeconfig=path) as api:
        with pytest.raises(KubernetesError, match="log in again") as caught:
            await api.request("GET", cluster.core("pods"))
        assert caught.value.status == 401
        with pytest.raises(KubernetesError, match="log in again"):
            async with api.stream_lines(cluster.core("pods"), query={"watch": True}):
                pytest.fail("a stream was opened")
        with pytest.raises(KubernetesError, match="log in again"):
            await api.websocket(cluster.core("pods") + "/one/portforward", query={"ports": 1})


async def test_a_forbidden_verb_names_verb_resource_namespace_and_role(
    fake: FakeKubernetes, api: KubeApi
) -> None:
    fake.forbidden.add(("list", "pods"))
    with pytest.raises(KubernetesError, match=r"role_manifest\(\)") as caught:
        await api.request("GET", PODS)
    error = caught.value
    assert (error.status, error.verb, error.resource) == (403, "list", "pods")
    assert "needs the verb 'list' on 'pods' in namespace 'default'" in str(error)


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ('pods "p" is forbidden: exceeded quota: q, requested: pods=1', "wait for other pods"),
        ("unable to create: namespace x is being terminated", "name another one"),
        ('pods "p" is forbidden: violates PodSecurity "restricted:latest"', ""),
    ],
)
async def test_other_refusals_get_hints_of_their_own(
    message: str, hint: str, fake: FakeKubernetes, api: KubeApi
) -> None:
    fake.refuse(403, reason="Forbidden", message=message)
    with pytest.raises(KubernetesError) as caught:
        await api.request("POST", PODS, body={})
    assert caught.value.detail == message
    assert hint in caught.value.hint
    assert bool(caught.value.hint) is bool(hint)


async def test_nobody_listening_is_told_within_seconds_with_the_url(
    fake: FakeKubernetes, tmp_path: Path
) -> None:
    path = fake.kubeconfig(tmp_path / "config")
    await fake.stop_api()
    async with open_kube_api(kubeconfig=path) as api:
        began = time.monotonic()
        with pytest.raises(KubernetesError, match=fake.url) as caught:
            await api.request("GET", PODS)
        assert time.monotonic() - began < 20
        for opening in (
            api.stream_lines(PODS, query={"watch": True}).__aenter__(),
            api.websocket(f"{PODS}/one/portforward", query={"ports": 1}),
        ):
            with pytest.raises(KubernetesError, match="no answer from"):
                await opening
    assert (caught.value.status, caught.value.reason) == (0, "Unreachable")
    assert "right context" in caught.value.hint
    await fake.start_api()


async def test_a_certificate_that_nobody_vouches_for_is_told_at_once(tmp_path: Path) -> None:
    async with FakeKubernetes(tls=True) as fake:
        path = fake.kubeconfig(tmp_path / "config")
        config = msgspec.json.decode(path.read_bytes())
        del config["clusters"][0]["cluster"]["certificate-authority-data"]
        path.write_bytes(msgspec.json.encode(config))
        async with open_kube_api(kubeconfig=path) as api:
            with pytest.raises(KubernetesError, match="certificate-authority") as caught:
                await api.request("GET", PODS)
            with pytest.raises(KubernetesError, match="certificate-authority"):
                await api.websocket(f"{PODS}/one/portforward", query={"ports": 1})
        config["clusters"][0]["cluster"]["insecure-skip-tls-verify"] = True
        path.write_bytes(msgspec.json.encode(config))
        async with open_kube_api(kubeconfig=path) as api:
            assert (await api.request("GET", PODS))["items"] == []
    assert caught.value.reason == "TLS"


async def test_a_server_that_was_there_is_waited_for(fake: FakeKubernetes, api: KubeApi) -> None:
    await api.request("GET", PODS)
    await fake.stop_api()
    async with anyio.create_task_group() as group:
        group.start_soon(api.request, "GET", PODS)
        await anyio.sleep(0.3)
        await fake.start_api()


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_passing_refusals_are_tried_again(
    status: int, fake: FakeKubernetes, api: KubeApi
) -> None:
    fake.refuse(status, times=2)
    assert (await api.request("GET", PODS))["items"] == []


async def test_retry_after_is_waited_for(fake: FakeKubernetes, api: KubeApi) -> None:
    fake.refuse(429, retry_after=0.3)
    began = time.monotonic()
    await api.request("POST", MAPS, body=config_map("one"))
    assert time.monotonic() - began >= 0.3
    fake.refuse(429, retry_after=60)
    with pytest.raises(KubernetesError) as caught:
        await api.request("GET", PODS)  # longer than there is time for: not waited for
    assert caught.value.retry_after == 60


async def test_a_creation_whose_fate_is_unknown_is_not_repeated_unless_allowed(
    fake: FakeKubernetes, api: KubeApi
) -> None:
    fake.lose_reply(method="POST")
    with pytest.raises(KubernetesError) as caught:
        await api.request("POST", MAPS, body=config_map("one"))
    assert (caught.value.status, caught.value.reason) == (0, "Broken")
    fake.refuse(500, method="POST")
    with pytest.raises(KubernetesError):
        await api.request("POST", MAPS, body=config_map("two"))
    fake.lose_reply(method="POST")
    with pytest.raises(KubernetesError) as caught:
        await api.request("POST", MAPS, body=config_map("three"), repeatable=True)
    assert caught.value.reason == "AlreadyExists"
    names = [item["metadata"]["name"] for item in (await api.request("GET", MAPS))["items"]]
    assert names == ["one", "three"]


async def test_a_lost_reply_of_a_patch_is_repaired(fake: FakeKubernetes, api: KubeApi) -> None:
    await api.request("POST", MAPS, body=config_map("one"))
    fake.lose_reply(method="PATCH")
    patched = await api.request("PATCH", f"{MAPS}/one", body={"data": {"a": "1"}})
    assert patched["data"] == {"a": "1"}


async def test_a_request_that_hangs_ends_at_its_timeout(fake: FakeKubernetes, api: KubeApi) -> None:
    fake.hang(times=9)
    with pytest.raises(KubernetesError, match="can be reached from here") as caught:
        await api.request("GET", PODS, timeout=0.2)
    assert caught.value.reason == "Timeout"
    with pytest.raises(KubernetesError) as caught:
        async with api.stream_lines(PODS, query={"watch": True}, idle_timeout=0.2):
            pytest.fail("a stream was opened")
    assert (caught.value.reason, caught.value.verb) == ("Timeout", "watch")
    with pytest.raises(KubernetesError, match="no answer"):
        await api.websocket(f"{PODS}/one/portforward", query={"ports": 1}, timeout=0.2)


async def test_what_is_cancelled_leaves_the_client_usable(
    fake: FakeKubernetes, api: KubeApi
) -> None:
    fake.hang()
    with anyio.move_on_after(0.1) as scope:
        await api.request("GET", PODS)
    assert scope.cancelled_caught
    assert (await api.request("GET", PODS))["items"] == []


async def test_an_answer_of_a_proxy_is_quoted(tmp_path: Path, fake: FakeKubernetes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        page = b"<h1>Sign in first</h1>"
        head = f"HTTP/1.1 404 No\r\nRetry-After: tomorrow\r\nContent-Length: {len(page)}\r\n\r\n"
        writer.write(head.encode() + page)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        fake.port = server.sockets[0].getsockname()[1]
        path = fake.kubeconfig(tmp_path / "config")
        async with open_kube_api(kubeconfig=path) as api:
            with pytest.raises(KubernetesError, match="Sign in first") as caught:
                await api.request("GET", PODS)
    assert (caught.value.status, caught.value.reason) == (404, "NotFound")
    assert caught.value.retry_after is None


async def test_a_refused_stream_is_an_error_with_its_words(cluster: Cluster) -> None:
    async with cluster.api() as api:
        with pytest.raises(KubernetesError) as caught:
            async with api.stream_lines(cluster.core("pods") + "/absent/log"):
                pytest.fail("a stream was opened")
    assert (caught.value.status, caught.value.resource) == (404, "pods/log")
    assert 'pods "absent" not found' in caught.value.detail


async def test_the_log_of_a_pod_is_followed_to_its_end(cluster: Cluster) -> None:
    code = "import time\nfor n in range(3): print('line', n, flush=True); time.sleep(0.1)"
    async with cluster.api() as api:
        await api.request("POST", cluster.jobs, body=job("talks", code))
        path = await running_pod(api, cluster, "talks") + "/log"
        async with api.stream_lines(path, query={"follow": True}) as stream:
            assert [line async for line in stream] == [b"line 0", b"line 1", b"line 2"]
        async with api.stream_lines(path, query={"tailLines": 1}) as stream:
            assert [line async for line in stream] == [b"line 2"]


async def running_pod(api: KubeApi, cluster: Cluster, name: str) -> str:
    """Return the path of a Job's first pod when it runs, or has run."""
    with anyio.fail_after(90):
        while True:
            selector = {"labelSelector": f"batch.kubernetes.io/job-name={name}"}
            pods = await api.request("GET", cluster.core("pods"), query=selector)
            for pod in pods["items"]:
                if pod["status"]["phase"] in ("Running", "Succeeded"):
                    return f"{cluster.core('pods')}/{pod['metadata']['name']}"
            await anyio.sleep(0.05)


ECHO = """
import socket
listener = socket.create_server(("127.0.0.1", 9000))
while True:
    connection, _ = listener.accept()
    while data := connection.recv(65536):
        connection.sendall(data)
"""


async def test_a_port_of_a_pod_is_reached_through_a_websocket(cluster: Cluster) -> None:
    async with cluster.api() as api:
        await api.request("POST", cluster.jobs, body=job("echoes", ECHO))
        path = await running_pod(api, cluster, "echoes") + "/portforward"
        with anyio.fail_after(30):
            while True:
                socket = await api.websocket(path, query={"ports": 9000})
                heads = [await socket.receive_bytes(), await socket.receive_bytes()]
                assert heads == [b"\0" + (9000).to_bytes(2, "little"), b"\1\x28\x23"]
                await socket.send_bytes(b"\0hello")
                answer = await socket.receive()
                if answer.data == b"\0hello":
                    break
                assert answer.data[:1] == b"\1"  # not listening yet
                await socket.close()
        await socket.close()
        await api.request("DELETE", f"{cluster.jobs}/echoes", query=BACKGROUND)


async def test_a_port_that_nobody_listens_at_is_told_on_the_error_channel(cluster: Cluster) -> None:
    async with cluster.api() as api:
        await api.request("POST", cluster.jobs, body=job("deaf", "import time; time.sleep(60)"))
        path = await running_pod(api, cluster, "deaf") + "/portforward"
        socket = await api.websocket(path, query={"ports": 9001})
        messages = [await socket.receive_bytes() for _ in range(3)]
        assert messages[2][0] == 1
        assert b"9001" in messages[2]
        assert (await socket.receive()).data in (1000, None)
        await socket.close()
        await api.request("DELETE", f"{cluster.jobs}/deaf", query=BACKGROUND)


async def test_port_forward_to_a_pod_that_is_not_there_is_refused(cluster: Cluster) -> None:
    async with cluster.api() as api:
        with pytest.raises(KubernetesError) as caught:
            await api.websocket(cluster.core("pods") + "/absent/portforward", query={"ports": 9000})
    assert (caught.value.status, caught.value.resource) == (404, "pods/portforward")


async def test_hundreds_of_websockets_are_open_at_once(fake: FakeKubernetes, api: KubeApi) -> None:
    await api.request("POST", MAPS.replace("configmaps", "pods"), body=echo_pod())
    query = {"fieldSelector": "status.phase=Running", "watch": "true"}
    async with api.stream_lines(PODS, query=query, idle_timeout=60) as stream:
        await stream.receive()
    sockets = []
    for _ in range(150):  # aiohttp's own limit is 100
        sockets.append(await api.websocket(f"{PODS}/echo/portforward", query={"ports": 9000}))
    assert (await api.request("GET", PODS))["kind"] == "PodList"
    for socket in sockets:
        await socket.close()


def echo_pod() -> dict[str, object]:
    container = {"name": "main", "image": "python", "command": ["python3", "-c", SERVE_MANY]}
    return {"metadata": {"name": "echo"}, "spec": {"containers": [container]}}


SERVE_MANY = """
import socket, time
listener = socket.create_server(("127.0.0.1", 9000), backlog=400)
time.sleep(60)
"""


async def lines_of(*chunks: bytes) -> list[list[bytes]]:
    left = list(chunks)

    async def read() -> bytes:
        await anyio.lowlevel.checkpoint()
        return left.pop(0) if left else b""

    stream = LineStream(read, idle_timeout=1)
    found = []
    while lines := await stream.receive():
        found.append(lines)
    return found


async def test_lines_are_put_together_and_a_cut_one_is_dropped() -> None:
    assert await lines_of(b"a\nb", b"b\n\nc\n", b"half") == [[b"a"], [b"bb", b"c"]]
    assert await lines_of(b"1", b"2", b"3\n") == [[b"123"]]
    assert await lines_of() == []


async def test_an_endless_line_and_an_endless_silence_end() -> None:
    async def read() -> bytes:
        await anyio.lowlevel.checkpoint()
        return b"x" * (1 << 23)

    with pytest.raises(KubernetesError, match="a line of over"):
        await LineStream(read, idle_timeout=1).receive()

    async def hang() -> bytes:
        await anyio.sleep_forever()
        return b""

    with pytest.raises(TimeoutError):
        await LineStream(hang, idle_timeout=0.01).receive()


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("GET", "/api/v1/namespaces/n/pods", "list pods in namespace 'n'"),
        ("GET", "/apis/batch/v1/namespaces/n/jobs/j", "get jobs 'j' in namespace 'n'"),
        ("POST", "/api/v1/namespaces/n/pods/p/eviction", "create pods/eviction 'p' in namespace"),
        ("DELETE", "/api/v1/namespaces/n/pods", "deletecollection pods in namespace 'n'"),
        ("DELETE", "/api/v1/namespaces/n", "delete namespaces 'n'"),
        ("PUT", "/api/v1/namespaces/n/secrets/s", "update secrets 's' in namespace 'n'"),
        ("GET", "/version", "get /version"),
    ],
)
def test_requests_are_described_in_the_words_of_a_role(method: str, path: str, words: str) -> None:
    assert str(describe_request(method, path)).startswith(words)
