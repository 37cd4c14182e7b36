"""The HTTP face of a fake cluster: what an API server answers, watches included."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec
from aiohttp import web

from asyncrt.testing.fakejobs import check_job_change, default_job
from asyncrt.testing.fakestore import (
    RESOURCES,
    ApiError,
    Change,
    Object,
    Resource,
    Store,
    matcher,
    merge_patch,
    timestamp,
)
from asyncrt.testing.fakestreams import forward_ports, send_log

if TYPE_CHECKING:
    from asyncrt.testing.fakekubernetes import FakeKubernetes

_PATH: Final = re.compile(
    r"/api(?:/v1|s/batch/v1)(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<resource>[a-z]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>[^/]+))?"
)
_VERBS: Final = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_MERGE_PATCHES: Final = ("application/merge-patch+json", "application/strategic-merge-patch+json")


@dataclass(frozen=True, slots=True)
class Call:
    """A request, in the words of a Role."""

    verb: str
    resource: Resource
    namespace: str
    name: str
    sub: str

    @property
    def full_resource(self) -> str:
        """The resource with its subresource, such as ``pods/log``."""
        return f"{self.resource.plural}/{self.sub}" if self.sub else self.resource.plural


class ApiServer:
    """Answers requests. Faults, accounts and settings are those of the cluster."""

    def __init__(self, cluster: FakeKubernetes, store: Store) -> None:
        self._cluster = cluster
        self._store = store
        self.watches: set[WatchStream] = set()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        fault = self._cluster.take_fault(request.method, request.path_qs)
        if fault is not None and fault.kind == "hang":
            await asyncio.Event().wait()
        if fault is not None and fault.kind == "refuse":
            headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            return _answer(fault.status, fault.body or {}, headers)
        try:
            response = await self._answer(request)
        except ApiError as error:
            response = _answer(error.status, error.to_object())
        if fault is not None and fault.kind == "lose_reply" and request.transport is not None:
            request.transport.abort()
        return response

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        user = self._authenticate(request)
        if request.path == "/version":
            return _answer(200, {"major": "1", "minor": "34", "gitVersion": "v1.34.0-fake"})
        found = _PATH.fullmatch(request.path)
        resource = RESOURCES.get(found["resource"]) if found else None
        if found is None or resource is None:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        verb = _VERBS.get(request.method) or _reading_verb(request.query, found["name"])
        if verb == "delete" and not found["name"]:
            verb = "deletecollection"
        call = Call(
            verb, resource, found["namespace"] or "", found["name"] or "", found["sub"] or ""
        )
        self._authorize(user, call)
        if call.sub:
            return await self._answer_sub(call, request)
        if verb == "watch":
            return await WatchStream(self, request, call).serve()
        body = await _read_body(request)
        method = getattr(self, f"_{verb}")
        status, answer = method(call, request, body)
        return _answer(status, answer)

    def _authenticate(self, request: web.Request) -> str:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in self._cluster.tokens:
            return self._cluster.tokens[token]
        raise ApiError(401, "Unauthorized", "Unauthorized")

    def _authorize(self, user: str, call: Call) -> None:
        if (call.verb, call.full_resource) not in self._cluster.forbidden:
            return
        name = f'"{call.name}" ' if call.name else ""
        raise ApiError(
            403,
            "Forbidden",
            f'{call.resource.full_name} {name}is forbidden: User "{user}" cannot {call.verb} '
            f'resource "{call.full_resource}" in API group "{call.resource.group}" in the '
            f'namespace "{call.namespace}"',
            {"name": call.name, "kind": call.resource.plural, "group": call.resource.group},
        )

    async def _answer_sub(self, call: Call, request: web.Request) -> web.StreamResponse:
        pod = self._store.get("pods", call.namespace, call.name)
        if call.full_resource == "pods/log":
            return await send_log(pod, self._cluster.kubelet.pod(call.name), request)
        if call.full_resource == "pods/portforward":
            return await forward_ports(pod, self._cluster.kubelet.pod(call.name), request)
        if call.sub == "status" and call.verb == "get":
            return _answer(200, pod)
        raise ApiError(404, "NotFound", "the server could not find the requested resource")

    def _get(self, call: Call, request: web.Request, body: Any) -> tuple[int, Object]:
        return 200, self._store.get(call.resource.plural, call.namespace, call.name)

    def _list(self, call: Call, request: web.Request, body: Any) -> tuple[int, Object]:
        query = request.query
        matches = matcher(query)
        version, after = self._store.version, ("", "")
        if "continue" in query:
            version, *after_key = json.loads(base64.b64decode(query["continue"]))
            after = (after_key[0], after_key[1])
            if version < self._store.oldest:
                raise ApiError(
                    410,
                    "Expired",
                    "The provided continue parameter is too old to display a consistent list "
                    "result",
                )
        items = [
            item
            for item in self._store.all(call.resource.plural, call.namespace or None)
            if _key(item) > after and matches(item)
        ]
        metadata: Object = {"resourceVersion": str(version)}
        limit = int(query.get("limit", 0))
        if limit and len(items) > limit:
            metadata["remainingItemCount"] = len(items) - limit
            items = items[:limit]
            token = json.dumps([version, *_key(items[-1])]).encode()
            metadata["continue"] = base64.b64encode(token).decode()
        # Members of a list say neither what they are nor of which version.
        bare = [
            {name: value for name, value in item.items() if name not in ("kind", "apiVersion")}
            for item in items
        ]
        kind, version_name = f"{call.resource.kind}List", call.resource.api_version
        return 200, {"kind": kind, "apiVersion": version_name, "metadata": metadata, "items": bare}

    def _create(self, call: Call, request: web.Request, body: Any) -> tuple[int, Object]:
        if call.namespace not in self._cluster.namespaces:
            raise ApiError(
                404,
                "NotFound",
                f'namespaces "{call.namespace}" not found',
                {"name": call.namespace, "kind": "namespaces"},
            )
        if not isinstance(body, dict):
            raise ApiError(400, "BadRequest", "the body is not an object")
        if call.resource.plural == "jobs":
            probe = copy.deepcopy(body)
            probe["metadata"].setdefault("uid", "")
            default_job(probe)  # refuses before anything is stored
        if call.resource.plural == "pods":
            body = {**body, "status": {"phase": "Pending", "qosClass": "BestEffort"}}
        created = self._store.create(call.resource.plural, call.namespace, body)
        if call.resource.plural == "jobs":
            created = self._store.update("jobs", created, default_job)
        return 201, created

    def _update(self, call: Call, request: web.Request, body: Any) -> tuple[int, Object]:
        before = self._store.get(call.resource.plural, call.namespace, call.name)
        version = body["metadata"].get("resourceVersion")
        if version is not None and version != before["metadata"]["resourceVersion"]:
            raise self._conflict(call)
        after = copy.deepcopy(body)
        for name in ("uid", "creationTimestamp", "namespace", "resourceVersion"):
            after["metadata"][name] = before["metadata"][name]
        return 200, self._change(call, before, after)

    def _patch(self, call: Call, request: web.Request, body: Any) -> tuple[int, Object]:
        if request.content_type not in _MERGE_PATCHES:
            raise ApiError(
                415,
                "UnsupportedMediaType",
                f"the body of the request was in an unknown format: {request.content_type}",
            )
        before = self._store.get(call.resource.plural, call.namespace, call.name)
        version = (body.get("metadata") or {}).get("resourceVersion")
        if version is not None and version != before["metadata"]["resourceVersion"]:
            raise self._conflict(call)
        return 200, self._change(call, before, merge_patch(copy.deepcopy(before), body))

    def _change(self, call: Call, before: Object, after: Object) -> Object:
        plural = call.resource.plural
        if plural == "jobs":
            check_job_change(before, after)
        data = ("data", "binaryData", "stringData")
        if before.get("immutable") and any(before.get(key) != after.get(key) for key in data):
            raise ApiError(
                422,
                "Invalid",
                f'{call.resource.kind} "{call.name}" is invalid: data: Forbidden: field is '
                "immutable when `immutable` is set",
                {"name": call.name, "kind": call.resource.kind},
            )
        if before.get("spec") != after.get("spec"):
            after["metadata"]["generation"] = before["metadata"]["generation"] + 1
        return self._store.replace(plural, after)

    def _conflict(self, call: Call) -> ApiError:
        return ApiError(
            409,
            "Conflict",
            f'Operation cannot be fulfilled on {call.resource.full_name} "{call.name}": the object '
            "has been modified; please apply your changes to the latest version and try again",
            {"name": call.name, "kind": call.resource.plural},
        )

    def _delete(self, call: Call, request: web.Request, body: Any) -> tuple[int, Object]:
        item = self._store.get(call.resource.plural, call.namespace, call.name)
        return 200, self._delete_one(call.resource, item, request.query, body or {})

    def _deletecollection(self, call: Call, request: web.Request, body: Any) -> tuple[int, Object]:
        matches = matcher(request.query)
        items = [i for i in self._store.all(call.resource.plural, call.namespace) if matches(i)]
        for item in items:
            self._delete_one(call.resource, item, request.query, body or {})
        return 200, _success(call.resource, items[0] if items else None)

    def _delete_one(
        self, resource: Resource, item: Object, query: Mapping[str, str], options: Object
    ) -> Object:
        expected = (options.get("preconditions") or {}).get("uid")
        if expected is not None and expected != item["metadata"]["uid"]:
            raise ApiError(409, "Conflict", f"Precondition failed: UID in precondition: {expected}")
        if resource.plural == "pods":
            grace = query.get("gracePeriodSeconds", options.get("gracePeriodSeconds"))
            return self._cluster.delete_pod(item, grace=None if grace is None else int(grace))
        # A Job that is deleted without a word leaves its pods behind.
        usual = "Orphan" if resource.plural == "jobs" else "Background"
        policy = query.get("propagationPolicy") or options.get("propagationPolicy") or usual
        self._cluster.controllers.delete(resource.plural, item, policy)
        return _success(resource, item)


class WatchStream:
    """One open watch."""

    def __init__(self, server: ApiServer, request: web.Request, call: Call) -> None:
        self._server = server
        self._store = server._store
        self._request = request
        self._call = call
        self._matches = matcher(request.query)
        self._pending: list[Change] = []
        self._wake = asyncio.Event()
        self._how: str | None = None
        self._last_line = b""

    def end(self, how: str) -> None:
        """Break down: see ``FakeKubernetes.break_watches``."""
        self._how = how
        self._wake.set()

    async def serve(self) -> web.StreamResponse:
        """Send events until the client, the time or a fault ends it."""
        query = self._request.query
        first = self._first_lines(query)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        unsubscribe = self._store.subscribe(self._on_change)
        self._server.watches.add(self)
        loop = asyncio.get_running_loop()
        end = loop.time() + float(query.get("timeoutSeconds", 1800))
        try:
            await response.prepare(self._request)
            await self._write(response, first)
            while self._how is None and loop.time() < end:
                pending, self._pending = self._pending, []
                await self._write(response, self._lines_of(pending))
                await self._wait(response, end)
            await self._break(response)
        except ConnectionError:
            pass  # the client has gone
        finally:
            unsubscribe()
            self._server.watches.discard(self)
        return response

    async def _wait(self, response: web.StreamResponse, end: float) -> None:
        loop = asyncio.get_running_loop()
        pause = min(self._server._cluster.bookmark_seconds, end - loop.time())
        if self._pending:
            return
        self._wake.clear()
        try:
            await asyncio.wait_for(self._wake.wait(), max(0.0, pause))
        except TimeoutError:
            if loop.time() < end and self._request.query.get("allowWatchBookmarks") == "true":
                await self._write(response, [self._bookmark()])

    async def _break(self, response: web.StreamResponse) -> None:
        how, transport = self._how, self._request.transport
        if how == "gone":
            await self._write(response, [_gone("too old resource version: 1 (2)")])
        elif how == "error":
            status = ApiError(500, "InternalError", "an error on the server").to_object()
            await self._write(response, [_line("ERROR", status)])
        elif how == "half_line":
            await response.write(self._last_line[: len(self._last_line) // 2] or b'{"type":"ADD')
        elif how == "silence":
            await asyncio.Event().wait()
        elif how == "reset" and transport is not None:
            transport.abort()

    def _first_lines(self, query: Mapping[str, str]) -> list[bytes]:
        version = query.get("resourceVersion", "")
        initial = query.get("sendInitialEvents") == "true"
        if initial and not self._server._cluster.streams_lists:
            raise _invalid_option(
                "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the "
                "WatchList feature gate is enabled"
            )
        if initial and query.get("resourceVersionMatch") != "NotOlderThan":
            raise _invalid_option(
                "resourceVersionMatch: Forbidden: sendInitialEvents requires setting "
                "resourceVersionMatch to NotOlderThan"
            )
        if version not in ("", "0") and not initial:
            try:
                return self._lines_of(self._store.changes_since(int(version)))
            except ApiError as error:
                self._how = "told"
                return [_gone(str(error))]
        namespace = self._call.namespace or None
        lines = [
            _line("ADDED", item)
            for item in self._store.all(self._call.resource.plural, namespace)
            if self._matches(item)
        ]
        if initial and query.get("allowWatchBookmarks") == "true":
            lines.append(self._bookmark({"k8s.io/initial-events-end": "true"}))
        return lines

    def _on_change(self, change: Change) -> None:
        if change.resource == self._call.resource.plural:
            self._pending.append(change)
            self._wake.set()

    def _lines_of(self, changes: list[Change]) -> list[bytes]:
        """Return events: what enters or leaves the selection counts as added or deleted."""
        lines = []
        for change in changes:
            if change.resource != self._call.resource.plural:
                continue
            before = change.before if self._selects(change.before) else None
            after = change.after if self._selects(change.after) else None
            if after is not None:
                lines.append(_line("ADDED" if before is None else "MODIFIED", after))
            elif before is not None:
                version = {"resourceVersion": str(change.version)}
                last = change.after or before
                gone = {**last, "metadata": {**last["metadata"], **version}}
                lines.append(_line("DELETED", gone))
        return lines

    def _selects(self, item: Object | None) -> bool:
        if item is None:
            return False
        namespace = self._call.namespace
        return (not namespace or item["metadata"]["namespace"] == namespace) and self._matches(item)

    def _bookmark(self, annotations: Mapping[str, str] | None = None) -> bytes:
        metadata: Object = {"resourceVersion": str(self._store.version), "creationTimestamp": None}
        if annotations:
            metadata["annotations"] = dict(annotations)
        resource = self._call.resource
        item = {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata}
        return _line("BOOKMARK", item)

    async def _write(self, response: web.StreamResponse, lines: list[bytes]) -> None:
        if not lines:
            return
        self._last_line = lines[-1]
        if self._server._cluster.duplicates_events:
            lines = [again for line in lines for again in (line, line)]
        await response.write(b"".join(lines))


def _line(kind: str, item: Object) -> bytes:
    return msgspec.json.encode({"type": kind, "object": item}) + b"\n"


def _gone(message: str) -> bytes:
    return _line("ERROR", ApiError(410, "Expired", message).to_object())


def _invalid_option(what: str) -> ApiError:
    return ApiError(
        422,
        "Invalid",
        f'ListOptions.meta.k8s.io "" is invalid: {what}',
        {"group": "meta.k8s.io", "kind": "ListOptions"},
    )


def _key(item: Object) -> tuple[str, str]:
    return (item["metadata"]["namespace"], item["metadata"]["name"])


def _reading_verb(query: Mapping[str, str], name: str | None) -> str:
    if query.get("watch") in ("true", "1"):
        return "watch"
    return "get" if name else "list"


async def _read_body(request: web.Request) -> Any:
    data = await request.read()
    if not data:
        return None
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(data)
    raise ApiError(400, "BadRequest", "the object provided is unrecognized")


def _success(resource: Resource, item: Object | None) -> Object:
    metadata = (item or {}).get("metadata") or {}
    details = {"kind": resource.plural, "name": metadata.get("name"), "uid": metadata.get("uid")}
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Success",
        "details": {**details, "group": resource.group},
    }


def _answer(status: int, body: Object, headers: Mapping[str, str] | None = None) -> web.Response:
    data = msgspec.json.encode(body)
    return web.Response(
        status=status, body=data, content_type="application/json", headers=dict(headers or {})
    )


def make_event(item: Object, kind: str, reason: str, message: str) -> Object:
    """Return an Event about an object, as ``core/v1`` has it."""
    metadata = item["metadata"]
    now = timestamp()
    return {
        "metadata": {"generateName": f"{metadata['name']}."},
        "involvedObject": {
            "kind": item["kind"],
            "apiVersion": item["apiVersion"],
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        },
        "type": kind,
        "reason": reason,
        "message": message,
        "count": 1,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "source": {"component": "fake"},
    }
