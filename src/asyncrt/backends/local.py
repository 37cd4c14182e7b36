"""Workers as subprocesses of this process, on its own interpreter."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import anyio
import cloudpickle

import asyncrt
from asyncrt.backends.base import ByteStream, Receiver, WorkerExit
from asyncrt.backends.cgroup import MemoryGroup, make_memory_group
from asyncrt.errors import ConfigError, WorkerStartError
from asyncrt.options import PoolSettings
from asyncrt.pack import worker_program
from asyncrt.threads import run_in_thread
from asyncrt.worker.modules import remove
from asyncrt.worker.protocol import Buffer
from asyncrt.worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

_TAIL_BYTES: Final = 4096
_END_SECONDS: Final = 5.0
_READS_AT_ONCE: Final = 4
_SOCKET_BYTES: Final = 1 << 17  # less than a full socket buffer gives at once
_SEGMENTS_AT_ONCE: Final = 64
_LONGEST_SOCKET_PATH: Final = 100  # 104 on macOS, 108 on Linux, with the final zero


class LocalBackend:
    """Starts workers on this machine. Needs nothing and takes no configuration.

    Args:
        spawn: How workers make the processes that run calls: ``"fork"``, or ``"exec"`` where a fork
            is unsafe; ``None`` chooses by the platform.
        sys_path: Where workers look for modules that do not travel; ``None``: where this process
            does. Another value shows what a function needs on machines that are not this one.
    """

    name = "local"

    def __init__(self, *, spawn: str | None = None, sys_path: Sequence[str] | None = None) -> None:
        self._spawn = spawn or ("exec" if sys.platform == "darwin" else "fork")
        self._sys_path = sys_path

    @asynccontextmanager
    async def open_pool(self, settings: PoolSettings, *, token: bytes) -> AsyncIterator[LocalPool]:
        """Open a pool. See ``Backend.open_pool``."""
        if settings.runtime is not None:
            raise ConfigError(
                f"runtime={settings.runtime!r}: the local backend runs on this interpreter, "
                "an image needs backend='docker' or 'k8s'",
                key="runtime",
            )
        directory = Path(tempfile.mkdtemp(prefix="asyncrt-", dir=_short_directory()))
        program = directory / "worker.pyz"
        pool = LocalPool(settings, token, directory, program, self._spawn, self._sys_path)
        try:
            await run_in_thread(lambda: program.write_bytes(worker_program()))
            yield pool
        finally:
            with anyio.CancelScope(shield=True):
                await pool.aclose()
            _remove(program, directory)


class LocalPool:
    """The workers of one executor on this machine."""

    def __init__(
        self,
        settings: PoolSettings,
        token: bytes,
        directory: Path,
        program: Path,
        spawn: str,
        sys_path: Sequence[str] | None,
    ) -> None:
        self._settings = settings
        self._token = token
        self._directory = directory
        self._program = program
        self._spawn = spawn
        self._sys_path = sys_path
        self._numbers = itertools.count(1)
        self._workers: set[LocalWorker] = set()

    @property
    def default_max_workers(self) -> int:
        """The CPUs that this process may use, shared out to the slots."""
        return max(1, available_cpus() // self._settings.slots)

    async def start_worker(self) -> LocalWorker:
        """Start a subprocess. It can be connected to at once: its socket exists already."""
        number = next(self._numbers)
        path = self._directory / f"{number}.sock"
        sys_path = sys.path if self._sys_path is None else self._sys_path
        group = make_memory_group(self._settings.memory_bytes, f"{self._directory.name}-{number}")
        try:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise WorkerStartError(f"a worker needs a socket: {error}") from error
        try:
            listener.bind(str(path))
            listener.listen(8)
            settings = WorkerSettings(
                token=self._token,
                asyncrt_version=asyncrt.__version__,
                cloudpickle_version=cloudpickle.__version__,
                listen_fd=listener.fileno(),
                slots=self._settings.slots,
                memory_bytes=self._settings.memory_bytes,
                memory_enforced=group is not None,
                recycle_bytes=self._settings.recycle_limit_bytes(),
                heartbeat_interval=self._settings.heartbeat_interval,
                orphan_timeout=self._settings.orphan_timeout,
                spawn=self._spawn,
                lifeline=True,
                echo=False,
                sys_path=tuple(entry or str(Path.cwd()) for entry in sys_path),
                modules=str(path.with_suffix(".modules")),
                remove=(str(path),),
                remove_last=(str(self._program), str(self._directory)),
            )
            process = await self._start_process(listener.fileno(), settings, group)
        except OSError as error:
            raise WorkerStartError(f"cannot start {sys.executable}: {error}") from error
        finally:
            listener.close()
        worker = LocalWorker(f"local-{os.getpid()}-{number}", process, path, group)
        self._workers.add(worker)
        worker.on_end(lambda: self._workers.discard(worker))
        return worker

    async def _start_process(
        self, listen_fd: int, settings: WorkerSettings, group: MemoryGroup | None
    ) -> subprocess.Popen[bytes]:
        enter = [] if group is None else group.enter_command()
        process = await run_in_thread(
            lambda: subprocess.Popen(
                [*enter, sys.executable, str(self._program), "serve", "-"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, **self._settings.env},
                pass_fds=(listen_fd,),
                start_new_session=True,
                bufsize=0,
            ),
        )
        stdin = process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # how it ended is told by its exit
            stdin.write(settings.to_json().encode() + b"\n")
        return process

    async def aclose(self) -> None:
        """End all workers, with what they run; return when they are gone."""
        workers = tuple(self._workers)
        for worker in workers:
            worker.hang_up()
        with anyio.move_on_after(_END_SECONDS):
            for worker in workers:
                await worker.wait_exit()
        for worker in workers:
            if not worker.ended:
                logger.warning("%s did not end within %s s: killed", worker.name, _END_SECONDS)
                worker.kill()
                await worker.wait_exit()


class LocalWorker:
    """One subprocess."""

    def __init__(
        self,
        name: str,
        process: subprocess.Popen[bytes],
        path: Path,
        group: MemoryGroup | None,
    ) -> None:
        self.name = name
        self._process = process
        self._path = path
        self._group = group
        self._tail = b""
        self._hung_up = False
        self._exit: asyncio.Future[WorkerExit] = asyncio.get_running_loop().create_future()
        self._watch()
        _workers.add(self)

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._exit.done()

    @property
    def pid(self) -> int:
        """The process, which leads a session of its own."""
        return self._process.pid

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call something when the process is gone."""
        self._exit.add_done_callback(lambda _: callback())

    def _watch(self) -> None:
        """Read what the worker itself writes; its end is the end of the process."""
        loop = asyncio.get_running_loop()
        stderr = self._process.stderr
        assert stderr is not None
        os.set_blocking(stderr.fileno(), False)
        loop.add_reader(stderr.fileno(), self._on_stderr)

    def _on_stderr(self) -> None:
        stderr = self._process.stderr
        assert stderr is not None
        try:
            data = os.read(stderr.fileno(), 1 << 16)
        except BlockingIOError:
            return
        if data:
            self._tail = (self._tail + data)[-_TAIL_BYTES:]
            return
        asyncio.get_running_loop().remove_reader(stderr.fileno())
        self._reap()

    def _reap(self) -> None:
        """Collect the exit code. Everybody who held its standard error is gone or about to be."""
        code = self._process.poll()
        if code is None:
            asyncio.get_running_loop().call_later(0.002, self._reap)
            return
        for pipe in (self._process.stdin, self._process.stderr):
            if pipe is not None:
                pipe.close()
        if self._group is not None:
            self._group.remove()
        self._path.unlink(missing_ok=True)
        remove(str(self._path.with_suffix(".modules")))  # if its server was killed as well
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
        self._exit.set_result(
            WorkerExit(
                reason=f"the worker process {self._process.pid} ended with {how}",
                exit_code=code,
                log_tail=self._tail.decode("utf-8", "replace"),
                expected=self._hung_up or code == 0,
            )
        )

    async def connect(self, receiver: Receiver) -> ByteStream:
        """Connect to the worker's socket. See ``Worker.connect``."""
        if self.ended:
            raise _start_error(self._exit.result())
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise ConnectionError(f"{self.name} cannot be connected to: {error}") from error
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, str(self._path))
        except OSError as error:
            sock.close()
            raise ConnectionError(f"{self.name} cannot be connected to: {error}") from error
        except BaseException:
            sock.close()
            raise
        return _SocketStream(sock, receiver)

    async def wait_exit(self) -> WorkerExit:
        """Return when the process is gone."""
        return await asyncio.shield(self._exit)

    def hang_up(self) -> None:
        """Let the worker end at once: the end of its standard input means that."""
        self._hung_up = True
        stdin = self._process.stdin
        if stdin is not None and not self.ended:
            stdin.close()

    def let_go(self) -> None:
        """Close this process's copies of the pipes: it is a fork of the one that has the worker."""
        for pipe in (self._process.stdin, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def kill(self) -> None:
        """Kill the worker's parent; its server notices and kills the children."""
        self._hung_up = True
        if not self.ended:
            self._process.kill()


# Its standard input is a worker's lifeline: a fork that kept it open would keep the worker alive
# when this process has hung up, or was killed.
_workers: weakref.WeakSet[LocalWorker] = weakref.WeakSet()


def _let_go_of_workers() -> None:
    for worker in tuple(_workers):
        worker.let_go()


os.register_at_fork(after_in_child=_let_go_of_workers)


class _SocketStream:
    """A socket as a ``ByteStream``: read straight into the receiver's memory, written in place.

    asyncio's own transports would copy each piece of a large body up to three times (Python 3.11).
    """

    def __init__(self, sock: socket.socket, receiver: Receiver) -> None:
        self._socket = sock
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        self._writing: deque[memoryview] = deque()
        self._closed = False
        self._waits = False
        self._loop.add_reader(sock.fileno(), self._on_readable)

    def _on_readable(self) -> None:
        try:
            for _ in range(_READS_AT_ONCE):
                if self._closed:
                    return
                target = self._receiver.get_buffer()
                room = target.nbytes
                size = self._socket.recv_into(target)
                del target
                if not size:
                    self._end(None)
                    return
                self._receiver.received(size)
                if size < min(room, _SOCKET_BYTES):
                    return  # that was all: asking again costs a system call and an exception
        except BlockingIOError:
            return
        except OSError as error:
            self._end(error)

    def write(self, segments: Sequence[Buffer]) -> bool:
        if self._closed:
            return False
        self._writing.extend(memoryview(segment).cast("B") for segment in segments)
        if not self._waits:
            self._flush()
        return not self._writing

    def _flush(self) -> None:
        writing = self._writing
        try:
            while writing:
                sent = self._socket.sendmsg(list(itertools.islice(writing, _SEGMENTS_AT_ONCE)))
                while writing and sent >= writing[0].nbytes:
                    sent -= writing.popleft().nbytes
                if sent:
                    writing[0] = writing[0][sent:]
        except BlockingIOError:
            if not self._waits:
                self._waits = True
                self._loop.add_writer(self._socket.fileno(), self._on_writable)
        except OSError as error:
            self._loop.call_soon(self._end, error)

    def _on_writable(self) -> None:
        self._flush()
        if not self._writing and not self._closed:
            self._waits = False
            self._loop.remove_writer(self._socket.fileno())
            self._receiver.writable()

    def close(self) -> None:
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
            self._writing.clear()
            self._receiver.closed(error)


def _remove(program: Path, directory: Path) -> None:
    program.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a worker that was killed has left its socket and modules
        shutil.rmtree(directory)


def available_cpus() -> int:
    """Return the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start_error(end: WorkerExit) -> WorkerStartError:
    tail = f":\n{end.log_tail}" if end.log_tail else ""
    return WorkerStartError(f"{end.reason}{tail}", log_tail=end.log_tail, exit_code=end.exit_code)


def _short_directory() -> str | None:
    """Return a directory whose sockets have paths that the system takes; ``None``: the default."""
    usual = tempfile.gettempdir()
    return None if len(usual) + 40 < _LONGEST_SOCKET_PATH else "/tmp"  # noqa: S108 - mkdtemp is private
