"""The objects of a fake cluster, with versions, history and selectors as an API server has them."""

from __future__ import annotations

import copy
import re
import secrets
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

Object = dict[str, Any]
Key = tuple[str, str]

_HISTORY_EVENTS: Final = 50_000
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


class ApiError(Exception):
    """A refusal, as the API server words it."""

    def __init__(
        self, status: int, reason: str, message: str, details: Object | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.details = details or {}

    def to_object(self) -> Object:
        """Return the ``Status`` object that a client receives."""
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": str(self),
            "reason": self.reason,
            "details": self.details,
            "code": self.status,
        }


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of objects."""

    plural: str
    kind: str
    group: str
    api_version: str

    @property
    def full_name(self) -> str:
        """As messages call it, such as ``jobs.batch``."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


RESOURCES: Final = {
    resource.plural: resource
    for resource in (
        Resource("jobs", "Job", "batch", "batch/v1"),
        Resource("pods", "Pod", "", "v1"),
        Resource("secrets", "Secret", "", "v1"),
        Resource("configmaps", "ConfigMap", "", "v1"),
        Resource("events", "Event", "", "v1"),
    )
}


@dataclass(frozen=True, slots=True)
class Change:
    """One step of the cluster's history. ``before`` and ``after`` are never changed."""

    version: int
    resource: str
    before: Object | None
    after: Object | None


class Store:
    """All objects of one cluster. Objects that were stored are never changed, only replaced."""

    def __init__(self) -> None:
        self.version = 100
        self.oldest = 100
        self._objects: dict[str, dict[Key, Object]] = {name: {} for name in RESOURCES}
        self._history: deque[Change] = deque(maxlen=_HISTORY_EVENTS)
        self._listeners: list[Callable[[Change], None]] = []
        self._uids: set[str] = set()
        self._owned: dict[str, dict[tuple[str, Key], None]] = {}

    def subscribe(self, listener: Callable[[Change], None]) -> Callable[[], None]:
        """Call something at each change; return what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def changes_since(self, version: int) -> list[Change]:
        """Return what happened after a version.

        Raises:
            ApiError: It is forgotten: 410.
        """
        if version < self.oldest:
            raise ApiError(410, "Expired", f"too old resource version: {version} ({self.oldest})")
        return [change for change in self._history if change.version > version]

    def compact(self) -> None:
        """Forget all history: whoever watches from an older version gets 410."""
        self.version += 1
        self.oldest = self.version
        self._history.clear()

    def all(self, resource: str, namespace: str | None = None) -> Iterator[Object]:
        """Return objects in the order of their keys."""
        objects = self._objects[resource]
        for key in sorted(objects):
            if namespace is None or key[0] == namespace:
                yield objects[key]

    def find(self, resource: str, namespace: str, name: str) -> Object | None:
        """Return an object, or ``None``."""
        return self._objects[resource].get((namespace, name))

    def get(self, resource: str, namespace: str, name: str) -> Object:
        """Return an object.

        Raises:
            ApiError: 404.
        """
        found = self.find(resource, namespace, name)
        if found is None:
            full = RESOURCES[resource].full_name
            raise ApiError(
                404, "NotFound", f'{full} "{name}" not found', {"name": name, "kind": resource}
            )
        return found

    def create(self, resource: str, namespace: str, body: Object) -> Object:
        """Store a new object.

        Raises:
            ApiError: 409 if there is one of this name, 422 if the name is not one.
        """
        kind = RESOURCES[resource]
        item = copy.deepcopy(body)
        metadata = item.setdefault("metadata", {})
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + random_suffix()
        name = metadata.get("name", "")
        if not _NAME.fullmatch(name):
            raise ApiError(
                422,
                "Invalid",
                f'{kind.kind}{"." + kind.group if kind.group else ""} "{name}" is invalid: '
                f'metadata.name: Invalid value: "{name}": a lowercase RFC 1123 subdomain must '
                "consist of lower case alphanumeric characters, '-' or '.'",
                {"name": name, "kind": kind.kind},
            )
        if (namespace, name) in self._objects[resource]:
            raise ApiError(
                409,
                "AlreadyExists",
                f'{kind.full_name} "{name}" already exists',
                {"name": name, "kind": resource},
            )
        item["kind"], item["apiVersion"] = kind.kind, kind.api_version
        metadata.update(
            namespace=namespace, uid=str(uuid.uuid4()), creationTimestamp=timestamp(), generation=1
        )
        return self._commit(resource, (namespace, name), None, item)

    def replace(self, resource: str, item: Object) -> Object:
        """Store an object in the place of its former state; return what is there then."""
        metadata = item["metadata"]
        key = (metadata["namespace"], metadata["name"])
        before = self._objects[resource].get(key)
        if before is None or before["metadata"]["uid"] != metadata["uid"] or before == item:
            return before or item
        return self._commit(resource, key, before, item)

    def update(self, resource: str, item: Object, change: Callable[[Object], None]) -> Object:
        """Apply a change to the present state of an object, if it is still there."""
        metadata = item["metadata"]
        present = self.find(resource, metadata["namespace"], metadata["name"])
        if present is None or present["metadata"]["uid"] != metadata["uid"]:
            return item
        changed = copy.deepcopy(present)
        change(changed)
        return self.replace(resource, changed)

    def remove(self, resource: str, item: Object) -> None:
        """Take an object away."""
        metadata = item["metadata"]
        key = (metadata["namespace"], metadata["name"])
        present = self._objects[resource].get(key)
        if present is not None and present["metadata"]["uid"] == metadata["uid"]:
            self._commit(resource, key, present, None)

    def exists(self, uid: str) -> bool:
        """Whether any object has this uid."""
        return uid in self._uids

    def dependents(self, uid: str) -> list[tuple[str, Object]]:
        """Return the objects that an object owns."""
        return [
            (resource, self._objects[resource][key]) for resource, key in self._owned.get(uid, ())
        ]

    def _index(self, resource: str, key: Key, before: Object | None, after: Object | None) -> None:
        if before is not None:
            self._uids.discard(before["metadata"]["uid"])
            for owner in before["metadata"].get("ownerReferences") or ():
                owned = self._owned.get(owner["uid"], {})
                owned.pop((resource, key), None)
                if not owned:
                    self._owned.pop(owner["uid"], None)
        if after is not None:
            self._uids.add(after["metadata"]["uid"])
            for owner in after["metadata"].get("ownerReferences") or ():
                self._owned.setdefault(owner["uid"], {})[resource, key] = None

    def _commit(
        self, resource: str, key: Key, before: Object | None, after: Object | None
    ) -> Object:
        self.version += 1
        self._index(resource, key, before, after)
        item = after
        if item is not None:
            item["metadata"]["resourceVersion"] = str(self.version)
            self._objects[resource][key] = item
        else:
            assert before is not None
            del self._objects[resource][key]
            # A deletion is told with the last state, under the version of the deletion.
            item = before = {
                **before,
                "metadata": {**before["metadata"], "resourceVersion": str(self.version)},
            }
        if len(self._history) == _HISTORY_EVENTS:
            self.oldest = self._history[0].version
        change = Change(self.version, resource, before, after)
        self._history.append(change)
        for listener in tuple(self._listeners):
            listener(change)
        return item


def timestamp() -> str:
    """Return the time as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def random_suffix() -> str:
    """Return what Kubernetes appends to generated names."""
    return "".join(secrets.choice("bcdfghjklmnpqrstvwxz2456789") for _ in range(5))


def matcher(query: Mapping[str, str]) -> Callable[[Object], bool]:
    """Return whether an object matches the selectors of a query.

    https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors
    """
    requirements = [
        *_label_requirements(query.get("labelSelector", "")),
        *_field_requirements(query.get("fieldSelector", "")),
    ]
    return lambda item: all(requirement(item) for requirement in requirements)


def _label_requirements(text: str) -> Iterator[Callable[[Object], bool]]:
    for part in re.split(r",(?![^(]*\))", text):
        if not part.strip():
            continue
        found = re.fullmatch(
            r"\s*(!?)([\w./-]+)\s*(?:(==|=|!=|in|notin)\s*(\(([^)]*)\)|[\w.-]*))?\s*", part
        )
        if found is None:
            raise ApiError(400, "BadRequest", f"unable to parse requirement: {part!r}")
        absent, name, operator, value, several = found.groups()
        values = {
            word.strip() for word in (several if several is not None else value or "").split(",")
        }
        yield _label_requirement(name, operator, values, bool(absent))


def _label_requirement(
    name: str, operator: str | None, values: set[str], absent: bool
) -> Callable[[Object], bool]:
    def holds(item: Object) -> bool:
        labels = item["metadata"].get("labels") or {}
        if operator is None:
            return (name in labels) is not absent
        if operator in ("!=", "notin"):
            return labels.get(name) not in values
        return labels.get(name) in values

    return holds


def _field_requirements(text: str) -> Iterator[Callable[[Object], bool]]:
    for part in filter(None, (word.strip() for word in text.split(","))):
        path, operator, value = re.split(r"(!=|==|=)", part, maxsplit=1)
        yield _field_requirement(path.split("."), value, operator == "!=")


def _field_requirement(path: list[str], value: str, other: bool) -> Callable[[Object], bool]:
    def holds(item: Object) -> bool:
        found: Any = item
        for step in path:
            found = (found or {}).get(step)
        return (str(found if found is not None else "") == value) is not other

    return holds


def merge_patch(target: Any, patch: Any) -> Any:
    """Return a target with a JSON merge patch applied: RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged
