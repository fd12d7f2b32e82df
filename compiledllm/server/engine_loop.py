"""The engine's loop: takes messages, runs steps, sends outputs. `engine_process` starts it."""

from __future__ import annotations

import contextlib
import queue
import time
from typing import TYPE_CHECKING, NoReturn

from compiledllm.log import log
from compiledllm.server.grammar_thread import Compiled, GrammarThread
from compiledllm.server.running_log import RunningLog
from compiledllm.server.wire import (
    Add,
    Finish,
    Grown,
    Ready,
    Speak,
    Stats,
    Stepped,
    ToEngine,
    request_of,
)
from compiledllm.types import Grammar, Request

if TYPE_CHECKING:
    from compiledllm.engine.core import EngineCore
    from compiledllm.server.lifeline import Lifeline


class EngineLoop:
    """Steps while there are unfinished requests, and otherwise waits for messages."""

    def __init__(self, core: EngineCore, lifeline: Lifeline, running: RunningLog) -> None:
        self._core = core
        core.isolate_failures()
        core.on_start = running.note
        self._lifeline = lifeline
        self._running = running
        self._inbox = lifeline.inbox
        self._grammars = GrammarThread(self._inbox.put, running.note)
        lifeline.deliver = self._deliver
        self._alive: dict[str, Request] = {}
        self._sent: dict[str, tuple[int, int]] = {}  # tokens and prompt logprobs sent so far
        self._num_steps = 0
        self._slow_seconds = 1.0 if core.platform.is_cuda else 20.0

    def run(self) -> NoReturn:
        """Run until the process ends: with the server, or by a failure of the engine itself."""
        try:
            self._lifeline.send(self._ready())
            while True:
                self._take_messages()
                if self._core.has_unfinished():
                    self._step()
        except BaseException as error:  # the core isolates failures of single requests
            self._fail(error)

    def _deliver(self, message: ToEngine) -> None:
        """In the reading thread: pass a message to the loop, or to the grammar thread first."""
        if isinstance(message, Speak):
            self._grammars.speak(message.vocabulary)
        elif isinstance(message, Add) and message.grammar is not None:
            self._grammars.compile(message)
        else:
            self._inbox.put(message)

    def _take_messages(self) -> None:
        """Handle all messages that have arrived; if the engine is idle, wait for one."""
        self._lifeline.turn()
        must_wait = not self._core.has_unfinished()
        while True:
            try:
                message = self._inbox.get(block=must_wait)
            except queue.Empty:
                return
            must_wait = False
            self._lifeline.turn()
            if isinstance(message, Add):
                self._add(message)
            elif isinstance(message, Compiled):
                self._add_compiled(message)
            elif isinstance(message, Finish):
                self._finish(message)
            self._core.check_when_idle()

    def _add(self, message: Add, grammar: Grammar | None = None) -> None:
        try:
            request = request_of(message, self._alive, grammar)
            self._core.add(request)
        except (ValueError, TypeError) as error:  # the server's checks do not catch everything
            self._refuse(message.request_id, str(error))
            return
        self._alive[request.request_id] = request
        self._sent[request.request_id] = (0, 0)

    def _add_compiled(self, message: Compiled) -> None:
        if not self._grammars.is_wanted(message):
            return
        if message.error is not None:
            self._refuse(message.add.request_id, message.error)
        else:
            self._add(message.add, message.grammar)

    def _refuse(self, request_id: str, error: str) -> None:
        grown = Grown(request_id, [], "error", error)
        self._lifeline.send(Stepped({}, [grown], self._stats(0.0, 0)))

    def _finish(self, message: Finish) -> None:
        for request_id in message.request_ids:
            self._core.finish(request_id, message.reason)
            self._grammars.forget(request_id)
            self._forget(request_id)
        if not self._core.has_unfinished():  # no step follows that would report the stats
            self._lifeline.send(Stepped({}, [], self._stats(0.0, 0)))

    def _forget(self, request_id: str) -> None:
        self._alive.pop(request_id, None)
        self._sent.pop(request_id, None)
        self._running.forget(request_id)

    def _step(self) -> None:
        started = time.perf_counter()
        advanced = self._core.step()
        self._num_steps += 1
        token_ids, grown = self._news_of(advanced)
        seconds = time.perf_counter() - started
        if seconds > self._slow_seconds:
            log.warning(
                "a step took %.1f s; the next one has %d tokens of %d requests",
                *(seconds, self._core.num_step_tokens, len(self._core.scheduler.running)),
            )
        stats = self._stats(seconds, self._core.num_step_tokens)
        self._lifeline.send(Stepped(token_ids, grown, stats))

    def _news_of(self, advanced: list[Request]) -> tuple[dict[str, int], list[Grown]]:
        """The outputs not sent yet: single tokens by request, and `Grown` for everything else."""
        token_ids: dict[str, int] = {}
        grown: list[Grown] = []
        for request in advanced:
            sent = self._sent.get(request.request_id)
            if sent is None:  # the request was ended during the step
                continue
            is_plain = sent[0] and not request.is_finished and not request.logprobs
            if is_plain and request.num_output_tokens == sent[0] + 1:
                token_ids[request.request_id] = request.token_ids[-1]
                self._sent[request.request_id] = sent[0] + 1, sent[1]
            else:
                grown.append(self._grown(request, *sent))
        return token_ids, grown

    def _grown(self, request: Request, tokens: int, prompts: int) -> Grown:
        """tokens, prompts: numbers of output tokens and of prompt log probabilities sent so far."""
        grown = Grown(
            request.request_id,
            request.token_ids[request.num_prompt_tokens + tokens :],
            request.finish_reason,
            request.stop_reason,
            max(request.num_cached_tokens, 0),
            request.logprobs[tokens:],
            request.prompt_logprobs[prompts:],
        )
        if request.is_finished:
            self._forget(request.request_id)
        else:
            counts = request.num_output_tokens, len(request.prompt_logprobs)
            self._sent[request.request_id] = counts
        return grown

    def _stats(self, seconds: float, num_tokens: int) -> Stats:
        scheduler = self._core.scheduler
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_usage=scheduler.block_pool.usage,
            num_preemptions=scheduler.num_preemptions,
            num_failed_rows=scheduler.num_failed_rows,
            num_recompiles=self._core.worker.stats().num_recompiles,
            step_seconds=seconds,
            num_tokens=num_tokens,
            prefix_queries=scheduler.num_prefix_queries,
            prefix_hits=scheduler.num_prefix_hits,
        )

    def _ready(self) -> Ready:
        core = self._core
        served = core.served_model()
        return Ready(
            options=core.options(),
            choices=core.report.lines(),
            model_path=str(core.model_path),
            vocab_size=served.vocab_size,
            eos_token_ids=list(served.eos_token_ids),
            num_slots=served.num_slots,
            startup_s=core.startup_s,
            is_cpu=not core.platform.is_cuda,
            max_position=served.max_position,
        )

    def _fail(self, error: BaseException) -> NoReturn:
        batch: list[dict[str, object]] = []
        details: dict[str, object] = {"step": self._num_steps, "batch": batch}
        with contextlib.suppress(Exception):  # the engine's state may be what is broken
            for r in self._core.scheduler.running:
                sizes = {"tokens": r.num_tokens, "computed": r.num_computed_tokens}
                batch.append({"request_id": r.request_id, **sizes})
            details["last_stats"] = asdict_of(self._stats(0, 0))
        self._lifeline.fail(error, [str(line["request_id"]) for line in batch], details)


def asdict_of(stats: Stats) -> dict[str, float]:
    return {name: getattr(stats, name) for name in stats.__struct_fields__}
