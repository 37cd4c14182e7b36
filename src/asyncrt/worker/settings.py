"""What a worker is told when it starts: one JSON object, on standard input or in a file."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class WorkerSettings(NamedTuple):
    """See ``PoolSettings`` in ``asyncrt.options`` for the meaning of those that users set.

    Attributes:
        token: Secret that client and worker share.
        listen_fd: A listening socket that was inherited; -1 to open one at ``listen_port``.
        listen_port: TCP port on the loopback address.
        memory_enforced: Whether a cgroup enforces ``memory_bytes``.
        spawn: ``"fork"``, or ``"exec"`` where fork is unsafe.
        lifeline: Whether the end of standard input means that the client is gone.
        echo: Whether to write what calls print to the worker's own output, too.
        sys_path: Entries for ``sys.path`` of the children.
        remove: Files, then directories, to remove at the end.
        remove_abandoned: The same, if the client is gone.
    """

    token: bytes
    asyncrt_version: str
    cloudpickle_version: str
    listen_fd: int = -1
    listen_port: int = 0
    slots: int = 1
    memory_bytes: int | None = None
    memory_enforced: bool = True
    recycle_bytes: int | None = None
    heartbeat_interval: float = 10.0
    orphan_timeout: float = 120.0
    spawn: str = "fork"
    lifeline: bool = False
    echo: bool = True
    sys_path: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    remove_abandoned: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the settings on one line."""
        return json.dumps({**self._asdict(), "token": self.token.hex()})

    @classmethod
    def from_json(cls, text: str | bytes) -> WorkerSettings:
        """Return what ``to_json`` was called on.

        Raises:
            ValueError: Not such a text.
        """
        found: dict[str, Any] = json.loads(text)
        found["token"] = bytes.fromhex(found["token"])
        for name in ("sys_path", "remove", "remove_abandoned"):
            found[name] = tuple(found.get(name, ()))
        return cls(**found)
