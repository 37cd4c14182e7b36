"""A Kubernetes cluster in this process: its API over TCP, its pods as local processes."""

from __future__ import annotations

import asyncio
import base64
import re
import secrets
import signal
import ssl
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

import anyio
import msgspec
from aiohttp import web

from asyncrt.testing.fakeapi import ApiServer, make_event
from asyncrt.testing.fakejobs import Controllers
from asyncrt.testing.fakekubelet import Kubelet, set_condition
from asyncrt.testing.fakestore import ApiError, Object, Store, timestamp

BreakHow = Literal["gone", "error", "eof", "half_line", "silence", "reset"]

_STOP_SECONDS: Final = 10.0
_EVENTS_NAMED: Final = 63


@dataclass
class Fault:
    """What happens to requests instead of, or after, their effect."""

    kind: Literal["refuse", "hang", "lose_reply"]
    method: str
    path: re.Pattern[str]
    times: int
    status: int = 0
    body: Object | None = None
    retry_after: float | None = None


class FakeKubernetes:
    """Answers as Kubernetes does, runs pods as processes of this machine, breaks down when told to.

    It has Jobs (Indexed, elastic, with their limits, deadline and TTL), pods, Secrets, ConfigMaps,
    Events, watches, logs and port-forward; one node; one namespace unless more are named. It has
    no network, no images (a pod's ``python`` is this one), no isolation and no admission.

    Args:
        namespaces: Those that exist.
        tls: Serve https, with a certificate of its own. Needs the program ``openssl``.
        hollow: Pods run without a process, until somebody ends them.
        retry_seconds: Pause before an index of a Job is tried again (10 in a real cluster).
        bookmark_seconds: Pause between bookmarks (about 60 in a real cluster).

    Attributes:
        tokens: Bearer tokens that are accepted, with the user each belongs to.
        forbidden: What no user may do, as ``("create", "jobs")`` or ``("get", "pods/log")``.
        namespaces: Those that exist.
        streams_lists: Whether watches may begin with a list (``sendInitialEvents``).
        duplicates_events: Whether watches tell each event twice.
        quota: A message: pods are refused with it, ``None``: there is room.

    Example::

        async with FakeKubernetes() as fake:
            fake.kubeconfig(path)
            async with open_kube_api(kubeconfig=path) as api:
                await api.request("GET", "/api/v1/namespaces/default/pods")
    """

    def __init__(
        self,
        *,
        namespaces: tuple[str, ...] = ("default",),
        tls: bool = False,
        hollow: bool = False,
        retry_seconds: float = 0.05,
        bookmark_seconds: float = 60.0,
    ) -> None:
        self.token = secrets.token_hex(16)
        self.tokens = {self.token: "tester"}
        self.forbidden: set[tuple[str, str]] = set()
        self.namespaces = set(namespaces)
        self.streams_lists = True
        self.duplicates_events = False
        self.quota: str | None = None
        self.bookmark_seconds = bookmark_seconds
        self.port = 0
        self._tls = tls
        self._hollow = hollow
        self._retry_seconds = retry_seconds
        self._faults: list[Fault] = []
        self._certificate = b""
        self._context: ssl.SSLContext | None = None
        self._events: dict[tuple[str, str, str, str], str] = {}
        self.store = Store()
        self._server = ApiServer(self, self.store)

    async def __aenter__(self) -> FakeKubernetes:
        self.kubelet = Kubelet(self.store, self.record, hollow=self._hollow)
        self.controllers = Controllers(
            self.store,
            delete_pod=self.delete_pod,
            check_quota=self._check_quota,
            record=self.record,
            retry_seconds=self._retry_seconds,
        )
        try:
            if self._tls:
                self._context = await asyncio.to_thread(self._make_certificate)
            await self._listen()
        except BaseException:
            with anyio.move_on_after(_STOP_SECONDS, shield=True):
                await self._stop_cluster()
            raise
        return self

    async def _listen(self) -> None:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", self._server.handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._context)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with anyio.move_on_after(_STOP_SECONDS, shield=True):
            await self._runner.cleanup()
            await self._stop_cluster()

    async def _stop_cluster(self) -> None:
        self.controllers.close()
        await self.kubelet.aclose()

    @property
    def url(self) -> str:
        """Where the API is."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def kubeconfig(self, path: Path, *, namespace: str | None = None, **user: Any) -> Path:
        """Write a kubeconfig with the context ``fake``; return its path.

        Args:
            path: Of the file.
            namespace: Of the context; ``None``: none.
            user: What the user's entry has instead of the token.
        """
        cluster: Object = {"server": self.url}
        if self._tls:
            cluster["certificate-authority-data"] = base64.b64encode(self._certificate).decode()
        context = {"cluster": "fake", "user": "tester"}
        if namespace is not None:
            context["namespace"] = namespace
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "fake", "cluster": cluster}],
            "users": [{"name": "tester", "user": user or {"token": self.token}}],
            "contexts": [{"name": "fake", "context": context}],
            "current-context": "fake",
        }
        path.write_bytes(msgspec.json.encode(config))  # JSON is YAML
        return path

    def refuse(
        self,
        status: int,
        *,
        method: str = "*",
        path: str = "",
        times: int = 1,
        retry_after: float | None = None,
        reason: str = "",
        message: str = "injected",
    ) -> None:
        """Refuse the next requests, before they have any effect.

        Args:
            status: HTTP status.
            method: ``*`` for any.
            path: Regular expression, searched in path and query.
            times: How many requests.
            retry_after: The header, seconds.
            reason: Kubernetes' word.
            message: For people.
        """
        body = ApiError(status, reason, message).to_object()
        self._add_fault("refuse", method, path, times, status, body, retry_after)

    def hang(self, *, method: str = "*", path: str = "", times: int = 1) -> None:
        """Never answer the next requests. They have no effect."""
        self._add_fault("hang", method, path, times)

    def lose_reply(self, *, method: str = "*", path: str = "", times: int = 1) -> None:
        """Cut the connection of the next requests after they had their effect."""
        self._add_fault("lose_reply", method, path, times)

    def _add_fault(
        self,
        kind: Literal["refuse", "hang", "lose_reply"],
        method: str,
        path: str,
        times: int,
        status: int = 0,
        body: Object | None = None,
        retry_after: float | None = None,
    ) -> None:
        pattern = re.compile(path)
        self._faults.append(Fault(kind, method, pattern, times, status, body, retry_after))

    def take_fault(self, method: str, path: str) -> Fault | None:
        """Return what shall happen to a request, and count it."""
        for fault in self._faults:
            if fault.method in ("*", method) and fault.path.search(path):
                fault.times -= 1
                if not fault.times:
                    self._faults.remove(fault)
                return fault
        return None

    @property
    def open_watches(self) -> int:
        """How many watches are open."""
        return len(self._server.watches)

    def break_watches(self, how: BreakHow) -> None:
        """Break all open watches.

        Args:
            how: ``gone`` and ``error`` tell 410 or 500 in mid-stream, ``eof`` ends cleanly,
                ``half_line`` ends within a line, ``silence`` stays open and says nothing any more,
                ``reset`` cuts the connection.
        """
        for watch in tuple(self._server.watches):
            watch.end(how)

    def compact(self) -> None:
        """Forget the history: watches that begin at an older version get 410."""
        self.store.compact()

    async def restart(self) -> None:
        """Cut all connections of the API and open it again. Pods run on."""
        await self._runner.cleanup()
        await self._listen()

    async def stop_api(self) -> None:
        """Refuse connections. ``start_api`` ends that."""
        await self._runner.cleanup()

    async def start_api(self) -> None:
        """Take connections again, at the same port."""
        await self._listen()

    def record(self, item: Object, kind: str, reason: str, message: str) -> None:
        """Store an event about an object."""
        event = make_event(item, kind, reason, message)
        event["metadata"]["generateName"] = event["metadata"]["generateName"][-_EVENTS_NAMED:]
        namespace = item["metadata"]["namespace"]
        same = (item["metadata"]["uid"], kind, reason, message)
        before = self.store.find("events", namespace, self._events.get(same, ""))
        if before is not None:
            self.store.update("events", before, _count)
        else:
            self._events[same] = self.store.create("events", namespace, event)["metadata"]["name"]

    def _check_quota(self, namespace: str, job: str) -> None:
        if self.quota is not None:
            raise ApiError(403, "Forbidden", f'pods "{job}-0-fake1" is forbidden: {self.quota}')

    def delete_pod(self, pod: Object, *, grace: int | None = None) -> Object:
        """Delete a pod as the API does: with its grace period if it was scheduled."""
        ended = pod["status"].get("phase") in ("Succeeded", "Failed")
        if not pod["spec"].get("nodeName") or ended or grace == 0:
            self.store.remove("pods", pod)
            return pod
        if pod["metadata"].get("deletionTimestamp"):
            return pod
        seconds = (
            grace if grace is not None else pod["spec"].get("terminationGracePeriodSeconds", 30)
        )

        def change(item: Object) -> None:
            item["metadata"].update(
                deletionTimestamp=timestamp(), deletionGracePeriodSeconds=seconds
            )

        return self.store.update("pods", pod, change)

    def fail_images(self, reason: str | None = "ErrImagePull", message: str = "not found") -> None:
        """Let containers that are not started wait for their image; ``None`` ends that."""
        self.kubelet.image_problem = None if reason is None else (reason, message)

    def make_unschedulable(self, message: str | None = "0/1 nodes are available") -> None:
        """Let new pods wait for a node; ``None`` ends that."""
        self.kubelet.unschedulable = message

    def kill_for_memory(self, name: str) -> None:
        """Kill a pod's whole container, as a memory limit of cgroup v2 does."""
        pod = self.kubelet.pod(name)
        if pod is None:
            raise LookupError(f"no pod {name!r} on the node")
        pod.oom = True
        pod.signal(signal.SIGKILL)

    def evict(self, name: str, *, namespace: str = "default") -> None:
        """Evict a pod through the API, as draining a node does."""
        pod = self.store.get("pods", namespace, name)
        pod = self.store.update("pods", pod, _disrupt("EvictionByEvictionAPI"))
        self.delete_pod(pod)

    def lose_node(self) -> None:
        """Let the node die: its pods stay, as they were last seen, and are not ready."""
        self.kubelet.lose()
        for pod in list(self.store.all("pods")):
            if pod["spec"].get("nodeName"):
                self.store.update("pods", pod, _unready)

    def evict_from_lost_node(self) -> None:
        """Delete the pods of the lost node by its taint; nobody confirms, so they stay."""
        for pod in list(self.store.all("pods")):
            if pod["spec"].get("nodeName"):
                self.delete_pod(self.store.update("pods", pod, _disrupt("DeletionByTaintManager")))

    def _make_certificate(self) -> ssl.SSLContext:
        with tempfile.TemporaryDirectory() as directory:
            key, certificate = f"{directory}/key.pem", f"{directory}/cert.pem"
            command = (
                "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=fake-kubernetes "
                "-addext subjectAltName=IP:127.0.0.1,DNS:localhost -keyout"
            )
            subprocess.run(
                [*command.split(), key, "-out", certificate], check=True, capture_output=True
            )
            self._certificate = Path(certificate).read_bytes()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
        return context


def _count(event: Object) -> None:
    event["count"] += 1
    event["lastTimestamp"] = timestamp()


def _disrupt(reason: str) -> Callable[[Object], None]:
    return lambda item: set_condition(item, "DisruptionTarget", "True", reason=reason)


def _unready(item: Object) -> None:
    set_condition(item, "Ready", "False")
