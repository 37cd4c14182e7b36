"""The Kubernetes API as plain JSON, over kubernetes_asyncio's transport and credentials.

Its typed models are left aside (435 us to decode an event, plain JSON takes 12), and the status
of an answer is checked here: kubernetes_asyncio 36.1.0 does not raise on a refusal unless it
reads the answer itself.
"""

from __future__ import annotations

import functools
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import msgspec

from asyncrt.backends.kubeconfig import ClusterSource, Credentials, find_cluster
from asyncrt.backends.kubeerrors import Target, describe_request, no_answer, refusal
from asyncrt.errors import KubernetesError

if TYPE_CHECKING:
    import aiohttp
    from kubernetes_asyncio.client.rest import RESTClientObject

_FIRST_CONTACT_SECONDS: Final = 5.0
_CONNECT_SECONDS: Final = 10.0
_ATTEMPT_SECONDS: Final = 15.0
_BACKOFF_SECONDS: Final = 0.1
_LONGEST_BACKOFF_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 2.0
_LONGEST_LINE_BYTES: Final = 1 << 25  # an object has 1.5 MiB at most, in etcd
_ERROR_BYTES: Final = 1 << 16
_REPEATABLE: Final = ("GET", "PUT", "PATCH", "DELETE")  # ours say what shall be, not what to add
_PORT_FORWARD: Final = "v4.channel.k8s.io"

Query = Mapping[str, str | int | bool]


class LineStream:
    """The lines of an answer that goes on.

    Args:
        read: Returns some bytes, none at the end.
        idle_timeout: Seconds without a byte after which the stream counts as dead.
    """

    def __init__(self, read: Callable[[], Awaitable[bytes]], *, idle_timeout: float) -> None:
        self._read = read
        self._idle_timeout = idle_timeout
        self._rest = b""

    async def receive(self) -> list[bytes]:
        """Return the complete lines that are there, at least one; none at the end.

        What follows the last newline at the end is not a line: it was cut off.

        Raises:
            TimeoutError: No byte within ``idle_timeout``.
            KubernetesError: The connection broke.
        """
        parts = [self._rest] if self._rest else []
        size = len(self._rest)
        while True:
            with anyio.fail_after(self._idle_timeout):
                data = await self._read()
            if not data:
                self._rest = b""
                return []
            head, newline, rest = data.rpartition(b"\n")
            if newline:
                self._rest = rest
                return [line for line in b"".join((*parts, head)).split(b"\n") if line]
            parts.append(data)
            size += len(data)
            if size > _LONGEST_LINE_BYTES:
                raise KubernetesError(f"a line of over {_LONGEST_LINE_BYTES} bytes in a stream")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while lines := await self.receive():
            for line in lines:
                yield line


class KubeApi:
    """One API server, as one account. Made by ``open_kube_api``.

    Attributes:
        namespace: Where to work.
    """

    def __init__(self, credentials: Credentials, namespace: str | None) -> None:
        self.namespace = namespace or credentials.namespace or "default"
        self._credentials = credentials
        self._transports: list[RESTClientObject] = []
        self._generation = 0
        self._reloading = anyio.Lock()
        self._reached = False
        self._connect()

    @property
    def server(self) -> str:
        """URL of the API server."""
        return str(self._credentials.configuration.host)

    @property
    def context(self) -> str | None:
        """Name of the kubeconfig's context; ``None`` for the account of a pod."""
        return self._credentials.source.context

    def _connect(self) -> None:
        from kubernetes_asyncio.client.rest import (  # noqa: PLC0415 - slow: only when needed
            RESTClientObject,
        )

        self._transports.append(RESTClientObject(self._credentials.configuration))

    async def aclose(self) -> None:
        """Close all connections."""
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
            for transport in self._transports:
                await transport.close()

    async def _reload(self, generation: int) -> None:
        """Load the credentials anew, unless somebody has done so since ``generation``."""
        async with self._reloading:
            if generation == self._generation:
                self._credentials = await Credentials.load(self._credentials.source)
                self._generation += 1
                self._connect()  # a client certificate belongs to the transport

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: Any = None,
        content_type: str | None = None,
        timeout: float = 30.0,
        repeatable: bool | None = None,
    ) -> dict[str, Any]:
        """Return the object that the API server answers with.

        Connection errors, 429 and 5xx are tried again, with backoff and within ``timeout``, if a
        repetition is harmless. A 401 loads the credentials again, once. A server that was never
        reached gets a few seconds only.

        Args:
            method: ``GET``, ``POST``, ``PUT``, ``PATCH`` or ``DELETE``.
            path: From ``/api`` or ``/apis`` on.
            body: Anything that msgspec writes as JSON.
            content_type: Of the body; for PATCH a merge patch unless given.
            timeout: Seconds for everything, retries included.
            repeatable: Whether the request may be sent again when it is not known whether it had
                its effect. ``None``: yes unless it is a POST. (For a POST with a fixed name, the
                repetition answers 409 if the first one had worked.)

        Raises:
            KubernetesError: Refused, or no answer. Nothing is left running.
            ConfigError: The credentials could not be loaded again.
        """
        target = describe_request(method, path, query)
        send = _Request(method, path, query, body, content_type)
        may_repeat = method in _REPEATABLE if repeatable is None else repeatable
        deadline = anyio.current_time() + timeout
        reloaded, tries = False, 0
        while True:
            generation = self._generation
            error, was_sent = await self._try(send, target, deadline)
            if error is None:
                return send.answer
            if error.status == 401 and not reloaded:
                reloaded = True
                await self._reload(generation)
                continue
            if not _is_passing(error) or (was_sent and not may_repeat):
                raise error
            pause = _pause(tries, error.retry_after)
            tries += 1
            end = deadline if self._reached else deadline - timeout + _FIRST_CONTACT_SECONDS
            if anyio.current_time() + pause > min(deadline, end):
                raise error
            await anyio.sleep(pause)

    async def _try(
        self, send: _Request, target: Target, deadline: float
    ) -> tuple[KubernetesError | None, bool]:
        """Send a request once; return what is wrong, and whether it may have had its effect."""
        import aiohttp  # noqa: PLC0415 - slow: only when needed

        left = max(0.001, deadline - anyio.current_time())
        try:
            with anyio.fail_after(min(left, _ATTEMPT_SECONDS)):
                response = await self._send(
                    send.method, send.path, send.query, data=send.data, headers=send.headers
                )
                async with response:
                    data = await response.read()
        except KubernetesError as error:
            return error, error.reason != "Unreachable"
        except TimeoutError as error:
            return no_answer(target, error, server=self.server, reason="Timeout"), True
        except (aiohttp.ClientError, OSError) as error:  # while the body was read
            return no_answer(target, error, server=self.server, reason="Broken"), True
        if not 200 <= response.status <= 299:
            after = _seconds(response.headers.get("Retry-After"))
            problem = refusal(
                target,
                response.status,
                _status_object(data),
                server=self.server,
                retry_after=after,
            )
            return problem, response.status != 429
        send.answer = msgspec.json.decode(data) if data else {}
        return None, True

    async def _send(
        self, method: str, path: str, query: Query | None, **arguments: Any
    ) -> aiohttp.ClientResponse:
        """Send a request; return the answer as soon as its head is here, to be closed."""
        import aiohttp  # noqa: PLC0415 - slow: only when needed

        target = describe_request(method, path, query)
        headers = {**arguments.pop("headers", {}), **await self._credentials.header()}
        try:
            response = await self._session.request(
                method,
                self.server + path,
                params=_texts(query),
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
                allow_redirects=False,
                **self._route,
                **arguments,
            )
        except aiohttp.ClientError as error:
            raise no_answer(target, error, server=self.server, reason=_reason_of(error)) from error
        except TimeoutError as error:
            raise no_answer(target, error, server=self.server, reason="Unreachable") from error
        self._reached = True
        return response

    @property
    def _session(self) -> aiohttp.ClientSession:
        session: aiohttp.ClientSession = self._transports[-1].pool_manager
        return session

    @property
    def _route(self) -> dict[str, Any]:
        """What kubernetes_asyncio's transport adds to each request; its websockets lack it."""
        transport = self._transports[-1]
        found = {
            "proxy": transport.proxy,
            "proxy_headers": transport.proxy_headers,
            "server_hostname": transport.server_hostname,
        }
        return {name: value for name, value in found.items() if value}

    @asynccontextmanager
    async def stream_lines(
        self, path: str, *, query: Query | None = None, idle_timeout: float = 90.0
    ) -> AsyncIterator[LineStream]:
        """Open an answer that goes on: a watch, or a log that is followed.

        Not tried again but after a 401, once.

        Args:
            idle_timeout: Seconds without a byte after which the stream is dead; also for its head.

        Raises:
            KubernetesError: Refused, or no answer.
        """
        target = describe_request("GET", path, query)
        for last in (False, True):
            generation = self._generation
            try:
                with anyio.fail_after(idle_timeout):
                    response = await self._send("GET", path, query)
            except TimeoutError as error:
                raise no_answer(target, error, server=self.server, reason="Timeout") from error
            try:
                if response.status == 200:
                    read = functools.partial(self._read_some, response, target)
                    yield LineStream(read, idle_timeout=idle_timeout)
                    return
                with anyio.fail_after(idle_timeout):
                    data = await response.content.read(_ERROR_BYTES)
            finally:
                response.close()  # not released: a stream that goes on never ends by itself
            if response.status == 401 and not last:
                await self._reload(generation)
                continue
            raise refusal(
                target,
                response.status,
                _status_object(data),
                server=self.server,
                retry_after=_seconds(response.headers.get("Retry-After")),
            )

    async def _read_some(self, response: aiohttp.ClientResponse, target: Target) -> bytes:
        import aiohttp  # noqa: PLC0415 - slow: only when needed

        try:
            return await response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise no_answer(target, error, server=self.server, reason="Broken") from error

    async def websocket(
        self, path: str, *, query: Query | None = None, timeout: float = 10.0
    ) -> aiohttp.ClientWebSocketResponse:
        """Open a websocket, for ``pods/<name>/portforward``. Whoever calls this closes it.

        Args:
            timeout: Seconds until it is open.

        Raises:
            KubernetesError: Refused, or no answer.
        """
        import aiohttp  # noqa: PLC0415 - slow: only when needed

        target = describe_request("GET", path, query)
        reloaded = False
        while True:
            generation, route = self._generation, self._route
            try:
                with anyio.fail_after(timeout):
                    headers = await self._credentials.header()
                    return await self._session.ws_connect(
                        self.server + path,
                        params=_texts(query),
                        headers=headers,
                        protocols=(_PORT_FORWARD,),
                        max_msg_size=0,
                        timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSE_SECONDS),
                        proxy=route.get("proxy"),
                        proxy_headers=route.get("proxy_headers"),
                        server_hostname=route.get("server_hostname"),
                    )
            except aiohttp.WSServerHandshakeError as error:
                # The body, which says more, is not kept by aiohttp.
                problem = refusal(
                    target, error.status, {"message": error.message}, server=self.server
                )
                if error.status != 401 or reloaded:
                    raise problem from error
            except aiohttp.ClientError as error:
                raise no_answer(
                    target, error, server=self.server, reason=_reason_of(error)
                ) from error
            except TimeoutError as error:
                raise no_answer(target, error, server=self.server, reason="Timeout") from error
            reloaded = True
            await self._reload(generation)


class _Request:
    """A request as it is sent, each time the same."""

    def __init__(
        self,
        method: str,
        path: str,
        query: Query | None,
        body: Any,
        content_type: str | None,
    ) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.data = None if body is None else msgspec.json.encode(body)
        self.headers = {"Accept": "application/json"}
        self.answer: dict[str, Any] = {}
        if self.data is not None:
            usual = "application/merge-patch+json" if method == "PATCH" else "application/json"
            self.headers["Content-Type"] = content_type or usual


@asynccontextmanager
async def open_kube_api(
    *,
    kubeconfig: Path | str | None = None,
    context: str | None = None,
    namespace: str | None = None,
) -> AsyncIterator[KubeApi]:
    """Open the API of a cluster. No request is sent yet.

    Args:
        kubeconfig: ``None``: ``$KUBECONFIG``, ``~/.kube/config``, or the account of this pod.
        context: ``None``: the current one.
        namespace: ``None``: the context's, else ``default``.

    Raises:
        ConfigError: No kubeconfig, or one that is wrong.
    """
    source: ClusterSource = find_cluster(kubeconfig, context)
    api = KubeApi(await Credentials.load(source), namespace)
    try:
        yield api
    finally:
        await api.aclose()


def _is_passing(error: KubernetesError) -> bool:
    """Whether another try may end otherwise."""
    if error.status == 0:
        return error.reason != "TLS"
    return error.status == 429 or error.status >= 500


def _pause(tries: int, retry_after: float | None) -> float:
    limit = min(_LONGEST_BACKOFF_SECONDS, _BACKOFF_SECONDS * 2**tries)
    return max(random.uniform(0, limit), retry_after or 0.0)  # noqa: S311 - not a secret


def _reason_of(error: Exception) -> str:
    import aiohttp  # noqa: PLC0415 - slow: only when needed

    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
        return "TLS"
    if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
        return "Unreachable"  # so it had no effect
    return "Broken"


def _texts(query: Query | None) -> dict[str, str]:
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in (query or {}).items()
    }


def _seconds(header: str | None) -> float | None:
    """Return a Retry-After; the API server gives seconds, never a date."""
    try:
        return None if header is None else max(0.0, float(header))
    except ValueError:
        return None


def _status_object(data: bytes) -> dict[str, Any]:
    """Return the ``Status`` of a refusal; a proxy on the way answers with something else."""
    try:
        found = msgspec.json.decode(data)
    except msgspec.DecodeError:
        found = None
    if isinstance(found, dict):
        return found
    text = data[:500].decode("utf-8", "replace").strip()
    return {"message": text} if text else {}
