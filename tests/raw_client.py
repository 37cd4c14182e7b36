"""A small client that starts a real worker process from the packed zipapp and drives it by hand."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import cloudpickle
import psutil

from asyncrt.worker.authentication import new_nonce, prove, verify
from asyncrt.worker.payload import decode, encode
from asyncrt.worker.protocol import Buffer, Decoder, Frame, Kind, Limits, Outbox, byte_length
from asyncrt.worker.records import LENGTH, Outcome, iterate_records, unpack_raised
from asyncrt.worker.settings import WorkerSettings

SECONDS: Final = 30.0  # for anything to happen; only a broken worker needs them


def payload_of(value: Any, *, base: int = 0) -> list[Buffer]:
    return encode(value, cloudpickle.Pickler, base=base)


def pack_arguments(arguments: Sequence[Any]) -> list[Buffer]:
    """Return the body of a chunk."""
    body: list[Buffer] = []
    at = 0
    for value in arguments:
        at += LENGTH.size
        segments = payload_of(value, base=at)
        size = byte_length(segments)
        body += [LENGTH.pack(size), *segments]
        at += size
    return body


class Report:
    """What became of the calls of a chunk, by position."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.values: dict[int, Any] = {}
        self.raised: dict[int, dict[str, Any]] = {}
        self.failed: dict[int, dict[str, Any]] = {}
        self.revoked: set[int] = set()
        self.times: dict[int, tuple[float, float]] = {}

    def revoke(self, positions: range) -> None:
        assert not self.positions & set(positions), "a second outcome"
        self.revoked |= set(positions)

    def add(self, positions: range, body: memoryview, records: Iterator[Any]) -> None:
        for position in positions:
            started, ended, outcome, begin, end = next(records)
            assert position not in self.positions, f"a second outcome of call {position}"
            self.times[position] = started, ended
            if outcome == Outcome.SUCCESS:
                self.values[position] = decode(body, begin, end)
            elif outcome == Outcome.RAISED:
                self.raised[position] = unpack_raised(body[begin:end])[0]
            else:
                self.failed[position] = _json(body[begin:end])

    @property
    def positions(self) -> set[int]:
        return {*self.values, *self.raised, *self.failed, *self.revoked}

    @property
    def done(self) -> bool:
        return self.positions == set(range(self.count))


def _json(view: memoryview) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(bytes(view))
    return found


class RawClient:
    """One connection to a worker. Frames that are not asked for are kept in ``inbox``."""

    def __init__(
        self, address: Path | tuple[str, int], token: bytes, counts: dict[int, int]
    ) -> None:
        family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(SECONDS)
        try:
            self.socket.connect(str(address) if isinstance(address, Path) else address)
        except OSError:
            self.socket.close()
            raise
        self.token = token
        self.inbox: deque[Frame] = deque()
        self.received = 0
        self.counts = counts  # of the calls of each chunk that any client sent
        self.reports: dict[int, Report] = {}
        self.hello: dict[str, Any] = {}
        self._taken: set[int] = set()
        self._decoder = Decoder(Limits())

    # -- frames -----------------------------------------------------------------------------------

    def send(self, kind: int, header: dict[str, Any], body: Sequence[Buffer] = ()) -> None:
        outbox = Outbox()
        outbox.put(kind, header, body)
        while outbox:
            for segment in outbox.take():
                self.socket.sendall(segment)

    def read(self) -> Frame:
        """Return the next frame.

        Raises:
            EOFError: The worker closed the connection.
        """
        while not self.inbox:
            try:
                size = self.socket.recv_into(self._decoder.get_buffer())
            except ConnectionResetError:
                size = 0
            if not size:
                raise EOFError
            self.inbox.extend(self._decoder.received(size))
        frame = self.inbox.popleft()
        self.received = max(self.received, frame.header.get("sequence", 0))
        return frame

    def wait_for(self, *kinds: int) -> Frame:
        """Return the next frame of some kind; what comes before it stays in the inbox."""
        others: list[Frame] = []
        while True:
            frame = self.read()
            if frame.kind in kinds:
                self.inbox.extendleft(reversed(others))
                return frame
            others.append(frame)

    def read_to_end(self) -> list[Frame]:
        """Return all that comes until the worker closes the connection."""
        frames = []
        with contextlib.suppress(EOFError):
            while True:
                frames.append(self.read())
        return frames

    def logs(self) -> list[Frame]:
        """Take the logs out of the inbox."""
        found = [frame for frame in self.inbox if frame.kind == Kind.LOG]
        self.inbox = deque(frame for frame in self.inbox if frame.kind != Kind.LOG)
        return found

    # -- handshake --------------------------------------------------------------------------------

    def answer(self, challenge: Frame, token: bytes) -> str:
        """Answer a challenge; return the nonce."""
        nonce = new_nonce()
        proof = prove(token, "client", challenge.header["nonce"], nonce)
        self.send(Kind.RESPONSE, {"nonce": nonce, "proof": proof})
        return nonce

    def shake_hands(self, *, sequence: int = 0) -> dict[str, Any]:
        """Authenticate and resume; return what the worker says that it has."""
        challenge = self.wait_for(Kind.CHALLENGE)
        nonce = self.answer(challenge, self.token)
        self.hello = self.wait_for(Kind.HELLO).header
        verify(self.hello["proof"], self.token, "worker", challenge.header["nonce"], nonce)
        self.send(Kind.RESUME, {"sequence": sequence})
        return self.wait_for(Kind.RESUME).header

    # -- work -------------------------------------------------------------------------------------

    def function(self, name: str, function: Callable[..., Any], **header: Any) -> None:
        self.send(Kind.FUNCTION, {"function": name, **header}, payload_of((function, {})))

    def calls(self, chunk: int, function: str, arguments: Sequence[Any], **header: Any) -> None:
        full = {
            "chunk": chunk,
            "run": "r-1",
            "function": function,
            "count": len(arguments),
            "indexes": 0,
            "attempt": 1,
            "style": "one",
            **header,
        }
        self.counts[chunk] = len(arguments)
        self.send(Kind.CALLS, full, pack_arguments(arguments))

    def report(self, chunk: int) -> Report:
        """Return what became of a chunk, when all of it is known. Keeps what it passes by."""
        others = []
        report = self._report(chunk)
        while not report.done:
            frame = self.read()
            if frame.kind in (Kind.RESULT, Kind.REVOKED):
                self._take(frame)
            else:
                others.append(frame)
        self.inbox.extendleft(reversed(others))
        return report

    def _take(self, frame: Frame) -> None:
        if frame.header["sequence"] in self._taken:
            return  # told before this connection resumed, and then again
        self._taken.add(frame.header["sequence"])
        body = memoryview(frame.body)
        parts = frame.header["parts"]
        records = iterate_records(body, sum(count for _, _, count in parts))
        for chunk, first, count in parts:
            positions = range(first, first + count)
            if frame.kind == Kind.REVOKED:
                self._report(chunk).revoke(positions)
            else:
                self._report(chunk).add(positions, body, records)

    def _report(self, chunk: int) -> Report:
        return self.reports.setdefault(chunk, Report(self.counts.get(chunk, 0)))

    def run(self, function: Callable[..., Any], *arguments: Any, **header: Any) -> Report:
        """Send a function under a new name and run one chunk of it."""
        chunk = max(self.counts, default=0) + 1000
        name = f"function-{chunk}"
        self.function(name, function)
        self.calls(chunk, name, arguments, **header)
        return self.report(chunk)

    def close(self) -> None:
        self.socket.close()


class RawWorker:
    """A worker process. Use as a context manager: at its end nothing may be left."""

    def __init__(self, program: Path, **settings: Any) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="asyncrt-test-"))
        self.path = self.directory / "sock"
        self.token = os.urandom(32)
        self.stderr = self.directory / "stderr"
        self._clients: list[RawClient] = []
        self._counts: dict[int, int] = {}
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.path))
        listener.listen(8)
        values: dict[str, Any] = {
            "lifeline": True,
            "echo": False,
            "orphan_timeout": 60.0,
            "sys_path": tuple(sys.path),
            "remove": (str(self.path),),
            **settings,
        }
        self.settings = WorkerSettings(
            self.token, "0.0.1", cloudpickle.__version__, listen_fd=listener.fileno(), **values
        )
        with listener, self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(program), "serve", "-"],
                stdin=subprocess.PIPE,
                stderr=stderr,
                pass_fds=(listener.fileno(),),
                start_new_session=True,
                bufsize=0,
            )
        assert self.process.stdin is not None
        self.stdin = self.process.stdin
        self.stdin.write(self.settings.to_json().encode() + b"\n")

    def open_connection(self) -> RawClient:
        client = RawClient(self.path, self.token, self._counts)
        self._clients.append(client)
        return client

    def connect(self, *, sequence: int = 0) -> RawClient:
        client = self.open_connection()
        client.shake_hands(sequence=sequence)
        return client

    def processes(self) -> list[psutil.Process]:
        """Return what lives of the worker's session: its own processes and what calls started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and os.getsid(process.pid) == self.process.pid:
                    found.append(process)
        return found

    def server(self) -> psutil.Process:
        """Return the process that makes children."""
        (found,) = psutil.Process(self.process.pid).children()
        return found

    def wait(self) -> int:
        """Return the exit code."""
        return self.process.wait(SECONDS)

    def hang_up(self) -> None:
        """Close its standard input: its lifeline, if it has one."""
        self.stdin.close()

    def end(self) -> list[psutil.Process]:
        """End the worker however it is; return what it left, which was killed now."""
        for client in self._clients:
            client.close()
        self.hang_up()
        try:
            self.process.wait(SECONDS / 3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        left = wait_gone(self.processes())
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return left


def wait_gone(processes: Sequence[psutil.Process], seconds: float = SECONDS / 3) -> list[Any]:
    """Wait for processes to end; return those that did not."""
    end = time.monotonic() + seconds
    alive = list(processes)
    while alive and time.monotonic() < end:
        psutil.wait_procs(alive, timeout=0.02)  # a zombie whose parent is slow is gone, too
        alive = [process for process in alive if _lives(process)]
    return alive


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def running_worker(program: Path, **settings: Any) -> Iterator[RawWorker]:
    """Start a worker; at the end, whatever happened, end it and check that nothing is left."""
    worker = RawWorker(program, **settings)
    try:
        yield worker
    finally:
        left = worker.end()
        socket_left = worker.path.exists()
        told = worker.stderr.read_text("utf-8", "replace")
        shutil.rmtree(worker.directory, ignore_errors=True)
    assert not left, f"processes are left: {left}"
    assert not socket_left or worker.process.returncode < 0, "its socket is left"
    assert "Traceback" not in told, told


class Gate:
    """Lets a call wait for the test, or the test for a call: a named pipe.

    ``wait`` and ``open`` each return when the other side has come.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)

    def wait(self) -> bytes:
        with self.path.open("rb") as file:
            return file.read()

    def open(self, text: bytes = b"") -> None:
        with self.path.open("wb") as file:
            file.write(text)
