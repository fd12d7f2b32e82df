"""The engine as the server sees it: a process that is started, watched and started again.

Requests are `RequestState`s: text and stop strings are made here, so that the engine's process does
nothing but steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from compiledllm.config import ConfigError, EngineConfig
from compiledllm.engine.request_state import RequestState
from compiledllm.engine.requests import RequestFactory
from compiledllm.engine.served_model import ServedModel
from compiledllm.engine.tokenizer import Tokenizer, warm_up
from compiledllm.log import log
from compiledllm.models.source import resolve_checkpoint
from compiledllm.runner.grammars import Vocabulary
from compiledllm.server.engine_process import write_crash_record
from compiledllm.server.live_request import (
    DeadlineExceeded,
    EngineError,
    Limits,
    LiveRequest,
    Overloaded,
    Unavailable,
)
from compiledllm.server.live_requests import LiveRequests
from compiledllm.server.wire import (
    Failed,
    FromEngine,
    Ready,
    Speak,
    Start,
    Stats,
    Stepped,
    ToEngine,
    frame,
    receive_async,
)

State = Literal["loading", "ready", "draining", "dead"]
MOST_RESTARTS = 5  # in RESTART_WINDOW_S; then something is wrong that a restart does not mend
RESTART_WINDOW_S = 600.0
YOUNG_OBJECTS = 20_000  # let live between collections; a request is about a thousand


class EngineClient:
    """Starts the engine's process and talks to it.

    Attributes: `state`, `requests` (the factory, once it is ready), `ready` (the engine's last
    report), `stats` (after its last step), `live` (the requests), `observe` (called with each
    message).
    """

    def __init__(self, options: dict[str, Any], limits: Limits, crash_folder: Path) -> None:
        self._options = options
        self._limits = limits
        self._crash_folder = crash_folder
        self.state: State = "loading"
        self.requests: RequestFactory | None = None
        self.ready: Ready | None = None
        self.stats: Stats | None = None
        self.observe: Callable[[FromEngine], None] = lambda message: None
        self.failure: Failed | None = None
        self.num_restarts = 0
        self.process: asyncio.subprocess.Process | None = None
        self.live = LiveRequests(self._send)
        self._vocabulary: Vocabulary | None = None  # None: no structured outputs
        self._writer: asyncio.StreamWriter | None = None
        self._last_sign = time.monotonic()  # of life, or of work to do
        self._crashes: list[float] = []
        self._changed = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None

    # -- life and death ------------------------------------------------------------------------

    def start(self) -> None:
        """Begin; `state` tells how far it is."""
        self._supervisor = asyncio.create_task(self._supervise())
        asyncio.get_running_loop().run_in_executor(None, warm_up)  # while the engine loads

    async def wait_until_settled(self) -> None:
        """Return when the engine is ready, or will never be."""
        while self.state == "loading":
            self._changed.clear()
            await self._changed.wait()

    async def drain(self, seconds: float) -> None:
        """Take nothing new; return when all is finished, or after so long."""
        self._set("draining")
        deadline = time.monotonic() + seconds
        while self.live and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.live.end_all(EngineError("the server is shutting down"))

    async def stop(self) -> None:
        """End the process."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        if self._writer is not None:
            self._writer.close()
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    def seconds_without_step(self) -> float:
        """While there is work: since the last step was finished. 0 otherwise."""
        return time.monotonic() - self._last_sign if self.live else 0.0

    def why_unhealthy(self) -> str | None:
        if self.state == "dead":
            return self.failure.error if self.failure else "the engine has ended"
        silence = self.seconds_without_step()
        if self.state != "loading" and silence > self._limits.stuck_seconds:
            return f"no step was finished for {silence:.0f} s, with {len(self.live)} requests live"
        return None

    async def _supervise(self) -> None:
        try:
            await self._keep_running()
        except Exception as error:
            log.exception("the engine is lost")
            is_config = isinstance(error, ConfigError)
            text = str(error) if is_config else f"{type(error).__name__}: {error}"
            self.failure = Failed(text, is_config)
            self._set("dead")
            self.live.end_all(EngineError(self.failure.error))

    async def _keep_running(self) -> None:
        while self.state != "dead":
            connection = await self._spawn()
            reader, self._writer = await asyncio.open_connection(sock=connection)
            self.failure = None
            while (message := await receive_async(reader)) is not None:
                self._last_sign = time.monotonic()
                self.observe(message)
                if isinstance(message, Ready):
                    await self._become_ready(message)
                else:
                    self._handle(message)
            self._writer.close()
            assert self.process is not None
            await self._mourn(await self.process.wait())

    async def _spawn(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "compiledllm.server.engine_process",
            str(theirs.fileno()),
            pass_fds=[theirs.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
        )
        theirs.close()
        ours.setblocking(True)
        ours.sendall(frame(Start(self._options, str(self._crash_folder))))
        return ours

    async def _mourn(self, status: int) -> None:
        """The process has ended: say why, end or keep its requests, and decide what comes next."""
        failure = self.failure or Failed(_cause_of(status))
        was_ready, self.failure = self.ready is not None, failure
        now = time.monotonic()
        self._crashes = [t for t in self._crashes if now - t < RESTART_WINDOW_S] + [now]
        if not was_ready or len(self._crashes) > MOST_RESTARTS:
            self._set("dead")
            self.live.end_all(EngineError(failure.error))
            return
        if not failure.blamed:  # else it has written one itself
            batch = [{"request_id": request_id} for request_id in self.live.engine_ids]
            record: dict[str, object] = {
                "error": failure.error,
                "batch": batch,
                "last_stats": str(self.stats),
            }
            write_crash_record(self._crash_folder, record)
        self._sort_out(failure)
        log.error("the engine ended (%s); starting it again", failure.error)
        self.num_restarts += 1
        if self.state != "draining":
            self._set("loading")

    def _sort_out(self, failure: Failed) -> None:
        """Requests that showed nothing yet start over, once; the rest end with the cause."""
        for live in self.live:
            if live.was_shown or live.was_replayed:
                self.live.end(live, EngineError(f"the engine ended: {failure.error}"))
            else:
                self.live.start_over(live)

    def _set(self, state: State) -> None:
        self.state = state
        self._changed.set()

    # -- messages ------------------------------------------------------------------------------

    def _handle(self, message: Stepped | Failed) -> None:
        if isinstance(message, Stepped):
            self.stats = message.stats
            self.live.book(message)
        else:
            self.failure = message

    async def _become_ready(self, message: Ready) -> None:
        requests = self.requests
        if requests is None:
            tokenizer = await asyncio.to_thread(_tokenizer_of, message)
            requests = RequestFactory(served_model_of(message), tokenizer)
            self._vocabulary = await asyncio.to_thread(_vocabulary_of, requests)
            gc.collect()
            gc.freeze()  # what is here now is here to stay: collections need not walk it
            gc.set_threshold(YOUNG_OBJECTS)
        if self._vocabulary is not None:
            self._send(Speak(self._vocabulary))
        self.requests = requests
        self.ready = message
        for live in self.live:
            self.live.tell(live)
        if self.state == "loading":
            self._set("ready")

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(message))

    # -- requests ------------------------------------------------------------------------------

    def admit(self, states: list[RequestState]) -> list[LiveRequest]:
        """Let requests in, all or none; each then has to be followed, or released.

        Raises Unavailable or Overloaded if no more may come in now.
        """
        num_requests = sum(len(state.completions) for state in states)
        num_tokens = sum(c.request.num_prompt_tokens for s in states for c in s.completions)
        self._check_admission(num_requests, num_tokens)
        if not self.live:
            self._last_sign = time.monotonic()
        return [self.live.add(state) for state in states]

    def release(self, lives: list[LiveRequest]) -> None:
        """End those that are not over; nobody waits for them any more."""
        for live in lives:
            self.live.abort(live)

    def _check_admission(self, num_requests: int, num_tokens: int) -> None:
        if self.state != "ready" or self.requests is None:
            raise Unavailable(f"the engine is {self.state}", 1 if self.state == "draining" else 5)
        assert self.ready is not None
        at_once = int(self.ready.options["max_num_seqs"] or 1)
        present = self.live.num_completions
        if present + num_requests > at_once + self._limits.queued_requests:
            raise Overloaded(
                f"{present} requests are running or waiting, and "
                f"{at_once + self._limits.queued_requests} may",
                self._retry_after(),
            )
        tokens = self.live.num_tokens
        if tokens and tokens + num_tokens > self._limits.queued_tokens:
            raise Overloaded(
                f"prompts of {tokens} tokens are running or waiting, and "
                f"{self._limits.queued_tokens} may",
                self._retry_after(),
            )

    def _retry_after(self) -> int:
        waiting = self.stats.num_waiting if self.stats else 0
        return min(1 + math.ceil(waiting / 32), 30)

    @contextlib.contextmanager
    def following(self, live: LiveRequest) -> Iterator[None]:
        """While its outputs are taken; leaving early ends the request.

        `live.take` raises EngineError if it cannot be finished, DeadlineExceeded if it takes too
        long from now on.
        """
        seconds = self._limits.request_seconds
        late = DeadlineExceeded(f"the request took longer than {seconds:.0f} s")
        timer = asyncio.get_running_loop().call_later(seconds, self.live.expire, live, late)
        try:
            yield
        finally:
            timer.cancel()
            self.live.abort(live)


def served_model_of(message: Ready) -> ServedModel:
    return ServedModel(
        config=EngineConfig.from_options(**message.options),
        model_path=Path(message.model_path),
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        num_slots=message.num_slots,
    )


def _tokenizer_of(message: Ready) -> Tokenizer | None:
    if message.options["skip_tokenizer_init"]:
        return None
    other = message.options["tokenizer"]
    return Tokenizer(
        resolve_checkpoint(other, weights=False) if other else Path(message.model_path)
    )


def _vocabulary_of(requests: RequestFactory) -> Vocabulary | None:
    """For structured outputs; None, and a line, if there are none."""
    try:
        return requests.grammars().vocabulary
    except ValueError as error:
        log.info("%-10s none (%s)", "grammars", error)
        return None


def _cause_of(status: int) -> str:
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"
