"""A pod's container as a process of this machine: volumes, environment, command, all rewritten."""

from __future__ import annotations

import base64
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from asyncrt.testing.fakestore import Object, Store

_PYTHONS: Final = ("python", "python3", "/usr/bin/python3", "/usr/local/bin/python3")

# A pod has its own loopback; a process of this machine does not. So each fake pod has an address
# of its own in 127.0.0.0/8, and what listens on its loopback, or everywhere, listens there.
SITE_CUSTOMIZE: Final = """
import os, socket
_ADDRESS = os.environ.get("ASYNCRT_FAKE_POD_IP")
if _ADDRESS:
    _bind = socket.socket.bind
    def bind(self, address):
        here = ("127.0.0.1", "0.0.0.0", "", "localhost")
        if self.family == socket.AF_INET and address[0] in here:
            address = (_ADDRESS, *address[1:])
        return _bind(self, address)
    socket.socket.bind = bind
"""


class MissingVolumeError(Exception):
    """A volume's source does not exist: the kubelet waits for it."""


class MissingConfigError(Exception):
    """What the environment refers to does not exist: the kubelet waits for it."""


@dataclass
class Container:
    """What to run.

    Attributes:
        command: With the paths of this machine.
        message_path: Where the process may leave its termination message.
    """

    command: list[str]
    env: dict[str, str]
    cwd: Path
    message_path: Path
    mounts: dict[str, Path] = field(default_factory=dict)


def prepare(store: Store, pod: Object, directory: Path, address: str, site: Path) -> Container:
    """Make the volumes of a pod and say how to run its first container.

    Raises:
        MissingVolumeError: A secret or config map that it mounts is not there.
        MissingConfigError: One that its environment names is not there.
    """
    namespace = pod["metadata"]["namespace"]
    container = pod["spec"]["containers"][0]
    volumes = {
        volume["name"]: _make_volume(store, namespace, volume, directory)
        for volume in pod["spec"].get("volumes") or ()
    }
    message = directory / "termination-log"
    message.touch()
    mounts: dict[str, Path] = {
        container.get("terminationMessagePath", "/dev/termination-log"): message
    }
    for mount in container.get("volumeMounts") or ():
        path = volumes[mount["name"]]
        mounts[mount["mountPath"].rstrip("/")] = path / mount.get("subPath", "")
    rewrite = _rewriter(mounts)
    env = {name: rewrite(value) for name, value in _environment(store, pod, container).items()}
    if "/tmp" in mounts:  # noqa: S108 - of the pod
        env.setdefault("TMPDIR", str(mounts["/tmp"]))  # noqa: S108 - the same
    env.update(
        PATH=env.get("PATH", os.environ.get("PATH", os.defpath)),
        ASYNCRT_FAKE_POD_IP=address,
        PYTHONPATH=os.pathsep.join(filter(None, (str(site), env.get("PYTHONPATH")))),
        **{name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")},
    )
    words = [*(container.get("command") or ()), *(container.get("args") or ())]
    command = [rewrite(_expand(word, env)) for word in words]
    if command and command[0] in _PYTHONS:
        command[0] = sys.executable
    cwd = directory / "root"
    cwd.mkdir(exist_ok=True)
    return Container(command, env, cwd, message, mounts)


def _rewriter(mounts: Mapping[str, Path]) -> Callable[[str], str]:
    """Return a function that replaces paths of the pod by those of this machine, each once."""
    choices = "|".join(re.escape(path) for path in sorted(mounts, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w./-])({choices})(?=/|$|[^\w.-])")
    return lambda text: pattern.sub(lambda found: str(mounts[found[1]]), text)


def _expand(text: str, env: Mapping[str, str]) -> str:
    """Replace ``$(NAME)``, as Kubernetes does in commands; ``$$`` stands for a dollar."""
    return re.sub(
        r"\$\$|\$\((\w+)\)",
        lambda found: "$" if found[0] == "$$" else env.get(found[1], found[0]),
        text,
    )


def _make_volume(store: Store, namespace: str, volume: Object, directory: Path) -> Path:
    path = directory / "volumes" / str(volume["name"])
    path.mkdir(parents=True, exist_ok=True)
    for resource, key in (("secrets", "secretName"), ("configmaps", "name")):
        source = volume.get("secret" if resource == "secrets" else "configMap")
        if source is None:
            continue
        found = store.find(resource, namespace, source[key])
        if found is None:
            if source.get("optional"):
                continue
            word = "secret" if resource == "secrets" else "configmap"
            raise MissingVolumeError(
                f'MountVolume.SetUp failed for volume "{volume["name"]}" : '
                f'{word} "{source[key]}" not found'
            )
        for name, data in _contents(found).items():
            targets = [item["path"] for item in source.get("items") or () if item["key"] == name]
            for target in targets if source.get("items") else [name]:
                (path / target).parent.mkdir(parents=True, exist_ok=True)
                (path / target).write_bytes(data)
    return path


def _contents(item: Object) -> dict[str, bytes]:
    """Return the entries of a secret or config map."""
    coded = {**(item.get("binaryData") or {})}
    plain = item.get("data") or {}
    if item["kind"] == "Secret":
        coded, plain = plain, item.get("stringData") or {}
    return {
        **{name: base64.b64decode(value) for name, value in coded.items()},
        **{name: value.encode() for name, value in plain.items()},
    }


def _environment(store: Store, pod: Object, container: Object) -> dict[str, str]:
    namespace = pod["metadata"]["namespace"]
    env: dict[str, str] = {"HOSTNAME": pod["metadata"]["name"]}
    for source in container.get("envFrom") or ():
        resource = "secrets" if "secretRef" in source else "configmaps"
        reference = source.get("secretRef") or source.get("configMapRef")
        for name, data in _referred(store, namespace, resource, reference).items():
            env[source.get("prefix", "") + name] = data.decode()
    for entry in container.get("env") or ():
        value = _value(store, pod, entry)
        if value is not None:
            env[entry["name"]] = _expand(value, env)
    return env


def _value(store: Store, pod: Object, entry: Object) -> str | None:
    source = entry.get("valueFrom")
    if not source:
        return str(entry.get("value", ""))
    if "fieldRef" in source:
        return _field(pod, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        return "0"
    resource = "secrets" if "secretKeyRef" in source else "configmaps"
    reference = source.get("secretKeyRef") or source.get("configMapKeyRef")
    namespace = pod["metadata"]["namespace"]
    found = _referred(store, namespace, resource, reference).get(reference["key"])
    if found is None and not reference.get("optional"):
        word = "Secret" if resource == "secrets" else "ConfigMap"
        raise MissingConfigError(
            f"couldn't find key {reference['key']} in {word} {namespace}/{reference['name']}"
        )
    return None if found is None else found.decode()


def _referred(
    store: Store, namespace: str, resource: str, reference: Mapping[str, Any]
) -> dict[str, bytes]:
    found = store.find(resource, namespace, reference["name"])
    if found is not None:
        return _contents(found)
    if reference.get("optional"):
        return {}
    word = "secret" if resource == "secrets" else "configmap"
    raise MissingConfigError(f'{word} "{reference["name"]}" not found')


def _field(pod: Object, path: str) -> str:
    found = re.fullmatch(r"metadata\.(labels|annotations)\['([^']+)'\]", path)
    if found is not None:
        return str((pod["metadata"].get(found[1]) or {}).get(found[2], ""))
    value: Any = pod
    for step in path.split("."):
        value = (value or {}).get(step)
    return str(value if value is not None else "")


def executable_of(container: Container) -> str | None:
    """Return the path of what a command runs, ``None`` if there is none."""
    if not container.command:
        return None
    return shutil.which(container.command[0], path=container.env["PATH"])
