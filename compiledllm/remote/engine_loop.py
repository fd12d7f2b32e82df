"""The engine's loop: takes messages, runs steps, sends outputs. `engine_process` starts it."""

from __future__ import annotations

import contextlib
import queue
import time
from typing import TYPE_CHECKING, NoReturn

from compiledllm.log import log
from compiledllm.remote.grammar_thread import Compiled, GrammarThread
from compiledllm.remote.running_log import RunningLog
from compiledllm.remote.wire import (
    Add,
    Finish,
    Ready,
    ResetPrefixCache,
    SetVocabulary,
    Stats,
    StepOutputs,
    ToEngine,
)
from compiledllm.types import Grammar, RequestSpec, RequestUpdate, StepNews

if TYPE_CHECKING:
    from compiledllm.engine.core import EngineCore
    from compiledllm.remote.lifeline import Lifeline


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
        self._num_steps = 0
        self._slow_s = 1.0 if core.platform.is_cuda else 20.0

    def run(self) -> NoReturn:
        """Run until the process ends: with the client, or by a failure of the engine itself."""
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
        if isinstance(message, SetVocabulary):
            self._grammars.set_vocabulary(message.vocabulary)
        elif isinstance(message, Add) and message.spec.grammar is not None:
            self._grammars.compile(message.spec)
        else:
            self._inbox.put(message)

    def _take_messages(self) -> None:
        """Handle all messages that have arrived; if the engine is idle, wait for one."""
        self._lifeline.turn()
        must_wait = not self._core.has_unfinished()
        while must_wait and self._inbox.empty() and self._core.worker.use_idle_time():
            self._lifeline.turn()
        while True:
            try:
                message = self._inbox.get(block=must_wait)
            except queue.Empty:
                return
            must_wait = False
            self._lifeline.turn()
            if isinstance(message, Add):
                self._add(message.spec)
            elif isinstance(message, Compiled):
                self._add_compiled(message)
            elif isinstance(message, Finish):
                self._finish(message)
            elif isinstance(message, ResetPrefixCache):
                self._core.reset_prefix_cache()
            self._core.check_when_idle()

    def _add(self, spec: RequestSpec, grammar: Grammar | None = None) -> None:
        try:
            self._core.add(spec, grammar)
        except (ValueError, TypeError) as error:  # the client's checks do not catch everything
            self._refuse(spec.request_id, str(error))

    def _add_compiled(self, message: Compiled) -> None:
        if not self._grammars.is_wanted(message):
            return
        if message.error is not None:
            self._refuse(message.spec.request_id, message.error)
        else:
            self._add(message.spec, message.grammar)

    def _refuse(self, request_id: str, error: str) -> None:
        self._send(StepNews(updates=[RequestUpdate(request_id, [], "error", error)]))

    def _finish(self, message: Finish) -> None:
        for request_id in message.request_ids:
            self._core.finish(request_id, message.reason)
            self._grammars.forget(request_id)
            self._running.forget(request_id)
        if not self._core.has_unfinished():  # no step follows that would report the stats
            self._send(StepNews())

    def _send(self, news: StepNews, step_s: float = 0.0, num_tokens: int = 0) -> None:
        self._lifeline.send(StepOutputs(news, self._stats(step_s, num_tokens)))

    def _step(self) -> None:
        started = time.perf_counter()
        news = self._core.step()
        self._num_steps += 1
        for update in news.updates:
            if update.finish_reason is not None:
                self._running.forget(update.request_id)
        step_s = time.perf_counter() - started
        if step_s > self._slow_s:
            log.warning(
                "a step took %.1f s; the next one has %d tokens of %d requests",
                *(step_s, self._core.num_step_tokens, len(self._core.scheduler.running)),
            )
        self._send(news, step_s, self._core.num_step_tokens)

    def _stats(self, step_s: float, num_tokens: int) -> Stats:
        scheduler = self._core.scheduler
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_usage=scheduler.block_pool.usage,
            num_preemptions=scheduler.num_preemptions,
            num_failed_rows=scheduler.num_failed_rows,
            num_recompiles=self._core.worker.stats().num_recompiles,
            step_s=step_s,
            num_tokens=num_tokens,
            prefix_queries=scheduler.num_prefix_queries,
            prefix_hits=scheduler.num_prefix_hits,
            prefix_misses_of_state=scheduler.num_prefix_misses_of_state,
            snapshot_hits=scheduler.kv.num_snapshot_hits,
            snapshot_bytes=self._core.snapshot_bytes,
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
            details["last_stats"] = stats_as_dict(self._stats(0, 0))
        self._lifeline.fail(error, [str(line["request_id"]) for line in batch], details)


def stats_as_dict(stats: Stats) -> dict[str, float]:
    return {name: getattr(stats, name) for name in stats.__struct_fields__}
