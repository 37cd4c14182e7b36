"""Pack the worker as one file that any Python from 3.11 on runs.

Reproducible: the same sources give the same bytes on one interpreter (fixed order, times, modes and
level). Bytecode halves the time until a worker says hello. Another Python skips it (``zipimport``
looks at its magic number) and compiles the source beside it. Such a worker can only tell its
version, so what runs calls has no source beside it.
"""

from __future__ import annotations

import functools
import io
import marshal
import tokenize
import types
import zipfile
from collections.abc import Iterator
from importlib.util import MAGIC_NUMBER, source_hash
from pathlib import Path
from typing import Final

import cloudpickle

_LIGHT_MODULES: Final = ("__init__.py", "errors.py", "inside.py", "placeholder.py")
_UNCHECKED: Final = 0b01  # bytecode valid by hash, not checked
_ONLY_BYTECODE: Final = (
    "asyncrt/inside.py",
    "asyncrt/placeholder.py",
    "asyncrt/sync.py",
    "asyncrt/worker/child.py",
    "asyncrt/worker/initializer.py",
    "asyncrt/worker/payload.py",
)
_NO_COLUMNS: Final = 13
_NO_LINE: Final = 15
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
_BEFORE_STATEMENT: Final = (tokenize.ENCODING, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
_INSIGNIFICANT: Final = (tokenize.COMMENT, tokenize.NL)
_MAIN: Final = """\
import runpy

runpy.run_module("asyncrt.worker", run_name="__main__")
"""


def pack_worker() -> bytes:
    """Return the worker as a zipapp."""
    package = Path(__file__).parent
    members = {f"asyncrt/{name}": package / name for name in _LIGHT_MODULES}
    members |= _sources(package / "worker", "asyncrt/worker")
    members["asyncrt/sync.py"] = members.pop("asyncrt/worker/nosync.py")
    members |= _sources(Path(cloudpickle.__file__).parent, "cloudpickle")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr(_entry("__main__.py"), _MAIN)
        for name in sorted(members):
            source = members[name].read_bytes()
            if name not in _ONLY_BYTECODE and not name.startswith("cloudpickle/"):
                archive.writestr(_entry(name), _without_docstrings(source))
            archive.writestr(_entry(f"{name}c"), _bytecode(name, source))
    return packed.getvalue()


@functools.cache
def worker_program() -> bytes:
    """Return the worker as a zipapp, packed once in a process: it takes 0.15 s."""
    return pack_worker()


def _sources(directory: Path, prefix: str) -> dict[str, Path]:
    return {f"{prefix}/{path.name}": path for path in directory.glob("*.py")}


def _without_docstrings(source: bytes) -> bytes:
    """Return the source with empty docstrings: they take a third of the space.

    By tokens: CPython 3.11 fails when two threads build syntax trees at once
    (https://github.com/python/cpython/issues/106905), and this runs beside the user's.
    """
    lines = source.splitlines(keepends=True)
    statement_begins = True
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type == tokenize.STRING and statement_begins:
            first, last = token.start[0] - 1, token.end[0]
            lines[first:last] = [b" " * token.start[1] + b'""\n', *[b"\n"] * (last - first - 1)]
        if token.type not in _INSIGNIFICANT:
            statement_begins = token.type in _BEFORE_STATEMENT
    return b"".join(lines)


def _bytecode(name: str, source: bytes) -> bytes:
    """Return a ``.pyc`` file, without docstrings, whose source is never looked at (PEP 552)."""
    code = compile(source, f"worker.pyz/{name}", "exec", dont_inherit=True, optimize=2)
    code = _without_columns(code)
    head = MAGIC_NUMBER + _UNCHECKED.to_bytes(4, "little") + source_hash(source)
    # Version 2 has no references between objects, whose use depends on what else is alive here.
    return head + marshal.dumps(code, 2)


def _without_columns(code: types.CodeType) -> types.CodeType:
    """Return code that knows its lines but not its columns, which would be a fifth of the file.

    As ``-X no_debug_ranges`` does, which this process was not started with. The format:
    https://github.com/python/cpython/blob/3.11/Objects/locations.md
    """
    table = bytearray()
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        kind, delta = (_NO_LINE, 0) if number is None else (_NO_COLUMNS, number - line)
        line += delta
        for units in _at_most_eight((end - start) // 2):
            table.append(0x80 | kind << 3 | units - 1)
            if kind == _NO_COLUMNS:
                table += _signed_varint(delta)
            delta = 0
    constants = tuple(
        _without_columns(constant) if isinstance(constant, types.CodeType) else constant
        for constant in code.co_consts
    )
    return code.replace(co_linetable=bytes(table), co_consts=constants)


def _at_most_eight(total: int) -> Iterator[int]:
    while total > 0:
        yield min(total, 8)
        total -= 8


def _signed_varint(value: int) -> bytes:
    rest = -value << 1 | 1 if value < 0 else value << 1
    packed = bytearray()
    while rest >= 64:
        packed.append(0x40 | rest & 63)
        rest >>= 6
    packed.append(rest)
    return bytes(packed)


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.external_attr = 0o644 << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry
