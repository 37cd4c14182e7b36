"""Pack the worker as one file that any Python from 3.11 on runs.

Reproducible: the same sources give the same bytes (fixed order, times, modes and level).
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Final

import cloudpickle

_LIGHT_MODULES: Final = ("__init__.py", "errors.py", "inside.py")
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
_MAIN: Final = """\
import runpy

runpy.run_module("asyncrt.worker", run_name="__main__")
"""


def pack_worker() -> bytes:
    """Return the worker as a zipapp."""
    package = Path(__file__).parent
    members = {f"asyncrt/{name}": package / name for name in _LIGHT_MODULES}
    members |= _sources(package / "worker", "asyncrt/worker")
    members |= _sources(Path(cloudpickle.__file__).parent, "cloudpickle")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        archive.writestr(_entry("__main__.py"), _MAIN)
        for name in sorted(members):
            archive.writestr(_entry(name), members[name].read_bytes())
    return packed.getvalue()


def _sources(directory: Path, prefix: str) -> dict[str, Path]:
    return {f"{prefix}/{path.name}": path for path in directory.glob("*.py")}


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.external_attr = 0o644 << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry
