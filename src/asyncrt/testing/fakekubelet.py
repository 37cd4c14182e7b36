"""The node of a fake cluster: a scheduler, and a kubelet whose containers are local processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import anyio

from asyncrt.testing.fakepods import (
    SITE_CUSTOMIZE,
    Container,
    MissingConfigError,
    MissingVolumeError,
    executable_of,
    prepare,
)
from asyncrt.testing.fakestore import Change, Object, Store, timestamp

_RETRY_SECONDS: Final = 0.1
_REAP_SECONDS: Final = 5.0
_MESSAGE_BYTES: Final = 4096
_FALLBACK_LINES: Final = 80
_FALLBACK_BYTES: Final = 2048
_IMAGE: Final = re.compile(r"[a-z0-9][\w./:@-]*")
NODE: Final = "fake-node"


class Kubelet:
    """Schedules and runs pods.

    Args:
        hollow: Pods "run" until somebody ends them, with no process: for thousands of them.
        record: Stores an event: object, type, reason, message.
    """

    def __init__(
        self, store: Store, record: Callable[[Object, str, str, str], None], *, hollow: bool
    ) -> None:
        self.unschedulable: str | None = None
        self.image_problem: tuple[str, str] | None = None
        self.lost = False
        self._store = store
        self._record = record
        self._hollow = hollow
        self.directory = Path(tempfile.mkdtemp(prefix="fake-kubernetes-"))
        self._site = self.directory / "site"
        self._site.mkdir()
        (self._site / "sitecustomize.py").write_text(SITE_CUSTOMIZE)
        self._number = 0
        self._pods: dict[str, _Pod] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._unsubscribe = store.subscribe(self._on_change)

    async def aclose(self) -> None:
        """Kill everything that runs and remove its files."""
        self._unsubscribe()
        for pod in tuple(self._pods.values()):
            pod.signal(signal.SIGKILL)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def pod(self, name: str) -> _Pod | None:
        """Return the pod that the node has under a name."""
        return next((pod for pod in self._pods.values() if pod.name == name), None)

    @property
    def pids(self) -> list[int]:
        """Processes of containers that run now."""
        return [pod.process.pid for pod in self._pods.values() if pod.is_running and pod.process]

    def lose(self) -> None:
        """Let the node die: its processes are gone, and nobody says so."""
        self.lost = True
        for pod in self._pods.values():
            pod.signal(signal.SIGKILL)

    def _on_change(self, change: Change) -> None:
        if change.resource != "pods":
            return
        item = change.after or change.before
        assert item is not None
        uid = item["metadata"]["uid"]
        if change.before is None:
            self._number += 1
            number = self._number
            address = f"127.{64 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
            pod = self._pods[uid] = _Pod(self, item, address)
            task = asyncio.get_running_loop().create_task(self._host(uid, pod))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif uid in self._pods and (
            change.after is None or item["metadata"].get("deletionTimestamp")
        ):
            self._pods[uid].deleted.set()

    async def _host(self, uid: str, pod: _Pod) -> None:
        try:
            await pod.live()
        finally:
            pod.signal(signal.SIGKILL)
            with anyio.move_on_after(_REAP_SECONDS, shield=True):
                if pod.process is not None:
                    await pod.process.wait()
            self._pods.pop(uid, None)


class _Pod:
    """One pod, from its creation to its removal."""

    def __init__(self, kubelet: Kubelet, item: Object, address: str) -> None:
        self.name = str(item["metadata"]["name"])
        self.address = address
        self.directory = kubelet.directory / item["metadata"]["uid"]
        self.log = self.directory / "log"
        self.deleted = asyncio.Event()
        self.process: asyncio.subprocess.Process | None = None
        self.is_running = False
        self.oom = False
        self._kubelet = kubelet
        self._store = kubelet._store
        self._item = item
        self._kill_timer: asyncio.TimerHandle | None = None

    def signal(self, number: int) -> None:
        """Signal all processes of the container."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    async def live(self) -> None:
        """Go through the phases of a pod's life."""
        await asyncio.sleep(0)
        if await self._schedule() and await self._start():
            await self._run()
        if self._kubelet.lost:
            return
        if self.deleted.is_set() and self._present() is not None:
            self._store.remove("pods", self._present() or {})

    def _present(self) -> Object | None:
        metadata = self._item["metadata"]
        found = self._store.find("pods", metadata["namespace"], metadata["name"])
        return found if found and found["metadata"]["uid"] == metadata["uid"] else None

    def _update(self, change: Callable[[Object], None]) -> None:
        if not self._kubelet.lost:
            self._item = self._store.update("pods", self._item, change)

    def _event(self, kind: str, reason: str, message: str) -> None:
        if not self._kubelet.lost:
            self._kubelet._record(self._item, kind, reason, message)

    async def _schedule(self) -> bool:
        told = False
        while (why := self._kubelet.unschedulable) is not None or self._kubelet.lost:
            why = why or "0/1 nodes are available: 1 node(s) were unreachable"
            if not told:
                told = True
                self._store.update("pods", self._item, _set_unschedulable(why))
                self._kubelet._record(self._item, "Warning", "FailedScheduling", why)
            if await self._deleted_within(_RETRY_SECONDS):
                return False
        if self.deleted.is_set():
            return False

        def assign(item: Object) -> None:
            item["spec"]["nodeName"] = NODE
            set_condition(item, "PodScheduled", "True")

        self._update(assign)
        where = f"{self._item['metadata']['namespace']}/{self.name}"
        self._event("Normal", "Scheduled", f"Successfully assigned {where} to {NODE}")
        return True

    async def _start(self) -> bool:
        await asyncio.sleep(0)
        self._wait_for("ContainerCreating", "")
        container = await self._prepare()
        if container is None:
            return False
        if self._kubelet._hollow:
            self._set_running()
            return True
        executable = executable_of(container)
        if executable is None:
            name = container.command[0] if container.command else ""
            message = (
                "failed to create containerd task: failed to create shim task: OCI runtime create "
                "failed: runc create failed: unable to start container process: error during "
                f'container init: exec: "{name}": executable file not found in $PATH: unknown'
            )
            self._set_ended(128, "StartError", message)
            self._event("Warning", "Failed", f"Error: {message}")
            await self.deleted.wait()
            return False
        with self.log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                executable,
                *container.command[1:],
                env=container.env,
                cwd=container.cwd,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._message_path = container.message_path
        self._set_running()
        return True

    async def _prepare(self) -> Container | None:
        """Get what a container needs, waiting for it; ``None`` when the pod is deleted first."""
        image = self._item["spec"]["containers"][0].get("image", "")
        await asyncio.to_thread(self.directory.mkdir, exist_ok=True)
        tries = 0
        while not self.deleted.is_set():
            problem = self._kubelet.image_problem
            if not _IMAGE.fullmatch(image):
                problem = ("InvalidImageName", f'couldn\'t parse image name "{image}"')
            try:
                if problem is None:
                    return prepare(
                        self._store, self._item, self.directory, self.address, self._kubelet._site
                    )
                self._refuse_image(image, *problem, tries=tries)
            except MissingVolumeError as error:
                if not tries:
                    self._event("Warning", "FailedMount", str(error))
            except MissingConfigError as error:
                self._wait_for("CreateContainerConfigError", str(error))
                if not tries:
                    self._event("Warning", "Failed", f"Error: {error}")
            tries += 1
            await self._deleted_within(_RETRY_SECONDS)
        return None

    def _refuse_image(self, image: str, reason: str, message: str, *, tries: int) -> None:
        if reason == "ErrImagePull" and tries:
            reason, message = "ImagePullBackOff", f'Back-off pulling image "{image}": {message}'
        self._wait_for(reason, message)
        if not tries:
            self._event("Warning", "Failed", f'Failed to pull image "{image}": {message}')
            self._event("Warning", "Failed", f"Error: {reason}")

    async def _deleted_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.deleted.wait(), seconds)
        return self.deleted.is_set()

    async def _run(self) -> None:
        """Wait for the end of the container; end it when the pod is deleted."""
        self.is_running = True
        ending = asyncio.get_running_loop().create_task(self._end_when_deleted())
        try:
            if self.process is None:
                await self.deleted.wait()
                code = 143
            else:
                code = await self.process.wait()
                self.signal_rest()
        finally:
            self.is_running = False
            ending.cancel()
        if self._kubelet.lost:
            return
        code = code if code >= 0 else 128 - code
        message = await asyncio.to_thread(self._termination_message, code)
        reason = "OOMKilled" if self.oom else "Completed" if code == 0 else "Error"
        self._set_ended(code, reason, message)
        await self.deleted.wait()

    def signal_rest(self) -> None:
        """Kill what is left of a container whose first process has ended, as its end does."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    async def _end_when_deleted(self) -> None:
        await self.deleted.wait()
        present = self._present() or self._item
        grace = present["metadata"].get("deletionGracePeriodSeconds", 30)
        if grace:
            # To the first process only, as a container runtime does.
            if self.process is not None and self.process.returncode is None:
                self.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(grace)
        self.signal(signal.SIGKILL)

    def _termination_message(self, code: int) -> str:
        container = self._item["spec"]["containers"][0]
        text = b""
        if self.process is not None:
            text = self._message_path.read_bytes()[:_MESSAGE_BYTES]
            policy = container.get("terminationMessagePolicy", "File")
            if not text and code and policy == "FallbackToLogsOnError":
                lines = self.log.read_bytes().splitlines(keepends=True)[-_FALLBACK_LINES:]
                text = b"".join(lines)[-_FALLBACK_BYTES:]
        return text.decode("utf-8", "replace")

    def _wait_for(self, reason: str, message: str) -> None:
        waiting = {"reason": reason, **({"message": message} if message else {})}
        self._set_status("Pending", {"waiting": waiting}, ready=False)

    def _set_running(self) -> None:
        self._set_status("Running", {"running": {"startedAt": timestamp()}}, ready=True)
        self._event("Normal", "Started", "Container started")

    def _set_ended(self, code: int, reason: str, message: str) -> None:
        before = self._item["status"]["containerStatuses"][0]["state"].get("running") or {}
        now = timestamp()
        terminated = {
            "exitCode": code,
            "reason": reason,
            "startedAt": before.get("startedAt", now),
            "finishedAt": now,
            "containerID": f"containerd://{self._item['metadata']['uid']}",
            **({"message": message} if message else {}),
        }
        phase = "Succeeded" if code == 0 else "Failed"
        self._set_status(phase, {"terminated": terminated}, ready=False)

    def _set_status(self, phase: str, state: dict[str, Any], *, ready: bool) -> None:
        def change(item: Object) -> None:
            container, status = item["spec"]["containers"][0], item["status"]
            status["phase"] = phase
            status.setdefault("startTime", timestamp())
            status.update(hostIP="127.0.0.1", hostIPs=[{"ip": "127.0.0.1"}])
            began = "waiting" not in state
            if began:
                status.update(podIP=self.address, podIPs=[{"ip": self.address}])
            status["containerStatuses"] = [
                {
                    "name": container["name"],
                    "image": container.get("image", ""),
                    "imageID": f"{container.get('image', '')}@sha256:0" if began else "",
                    "state": state,
                    "lastState": {},
                    "ready": ready,
                    "started": ready,
                    "restartCount": 0,
                    **({"containerID": f"containerd://{item['metadata']['uid']}"} if began else {}),
                }
            ]
            if phase == "Succeeded":
                why = {"reason": "PodCompleted"}
            elif phase == "Failed":
                why = {"reason": "PodFailed"}
            elif ready:
                why = {}
            else:
                names = f"[{container['name']}]"
                why = {
                    "reason": "ContainersNotReady",
                    "message": f"containers with unready status: {names}",
                }
            set_condition(item, "PodReadyToStartContainers", "True" if ready else "False")
            set_condition(item, "Initialized", "True")
            for kind in ("Ready", "ContainersReady"):
                set_condition(item, kind, "True" if ready else "False", **why)

        self._update(change)


def set_condition(item: Object, kind: str, status: str, **facts: str) -> None:
    """Set a condition of a pod."""
    conditions = item["status"].setdefault("conditions", [])
    before = next((found for found in conditions if found["type"] == kind), None)
    condition = {"type": kind, "status": status, "lastProbeTime": None, **facts}
    if before is not None and before["status"] == status:
        condition["lastTransitionTime"] = before["lastTransitionTime"]
    else:
        condition["lastTransitionTime"] = timestamp()
    conditions[:] = [*(found for found in conditions if found["type"] != kind), condition]


def _set_unschedulable(message: str) -> Callable[[Object], None]:
    return lambda item: set_condition(
        item, "PodScheduled", "False", reason="Unschedulable", message=message
    )
