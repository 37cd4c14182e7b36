"""Strategic-merge patches of pod templates, as ``kubectl patch`` applies them.

Mappings are merged key by key, ``null`` removes a key. Lists whose items have a key of their own
are merged by it, all others are replaced. Directives: ``$patch: replace`` (in a mapping; for a
list, in an item of its own), ``$patch: delete`` (in a mapping or an item) and ``$retainKeys``. Two
differences. Items that are new come after those that exist (``kubectl`` puts them first), so that
the worker's container stays the first one. And directives and ``null`` in what is new are carried
out, so that none of them ever reaches the result (Kubernetes' own library keeps or drops them).

https://kubernetes.io/docs/tasks/manage-kubernetes-objects/update-api-object-kubectl-patch/
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from asyncrt.errors import ConfigError

# The `patchMergeKey` of every list of a pod template that has one (k8s.io/api/core/v1/types.go,
# 1.34), by where it is. Not in it, so replaced as a whole: tolerations, envFrom, command, args, ...
_CONTAINER: Final = {
    "env": "name",
    "ports": "containerPort",
    "volumeDevices": "devicePath",
    "volumeMounts": "mountPath",
}
_MERGE_KEYS: Final[Mapping[tuple[str, ...], str]] = {
    ("spec", "containers"): "name",
    ("spec", "ephemeralContainers"): "name",
    ("spec", "hostAliases"): "ip",
    ("spec", "imagePullSecrets"): "name",
    ("spec", "initContainers"): "name",
    ("spec", "resourceClaims"): "name",
    ("spec", "schedulingGates"): "name",
    ("spec", "topologySpreadConstraints"): "topologyKey",
    ("spec", "volumes"): "name",
    **{
        ("spec", containers, name): key
        for containers in ("containers", "ephemeralContainers", "initContainers")
        for name, key in _CONTAINER.items()
    },
}
_PATCH: Final = "$patch"
_RETAIN: Final = "$retainKeys"

_Path = tuple[str, ...]


def check_pod_patch(patch: Any, *, key: str = "pod_patch") -> None:
    """Refuse what is no patch of a pod template, before there is a template.

    Raises:
        ConfigError: Not a mapping of ``metadata`` and ``spec``; a directive that is not known or is
            in a place where it means nothing; an item of a merged list without the list's key.
    """
    if not isinstance(patch, Mapping) or not set(patch) <= {"metadata", "spec"}:
        raise ConfigError(
            f"{key} must be a mapping with 'metadata' and 'spec', as in the template of a Job",
            key=key,
            expected="a mapping with the keys metadata and spec",
        )
    for name, part in patch.items():
        if not isinstance(part, Mapping):
            raise _wrong(key, (name,), "must be a mapping")
        _check_mapping(key, part, (name,))


def merge_pod_patch(template: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pod template with a patch laid over. Neither argument is changed.

    Args:
        patch: One that ``check_pod_patch`` accepts.
    """
    return _merge_mapping(template, patch, ())


def _check_mapping(key: str, patch: Mapping[Any, Any], path: _Path) -> None:
    for name, value in patch.items():
        if not isinstance(name, str):
            raise _wrong(key, path, f"has the key {name!r}, which is no text")
        if name == _PATCH:
            if value not in ("replace", "delete"):
                raise _wrong(key, path, f"has $patch: {value!r}; it can be 'replace' or 'delete'")
        elif name == _RETAIN:
            if not isinstance(value, Sequence) or not all(isinstance(kept, str) for kept in value):
                raise _wrong(key, path, "has a $retainKeys that is no list of names")
        elif name.startswith("$"):
            raise _wrong(key, path, f"has the directive {name}; known are $patch and $retainKeys")
        elif isinstance(value, Mapping):
            _check_mapping(key, value, (*path, name))
        elif isinstance(value, list | tuple):
            _check_list(key, value, (*path, name))
        elif value is not None and not isinstance(value, str | int | float):
            raise _wrong(key, (*path, name), f"is a {type(value).__name__}, which JSON has not")


def _check_list(key: str, items: Sequence[Any], path: _Path) -> None:
    merge_key = _MERGE_KEYS.get(path)
    for item in items:
        if merge_key is None:
            if isinstance(item, Mapping):
                if _PATCH in item:
                    raise _wrong(key, path, "is replaced as a whole: there is no $patch in it")
                _check_mapping(key, item, path)
            continue
        if not isinstance(item, Mapping):
            raise _wrong(key, path, "must be a list of mappings")
        if item.get(_PATCH) == "replace":
            if len(item) > 1:
                raise _wrong(key, path, "is replaced by '$patch: replace' in an item of its own")
        elif merge_key not in item:
            raise _wrong(
                key, path, f"has an item without {merge_key!r}, by which this list is merged"
            )
        _check_mapping(key, item, path)


def _wrong(key: str, path: _Path, problem: str) -> ConfigError:
    return ConfigError(
        f"{key}: {'.'.join(path)} {problem}",
        key=key,
        expected="a strategic-merge patch of a pod template",
    )


def _merge_mapping(
    original: Mapping[str, Any], patch: Mapping[str, Any], path: _Path
) -> dict[str, Any]:
    directive = patch.get(_PATCH)
    if directive == "delete":
        return {}
    merged = {} if directive == "replace" else {name: _copied(original[name]) for name in original}
    if (retained := patch.get(_RETAIN)) is not None:
        merged = {name: value for name, value in merged.items() if name in retained}
    for name, value in patch.items():
        if name in (_PATCH, _RETAIN):
            continue
        there = merged.get(name)
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, Mapping):
            below = there if isinstance(there, Mapping) else {}
            merged[name] = _merge_mapping(below, value, (*path, name))
        elif isinstance(value, list | tuple):
            below_list = there if isinstance(there, list) else []
            merged[name] = _merge_list(below_list, value, (*path, name))
        else:
            merged[name] = value
    return merged


def _merge_list(original: Sequence[Any], patch: Sequence[Any], path: _Path) -> list[Any]:
    merge_key = _MERGE_KEYS.get(path)
    if merge_key is None:
        return [_copied(item) for item in patch]
    replaced = any(item.get(_PATCH) == "replace" for item in patch)
    merged = [] if replaced else [_copied(item) for item in original]
    for item in patch:
        if item.get(_PATCH) == "replace":
            continue
        name = item[merge_key]
        found = next((at for at, there in enumerate(merged) if there.get(merge_key) == name), None)
        if item.get(_PATCH) == "delete":
            if found is not None:
                del merged[found]
        elif found is None:
            merged.append(_merge_mapping({}, item, path))
        else:
            merged[found] = _merge_mapping(merged[found], item, path)
    return merged


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copied(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item) for item in value]
    return value
