"""Starts the other ranks of a model from the first rank's process, and talks to them."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from compiledllm.config import ConfigError
from compiledllm.engine.rank_frames import (
    Failed,
    FromRank,
    Join,
    Ready,
    ToRank,
    frame,
    receive_from_rank,
)
from compiledllm.kernels.collectives import (
    JOIN_TIMEOUT_S,
    TIMEOUT_S,
    abandon,
    is_member,
    join,
    leave,
    make_store,
)
from compiledllm.log import log

if TYPE_CHECKING:
    from compiledllm.graphs.cuda_graphs import StepGraphs

COMMAND = (sys.executable, "-m", "compiledllm.engine.rank_process")
_NOTICE_S = 2.0  # time limit for the reading threads to notice a rank's end
_END_S = 5.0  # time limit for a process to exit after its connection is closed


class RankError(RuntimeError):
    """A rank has failed or ended, so the model cannot run any more; it can be started again."""


class OtherRank(Protocol):
    """A rank other than the first, in a process or a Ray actor. connection: carries frames."""

    rank: int
    connection: socket.socket

    def end(self) -> str:
        """Close the connection and wait for the end. Returns how the rank ended."""


class RankProcess:
    """One rank as a child process. A thread reads its messages."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*COMMAND, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"TQDM_DISABLE": "1"},
            )
        self.connection = ours
        self.pid = self._process.pid

    def end(self) -> str:
        """Close the connection and wait for the process. Returns how it ended."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.connection.close()
        return f"its process ended with status {self._process.returncode}"


class RankGroup:
    """The other ranks of a model: sends them messages, waits for answers, and notices their end.

    device: the device of a rank, as torch names it. start_rank: starts a rank; None: as a child
    process. host: the first rank's address.

    When a rank fails or ends, the thread that reads its messages sets `failure` and raises
    RankError. In an engine's process this ends the process (`lifeline`), which is necessary because
    the first rank may be waiting for the others in a kernel that nothing else interrupts.
    """

    def __init__(
        self,
        num_ranks: int,
        device: Callable[[int], str],
        start_rank: Callable[[int], OtherRank] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        if is_member():
            gc.collect()  # an unused engine that has not been collected may still hold its ranks
        if is_member():
            raise ConfigError(
                "a process has one engine with tensor_parallel_size > 1 at a time; call the "
                "other's shutdown() first"
            )
        self.num_ranks = num_ranks
        self.failure: Failed | None = None
        self.graphs: StepGraphs | None = None  # of the first rank; they contain sums over ranks
        self._is_ended = False
        self._answers: queue.SimpleQueue[FromRank] = queue.SimpleQueue()
        self.ranks: list[OtherRank] = []
        try:
            for rank in range(1, num_ranks):
                self.ranks.append((start_rank or RankProcess)(rank))
            for process in self.ranks:
                name = f"rank {process.rank}"
                threading.Thread(target=self._read, args=[process], name=name, daemon=True).start()
            self.sums_by = self._join(device, host)
        except BaseException:
            self.end()
            raise

    def _join(self, device: Callable[[int], str], host: str) -> str:
        own = torch.device(device(0))
        num_threads = max(1, (os.cpu_count() or 1) // self.num_ranks)
        if own.type == "cpu":
            torch.set_num_threads(num_threads)
        store = make_store(self.num_ranks, host)
        for process in self.ranks:
            self._send(
                process,
                Join(
                    process.rank,
                    self.num_ranks,
                    host,
                    store.port,
                    device(process.rank),
                    num_threads,
                ),
            )
        sums_by = join(0, self.num_ranks, store, own)
        self.answers(JOIN_TIMEOUT_S)
        return sums_by

    def send(self, message: ToRank) -> None:
        """Send a message to every rank. Raises RankError if one has ended."""
        self.check()
        raw = frame(message)
        for process in self.ranks:
            self._send_raw(process, raw)

    def answers(self, timeout_s: float = TIMEOUT_S) -> list[Ready]:
        """Wait for an answer from every rank. Raises a failure: ConfigError or RankError."""
        found: list[Ready] = []
        while len(found) < len(self.ranks):
            try:
                answer = self._answers.get(timeout=timeout_s)
            except queue.Empty:
                raise RankError(f"a rank did not answer within {timeout_s:.0f} s") from None
            if isinstance(answer, Failed):
                raise ConfigError(answer.error) if answer.is_config else RankError(answer.error)
            found.append(answer)
        return found

    def check(self) -> None:
        """Raise RankError if a rank has failed."""
        if self.failure is not None:
            raise RankError(self.failure.error)

    def wait_for_failure(self) -> None:
        """Raise RankError if a rank has failed, even if its reader has yet to notice it."""
        deadline = time.monotonic() + _NOTICE_S
        while self.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        self.check()

    def end(self) -> None:
        """End all other ranks and leave the group of ranks."""
        self._is_ended = True
        self.failure = self.failure or Failed("the ranks have been ended")
        abandon()  # otherwise a step that waits for a rank would block the release of the graphs
        for process in self.ranks:
            process.end()
        self.ranks = []
        if self.graphs is not None:
            self.graphs.forget()  # graphs that contain NCCL's kernels must be gone before NCCL ends
        with contextlib.suppress(Exception):
            leave()

    def _send(self, process: OtherRank, message: ToRank) -> None:
        self._send_raw(process, frame(message))

    def _send_raw(self, process: OtherRank, raw: bytes) -> None:
        try:
            process.connection.sendall(raw)
        except OSError:
            raise RankError(f"rank {process.rank} has ended") from None

    def _read(self, process: OtherRank) -> None:
        last: FromRank | None = None
        while (message := receive_from_rank(process.connection)) is not None:
            last = message
            self._answers.put(message)
        if self._is_ended:
            return
        how = last if isinstance(last, Failed) else Failed(process.end())
        error = f"rank {process.rank}: {how.error}"
        if self.failure is None:
            self.failure = Failed(error, how.is_config)
        if last is not how:
            self._answers.put(self.failure)
        if not how.is_config:
            raise RankError(error)
        log.error(error)
