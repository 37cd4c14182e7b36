"""Logs and port-forwards of a fake cluster."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final, Protocol

import anyio
from aiohttp import WSMsgType, web

from asyncrt.testing.fakestore import ApiError, Object

_PROTOCOL: Final = "v4.channel.k8s.io"
_CHUNK_BYTES: Final = 1 << 15  # of the kubelet's own copying
_CLOSE_SECONDS: Final = 2.0
_FOLLOW_SECONDS: Final = 0.05


class RunningPod(Protocol):
    """What the kubelet knows of a pod."""

    address: str
    log: Path
    is_running: bool


async def send_log(
    pod: Object, running: RunningPod | None, request: web.Request
) -> web.StreamResponse:
    """Answer ``pods/<name>/log``: ``follow``, ``tailLines`` and ``limitBytes``."""
    name = pod["metadata"]["name"]
    statuses = pod["status"].get("containerStatuses") or [{}]
    waiting = statuses[0].get("state", {}).get("waiting")
    container = pod["spec"]["containers"][0]["name"]
    if waiting is not None or not pod["status"].get("containerStatuses"):
        why = f"is waiting to start: {waiting['reason']}" if waiting else "is not available"
        raise ApiError(400, "BadRequest", f'container "{container}" in pod "{name}" {why}')
    response = web.StreamResponse(headers={"Content-Type": "text/plain"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    path = running.log if running is not None else None
    data = _read(path, 0)
    position = len(data)
    tail = request.query.get("tailLines")
    if tail is not None:
        lines = data.splitlines(keepends=True)
        data = b"".join(lines[len(lines) - min(len(lines), int(tail)) :])
    if "limitBytes" in request.query:
        data = data[: int(request.query["limitBytes"])]
    try:
        await response.write(data)
        while request.query.get("follow") == "true" and running is not None:
            last = not running.is_running
            data = _read(path, position)
            position += len(data)
            await response.write(data)
            if last:
                break
            await asyncio.sleep(_FOLLOW_SECONDS)
    except ConnectionError:
        pass  # the client has gone
    return response


def _read(path: Path | None, position: int) -> bytes:
    if path is None or not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(position)
        return file.read()


async def forward_ports(
    pod: Object, running: RunningPod | None, request: web.Request
) -> web.StreamResponse:
    """Answer ``pods/<name>/portforward`` over a websocket.

    https://github.com/kubernetes/kubernetes/blob/master/staging/src/k8s.io/kubelet/pkg/cri/streaming/portforward/websocket.go
    """
    ports = [int(port) for value in request.query.getall("ports", []) for port in value.split(",")]
    if not ports:
        raise ApiError(400, "BadRequest", 'query parameter "ports" is required')
    if pod["status"].get("phase") != "Running" or running is None:
        phase = pod["status"].get("phase")
        raise ApiError(
            500,
            "InternalError",
            f"unable to forward port because pod is not running. Current status={phase}",
        )
    socket = web.WebSocketResponse(protocols=(_PROTOCOL,), max_msg_size=0, timeout=1.0)
    await socket.prepare(request)
    for number, port in enumerate(ports):
        for channel in (2 * number, 2 * number + 1):
            await socket.send_bytes(bytes((channel,)) + port.to_bytes(2, "little"))
    connections: list[asyncio.StreamWriter] = []
    readers: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()
    try:
        for number, port in enumerate(ports):
            try:
                reader, writer = await asyncio.open_connection(running.address, port)
            except OSError as error:
                await _refuse(socket, 2 * number + 1, port, pod, error)
                return socket
            connections.append(writer)
            readers.append(loop.create_task(_copy(reader, socket, 2 * number)))
        async for message in socket:
            if message.type is not WSMsgType.BINARY:
                break
            writer = connections[message.data[0] // 2]
            writer.write(message.data[1:])
            await writer.drain()
    except ConnectionError:
        pass  # one side has gone: the other one is told by the end
    finally:
        for task in readers:
            task.cancel()
        for writer in connections:
            writer.close()
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
            await asyncio.gather(*readers, return_exceptions=True)
            await socket.close()
    return socket


async def _refuse(
    socket: web.WebSocketResponse, channel: int, port: int, pod: Object, error: OSError
) -> None:
    text = (
        f"error forwarding port {port} to pod {pod['metadata']['uid']}, uid : failed to execute "
        f"portforward in network namespace: failed to connect to localhost:{port} inside "
        f'namespace "{pod["metadata"]["uid"]}", IPv4: dial tcp4 127.0.0.1:{port}: '
        f"connect: {os.strerror(error.errno or 0).lower()}"
    )
    await socket.send_bytes(bytes((channel,)) + text.encode())
    await socket.close()


async def _copy(reader: asyncio.StreamReader, socket: web.WebSocketResponse, channel: int) -> None:
    head = bytes((channel,))
    try:
        while data := await reader.read(_CHUNK_BYTES):
            await socket.send_bytes(head + data)
    except ConnectionError:
        pass  # the process died: the end is told all the same
    await socket.close()
