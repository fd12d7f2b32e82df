"""The engine as its client sees it: a process that is started, watched and restarted.

Requests are `RequestState`s: this process makes text and checks stop strings, so that the engine's
process only runs steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from compiledllm.config import ConfigError
from compiledllm.engine.request_state import RequestState
from compiledllm.engine.requests import RequestFactory
from compiledllm.engine.tokenizer_class import warm_up
from compiledllm.grammars.library import Vocabulary
from compiledllm.log import log
from compiledllm.remote.admission import Load, check_admission
from compiledllm.remote.crash_records import tidy_crash_records, write_crash_record
from compiledllm.remote.engine_child import ENGINE_COMMAND, EngineChild, cause_of
from compiledllm.remote.errors import EngineError, Unavailable
from compiledllm.remote.limits import Limits
from compiledllm.remote.live_request import LiveRequest
from compiledllm.remote.live_requests import LiveRequests
from compiledllm.remote.restarts import Restarts
from compiledllm.remote.served_text import load_vocabulary, make_request_factory
from compiledllm.remote.vital_signs import VitalSigns
from compiledllm.remote.wire import (
    Alive,
    Failed,
    FromEngine,
    Ping,
    Ready,
    ResetPrefixCache,
    SetVocabulary,
    Start,
    Stats,
    StepOutputs,
    ToEngine,
    WireError,
)

State = Literal["loading", "ready", "draining", "dead"]
STOP_S = 5.0  # for a killed process to exit
MAX_UNREAD_BYTES = 2**24  # bytes the engine has not read; beyond this limit no request is admitted


class EngineClient:
    """Starts the engine's process and talks to it.

    command: starts such a process; two file descriptors are appended as arguments. environment:
    variables of the process besides this process's own. Attributes:
    `state`, `requests` (the request factory, once the engine is ready), `ready` (the engine's last
    `Ready` message), `stats` (after its last step), `live` (the requests in progress), `signs` (the
    signs of life), `observe` (called with each message), `on_loaded` (called once, when tokenizer
    and grammars have been loaded in this process).
    """

    def __init__(
        self,
        options: dict[str, Any],
        limits: Limits,
        crash_folder: Path,
        command: Sequence[str] = ENGINE_COMMAND,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._options = options
        self._environment = environment
        self._limits = limits
        self._crash_folder = crash_folder
        self._command = command
        self.state: State = "loading"
        self.requests: RequestFactory | None = None
        self.ready: Ready | None = None
        self.stats: Stats | None = None
        self.observe: Callable[[FromEngine], None] = lambda message: None
        self.on_loaded: Callable[[], None] = lambda: None
        self.failure: Failed | None = None
        self.num_restarts = 0
        self.signs = VitalSigns(limits)
        self.live = LiveRequests(self._send)
        self._vocabulary: Vocabulary | None = None  # None: no structured outputs
        self._child: EngineChild | None = None
        self._restarts = Restarts()
        self._num_finished = 0  # requests finished up to the last crash
        self._was_silent = False  # when the process was killed
        self._changed = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None

    # -- life and death ------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine in the background; `state` tells the progress."""
        tidy_crash_records(self._crash_folder)
        self._supervisor = asyncio.create_task(self._supervise())
        if not self._options.get("skip_tokenizer_init"):
            asyncio.get_running_loop().run_in_executor(None, warm_up)  # runs while the engine loads

    async def wait_until_settled(self) -> None:
        """Return once the engine is ready or has failed for good."""
        while self.state == "loading":
            self._changed.clear()
            await self._changed.wait()

    async def wait_until_dead(self) -> None:
        """Return once the engine has ended and will not be restarted."""
        assert self._supervisor is not None
        await asyncio.wait({self._supervisor})

    async def drain(self, timeout_s: float) -> None:
        """Admit no more requests; return when all are finished or `timeout_s` have passed."""
        self._set("draining")
        deadline = time.monotonic() + timeout_s
        while self.live and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.live.end_all(EngineError("the server is shutting down"))

    async def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
        if self._child is not None:
            self._child.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._child.end(), STOP_S)

    def kill(self, reason: str) -> None:
        """End the process and all requests at once, even if the event loop is closed."""
        if self._child is not None:
            self._child.kill()
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
            if self._supervisor is not None:
                self._supervisor.cancel()
            self._set("draining")
            self.live.end_all(EngineError(reason))

    def why_unhealthy(self) -> str | None:
        if self.state == "dead":
            return self.failure.error if self.failure else "the engine has ended"
        reason = self.signs.why_unhealthy()
        return reason and f"{reason}, with {len(self.live)} requests live"

    async def _supervise(self) -> None:
        try:
            await self._keep_running()
        except Exception as error:
            log.exception("the engine is lost")
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            is_config = isinstance(error, ConfigError)
            text = str(error) if is_config else f"{type(error).__name__}: {error}"
            self._give_up(Failed(text, is_config))

    async def _keep_running(self) -> None:
        goes_on = True
        while goes_on:
            await asyncio.sleep(self._restarts.delay_s)
            self.failure, self._was_silent = None, False
            started: set[str] = set()
            try:
                self._child = child = await EngineChild.spawn(self._command, self._environment)
            except OSError as error:
                self.failure = Failed(f"its process cannot be started ({error})")
            else:
                self.signs.begin()
                level = log.level or logging.INFO
                child.send(Start(self._options, str(self._crash_folder), level))
                await self._attend(child)
                status = await child.end()
                self.failure = self.failure or Failed(cause_of(status))
                started = set(self.failure.blamed) or child.take_started()
            goes_on = self._mourn(self.failure, started)

    async def _attend(self, child: EngineChild) -> None:
        """Read the process's messages until it ends, and kill the process if it hangs."""
        async with asyncio.TaskGroup() as tasks:
            beside = [tasks.create_task(self._watch(child))]
            try:
                while (message := await child.receive()) is not None:
                    self.signs.hear(message)
                    if isinstance(message, Ready):
                        self.observe(message)
                        beside.append(tasks.create_task(self._become_ready(message)))
                    else:
                        self._handle(message)
            except WireError as error:
                self._kill(child, str(error))
            for task in beside:
                task.cancel()

    async def _watch(self, child: EngineChild) -> None:
        while True:
            await asyncio.sleep(self.signs.interval_s)
            self.signs.tick()
            child.send(Ping())
            reason = self.signs.why_lost()
            self._was_silent = reason is not None
            if self.signs.is_overdue:
                limit_s = self._limits.load_s
                reason = f"loading took longer than {limit_s:.0f} s (--load-timeout)"
            if reason is not None:
                self._kill(child, reason)
                return

    def _kill(self, child: EngineChild, reason: str) -> None:
        log.error("killing the engine's process: %s", reason)
        self.failure = Failed(reason)
        child.kill()

    def _mourn(self, failure: Failed, started: set[str]) -> bool:
        """Fail or keep the requests of an ended process; return whether to start another one."""
        if self.live.num_finished > self._num_finished:
            self._restarts.note_success()
        self._num_finished = self.live.num_finished
        if self.ready is not None and not failure.is_recorded:
            self._write_record(failure, started)
        is_explained = self.live.on_engine_end(failure.error, started)
        has_loaded = self.ready is not None or self._was_silent  # else a restart would fail too
        if not has_loaded or not self._restarts.note_crash(is_explained):
            self._give_up(failure)
            return False
        if self.state == "draining" and not self.live:
            return False
        log.error("the engine ended (%s); starting it again", failure.error)
        self.num_restarts += 1
        if self.state != "draining":
            self._set("loading")
        return True

    def _write_record(self, failure: Failed, started: set[str]) -> None:
        running = [{"request_id": name} for name in self.live.engine_ids if name in started]
        record: dict[str, object] = {"error": failure.error, "batch": running}
        record |= {"num_live": len(self.live), "last_stats": str(self.stats)}
        write_crash_record(self._crash_folder, record)

    def _give_up(self, failure: Failed) -> None:
        self.failure = failure
        self._set("dead")
        self.live.end_all(EngineError(failure.error))

    def _set(self, state: State) -> None:
        self.state = state
        self._changed.set()

    # -- messages ------------------------------------------------------------------------------

    def _handle(self, message: StepOutputs | Failed | Alive) -> None:
        if isinstance(message, StepOutputs):
            self.observe(message)
            self.stats = message.stats
            self.live.take(message.news)
        elif isinstance(message, Failed):
            self.failure = message

    async def _become_ready(self, message: Ready) -> None:
        if self.requests is None:
            requests = await asyncio.to_thread(make_request_factory, message)
            self._vocabulary = await asyncio.to_thread(load_vocabulary, requests)
            self.requests = requests
            self.on_loaded()
        if self._vocabulary is not None:
            self._send(SetVocabulary(self._vocabulary))
        self.ready = message
        self.live.replay()
        if self.state == "loading":
            self._set("ready")

    def share_texts(self, other: EngineClient) -> None:
        """Use the tokenizer and grammars that the client of an equal engine has loaded."""
        if self.requests is None:
            self.requests, self._vocabulary = other.requests, other._vocabulary

    def _send(self, message: ToEngine) -> None:
        if self._child is not None:
            self._child.send(message)

    def reset_prefix_cache(self) -> None:
        """Let the engine forget all cached prefixes, before any request that is admitted later."""
        self._send(ResetPrefixCache())

    # -- requests ------------------------------------------------------------------------------

    def require_ready(self) -> RequestFactory:
        """The request factory. Raises Unavailable if the engine accepts no requests now."""
        if self.state != "ready" or self.requests is None:
            raise Unavailable(f"the engine is {self.state}", 1 if self.state == "draining" else 5)
        if reason := self.why_unhealthy():
            raise Unavailable(reason, 5)
        if self._child is not None and self._child.num_unread_bytes > MAX_UNREAD_BYTES:
            raise Unavailable("the engine does not take what it was sent", 5)
        return self.requests

    def admit(self, states: list[RequestState]) -> list[LiveRequest]:
        """Admit all of these requests or none; the caller must follow or release each one.

        Raises Unavailable or Overloaded if no more requests are accepted now.
        """
        num_requests = sum(len(state.completions) for state in states)
        num_tokens = sum(c.spec.num_prompt_tokens for s in states for c in s.completions)
        self.check_admission(num_requests, num_tokens)
        admitted: list[LiveRequest] = []
        try:
            for state in states:
                admitted.append(self.live.add(state))
        except BaseException:
            self.release(admitted)
            raise
        return admitted

    def release(self, live_requests: list[LiveRequest]) -> None:
        """Abort the unfinished ones of these requests, because nobody waits for their output."""
        for live in live_requests:
            self.live.abort(live)

    def check_admission(self, num_requests: int, num_tokens: int) -> None:
        """Raise Unavailable or Overloaded for a temporary reason, ValueError for a permanent one.

        num_tokens: sum of the prompts' lengths, counted once per engine request.
        """
        self.require_ready()
        assert self.ready is not None
        check_admission(
            Load(num_requests, num_tokens),
            Load(self.live.num_completions, self.live.num_tokens),
            self._limits,
            max_num_seqs=int(self.ready.options["max_num_seqs"] or 1),
            num_waiting=self.stats.num_waiting if self.stats else 0,
        )

    def following(self, live: LiveRequest) -> contextlib.AbstractContextManager[None]:
        """A context for taking a request's outputs; leaving early aborts the request.

        Inside, `live.take` raises EngineError if the request fails, and DeadlineExceeded if the
        request takes longer than the limit, counted from here.
        """
        return self.live.following(live, self._limits.request_s)
