"""The engine's end of the connection: reads messages in a thread, and reports failures."""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from compiledllm.remote.crash_records import write_crash_record
from compiledllm.remote.wire import Alive, Failed, FromEngine, Ping, frame, receive

_FAREWELL_S = 5  # time limit for a failing process to report its failure
_MAX_ERROR_LENGTH = 2000


class Lifeline:
    """The connection to the client, read by a thread as long as the process lives.

    deliver: called with each message in that thread; by default it puts the message into `inbox`.
    The engine's loop calls `turn` in every iteration. Until the first `turn`, the process is
    loading.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.deliver: Callable[[Any], None] = self.inbox.put
        self.crash_folder: Path | None = None
        self._connection = connection
        self._sending = threading.Lock()
        self._is_looping = False
        # Time of the first ping since the loop's last turn, in seconds of `time.monotonic`.
        self._first_ping_at: float | None = None

    def start(self) -> None:
        threading.excepthook = self._on_thread_failure
        threading.Thread(target=self._read, name="frames", daemon=True).start()

    def turn(self) -> None:
        """Note that the engine's loop has started an iteration."""
        self._is_looping, self._first_ping_at = True, None

    def send(self, message: FromEngine) -> None:
        raw = frame(message)
        try:
            with self._sending:
                self._connection.sendall(raw)
        except OSError:
            os._exit(0)  # the client is gone

    def _read(self) -> None:
        while (message := receive(self._connection)) is not None:
            if isinstance(message, Ping):
                self.send(Alive(self._loop_silence_s()))
            self.deliver(message)
        os._exit(0)  # the client is gone

    def _loop_silence_s(self) -> float:
        now, pinged_at = time.monotonic(), self._first_ping_at
        if pinged_at is not None:
            return now - pinged_at
        self._first_ping_at = now if self._is_looping else None
        return 0.0

    def _on_thread_failure(self, failed: threading.ExceptHookArgs) -> None:
        thread = failed.thread.name if failed.thread else "?"
        self.fail(failed.exc_value or failed.exc_type(), [], {"thread": thread})

    def fail(
        self, error: BaseException, blamed: Sequence[str], details: dict[str, Any]
    ) -> NoReturn:
        """Record a failure, tell the client and exit, in any thread and even if recording fails.

        blamed: ids of the requests that may be the cause. details: more fields of the crash record.
        """
        signal.alarm(_FAREWELL_S)  # ends the process if reporting blocks
        is_recorded = False
        try:
            traceback.print_exception(error)
            text = f"{type(error).__name__}: {error}"[:_MAX_ERROR_LENGTH]
            if self.crash_folder is not None:
                trace = "".join(traceback.format_exception(error))
                record = {"error": text, **details, "traceback": trace}
                is_recorded = write_crash_record(self.crash_folder, record) is not None
            self.send(Failed(text, blamed=list(blamed), is_recorded=is_recorded))
        finally:
            os._exit(1)
