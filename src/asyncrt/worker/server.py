"""The process that makes children: single-threaded, with cloudpickle loaded, and nothing else.

Forking it costs milliseconds, and the children share its memory. It never runs user code. For
functions whose import is expensive it forks a *template*: a copy of itself that loads the function
and then serves in its place. A function was loaded by a child before it is given to a template, and
a template that died, or that has more than one thread after loading (a fork would copy locks that
nobody holds), is simply not used.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from asyncrt.errors import SerializationError
from asyncrt.worker.channel import Channel, SharedMemory, close_descriptors
from asyncrt.worker.modules import remove
from asyncrt.worker.protocol import Frame, Kind

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_MAX_GENERATIONS = 8  # of processes that leave processes


class Server:
    """Forks (or, where fork is unsafe, executes) children when the parent asks, and reaps them."""

    def __init__(
        self, channel: Channel, *, spawn: str, loaded: dict[str, Any] | None = None
    ) -> None:
        self._channel = channel
        self._spawn = spawn
        self._loaded = loaded or {}
        self._running: dict[int, subprocess.Popen[bytes] | None] = {}
        self._children: dict[int, list[int]] = {}
        self._wakeup_read, self._wakeup_write = os.pipe()
        for fd in (self._wakeup_read, self._wakeup_write):
            os.set_blocking(fd, False)

    def serve(self) -> None:
        """Serve until the parent hangs up, then kill what is left."""
        _adopt_strays()
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)
        self._channel.send(Kind.READY, {"pid": os.getpid(), "threads": count_threads()})
        try:
            while self._serve_once():
                pass
        finally:
            for pid in self._running:
                # A template kills its own children, which are in groups of their own, and ends.
                kill_group(pid, signal.SIGKILL if pid in self._children else signal.SIGTERM)
            for pid in self._running:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
            self._running.clear()
            self._kill_strays()

    def _serve_once(self) -> bool:
        channel_fd = self._channel.fileno()
        readable, _, _ = select.select([channel_fd, self._wakeup_read], [], [])
        if self._wakeup_read in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wakeup_read, 4096)
            self._reap()
        if channel_fd in readable:
            received = self._channel.receive()
            if received is None:
                return False
            for frame, descriptors in received:
                self._handle(frame, descriptors)
        return True

    def _handle(self, frame: Frame, descriptors: list[int]) -> None:
        header = frame.header
        if frame.kind == Kind.SPAWN:
            pid = self._spawn_child(descriptors, header["mark"])
            self._children[pid] = header["child"]
            self._channel.send(Kind.SPAWNED, {"child": header["child"], "pid": pid})
        elif frame.kind == Kind.KILL:
            for pid, child in self._children.items():
                if child == header["child"]:
                    kill_group(pid)
        elif frame.kind == Kind.TEMPLATE:
            self._fork_template(descriptors[0], header["function"], frame)
        close_descriptors(descriptors)

    def _spawn_child(self, descriptors: Sequence[int], mark: str) -> int:
        if self._spawn == "exec":
            return self._execute_child(descriptors, mark)
        pid = os.fork()
        if not pid:
            self._become_child(descriptors, mark)
        _set_group(pid)
        self._running[pid] = None
        return pid

    def _become_child(self, descriptors: Sequence[int], mark: str) -> NoReturn:
        status = 1
        try:
            self._leave_server()
            control, tokens, board, out, err = descriptors
            os.dup2(out, 1)
            os.dup2(err, 2)
            close_descriptors((out, err))
            _become_victim()
            _seed()
            run_child_on(control, tokens, board, mark, self._loaded)
            status = 0
        except (BrokenPipeError, ConnectionResetError):
            status = 0  # the parent is gone, and told nobody to wait for us
        finally:
            os._exit(status)

    def _leave_server(self) -> None:
        """Undo, in a forked process, what only the server needs."""
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._channel.close()
        close_descriptors((self._wakeup_read, self._wakeup_write))

    def _execute_child(self, descriptors: Sequence[int], mark: str) -> int:
        control, tokens, board, out, err = descriptors
        process = subprocess.Popen(
            [
                sys.executable,
                sys.argv[0],
                "child",
                *(str(fd) for fd in (control, tokens, board)),
                mark,
                json.dumps(sys.path[1:]),
            ],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            pass_fds=(control, tokens, board),
            process_group=0,
        )
        self._running[process.pid] = process
        return process.pid

    def _fork_template(self, control: int, function: str, frame: Frame) -> None:
        pid = os.fork()
        if pid:
            _set_group(pid)
            self._running[pid] = None
            return
        status = 1
        try:
            self._leave_server()
            from asyncrt.worker.child import load_function  # noqa: PLC0415 - after the fork server started

            units = frame.header["units"]
            loaded = {**self._loaded, function: load_function(frame.body, units)}
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            server = Server(Channel(socket.socket(fileno=control)), spawn="fork", loaded=loaded)
            server.serve()
            status = 0
        except (SerializationError, BrokenPipeError):
            status = 1  # the parent sees the channel close, and goes on with the plain server
        finally:
            os._exit(status)

    def _kill_strays(self) -> None:
        """Kill what dead children left in sessions of their own, and what that leaves."""
        for _ in range(_MAX_GENERATIONS):
            strays = _find_strays(self._running)
            for pid in strays:
                kill_group(pid)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
            if not strays:
                return

    def _reap(self) -> None:
        for pid, process in list(self._running.items()):
            if process is not None:
                code = process.poll()
                if code is None:
                    continue
            else:
                done, status = os.waitpid(pid, os.WNOHANG)
                if not done:
                    continue
                code = os.waitstatus_to_exitcode(status)
            kill_group(pid)  # what the user's code started and left
            del self._running[pid]
            self._kill_strays()
            child = self._children.pop(pid, None)
            if child is not None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self._channel.send(Kind.EXITED, {"child": child, "code": code})


def run_child_on(control: int, tokens: int, board: int, mark: str, loaded: dict[str, Any]) -> None:
    """Run calls in this process on descriptors that the parent made."""
    from asyncrt.worker.child import BOARD_BYTES, run_child  # noqa: PLC0415 - see run_server

    sock = socket.socket(fileno=control)
    memory = SharedMemory(BOARD_BYTES, board)
    run_child(Channel(sock), tokens, memory, mark=mark, loaded=loaded)


def run_server(sock: socket.socket, *, spawn: str, modules: str) -> None:
    """Be the server until the parent hangs up; then remove the directory of modules.

    The parent removes it, too, but the parent can be killed.

    The imports are here, since the parent forks this process from itself and never needs them.
    """
    try:
        import cloudpickle  # noqa: F401, PLC0415

        import asyncrt.worker.child  # noqa: F401, PLC0415
    except ImportError:  # another Python than the client's, as the parent tells: no call will come
        sock.recv(1)
        return
    if sys.platform.startswith("linux"):
        import ctypes  # noqa: F401, PLC0415 - for each child, see _become_victim
    gc.freeze()  # a collection in a child would copy every page that it shares with this process
    try:
        Server(Channel(sock), spawn=spawn).serve()
    finally:
        remove(modules)


def kill_group(pid: int, number: int = signal.SIGKILL) -> None:
    """Kill a process, also one that has left its group, and what it started, if they are there."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, number)


def _adopt_strays() -> None:
    """Become the parent of what dead children leave, in whatever session it is."""
    if sys.platform.startswith("linux"):
        import ctypes  # noqa: PLC0415 - Linux only

        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _find_strays(known: Collection[int]) -> list[int]:
    """Return the children of this process that it has not started itself."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return [int(pid) for pid in file.read().split() if int(pid) not in known]
    except OSError:
        return []


def _set_group(pid: int) -> None:
    """Give a forked process a group of its own. It does so itself too: whoever comes first."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)


def count_threads() -> int:
    """Return how many threads this process has; 1 where that is not known."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 1


def _become_victim() -> None:
    """Die with the server; be the first that a short memory kills, so that the parent can tell."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes  # noqa: PLC0415 - Linux only

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
        file.write(b"1000")


def _seed() -> None:
    """Give each fork its own random numbers: ``random`` does that itself, numpy does not."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
