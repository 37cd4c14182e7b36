"""Follows the objects of one kind: LIST, then WATCH, and again, without losing any change.

https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Literal, NamedTuple, Protocol

import anyio
import anyio.lowlevel
import msgspec

from asyncrt.errors import KubernetesError

logger = logging.getLogger(__name__)

Kind = Literal["ADDED", "MODIFIED", "DELETED"]
Object = dict[str, Any]

_PAGE_OBJECTS: Final = 100  # pods of 5 KB: 5 ms to decode, as one piece
_SERVER_TIMEOUT: Final = (240, 480)
_SILENCE_SECONDS: Final = 90.0
_BEGIN_SECONDS: Final = 20.0
_SHORTEST_BACKOFF: Final = 0.1
_LONGEST_BACKOFF: Final = 30.0
_HEALTHY_SECONDS: Final = 60.0
_GIVE_UP_SECONDS: Final = 300.0
_BUSY_SECONDS: Final = 0.005
_INITIAL_EVENTS_END: Final = "k8s.io/initial-events-end"
# Refusals that a later try may not meet; others (no right, no such thing) are final.
_PASSING: Final = (0, 408, 409, 410, 429)


class _Known(NamedTuple):
    """The last state of an object, as bytes.

    Thousands of pods as dicts are millions of objects for the garbage collector, whose rounds
    would then hold the loop for more than 100 ms each.
    """

    uid: str
    version: str
    data: bytes

    def load(self) -> Object:
        found: Object = msgspec.json.decode(self.data)
        return found


class Lines(Protocol):
    """See ``LineStream``."""

    def receive(self) -> Awaitable[list[bytes]]:
        """Return the lines that are there; none at the end."""


class Transport(Protocol):
    """The part of ``KubeApi`` that watching needs."""

    async def request(
        self, method: str, path: str, *, query: dict[str, str | int | bool] | None = None
    ) -> dict[str, Any]:
        """Return an answer."""

    def stream_lines(
        self,
        path: str,
        *,
        query: dict[str, str | int | bool] | None = None,
        idle_timeout: float = 90.0,
    ) -> AbstractAsyncContextManager[Lines]:
        """Open an answer that goes on."""


class Watch:
    """Tells every change of the objects of one collection, once and in order.

    Callbacks run in the event loop, must be short, and see each object as it is known here:
    borrowed, not to be changed. After a break the difference is told, deletions included (with the
    last known object), as if nothing had been missed but the steps in between.

    Args:
        api: Borrowed.
        path: Of the collection, such as ``/api/v1/namespaces/team/pods``.
        on_event: Takes ``ADDED``, ``MODIFIED`` or ``DELETED``, and the object.
        on_synced: Called when everything that existed at the beginning was told, and again after
            each relist.
        chance: Source of jitter.
    """

    def __init__(
        self,
        api: Transport,
        path: str,
        *,
        on_event: Callable[[Kind, Object], None],
        on_synced: Callable[[], None] = lambda: None,
        label_selector: str | None = None,
        field_selector: str | None = None,
        chance: random.Random | None = None,
    ) -> None:
        self._api = api
        self._path = path
        self._on_event = on_event
        self._on_synced = on_synced
        self._selectors: dict[str, str | int | bool] = {}
        if label_selector:
            self._selectors["labelSelector"] = label_selector
        if field_selector:
            self._selectors["fieldSelector"] = field_selector
        self._chance = chance or random.Random()  # noqa: S311 - not a secret
        self._known: dict[tuple[str, str], _Known] = {}
        self._version: str | None = None
        self._streams_lists = True
        self._backoff = _SHORTEST_BACKOFF
        self._heard_at = 0.0
        self._busy_since = 0.0

    async def run(self) -> None:
        """Watch until cancelled.

        Raises:
            KubernetesError: It cannot go on: refused for good, or no contact for 300 seconds.
        """
        self._heard_at = anyio.current_time()
        while True:
            minimum = 0.0
            began = anyio.current_time()
            try:
                await self._watch_once()
                if anyio.current_time() - began >= _HEALTHY_SECONDS:
                    self._backoff = _SHORTEST_BACKOFF  # it ended as it should, at its time
            except (KubernetesError, TimeoutError) as error:
                minimum = self._judge(error)
            limit = self._backoff
            self._backoff = min(_LONGEST_BACKOFF, limit * 2)
            # Between half and all of it: never a tight loop, never in step with others.
            await anyio.sleep(max(minimum, self._chance.uniform(limit / 2, limit)))

    def _judge(self, error: KubernetesError | TimeoutError) -> float:
        """Raise what ends the watch; return the seconds to wait at least."""
        silent = anyio.current_time() - self._heard_at
        if isinstance(error, TimeoutError):
            logger.info("watch of %s: silent, opened again", self._path)
            return 0.0
        if error.status not in _PASSING and error.status < 500:
            raise error
        if error.reason == "TLS" or silent > _GIVE_UP_SECONDS:
            raise error
        if error.status == 410:
            logger.debug("watch of %s: its version is too old, listed again", self._path)
            self._version = None
        else:
            logger.info("watch of %s: %s", self._path, error)
        return error.retry_after or 0.0

    async def _watch_once(self) -> None:
        """Follow one stream to its end, beginning with a list if there is none yet."""
        if self._version is None:
            if self._streams_lists and await self._begin_by_stream():
                return
            await self._list()
        await self._follow(
            {"resourceVersion": self._version or "0", "allowWatchBookmarks": True}, None
        )

    async def _begin_by_stream(self) -> bool:
        """List and watch in one stream, where the server can; return whether it can.

        https://kubernetes.io/docs/reference/using-api/api-concepts/#streaming-lists
        """
        query: dict[str, str | int | bool] = {
            "sendInitialEvents": True,
            "resourceVersionMatch": "NotOlderThan",
            "allowWatchBookmarks": True,
        }
        beginning: set[tuple[str, str]] = set()
        try:
            await self._follow(query, beginning)
        except KubernetesError as error:
            # 400 and 422: it knows the words but not the feature, or neither.
            if error.status not in (400, 422):
                raise
            self._streams_lists = False
        except TimeoutError:
            if self._version is not None:
                raise  # it went silent later
            self._streams_lists = False  # it ignored what it does not know: no end is marked
        return self._streams_lists

    async def _list(self) -> None:
        """List everything in pages; tell the difference."""
        present: set[tuple[str, str]] = set()
        query = {**self._selectors, "limit": _PAGE_OBJECTS}
        while True:
            page = await self._api.request("GET", self._path, query=query)
            self._hear()
            self._busy_since = time.perf_counter()
            kind, version = page.get("kind", "List").removesuffix("List"), page.get("apiVersion")
            for item in page.get("items") or ():
                # Members of a list say neither: https://github.com/kubernetes/kubernetes/issues/3030
                item.setdefault("kind", kind)
                item.setdefault("apiVersion", version)
                self._put(item, present)
                await self._breathe()
            metadata = page["metadata"]
            if not metadata.get("continue"):
                break
            query["continue"] = metadata["continue"]
        await self._end_of_list(present, metadata["resourceVersion"])

    async def _end_of_list(self, present: set[tuple[str, str]], version: str) -> None:
        for key in [key for key in self._known if key not in present]:
            self._on_event("DELETED", self._known.pop(key).load())
            await self._breathe()
        self._version = version
        self._on_synced()

    async def _follow(
        self, query: dict[str, str | int | bool], beginning: set[tuple[str, str]] | None
    ) -> None:
        """Take the events of one stream until it ends.

        Args:
            beginning: Keys that were there, while the stream still tells what exists.
        """
        query = {
            **self._selectors,
            **query,
            "watch": True,
            "timeoutSeconds": self._chance.randint(*_SERVER_TIMEOUT),
        }
        async with self._api.stream_lines(
            self._path, query=query, idle_timeout=_SILENCE_SECONDS
        ) as stream:
            self._hear()
            while True:
                if beginning is None:
                    lines = await stream.receive()
                else:
                    with anyio.fail_after(_BEGIN_SECONDS):
                        lines = await stream.receive()
                self._hear()
                if not lines:
                    return
                self._busy_since = time.perf_counter()
                for line in lines:
                    beginning = await self._take(line, beginning)
                    await self._breathe()

    async def _take(
        self, line: bytes, beginning: set[tuple[str, str]] | None
    ) -> set[tuple[str, str]] | None:
        """Take one event; return ``beginning`` while it is one."""
        kind, item, metadata = self._decode(line)
        version = metadata["resourceVersion"]
        if kind == "BOOKMARK":
            if beginning is None:
                self._version = version
            elif (metadata.get("annotations") or {}).get(_INITIAL_EVENTS_END) == "true":
                await self._end_of_list(beginning, version)
                return None
            return beginning
        self._backoff = _SHORTEST_BACKOFF
        if kind == "DELETED":
            self._remove(item, beginning)
        else:
            self._put(item, beginning)
        if beginning is None:
            self._version = version
        return beginning

    def _decode(self, line: bytes) -> tuple[str, Object, Object]:
        """Return an event's type, object and the object's metadata."""
        try:
            event = msgspec.json.decode(line)
            kind, item = event["type"], event["object"]
            if kind == "ERROR":
                raise _stream_error(item, self._path)
            metadata = item["metadata"]
            if kind != "BOOKMARK":
                metadata["name"], metadata["uid"]
            metadata["resourceVersion"]
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
            raise KubernetesError(
                f"watch of {self._path}: not an event: {line[:200]!r}", reason="Broken"
            ) from error
        return kind, item, metadata

    def _put(self, item: Object, present: set[tuple[str, str]] | None) -> None:
        metadata = item["metadata"]
        metadata.pop("managedFields", None)  # a third of a pod, and nobody here reads it
        key = (metadata.get("namespace", ""), metadata["name"])
        if present is not None:
            present.add(key)
        before = self._known.get(key)
        kind: Kind = "ADDED"
        if before is not None:
            if before.uid != metadata["uid"]:
                self._on_event("DELETED", before.load())  # the same name, another object
            elif before.version == metadata["resourceVersion"]:
                return  # told already
            else:
                kind = "MODIFIED"
        self._known[key] = _Known(
            metadata["uid"], metadata["resourceVersion"], msgspec.json.encode(item)
        )
        self._on_event(kind, item)

    def _remove(self, item: Object, present: set[tuple[str, str]] | None) -> None:
        metadata = item["metadata"]
        key = (metadata.get("namespace", ""), metadata["name"])
        before = self._known.get(key)
        if before is None or before.uid != metadata["uid"]:
            return  # told already
        del self._known[key]
        if present is not None:
            present.discard(key)
        metadata.pop("managedFields", None)
        self._on_event("DELETED", item)

    def _hear(self) -> None:
        self._heard_at = anyio.current_time()

    async def _breathe(self) -> None:
        """Let others run when this has held the loop for long enough."""
        if time.perf_counter() - self._busy_since > _BUSY_SECONDS:
            await anyio.lowlevel.checkpoint()
            self._busy_since = time.perf_counter()


def _stream_error(status: Object, path: str) -> KubernetesError:
    """Return the error that a stream carries in its midst.

    kube-apiserver sends 500 there, too, when its own watch of etcd breaks.
    """
    details = status.get("details") or {}
    after = details.get("retryAfterSeconds")
    return KubernetesError(
        f"watch of {path}: {status.get('message')}",
        status=int(status.get("code") or 500),
        reason=str(status.get("reason") or ""),
        detail=str(status.get("message") or ""),
        retry_after=float(after) if after else None,
    )
