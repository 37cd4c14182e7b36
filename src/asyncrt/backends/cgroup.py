"""A memory limit by the kernel for a local worker, where this user may make a cgroup."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

_ROOT: Final = Path("/sys/fs/cgroup")
_ENTER: Final = 'echo $$ > "$1" && shift && exec "$@"'
_REMOVE_ATTEMPTS: Final = 50


class MemoryGroup:
    """A cgroup, v1 or v2, with a limit on memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def enter_command(self) -> list[str]:
        """Return the beginning of a command line that joins the group, then runs the rest.

        (``preexec_fn`` would run Python between fork and exec, which is unsafe with threads.)
        """
        return ["/bin/sh", "-c", _ENTER, "sh", str(self.path / "cgroup.procs")]

    def remove(self) -> None:
        """Remove the group, whose processes are gone or about to be."""
        for _ in range(_REMOVE_ATTEMPTS):
            try:
                self.path.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                self._kill_rest()
                time.sleep(0.001)
            else:
                return
        logger.warning("the cgroup %s could not be removed", self.path)

    def _kill_rest(self) -> None:
        with contextlib.suppress(OSError):
            for line in (self.path / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(int(line), 9)


def make_memory_group(limit_bytes: int | None, name: str) -> MemoryGroup | None:
    """Make a cgroup with a limit; ``None`` if there is no limit, or no permission to make one."""
    if limit_bytes is None or not sys.platform.startswith("linux"):
        return None
    for parent, limit_file, swap_file in _parents():
        path = parent / name
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            (path / limit_file).write_text(str(limit_bytes))
        except OSError:
            with contextlib.suppress(OSError):
                path.rmdir()
            continue
        with contextlib.suppress(OSError):  # not every kernel counts swap
            (path / swap_file).write_text(str(limit_bytes) if "memsw" in swap_file else "0")
        return MemoryGroup(path)
    logger.debug("no cgroup can be made here: memory of workers is watched instead")
    return None


def _parents() -> list[tuple[Path, str, str]]:
    """Return where a child of this process's own memory cgroup could be made."""
    found: list[tuple[Path, str, str]] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            directory = _ROOT / "memory" / path.lstrip("/")
            found.append((directory, "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"))
        elif not controllers:
            for root in (_ROOT, _ROOT / "unified"):
                found.append((root / path.lstrip("/"), "memory.max", "memory.swap.max"))
    return found
