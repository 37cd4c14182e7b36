"""Entry of the zipapp.

``worker.pyz serve FILE`` serves with the settings in a file (``-``: the first line of standard
input). ``worker.pyz child ...`` is how a server starts children where fork is unsafe.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys

import asyncrt


def serve(source: str) -> int:
    """Be a worker until told to end, or until no client comes any more; return the exit code."""
    from asyncrt.worker.modules import remove  # noqa: PLC0415 - a child needs none of it
    from asyncrt.worker.parent import Parent  # noqa: PLC0415
    from asyncrt.worker.settings import WorkerSettings  # noqa: PLC0415

    if source == "-":
        settings = WorkerSettings.from_json(_read_line(0))
    else:
        with open(source, "rb") as file:
            settings = WorkerSettings.from_json(file.read())
    lifeline = os.dup(0) if settings.lifeline else None
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.path[1:] = settings.sys_path or sys.path[1:]
    find_client()
    if not settings.modules:
        settings = settings._replace(modules=_new_directory())
    if settings.listen_fd >= 0:
        listener = socket.socket(fileno=settings.listen_fd)
        os.set_inheritable(settings.listen_fd, False)
    else:
        listener = socket.create_server(("127.0.0.1", settings.listen_port))
    parent = Parent(settings, listener)
    try:
        return parent.run(lifeline=lifeline)
    finally:
        remove(settings.modules)  # the server did, if it could
        for path in settings.remove + (settings.remove_last if parent.abandoned else ()):
            with contextlib.suppress(OSError):
                if os.path.isdir(path):
                    os.rmdir(path)  # the last worker of a pool succeeds
                else:
                    os.unlink(path)


def find_client() -> None:
    """Let ``import asyncrt.executor`` work where this version of asyncrt is installed as well."""
    for entry in sys.path[1:]:
        package = os.path.join(entry, "asyncrt")
        with contextlib.suppress(OSError, ValueError):
            with open(os.path.join(package, "__init__.py"), encoding="utf-8") as file:
                installed = f'__version__ = "{asyncrt.__version__}"' in file.read()
            if installed:
                asyncrt.__path__.append(package)
                return


def _new_directory() -> str:
    """Return a path that nobody can guess; whoever needs the directory makes it."""
    # Not tempfile.gettempdir(), which fails where nothing can be written, if needed or not.
    parent = os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - its name is a secret, its mode 0700
    return os.path.join(parent, f"asyncrt-modules-{os.urandom(8).hex()}")


def _read_line(fd: int) -> bytes:
    """Read up to a newline and not a byte further, unlike ``sys.stdin``."""
    line = bytearray()
    while (byte := os.read(fd, 1)) not in (b"\n", b""):
        line += byte
    return bytes(line)


def child(arguments: list[str]) -> None:
    """Run calls in this freshly executed process."""
    from asyncrt.worker.server import run_child_on  # noqa: PLC0415 - see serve

    control, tokens, board = (int(number) for number in arguments[:3])
    sys.path[1:] = json.loads(arguments[4])
    find_client()
    status = 1
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            run_child_on(control, tokens, board, arguments[3], {})
        status = 0
    finally:
        os._exit(status)  # like a forked child, which no thread of the user's code keeps alive


if __name__ == "__main__":
    if sys.argv[1] == "child":
        child(sys.argv[2:])
    else:
        sys.exit(serve(sys.argv[2]))
