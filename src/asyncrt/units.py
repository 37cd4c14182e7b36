"""Plain modules and whole packages as they travel: all files of each, under its content hash.

What is packed is a list of the files, as JSON, with its length in front, and then what is in them.
No archive format: the worker needs nothing but a loop to unpack it, nothing is copied here, and no
time or order of a directory can change the hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import BYTECODE_SUFFIXES, all_suffixes
from pathlib import Path
from typing import Final

from asyncrt.errors import ModulesError
from asyncrt.importgraph import Located
from asyncrt.worker.modules import HEAD_BYTES
from asyncrt.worker.protocol import Buffer

_SHOWN_FILES: Final = 5
_UNSETTLED_NS: Final = 50_000_000  # a file this young may be written again within one tick
_SUFFIXES: Final = tuple(sorted(all_suffixes(), key=len, reverse=True))


@dataclass(frozen=True, slots=True)
class Unit:
    """A plain module or a whole package as it travels.

    Attributes:
        name: Its dotted name.
        hash: Content hash, under which a worker keeps it.
        segments: The payload.
    """

    name: str
    hash: str
    segments: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a unit.

    Attributes:
        name: Where it comes, below the directory that is put on ``sys.path``.
    """

    name: str
    path: str
    size_bytes: int
    mtime_ns: int
    executable: bool


class UnitPacker:
    """Packs units, and remembers each as long as no file of it changes."""

    def __init__(self) -> None:
        self._packed: dict[tuple[str, str], tuple[list[_File], Unit]] = {}

    def pack(
        self, modules: Sequence[Located], *, exclude: frozenset[str], limit_bytes: int
    ) -> tuple[Unit, ...]:
        """Return modules as they travel.

        Args:
            exclude: Dotted names of what is left out of packages.
            limit_bytes: What all of them may hold.

        Raises:
            ModulesError: They are larger than that, or cannot be read.
        """
        listed: list[tuple[Located, list[_File]]] = []
        for module in modules:
            try:
                files = sorted(_files_of(module, exclude), key=lambda file: file.name)
            except OSError as error:
                raise _unreadable(module.name, error) from error
            listed.append((module, files))
        _check_size([file for _, files in listed for file in files], limit_bytes)
        return tuple(self._pack(module, files) for module, files in listed)

    def _pack(self, module: Located, files: list[_File]) -> Unit:
        key = module.name, str(module.file)
        known = self._packed.get(key)
        youngest = max((file.mtime_ns for file in files), default=0)
        if known is not None and known[0] == files:
            return known[1]
        try:
            contents = [Path(file.path).read_bytes() for file in files]
        except OSError as error:
            raise _unreadable(module.name, error) from error
        head = json.dumps(
            [
                (file.name, len(content), file.executable)
                for file, content in zip(files, contents, strict=True)
            ]
        ).encode()
        segments = [len(head).to_bytes(HEAD_BYTES, "little"), head, *filter(None, contents)]
        digest = hashlib.blake2b(digest_size=16)
        for segment in segments:
            digest.update(segment)
        unit = Unit(module.name, digest.hexdigest(), segments)
        if known is not None and known[1].hash == unit.hash:
            unit = known[1]
        if not 0 <= time.time_ns() - youngest < _UNSETTLED_NS:
            self._packed[key] = files, unit
        return unit


def _files_of(module: Located, exclude: frozenset[str]) -> Iterator[_File]:
    """Yield the files of a unit, with names below the directory that is put on ``sys.path``."""
    base = module.name.replace(".", "/")
    file = str(module.file)
    if module.search is not None:
        yield from _walk(os.path.dirname(file), base, exclude, frozenset())
        return
    suffix = next((suffix for suffix in _SUFFIXES if file.endswith(suffix)), ".py")
    yield _describe(f"{base}{suffix}", file, os.stat(file))


def _walk(
    directory: str, base: str, exclude: frozenset[str], outer: frozenset[str]
) -> Iterator[_File]:
    real = os.path.realpath(directory)
    if real in outer or os.path.exists(os.path.join(directory, "pyvenv.cfg")):
        return  # a link to where it is, or a virtual environment
    with os.scandir(directory) as entries:
        for entry in entries:
            name = f"{base}/{entry.name}"
            if entry.name.startswith(".") or entry.name == "__pycache__":
                continue
            if entry.is_dir():
                if name.replace("/", ".") not in exclude:
                    yield from _walk(entry.path, name, exclude, outer | {real})
            elif _travels(entry) and _module_name(name) not in exclude:
                yield _describe(name, entry.path, entry.stat())


def _travels(entry: os.DirEntry[str]) -> bool:
    return entry.is_file() and not entry.name.endswith(tuple(BYTECODE_SUFFIXES))


def _module_name(name: str) -> str | None:
    """Return the dotted name of the module that a file is; ``None`` if it is data."""
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
    return None if suffix is None else name.removesuffix(suffix).replace("/", ".")


def _describe(name: str, path: str, stat: os.stat_result) -> _File:
    return _File(name, path, stat.st_size, stat.st_mtime_ns, bool(stat.st_mode & 0o100))


def _check_size(files: list[_File], limit_bytes: int) -> None:
    total = sum(file.size_bytes for file in files)
    if total <= limit_bytes:
        return
    largest = sorted(files, key=lambda file: -file.size_bytes)[:_SHOWN_FILES]
    shown = ", ".join(f"{file.path} ({_size(file.size_bytes)})" for file in largest)
    raise ModulesError(
        f"the local modules hold {_size(total)} in {len(files)} files, more than "
        f"modules_limit={_size(limit_bytes)}; the largest are {shown}. Move data out of the "
        "package, leave modules out with exclude_modules=[...], or raise modules_limit",
        paths=tuple(file.path for file in largest),
        limit_bytes=limit_bytes,
    )


def _size(size_bytes: int) -> str:
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes} bytes"


def _unreadable(name: str, error: OSError) -> ModulesError:
    path = str(error.filename)
    return ModulesError(
        f"{path} cannot be read, and is part of the module {name!r}: {error.strerror}; make it "
        "readable, or leave it out with exclude_modules=[...]",
        module=name,
        paths=(path,),
    )
