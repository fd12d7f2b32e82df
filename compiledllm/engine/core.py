"""The engine's core loop: schedule, launch, collect, update. Knows token ids, no text.

core = EngineCore(plan(config), ledger)
core.add(spec)
while core.has_unfinished():
    news = core.step()
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, KeysView
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from compiledllm.caches import use_compiler_caches
from compiledllm.choices import Choice, Report
from compiledllm.config import ConfigError
from compiledllm.engine.executor import make_executor
from compiledllm.engine.isolation import Isolation
from compiledllm.engine.plan_views import start_lines
from compiledllm.engine.served_model import ServedModel
from compiledllm.engine.warm_up import warm_up
from compiledllm.engine_options import AUTO
from compiledllm.kernels import late_compiles
from compiledllm.ledger import Ledger
from compiledllm.log import log
from compiledllm.models.spec import ModelSpec
from compiledllm.outputs import FinishReason
from compiledllm.platform import Platform, is_fatal
from compiledllm.resolved_config import ResolvedConfig
from compiledllm.runner.model_runner import ModelRunner
from compiledllm.runner.pending import PendingOutput
from compiledllm.runner.plan import Plan
from compiledllm.scheduler.block_pool import BlockPool
from compiledllm.scheduler.policy import BALANCED_TOKENS, Pace
from compiledllm.scheduler.prompt_budget import ItlTarget
from compiledllm.scheduler.scheduler import Scheduler
from compiledllm.types import Grammar, Request, RequestSpec, SchedulerOutput, StepNews

IDLE_CHECK_INTERVAL_S = 10.0


class EngineCore:
    """A scheduler, the worker that runs its steps, and the requests. Single-threaded.

    ledger: the start-up phases that the caller has timed; None: start-up begins here. Attributes:
    `plan`, `scheduler`, `worker`, `report` (option -> value and reason), `startup_s` (phase ->
    seconds), `on_start` (called with the ids of requests before their first step is launched).
    """

    def __init__(self, plan: Plan, ledger: Ledger | None = None) -> None:
        use_compiler_caches()
        self.plan = plan
        self.isolation: Isolation | None = None
        self.num_step_tokens = 0  # tokens of the step scheduled last
        self.on_start: Callable[[Iterable[str]], None] | None = None
        self._last_idle_check = 0.0
        self._started: dict[str, float] = {}  # request id -> start time, for the next news
        # Steps launched and not collected, with the time of the launch.
        self._in_flight: deque[tuple[SchedulerOutput, PendingOutput, float]] = deque()
        self._collected_s = 0.0  # time of the last collection
        self.ledger = ledger or Ledger()
        with late_compiles.starting(), _compiling_in_threads(plan):
            self._start(plan)
        if self.max_model_len < plan.config.limits.max_model_len:
            choice = Choice(self.max_model_len, "what the KV cache holds")
            self.worker.report.note("max_model_len", choice)
        self.report: Report = plan.report | self.worker.report
        self.startup_s = self.ledger.close()
        for topic, line in start_lines(plan, self.worker).items():
            log.info("%-10s %s", topic, line)

    def _start(self, plan: Plan) -> None:
        self.worker = make_executor(plan, self.ledger)
        num_kv_blocks = self.worker.count_kv_blocks()
        self.scheduler = _scheduler(plan, num_kv_blocks)
        limits = plan.config.limits
        max_len = min(limits.max_model_len, self.scheduler.kv.max_request_tokens)
        self.worker.start(num_kv_blocks, max_blocks=-(-max_len // limits.block_size))
        if plan.platform.is_cuda and self.worker.cache.key and not self.worker.is_restored:
            with self.ledger.phase("compile"):
                warm_up(self)
        self.worker.finish_start()
        if self.worker.step_times is not None:
            target_ms = plan.config.requested.scheduler.target_itl_ms or 0.0
            self.scheduler.pace.target = ItlTarget(target_ms / 1e3, self.worker.step_times)

    @property
    def config(self) -> ResolvedConfig:
        return self.plan.config

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of a request, prompt and output; "auto": what the cache holds.

        Requests are checked against this limit. With "auto", the plan is made for the model's whole
        context.
        """
        limit, room = self.config.limits.max_model_len, self.scheduler.kv.max_request_tokens
        return min(limit, room) if self.config.requested.model.max_model_len == AUTO else limit

    @property
    def model_path(self) -> Path:
        return self.plan.checkpoint

    @property
    def platform(self) -> Platform:
        return self.plan.platform

    @property
    def spec(self) -> ModelSpec:
        return self.worker.spec

    @property
    def runner(self) -> ModelRunner:
        return self.worker.runner

    def options(self) -> dict[str, Any]:
        """All options by name, with the values in use."""
        num_blocks = self.worker.num_kv_blocks
        num_bytes = (num_blocks + 1) * self.plan.block_bytes  # with the null block
        measured = {
            "num_kv_blocks": num_blocks,
            "kv_cache_memory_bytes": num_bytes,
            "max_model_len": self.max_model_len,
            "enable_prefix_caching": self.scheduler.block_pool.enable_prefix_caching,
        }
        return self.plan.options() | measured

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of all snapshots of states that a request could start from."""
        states = self.scheduler.kv.states
        return 0 if states is None else len(states.snapshots) * self.plan.spec.bytes_per_request

    # -- requests ------------------------------------------------------------------------------

    def add(self, spec: RequestSpec, grammar: Grammar | None = None) -> None:
        """Queue a request. grammar: compiled from `spec.grammar`.

        Raises ValueError if the request can never fit.
        """
        self.scheduler.add(Request(spec, grammar))

    def finish(
        self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None
    ) -> bool:
        """End a request from outside and free its blocks. False if it has already ended."""
        return self.scheduler.finish(request_id, reason, stop_reason) is not None

    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished()

    @property
    def unfinished_ids(self) -> KeysView[str]:
        return self.scheduler.requests.keys()

    def step(self) -> StepNews:
        """Launch one step of the whole batch. Returns what requests gained, and how they ended.

        With `async_scheduling` the tokens are those of the previous step: the device computes one
        step while the host processes the previous step and prepares the next.
        """
        news = self._step()
        if self._started:
            news.started, self._started = self._started, {}
        return news

    def _step(self) -> StepNews:
        step = self.scheduler.schedule()
        self._note_start(step)
        try:
            launched_s = time.perf_counter()
            self._in_flight.append((step, self.worker.launch(step), launched_s))
            if len(self._in_flight) <= self.config.async_scheduling:
                return StepNews()
            step, output, launched_s = self._in_flight.popleft()
            collected = self.worker.collect(output)
            self._note_time(step, launched_s)
            news = self.scheduler.update(step, collected)
        except BaseException as error:
            return self._recover(step, error)
        if self.isolation is not None:
            self.isolation.after_success(news)
        return news

    def _note_start(self, step: SchedulerOutput) -> None:
        self.num_step_tokens = step.num_scheduled_tokens
        if step.new_requests:
            ids = [new.spec.request_id for new in step.new_requests]
            self._started |= dict.fromkeys(ids, time.monotonic())
            if self.on_start is not None:
                self.on_start(ids)

    def _note_time(self, step: SchedulerOutput, launched_s: float) -> None:
        """Let the ITL target, if there is one, learn from the duration of a collected step.

        The device begins a step when the step is launched, or when the step before it is done.
        """
        began_s = max(launched_s, self._collected_s)
        self._collected_s = time.perf_counter()
        if self.scheduler.pace.target is not None:
            self.scheduler.pace.target.learn(step, self._collected_s - began_s)

    def _recover(self, step: SchedulerOutput, error: BaseException) -> StepNews:
        """Abandon a failed step. With isolation, only the request to blame ends; otherwise raise.

        Without isolation, or if the error is fatal, every request of the step ends with an error.
        After Ctrl-C, the requests are computed again.
        """
        if not isinstance(error, Exception):
            self._abandon(step, failed=False)
            raise error
        isolation = None if is_fatal(error) or self.worker.is_broken else self.isolation
        if isolation is None or isolation.is_hopeless:
            self._abandon(step, failed=True)
            raise error
        self._abandon(step, failed=False)
        log.error("a step failed (%s: %s)", type(error).__name__, error)
        return isolation.after_failure(_ids_of(step), error)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; requests in progress keep their blocks."""
        self.scheduler.kv.reset_prefixes()

    def isolate_failures(self) -> None:
        """From now on, let a failing step end only the request that caused the failure.

        `step` then raises only fatal errors, and errors that every request causes.
        """
        self.isolation = Isolation(self.scheduler)

    def _abandon(self, step: SchedulerOutput, failed: bool) -> None:
        self.scheduler.abandon_step(step, failed)
        self._in_flight.clear()
        self.worker.reset()

    def check_when_idle(self) -> None:
        """If idle, check the scheduler's invariants, at most once per IDLE_CHECK_INTERVAL_S."""
        now = time.monotonic()
        if not self.has_unfinished() and now - self._last_idle_check > IDLE_CHECK_INTERVAL_S:
            self._last_idle_check = now
            self.scheduler.check_invariants()

    def served_model(self) -> ServedModel:
        """The facts that a `RequestFactory` needs about the model."""
        return ServedModel(
            self.config.requested,
            self.max_model_len,
            self.model_path,
            self.spec.vocab_size,
            self.spec.eos_token_ids,
            num_slots=self.scheduler.kv.max_request_tokens,
            max_position=self.spec.max_position,
        )


def _compiling_in_threads(plan: Plan) -> AbstractContextManager[None]:
    if not plan.platform.is_cuda:
        return nullcontext()
    from compiledllm.kernels.compile_ahead import in_threads

    return in_threads()


def _scheduler(plan: Plan, num_kv_blocks: int) -> Scheduler:
    """The scheduler of a plan. Raises ConfigError if not every group of layers gets a block."""
    config, limits, windows = plan.config, plan.config.limits, plan.kv_layout.windows_of_tables
    requested = config.requested
    scheduler = Scheduler(
        BlockPool(num_kv_blocks, bool(plan.caches_prefixes(num_kv_blocks).value)),
        limits.block_size,
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
        requested.scheduler.scheduling_policy,
        Pace(
            BALANCED_TOKENS * plan.spec.sparsity,
            config.mixed_prompt_tokens,
            _attention_parity(plan.spec),
        ),
        windows,
        plan.num_snapshots(num_kv_blocks) if plan.spec.bytes_per_request else None,
    )
    if scheduler.kv.max_request_tokens == 0:
        raise ConfigError(
            f"{num_kv_blocks} KV blocks hold no token in each of "
            f"{len(plan.kv_layout.windows)} groups of layers; "
            f"{plan.blocks_per_context} hold a whole context: give the cache more room "
            "(num_kv_blocks, kv_cache_memory_bytes)"
        )
    return scheduler


def _attention_parity(spec: ModelSpec) -> float:
    """The position from which a token's attention takes as long as its products with weights.

    A token's attention is two products per layer, counted at half of the rate of products with
    weights. Layers with a window are not counted, as their attention does not grow.
    """
    pair_flops = 4 * sum(attn.q_size for attn in spec.attentions if not attn.sliding_window)
    return spec.weights_read.num_parameters / pair_flops if pair_flops else math.inf


def _ids_of(step: SchedulerOutput) -> list[str]:
    return [line.request_id for line in step.scheduled]
