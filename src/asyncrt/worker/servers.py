"""The servers that a parent has: the one that it forked, and perhaps a template beside it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from asyncrt.worker.channel import Channel
from asyncrt.worker.protocol import Buffer, Frame, Kind
from asyncrt.worker.server import run_server

_END_SECONDS: Final = 2.0
_NOTHING: Final[Mapping[str, str]] = {}


class ServerProcess:
    """A server, or a template that serves in its place and has a function loaded."""

    def __init__(
        self,
        channel: Channel,
        pid: int,
        function: str | None = None,
        units: Mapping[str, str] = _NOTHING,
    ) -> None:
        self.channel = channel
        self.pid = pid
        self.function = function
        self.units = units
        self.ready = False


class Servers:
    """Starts servers, chooses one for each new child, ends them.

    Args:
        spawn: ``"fork"`` or ``"exec"``, see ``WorkerSettings``.
        modules: Directory that the server removes at its end.
        watch: Called with a server's channel and what to call when it is readable.
        unwatch: Called with a channel that is about to be closed.
        on_frame: Called with what a server says of its children.
        on_template_lost: Called with the channel of a template that died.
    """

    def __init__(
        self,
        *,
        spawn: str,
        modules: str,
        watch: Callable[[Any, Callable[[], Any]], None],
        unwatch: Callable[[Any], None],
        on_frame: Callable[[Frame], None],
        on_template_lost: Callable[[Channel], None],
    ) -> None:
        self._spawn = spawn
        self._modules = modules
        self._watch = watch
        self._unwatch = unwatch
        self._on_frame = on_frame
        self._on_template_lost = on_template_lost
        self._template: ServerProcess | None = None
        self._tried: set[str] = set()  # functions that a template was made for
        self.lost = False  # the server is gone, and its children with it

    def start(self, *, leave: Sequence[socket.socket], leave_fds: Sequence[int]) -> None:
        """Fork the server. What it must not hold open is named."""
        mine, its = socket.socketpair()
        pid = os.fork()
        if not pid:
            self._be_server(mine, its, leave, leave_fds)
        its.close()
        server = self._server = ServerProcess(Channel(mine), pid)
        self._watch(server.channel, lambda: self._on_readable(server))

    def _be_server(
        self,
        mine: socket.socket,
        its: socket.socket,
        leave: Sequence[socket.socket],
        leave_fds: Sequence[int],
    ) -> None:
        status = 1
        try:
            for sock in (mine, *leave):
                sock.close()
            for fd in leave_fds:
                os.close(fd)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            run_server(its, spawn=self._spawn, modules=self._modules)
            status = 0
        finally:
            os._exit(status)

    def choose(
        self,
        function: str | None,
        packed: Buffer | None,
        units: Mapping[str, str],
        in_use: Callable[[Channel], bool],
    ) -> ServerProcess:
        """Return who forks the next child of a slot: a template that has its function, if any.

        Args:
            function: What the slot's last child ran; ``None`` if it is its first one.
            packed: That function, if it is still known.
            units: Directories of the units that it needs: a child has unpacked them.
            in_use: Tells whether a slot's child was made by a server: it would die with it.
        """
        template = self._template
        if template is not None and template.ready and template.function == function:
            return template
        if function is not None and packed is not None and function not in self._tried:
            self._start_template(function, packed, units, in_use)
        return self._server

    def _start_template(
        self,
        function: str,
        packed: Buffer,
        units: Mapping[str, str],
        in_use: Callable[[Channel], bool],
    ) -> None:
        """Let a copy of the server load a function, for the children that come after."""
        if self._spawn != "fork":
            return
        if self._template is not None:
            if in_use(self._template.channel):
                return
            self._close(self._template)
        self._tried.add(function)
        mine, its = socket.socketpair()
        with its, contextlib.suppress(OSError):
            note = {"function": function, "units": units}
            self._server.channel.send(Kind.TEMPLATE, note, [packed], [its.fileno()])
        template = self._template = ServerProcess(Channel(mine), 0, function, units)
        self._watch(template.channel, lambda: self._on_readable(template))

    def _on_readable(self, server: ServerProcess) -> None:
        received = server.channel.receive()
        if received is None:
            self._close(server)
            if server is self._server:
                self.lost = True
            else:
                self._on_template_lost(server.channel)
            return
        for frame, _ in received:
            if frame.kind != Kind.READY:
                self._on_frame(frame)
                continue
            server.ready = frame.header["threads"] == 1
            if not server.ready and server is not self._server:
                self._close(server)
                return

    def _close(self, server: ServerProcess) -> None:
        self._unwatch(server.channel)
        server.channel.close()
        if server is self._template:
            self._template = None

    def close(self) -> None:
        """End all servers, which end their children first."""
        for server in (self._template, self._server):
            if server is not None:
                self._close(server)
        _wait_or_kill(self._server.pid)


def _wait_or_kill(pid: int) -> None:
    """Wait for the server, which has nothing to do that could take long."""
    end = time.monotonic() + _END_SECONDS
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < end:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
