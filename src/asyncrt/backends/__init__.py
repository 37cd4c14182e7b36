"""Where workers run. A backend starts and ends them, and opens a byte stream to each."""

from asyncrt.backends.base import (
    Backend,
    ByteStream,
    Receiver,
    Worker,
    WorkerExit,
    WorkerPoolHandle,
)

__all__ = ["Backend", "ByteStream", "Receiver", "Worker", "WorkerExit", "WorkerPoolHandle"]
