"""The Kubernetes cluster that tests run on: `$ASYNCRT_TEST_KUBECONFIG`, else `scripts/cluster`'s.

`cluster` skips a test, and says what to do, where there is neither. `make_namespace` gives a test
a namespace of its own that enforces the Pod Security Standard *restricted*, and an account that may
do what its Role says and nothing else; it works in tests with and without an event loop.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import pytest

__all__ = [
    "Cluster",
    "ClusterApi",
    "NamespaceMaker",
    "NodeControls",
    "RefusedError",
    "TestNamespace",
    "real_cluster",
    "make_namespace",
    "own_node",
]

SCRIPT = Path(__file__).parents[1] / "scripts" / "cluster"
START_SECONDS = 60.0  # until something is there that takes a second on an idle machine
TOKEN_SECONDS = 6 * 3600
JSON_PATCH_KINDS = {"merge": "application/merge-patch+json", "json": "application/json-patch+json"}

Manifest = dict[str, Any]


class RefusedError(Exception):
    """The API server's answer was an error.

    Attributes:
        status: Of HTTP.
        reason: The API's own, like ``Forbidden``; empty if the answer was no API object.
    """

    def __init__(self, request: str, status: int, body: bytes) -> None:
        super().__init__(f"{request}: {status} {body.decode(errors='replace')[:2000]}")
        self.status = status
        try:
            self.reason = str(json.loads(body).get("reason", ""))
        except ValueError:
            self.reason = ""


class ClusterApi:
    """One account's plain JSON access, independent of the code under test."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def _open(
        self, method: str, path: str, body: object, query: Mapping[str, str], content_type: str
    ) -> Any:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        await self._client.update_params_for_auth(headers, [], ["BearerToken"])
        url = self._client.configuration.host + path
        response = await self._client.request(
            method,
            url,
            query_params=list(query.items()),
            headers=headers,
            body=body,
            _preload_content=False,
        )
        if response.status >= 400:
            raise RefusedError(f"{method} {path}", response.status, await response.read())
        return response

    async def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        content_type: str = "application/json",
        **query: str,
    ) -> Manifest:
        """Return the answer's object.

        Raises:
            RefusedError: The status is 400 or higher.
        """
        response = await self._open(method, path, body, query, content_type)
        answer: Manifest = json.loads(await response.read())
        return answer

    async def get(self, path: str, **query: str) -> Manifest:
        return await self.request("GET", path, **query)

    async def items(self, path: str, **query: str) -> list[Manifest]:
        listed: list[Manifest] = (await self.get(path, **query))["items"]
        return listed

    async def create(self, path: str, manifest: Manifest) -> Manifest:
        return await self.request("POST", path, manifest)

    async def patch(self, path: str, change: object, *, kind: str = "merge") -> Manifest:
        """Change an object; ``kind`` is ``merge`` or ``json``."""
        return await self.request("PATCH", path, change, content_type=JSON_PATCH_KINDS[kind])

    async def delete(self, path: str, *, grace_seconds: int | None = None) -> None:
        """Delete an object or a collection; that there is none is as good.

        What it owns goes with it. Without ``propagationPolicy`` a Job would orphan its pods.
        """
        options: Manifest = {"propagationPolicy": "Background"}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        try:
            await self.request("DELETE", path, options)
        except RefusedError as error:
            if error.status != 404:
                raise

    async def wait_for(
        self,
        path: str,
        condition: Callable[[list[Manifest]], bool],
        *,
        seconds: float = START_SECONDS,
        **query: str,
    ) -> list[Manifest]:
        """Wait until a collection is as it should be; return what is in it then.

        A watch wakes it, a list decides.

        Raises:
            AssertionError: It was not so in time; shows what was there.
        """
        found: list[Manifest] = []
        with anyio.move_on_after(seconds):
            while True:
                listing = await self.get(path, **query)
                found = listing["items"]
                if condition(found):
                    return found
                await self._wait_for_change(path, listing["metadata"]["resourceVersion"], query)
        shown = json.dumps([{"name": i["metadata"]["name"], **i.get("status", {})} for i in found])
        raise AssertionError(f"{path} {query} is not as it should be after {seconds} s: {shown}")

    async def _wait_for_change(self, path: str, version: str, query: Mapping[str, str]) -> None:
        watch = {"watch": "1", "resourceVersion": version, "timeoutSeconds": "10", **query}
        response = await self._open("GET", path, None, watch, "application/json")
        try:
            await response.content.readline()
        finally:
            response.close()

    async def wait_for_pod(
        self, namespace: str, name: str, *phases: str, seconds: float = START_SECONDS
    ) -> Manifest:
        """Wait until a pod is in one of these phases and return it."""
        (pod,) = await self.wait_for(
            f"/api/v1/namespaces/{namespace}/pods",
            lambda pods: bool(pods) and pods[0].get("status", {}).get("phase") in phases,
            seconds=seconds,
            fieldSelector=f"metadata.name={name}",
        )
        return pod


@dataclass(frozen=True)
class Images:
    """Names of images that the cluster's nodes can pull.

    Attributes:
        python: The client's own minor version.
        other_python: Another one.
        no_python: Nothing that could run Python.
    """

    python: str
    other_python: str
    no_python: str


@dataclass(frozen=True)
class TestNamespace:
    """A namespace of one test.

    Attributes:
        kubeconfig: Of its service account, with this namespace as its default.
        service_account: Its name.
    """

    __test__ = False  # pytest takes the name for a test's

    name: str
    kubeconfig: Path
    service_account: str


class NodeControls:
    """Stops and starts parts of the cluster that `scripts/cluster` made."""

    async def stop(self, part: str) -> None:
        await self._control("stop", part)

    async def start(self, part: str) -> None:
        await self._control("start", part)

    async def restart(self, part: str) -> None:
        await self._control("restart", part)

    async def repair(self) -> None:
        """Start what does not run and wait until pods can run again."""
        await self._control("up")

    async def _control(self, *arguments: str) -> None:
        await anyio.run_process([str(SCRIPT), *arguments], stderr=None)


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs, and an account that may do everything on it.

    Attributes:
        kubeconfig: Of that account.
        images: What its nodes can pull.
        node: Control over its parts; ``None`` if it is somebody else's.
    """

    kubeconfig: Path
    images: Images
    node: NodeControls | None

    @asynccontextmanager
    async def connect(self, kubeconfig: Path | None = None) -> AsyncIterator[ClusterApi]:
        """Open a connection, as the administrator unless another kubeconfig is given."""
        from kubernetes_asyncio.client import ApiClient, Configuration
        from kubernetes_asyncio.config import load_kube_config

        configuration = Configuration()
        await load_kube_config(
            config_file=str(kubeconfig or self.kubeconfig), client_configuration=configuration
        )
        async with ApiClient(configuration) as client:
            yield ClusterApi(client)

    @asynccontextmanager
    async def open_namespace(
        self, directory: Path, role: Manifest | None = None
    ) -> AsyncIterator[TestNamespace]:
        """Make a namespace with an account, and delete all of it in the end.

        Args:
            directory: Where the kubeconfig is written.
            role: Manifest of a Role for the account, whatever its own name and namespace say;
                without one the account may do nothing.
        """
        async with self.connect() as api:
            manifest = await api.create("/api/v1/namespaces", RESTRICTED_NAMESPACE)
            name = manifest["metadata"]["name"]
            try:
                yield await self._furnish(api, name, directory, role)
            finally:
                with anyio.CancelScope(shield=True):
                    await delete_namespace(api, name)

    async def _furnish(
        self, api: ClusterApi, name: str, directory: Path, role: Manifest | None
    ) -> TestNamespace:
        account = "tester"
        core, rbac = namespace_paths(name)
        await api.create(f"{core}/serviceaccounts", {"metadata": {"name": account}})
        request = {"spec": {"expirationSeconds": TOKEN_SECONDS}}
        answer = await api.create(f"{core}/serviceaccounts/{account}/token", request)
        path = directory / f"{name}.kubeconfig"
        write_token_kubeconfig(path, self.kubeconfig, name, answer["status"]["token"])
        if role is not None:
            await api.create(f"{rbac}/roles", {**role, "metadata": {"name": account}})
            await api.create(f"{rbac}/rolebindings", role_binding(name, account))
            await self._wait_until_allowed(path, name, role)
        # Pods are refused until the controller has made this one.
        await api.wait_for(f"{core}/serviceaccounts", bool, fieldSelector="metadata.name=default")
        return TestNamespace(name, path, account)

    async def _wait_until_allowed(self, kubeconfig: Path, name: str, role: Manifest) -> None:
        """The API server learns of a new Role a moment after it has stored it."""
        rule = role["rules"][0]
        resource, _, subresource = rule["resources"][0].partition("/")
        review = {
            "spec": {
                "resourceAttributes": {
                    "namespace": name,
                    "verb": rule["verbs"][0],
                    "group": rule["apiGroups"][0],
                    "resource": resource,
                    "subresource": subresource,
                }
            }
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        async with self.connect(kubeconfig) as api:
            with anyio.fail_after(START_SECONDS):
                # Nothing tells when: what an API server knows of RBAC cannot be watched.
                while not (await api.create(path, review))["status"]["allowed"]:  # noqa: ASYNC110
                    await anyio.sleep(0.02)


RESTRICTED_NAMESPACE: Manifest = {
    "metadata": {
        "generateName": "asyncrt-test-",
        "labels": {
            "pod-security.kubernetes.io/enforce": "restricted",
            "pod-security.kubernetes.io/enforce-version": "latest",
        },
    }
}


def namespace_paths(name: str) -> tuple[str, str]:
    """Return the paths of a namespace in the core API and in that of RBAC."""
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{name}"
    return f"/api/v1/namespaces/{name}", rbac


def role_binding(namespace: str, account: str) -> Manifest:
    return {
        "metadata": {"name": account},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": namespace}],
    }


def write_token_kubeconfig(path: Path, source: Path, namespace: str, token: str) -> None:
    """Write a kubeconfig for the cluster of another one's current context."""
    import yaml

    config = yaml.safe_load(source.read_text())
    contexts = {entry["name"]: entry["context"] for entry in config["contexts"]}
    used = contexts[config["current-context"]]["cluster"]
    (cluster,) = (dict(e["cluster"]) for e in config["clusters"] if e["name"] == used)
    authority = cluster.get("certificate-authority")
    if authority:  # relative to the file that names it
        cluster["certificate-authority"] = str((source.parent / authority).resolve())
    context = {"cluster": "test", "user": "test", "namespace": namespace}
    path.touch(mode=0o600)
    path.write_text(
        json.dumps(  # JSON is YAML
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "test", "cluster": cluster}],
                "users": [{"name": "test", "user": {"token": token}}],
                "contexts": [{"name": "test", "context": context}],
                "current-context": "test",
            }
        )
    )


async def delete_namespace(api: ClusterApi, name: str) -> None:
    """Delete a namespace: Jobs and pods first, else it can hang on the finalizers of Jobs' pods.

    It is Terminating, and empty of pods, when this returns.
    """
    core, _ = namespace_paths(name)
    await api.delete(f"/apis/batch/v1/namespaces/{name}/jobs")
    await api.delete(f"{core}/pods", grace_seconds=0)
    await api.wait_for(f"{core}/pods", lambda pods: not pods)
    await api.delete(core)


def find_own_kubeconfig() -> Path:
    """Return where `scripts/cluster` puts its kubeconfig, whether it is up or not."""
    directory = os.environ.get("ASYNCRT_CLUSTER_DIR") or Path.home() / ".cache/asyncrt-cluster"
    return Path(directory) / "run" / "admin.kubeconfig"


def find_images(own: bool) -> Images:
    version = "{}.{}".format(*sys.version_info)
    other = "3.11" if version == "3.13" else "3.13"
    empty = "nopython:1" if own else "registry.k8s.io/pause:3.10"
    return Images(f"python:{version}-slim", f"python:{other}-slim", empty)


@pytest.fixture(scope="session")
def real_cluster() -> Cluster:
    """The cluster; skips the test, with the reason, where there is none."""
    own = find_own_kubeconfig()
    named = os.environ.get("ASYNCRT_TEST_KUBECONFIG")
    if named:  # whoever names one wants the tests to fail if it is not there
        path = Path(named).expanduser().resolve()
        if not path.is_file():
            pytest.fail(f"ASYNCRT_TEST_KUBECONFIG names {path}, which is no file")
        is_own = path == own.resolve()
        return Cluster(path, find_images(is_own), NodeControls() if is_own else None)
    status = subprocess.run([SCRIPT, "status"], capture_output=True, check=False)
    if status.returncode:
        pytest.skip(
            "no Kubernetes cluster: `scripts/cluster up` starts one (as root on Debian 12), or "
            "ASYNCRT_TEST_KUBECONFIG names another's kubeconfig"
        )
    return Cluster(own, find_images(own=True), NodeControls())


NamespaceMaker = Callable[..., TestNamespace]


@pytest.fixture
def make_namespace(real_cluster: Cluster, tmp_path: Path) -> Iterator[NamespaceMaker]:
    """A function that takes a Role's manifest, or nothing, and makes a namespace for this test.

    A thread does the work, so that it can be called whether an event loop runs or not.
    """
    with anyio.from_thread.start_blocking_portal() as portal, ExitStack() as stack:

        def make(role: Manifest | None = None) -> TestNamespace:
            opened = real_cluster.open_namespace(tmp_path, role)
            return stack.enter_context(portal.wrap_async_context_manager(opened))

        yield make


@pytest.fixture
def own_node(real_cluster: Cluster) -> Iterator[NodeControls]:
    """Control over the node's parts; all run again after the test. Skips on others' clusters."""
    if real_cluster.node is None:
        pytest.skip("this cluster is not ours to break: `scripts/cluster up` starts one that is")
    yield real_cluster.node
    subprocess.run([SCRIPT, "up"], check=True)
