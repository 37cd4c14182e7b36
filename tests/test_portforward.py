"""A pod's port as a byte stream, against a server that speaks the API server's framing."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import anyio
import pytest
from aiohttp import web

from asyncrt.backends.portforward import PortForward

pytestmark = pytest.mark.anyio

PORT = struct.pack("<H", 9000)
Peer = Callable[[web.WebSocketResponse], Awaitable[None]]


class Received:
    """A ``Receiver`` with a small buffer, so that messages come in several pieces."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.buffer = bytearray(1000)
        self.error: Exception | None = None
        self.ended = asyncio.Event()
        self.more = asyncio.Event()
        self.may_write = asyncio.Event()
        self.closed_count = 0

    def get_buffer(self) -> memoryview:
        return memoryview(self.buffer)

    def received(self, size: int) -> None:
        self.data += self.buffer[:size]
        self.more.set()

    def writable(self) -> None:
        self.may_write.set()

    def closed(self, error: Exception | None) -> None:
        self.closed_count += 1
        self.error = error
        self.ended.set()

    async def until(self, size: int) -> bytes:
        while len(self.data) < size:
            self.more.clear()
            await self.more.wait()
        return bytes(self.data)


@asynccontextmanager
async def forward(peer: Peer) -> AsyncIterator[tuple[PortForward, Received]]:
    """Open a stream to a peer that says the ports first, as the API server does."""

    async def handle(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        await socket.send_bytes(b"\0" + PORT)
        await socket.send_bytes(b"\1" + PORT)
        await peer(socket)
        return socket

    application = web.Application()
    application.router.add_get("/", handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    received = Received()
    async with asyncio.timeout(30), aiohttp.ClientSession() as session:
        socket = await session.ws_connect(_url(runner), max_msg_size=0)
        stream = PortForward(socket, received)
        async with anyio.create_task_group() as group:
            group.start_soon(stream.run)
            yield stream, received
            stream.close()
    assert received.closed_count == 1
    await runner.cleanup()


def _url(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"http://{host}:{port}/"


async def echo(socket: web.WebSocketResponse) -> None:
    async for message in socket:
        await socket.send_bytes(message.data)


async def wait(socket: web.WebSocketResponse) -> None:
    await socket.receive()


async def test_bytes_go_both_ways() -> None:
    async with forward(echo) as (stream, received):
        assert stream.write([b"abc", b"", memoryview(b"def")])
        assert await received.until(6) == b"abcdef"
        assert stream.write([b"ghi"])
        assert await received.until(9) == b"abcdefghi"


async def test_large_bodies_go_in_messages_and_writing_waits() -> None:
    body = bytes(range(256)) * (5 << 12)
    async with forward(echo) as (stream, received):
        assert not stream.write([body[: 1 << 20], body[1 << 20 :]])
        await received.may_write.wait()
        assert await received.until(len(body)) == body
        assert stream.write([b"small"])


async def test_an_error_of_the_port_is_told_in_its_words() -> None:
    async def refuse(socket: web.WebSocketResponse) -> None:
        await socket.send_bytes(b"\1dial tcp4 127.0.0.1:9000: connect: connection refused\n")
        await socket.close()

    async with forward(refuse) as (_, received):
        await received.ended.wait()
        assert isinstance(received.error, ConnectionError)
        assert str(received.error).endswith("connection refused")


async def test_a_server_that_closes_is_a_lost_connection() -> None:
    async def leave(socket: web.WebSocketResponse) -> None:
        await socket.close()

    async with forward(leave) as (stream, received):
        await received.ended.wait()
        assert isinstance(received.error, ConnectionError)
        assert not stream.write([b"into the void"])


async def test_a_server_that_speaks_something_else_is_told() -> None:
    async def talk(socket: web.WebSocketResponse) -> None:
        await socket.send_bytes(b"\2hello there")
        await socket.receive()

    async with forward(talk) as (_, received):
        await received.ended.wait()
        assert "not a port-forward" in str(received.error)


async def test_closing_ends_it_at_once_and_says_so_once() -> None:
    async with forward(wait) as (stream, received):
        stream.close()
        assert received.closed_count == 1
        assert received.error is None
        stream.close()


async def test_a_receiver_that_closes_while_it_takes_bytes_gets_no_more() -> None:
    async with forward(echo) as (stream, received):
        take = received.received

        def take_once(size: int) -> None:
            take(size)
            stream.close()

        received.received = take_once  # type: ignore[method-assign]
        stream.write([bytes(5000)])
        await received.ended.wait()
        assert len(received.data) == 1000
