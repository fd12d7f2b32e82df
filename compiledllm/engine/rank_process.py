"""The process of a rank other than the first: `python -m …rank_process DESCRIPTOR`.

The process has no scheduler: it carries out the first rank's messages in order, steps among them.
It ends after a failure, and at once when the first rank has gone, whatever it is doing.
DESCRIPTOR: file descriptor of the connection to the first rank.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING

from compiledllm import bytecode
from compiledllm.config import ConfigError, EngineConfig
from compiledllm.engine.rank_frames import (
    Build,
    CountBlocks,
    Failed,
    FromRank,
    Join,
    Ready,
    Reset,
    Run,
    Step,
    ToRank,
    frame,
    receive_by_rank,
)
from compiledllm.kernels import late_compiles
from compiledllm.log import log, show_logs

if TYPE_CHECKING:
    from compiledllm.runner.pending import PendingOutput
    from compiledllm.runner.worker import Worker

_MAX_ERROR_LENGTH = 2000


class Rank:
    """A worker that carries out messages. connection: to the first rank."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[ToRank] = queue.SimpleQueue()
        self._in_flight: deque[PendingOutput] = deque()
        self._joined: Join
        self._worker: Worker

    def run(self) -> None:
        """Carry out messages until the process ends."""
        threading.Thread(target=self._read, name="frames", daemon=True).start()
        try:
            while True:
                self._carry_out(self._inbox.get())
        except BaseException as error:
            is_config = isinstance(error, ConfigError)
            if not is_config:
                log.exception("rank %d failed", getattr(self, "_joined", Join).rank)
            text = str(error) if is_config else f"{type(error).__name__}: {error}"
            self._send(Failed(text[:_MAX_ERROR_LENGTH], is_config))
            os._exit(1)

    def _read(self) -> None:
        while (message := receive_by_rank(self._connection)) is not None:
            self._inbox.put(message)
        os._exit(0)  # the first rank has gone

    def _carry_out(self, message: ToRank) -> None:
        if isinstance(message, Step):
            self._launch(message)
            return
        with late_compiles.starting():
            self._send(self._prepare(message))

    def _prepare(self, message: ToRank) -> Ready:
        """Carry out any message but a step. Returns the answer."""
        answer = Ready()
        if isinstance(message, Join):
            self._join(message)
        elif isinstance(message, Build):
            answer = Ready(agreement=self._build(message))
        elif isinstance(message, CountBlocks):
            answer = Ready(num_kv_blocks=self._worker.count_kv_blocks())
        elif isinstance(message, Run):
            self._worker.start(message.num_kv_blocks, message.max_blocks)
        elif isinstance(message, Reset):
            self._in_flight.clear()
            self._worker.reset()
        return answer

    def _launch(self, step: Step) -> None:
        while len(self._in_flight) > step.num_in_flight:
            self._worker.collect(self._in_flight.popleft())
        self._in_flight.append(self._worker.launch(step.to_run()))

    def _join(self, message: Join) -> None:
        import torch

        from compiledllm.kernels.collectives import join, make_store

        self._joined, device = message, torch.device(message.device)
        if device.type == "cpu":
            torch.set_num_threads(message.num_threads)
        store = make_store(message.num_ranks, message.host, message.port)
        join(message.rank, message.num_ranks, store, device)

    def _build(self, message: Build) -> str:
        from compiledllm.engine.startup import plan
        from compiledllm.ledger import Ledger
        from compiledllm.runner.worker import Worker

        self._in_flight.clear()
        joined = self._joined
        made = plan(EngineConfig.from_options(**message.options), joined.rank, joined.device)
        self._worker = Worker(made, Ledger())
        return made.agreement

    def _send(self, message: FromRank) -> None:
        try:
            self._connection.sendall(frame(message))
        except OSError:
            os._exit(0)


@bytecode.kept()
def main(connection: socket.socket) -> None:
    """Run a rank until the process ends. connection: to the first rank."""
    with contextlib.suppress(ValueError):  # a Ray actor does not run in the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the first rank
    show_logs()
    log.setLevel(logging.WARNING)  # the first rank reports the start
    Rank(connection).run()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
