"""Memory limits: what the kernel enforces, seen from inside, and what has to be watched."""

from __future__ import annotations

import os
import resource


class MemoryWatch:
    """Tells whether the limit of this worker killed a process.

    Args:
        limit_bytes: The limit; ``None`` if there is none.
        enforced: Whether a cgroup enforces it (a container's, or one that the client made). If not,
            ``over_limit`` has to be asked now and then.
    """

    def __init__(self, limit_bytes: int | None, *, enforced: bool) -> None:
        self.limit_bytes = limit_bytes
        self.must_poll = limit_bytes is not None and not enforced
        self._events, self._peak = _find_cgroup_files()
        self._kills = self._count_kills()

    def killed_since_last_asked(self) -> bool:
        """Return whether the kernel killed a process of this cgroup for memory."""
        kills = self._count_kills()
        more = kills > self._kills
        self._kills = kills
        return more

    def over_limit(self, pid: int) -> bool:
        """Return whether a process holds more than the limit."""
        return self.limit_bytes is not None and held_by(pid) > self.limit_bytes

    def peak_bytes(self) -> int:
        """Return the most that this cgroup ever held; 0 if the kernel does not say."""
        try:
            return int(_read(self._peak)) if self._peak else 0
        except (OSError, ValueError):
            return 0

    def _count_kills(self) -> int:
        if self._events is None:
            return 0
        try:
            for line in _read(self._events).splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
        except (OSError, ValueError):
            return 0
        return 0


def held_by(pid: int) -> int:
    """Return the resident memory of a process in bytes; 0 if it is gone or not known."""
    try:
        return int(_read(f"/proc/{pid}/statm").split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _find_cgroup_files() -> tuple[str | None, str | None]:
    """Return the files with kill counter and peak of this process's memory cgroup, v1 or v2."""
    try:
        lines = _read("/proc/self/cgroup").splitlines()
    except OSError:
        return None, None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            roots = ["/sys/fs/cgroup/memory"]
            names = ("memory.oom_control", "memory.max_usage_in_bytes")
        elif not controllers:
            roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            names = ("memory.events", "memory.peak")
        else:
            continue
        for root in roots:
            # In a container the path is the host's; the container's own cgroup is the root.
            for directory in (root + path.rstrip("/"), root):
                if os.access(f"{directory}/{names[0]}", os.R_OK):
                    return f"{directory}/{names[0]}", f"{directory}/{names[1]}"
    return None, None
