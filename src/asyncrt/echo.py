"""What calls print, shown where the client runs."""

from __future__ import annotations

import codecs
import logging
import sys

logger = logging.getLogger(__name__)


class Echo:
    """Writes to this process's standard output and error, and never fails for it.

    What cannot be shown there (another encoding, a closed stream, none at all) is told once and
    dropped: it is in ``call.logs()``.
    """

    def __init__(self) -> None:
        self._decoders: dict[tuple[str, str], codecs.IncrementalDecoder] = {}
        self._is_broken = False

    def write(self, worker: str, name: str, text: bytes) -> None:
        """Write what a worker's call printed to ``"out"`` or ``"err"``.

        Characters may come in two pieces, so each stream of each worker has a decoder.
        """
        decoder = self._decoders.get((worker, name))
        if decoder is None:
            make = codecs.getincrementaldecoder("utf-8")
            decoder = self._decoders[worker, name] = make("replace")
        stream = sys.stdout if name == "out" else sys.stderr
        if self._is_broken or stream is None:  # as in a process without a console
            return
        try:
            encoding = getattr(stream, "encoding", None) or "utf-8"
            shown = decoder.decode(text).encode(encoding, "backslashreplace").decode(encoding)
            stream.write(shown)
            stream.flush()
        except (OSError, ValueError, LookupError) as error:
            self._is_broken = True
            logger.warning("what calls print is not shown any more: %s", error)

    def forget(self, worker: str) -> None:
        """Let go of what is kept for a worker."""
        for name in ("out", "err"):
            self._decoders.pop((worker, name), None)
