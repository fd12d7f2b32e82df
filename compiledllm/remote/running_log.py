"""The requests that have begun to run, written by the engine and read by the client after a crash.

Both processes hold the same unnamed file, so that a note costs the engine one write and the client
nothing.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable

_MAX_BYTES = 2**20  # beyond this size the file is rewritten without finished requests


class RunningLog:
    """fd: the descriptor of the file; `close` closes it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._running: dict[str, None] = {}
        self._size = 0

    @classmethod
    def create(cls) -> RunningLog:
        with contextlib.suppress(AttributeError, OSError):  # Linux only: a file in memory
            return cls(os.memfd_create("running"))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def note(self, request_ids: Iterable[str]) -> None:
        """Note that these requests begin to run. A failing write only loses the note."""
        new = dict.fromkeys(request_ids)
        self._running |= new
        with contextlib.suppress(OSError):
            if self._size > _MAX_BYTES:
                os.ftruncate(self.fd, 0)
                os.lseek(self.fd, 0, os.SEEK_SET)
                self._size, new = 0, self._running
            self._size += os.write(self.fd, b"".join(_line(name) for name in new))

    def forget(self, request_id: str) -> None:
        self._running.pop(request_id, None)

    def read(self) -> set[str]:
        """The ids of all noted requests, some finished. The writer's file offset is kept."""
        with contextlib.suppress(OSError):
            raw = os.pread(self.fd, os.fstat(self.fd).st_size, 0)
            return set(raw.decode(errors="replace").split("\0"))
        return set()

    def close(self) -> None:
        os.close(self.fd)


def _line(request_id: str) -> bytes:
    return request_id.encode(errors="replace") + b"\0"
