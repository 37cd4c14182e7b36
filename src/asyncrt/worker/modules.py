"""Modules that travel with functions: what the parent keeps of them, how children import them.

A *unit* is a plain module or a whole package. The client sends it under its content hash. The first
child that needs it unpacks it into a directory of that name, which all children of the worker share
and put at the front of ``sys.path``. The parent only stores bytes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Mapping, MutableMapping
from importlib.machinery import EXTENSION_SUFFIXES
from typing import Any, Final

from asyncrt.errors import ProtocolError
from asyncrt.worker.protocol import Buffer

HEAD_BYTES: Final = 8  # length of the list of files, which comes before what is in them


class Library:
    """The functions and units that the client has sent.

    Args:
        directory: Where units are unpacked.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._packed: dict[str, Buffer] = {}
        self._units: dict[str, dict[str, str]] = {}

    @property
    def names(self) -> list[str]:
        """The content hashes of all that is here."""
        return list(self._packed)

    def add(self, header: Mapping[str, Any], body: Buffer) -> None:
        """Take a function, or a unit: it has a module's name under ``unit``.

        Raises:
            ProtocolError: A hash that is none.
        """
        name, units = header["function"], header.get("modules", {})
        if not isinstance(units, dict) or not all(
            isinstance(hash_, str) and hash_.isalnum() for hash_ in units.values()
        ):
            raise ProtocolError(f"a function with modules {units!r}")
        self._packed[name] = body
        if "unit" not in header:
            self._units[name] = units

    def forget(self, name: str) -> None:
        """Let go of what the client will not use again without sending it."""
        self._packed.pop(name, None)
        self._units.pop(name, None)

    def get(self, name: str) -> Buffer | None:
        """Return a packed function."""
        return self._packed.get(name)

    def has(self, function: str) -> bool:
        """Whether a function has arrived, and all units that it needs: they may be overtaken."""
        units = self._units.get(function)
        if not units:
            return units is not None
        return all(unit in self._packed for unit in units.values())

    def directories(self, function: str | None) -> dict[str, str]:
        """Return where the units of a function are, or will be, by their modules' names."""
        units = self._units.get(function or "", {})
        return {name: os.path.join(self._directory, hash_) for name, hash_ in units.items()}

    def packed_units(self, function: str) -> dict[str, Buffer]:
        """Return the units of a function that no child has unpacked yet, by their directories."""
        found: dict[str, Buffer] = {}
        for hash_ in self._units.get(function, {}).values():
            path = os.path.join(self._directory, hash_)
            if self._packed[hash_]:
                if os.path.isdir(path):
                    self._packed[hash_] = b""  # no need to hold it in memory as well
                else:
                    found[path] = self._packed[hash_]
        return found


def conflict(given: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether a process that was given units, by name, cannot be given others as well.

    It has imported another version of one of them, or would look for a module inside a namespace
    that is a package now.
    """
    return any(
        given.get(name, path) != path
        or any(other.startswith(f"{name}.") or name.startswith(f"{other}.") for other in given)
        for name, path in wanted.items()
    )


def install(units: Mapping[str, str], packed: MutableMapping[str, Buffer]) -> None:
    """Make units importable in this process.

    Args:
        units: Their directories, by their modules' names.
        packed: Those that may not be unpacked yet, by their directories. They are taken out.

    Raises:
        OSError: One cannot be unpacked: no room, or no right to write.
    """
    new = [(name, path) for name, path in units.items() if path not in sys.path]
    for name, path in new:
        if not os.path.isdir(path):
            _unpack(path, memoryview(packed.get(path, b"")))
        packed.pop(path, None)
        _unload(name)
    sys.path[1:1] = [path for _, path in new]  # the first is the worker itself
    if new:
        importlib.invalidate_caches()


def _unload(name: str) -> None:
    """Forget a module that was found elsewhere before its unit came, unless it is in part C."""
    stale = [loaded for loaded in sys.modules if loaded == name or loaded.startswith(f"{name}.")]
    files = [str(getattr(sys.modules[loaded], "__file__", "")) for loaded in stale]
    if not any(file.endswith(tuple(EXTENSION_SUFFIXES)) for file in files):
        for loaded in stale:
            del sys.modules[loaded]


def _unpack(path: str, body: memoryview) -> None:
    if not body:
        raise FileNotFoundError(f"{path} was removed while the worker needs it")
    temporary = f"{path}.{os.getpid()}"
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    try:
        _write(temporary, body)
        os.rename(temporary, path)
    except OSError:
        remove(temporary)
        if not os.path.isdir(path):  # else another child was faster
            raise


def _write(directory: str, body: memoryview) -> None:
    at = HEAD_BYTES + int.from_bytes(body[:HEAD_BYTES], "little")
    for name, size, executable in json.loads(bytes(body[HEAD_BYTES:at])):
        target = os.path.join(directory, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as file:
            file.write(body[at : at + size])
        if executable:
            os.chmod(target, 0o755)  # noqa: S103 - as it was where it comes from
        at += size


def remove(directory: str) -> None:
    """Remove a directory with all that is in it, if it is there."""
    import shutil  # noqa: PLC0415 - needed at the end only

    with contextlib.suppress(OSError):
        shutil.rmtree(directory)
