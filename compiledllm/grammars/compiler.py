"""Compiles untrusted grammars in a helper process before this process uses them.

`Compiler(vocabulary).text_of(params)` may be called from any thread. A crash, too much memory and a
compilation longer than COMPILE_LIMIT_S become a ValueError. There are two workers. The first gives
up on a grammar after QUICK_LIMIT_S, so that later requests do not wait long; the second then
compiles that grammar from the beginning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import threading
import weakref
from typing import Any

from compiledllm.grammars import frames
from compiledllm.grammars.library import Vocabulary, require_llguidance
from compiledllm.log import log
from compiledllm.structured_outputs import StructuredOutputsParams

COMPILE_LIMIT_S = 2.0
QUICK_LIMIT_S = 0.3  # limit of the first worker
MAX_WAITING = 32  # requests that wait for a worker or use one
START_LIMIT_S = 120.0  # until the helper has started, with a vocabulary of any size
_GRACE_S = 5.0  # after a worker's time limit, until the helper must have reported its death
_MAX_NOTED = 200  # after so many different ignored keywords and formats, no more are logged


class CompilersBusy(RuntimeError):
    """Too many other requests' grammars are being compiled; a later attempt may succeed."""


class HelperLost(RuntimeError):
    """The helper process has ended or does not answer."""


class Helper:
    """The running helper process, with a socket to each of its workers."""

    def __init__(self, vocabulary: Vocabulary, num_workers: int) -> None:
        self.owner = os.getpid()
        pairs = [socket.socketpair() for _ in range(num_workers)]
        theirs = [pair[1] for pair in pairs]
        self.connections = [pair[0] for pair in pairs]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "compiledllm.grammars.helper"]
            + [str(connection.fileno()) for connection in theirs],
            pass_fds=[connection.fileno() for connection in theirs],
            stdin=subprocess.DEVNULL,
        )
        for connection in theirs:
            connection.close()
        answer = self.ask(0, dataclasses.asdict(vocabulary), START_LIMIT_S)
        if "error" in answer:
            self.close()
            raise ValueError(answer["error"])

    def ask(self, worker: int, message: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """The worker's answer, or {"died": cause} from the helper. Raises HelperLost."""
        connection = self.connections[worker]
        connection.settimeout(limit_s + _GRACE_S)
        try:
            frames.skip(connection)  # a worker may have died after its last answer
            frames.send(connection, message)
            answer = frames.receive(connection)
        except OSError as error:
            raise HelperLost(str(error)) from None
        if answer is None:
            raise HelperLost("it has closed its sockets")
        return answer

    def close(self) -> None:
        """End the helper and its workers, and wait for them. In a fork of the owner, do nothing."""
        if os.getpid() != self.owner:
            return
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that is reading
            connection.close()
        self.process.kill()
        self.process.wait()


class Compiler:
    """Compiles by means of a helper, which is started on first use and again when it is lost."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        require_llguidance()
        self.vocabulary = vocabulary
        self._limits_s = (QUICK_LIMIT_S, COMPILE_LIMIT_S)  # by worker, in seconds
        self._workers = [threading.Lock() for _ in self._limits_s]
        self._slots = threading.Semaphore(MAX_WAITING)
        self._helper: Helper | None = None
        self._starting = threading.Lock()
        self._noted: set[str] = set()

    def start(self) -> None:
        """Start the helper. Raises ValueError if llguidance does not support the vocabulary."""
        self._running()

    def close(self) -> None:
        with self._starting:
            if self._helper is not None:
                self._helper.close()
                self._helper = None

    def text_of(self, params: StructuredOutputsParams) -> str:
        """The grammar as a text for llguidance that is known to compile.

        Raises ValueError if there is none, and CompilersBusy.
        """
        if not self._slots.acquire(blocking=False):
            raise CompilersBusy("many requests' structured_outputs are being compiled; try again")
        try:
            answer = self._answer(params.fields())
        finally:
            self._slots.release()
        if "text" not in answer:
            raise ValueError(answer.get("error") or _why_died(answer["died"]))
        self._note(answer["ignored"])
        return str(answer["text"])

    def _answer(self, fields: dict[str, Any]) -> dict[str, Any]:
        for worker, limit_s in enumerate(self._limits_s):
            answer = self._ask(worker, fields, limit_s)
            if answer.get("died") != frames.TOO_LATE:
                break
        return answer

    def _ask(self, worker: int, fields: dict[str, Any], limit_s: float) -> dict[str, Any]:
        if not self._workers[worker].acquire(timeout=COMPILE_LIMIT_S):
            raise CompilersBusy("other requests' structured_outputs are being compiled; try again")
        try:
            for _ in range(2):
                helper = self._running()
                try:
                    return helper.ask(worker, {"fields": fields, "limit_s": limit_s}, limit_s)
                except HelperLost as error:
                    self._lose(helper, error)
        finally:
            self._workers[worker].release()
        raise ValueError("structured_outputs ended the process that compiles it; make it simpler")

    def _running(self) -> Helper:
        with self._starting:
            if self._helper is None or self._helper.owner != os.getpid():
                self._helper = Helper(self.vocabulary, len(self._limits_s))
                weakref.finalize(self, Helper.close, self._helper)
            return self._helper

    def _lose(self, helper: Helper, error: HelperLost) -> None:
        with self._starting:
            if self._helper is helper:
                log.warning("the process that compiles grammars is lost (%s)", error)
                helper.close()
                self._helper = None

    def _note(self, ignored: list[str]) -> None:
        new = [text for text in ignored if text not in self._noted]
        if new and len(self._noted) < _MAX_NOTED:
            self._noted.update(new)
            log.info("schemas: unknown, therefore not enforced: %s", ", ".join(new))


def _why_died(cause: str) -> str:
    if cause == frames.TOO_LATE:
        return f"structured_outputs did not compile within {COMPILE_LIMIT_S:g} s; make it simpler"
    return f"structured_outputs cannot be compiled: {cause}; make it simpler"
