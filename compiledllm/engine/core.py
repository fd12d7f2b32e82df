"""The engine's core loop: schedule, execute, update. Knows token ids, no text.

core = EngineCore(config)
core.add(request)
while core.has_unfinished():
    advanced = core.step()
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from compiledllm.config import Choice, ConfigError, EngineConfig
from compiledllm.engine.isolation import Isolation
from compiledllm.engine.served_model import ServedModel
from compiledllm.graphs.buckets import StepShape, step_shapes
from compiledllm.log import log
from compiledllm.models.build import build_model
from compiledllm.models.cache_groups import choose_groups
from compiledllm.models.decoder import Decoder
from compiledllm.models.deterministic import fixed_order
from compiledllm.models.registry import load_spec
from compiledllm.models.source import resolve_checkpoint
from compiledllm.models.spec import ModelSpec
from compiledllm.outputs import FinishReason
from compiledllm.platform import Platform, is_fatal
from compiledllm.runner.choose_backend import choose_backend
from compiledllm.runner.kv_cache import allocate_kv_caches, block_bytes, plan_num_blocks
from compiledllm.runner.memory import (
    check_gpu_is_free,
    max_sampling_bytes,
    measure_activations,
    plan_memory,
)
from compiledllm.runner.model_runner import ModelRunner
from compiledllm.runner.pending import PendingOutput
from compiledllm.scheduler.block_pool import BlockPool
from compiledllm.scheduler.kv_manager import most_blocks_of_all, num_blocks_needed
from compiledllm.scheduler.policy import BALANCED_TOKENS, Pace
from compiledllm.scheduler.scheduler import Scheduler
from compiledllm.types import Request, SchedulerOutput

IDLE_CHECK_INTERVAL_S = 10.0
# On two CPU cores, compiling takes 10 to 30 s, during which the model has one core fewer, and makes
# a step up to 14 % faster (16 requests; one request: no faster). Shorter work never gains from it.
BUSY_SECONDS = 60.0


class EngineCore:
    """One model on one device, and the requests that it serves. Single-threaded.

    Attributes: `config` (resolved), `choices` (option -> value and reason), `model_path`, `spec`,
    `scheduler`, `runner`, `startup_s` (phase -> seconds), `on_start` (called with the ids of
    requests that begin to run, before the first step that has them).
    """

    def __init__(self, config: EngineConfig) -> None:
        self.startup_s: dict[str, float] = {}
        self.isolation: Isolation | None = None
        self.num_step_tokens = 0  # tokens of the step scheduled last
        self.on_start: Callable[[Iterable[str]], None] | None = None
        self._last_idle_check = 0.0
        self._in_flight: deque[tuple[SchedulerOutput, PendingOutput]] = deque()
        started = time.perf_counter()
        self.model_path: Path = resolve_checkpoint(
            config.model.model,
            config.model.revision,
            weights=config.model.load_format != "dummy",
        )
        self.spec: ModelSpec = load_spec(
            self.model_path, config.model.model_impl, config.model.quantization
        )
        self.platform = Platform.detect(config.model.device)
        self.config, self.choices = config.resolve(
            self.platform.is_cuda, self.spec.max_position, self.platform.memory_bytes
        )
        if self.spec.implementation == "transformers":
            self._note_transformers()
        asked = config.model.dtype
        self.choices["dtype"] = self.platform.choose_dtype(asked, self.spec.dtype)
        self._choose_attention()
        sized = config.cache.num_kv_blocks or config.cache.kv_cache_memory_bytes
        if self.platform.is_cuda and not sized:
            check_gpu_is_free(self.platform, config.cache.gpu_memory_utilization)
        self.startup_s["config"] = time.perf_counter() - started
        model = self._build_model()
        if model.spec.tie_word_embeddings != self.spec.tie_word_embeddings:
            self.choices["tie_word_embeddings"] = Choice(False, "the checkpoint has its own head")
        self.spec = model.spec
        self.startup_s["weights"] = time.perf_counter() - started - self.startup_s["config"]
        self.runner, self.scheduler = self._build_runner(model)
        self._start_compiler()
        self._capture()
        self.startup_s["total"] = time.perf_counter() - started
        self._report()

    # -- requests ------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError if it can never fit."""
        self.scheduler.add(request)

    def finish(
        self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None
    ) -> Request | None:
        """End a request from outside and free its blocks. None if it has already ended."""
        return self.scheduler.finish(request_id, reason, stop_reason)

    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished()

    def step(self) -> list[Request]:
        """Launch one step of the whole batch. Returns the requests that got a token.

        With `async_scheduling` the tokens are those of the previous step: the device computes one
        step while the host processes the previous step and prepares the next.
        """
        step = self.scheduler.schedule()
        self.num_step_tokens = step.num_scheduled_tokens
        if self.on_start is not None and step.new_requests:
            self.on_start(new.request_id for new in step.new_requests)
        try:
            self._in_flight.append((step, self.runner.launch(step)))
            if len(self._in_flight) <= bool(self.config.scheduler.async_scheduling):
                return []
            step, output = self._in_flight.popleft()
            advanced = self.scheduler.update(step, self.runner.collect(output))
        except Exception as error:
            isolation = None if is_fatal(error) else self.isolation
            if isolation is not None and isolation.is_hopeless:
                isolation = None
            # Without isolation, every request of the step ends with an error.
            self._abandon(step, failed=isolation is None)
            if isolation is None:
                raise
            log.error("a step failed (%s: %s)", type(error).__name__, error)
            return isolation.after_failure(_ids_of(step), error)
        except BaseException:  # after Ctrl-C the requests are computed again
            self._abandon(step, failed=False)
            raise
        if self.isolation is not None:
            self.isolation.after_success(advanced)
        return advanced

    def isolate_failures(self) -> None:
        """From now on a failing step ends only the request to blame, and `step` does not raise."""
        self.isolation = Isolation(self.scheduler)

    def _abandon(self, step: SchedulerOutput, failed: bool) -> None:
        self.scheduler.abandon_step(step, failed)
        self._in_flight.clear()
        self.runner.reset()

    def check_when_idle(self) -> None:
        """Without requests, verify that no block leaked, at most every IDLE_CHECK_INTERVAL_S."""
        now = time.monotonic()
        if not self.has_unfinished() and now - self._last_idle_check > IDLE_CHECK_INTERVAL_S:
            self._last_idle_check = now
            self.scheduler.check_invariants()

    def served_model(self) -> ServedModel:
        """The facts that a `RequestFactory` needs about the model."""
        return ServedModel(
            self.config,
            self.model_path,
            self.spec.vocab_size,
            self.spec.eos_token_ids,
            num_slots=self.scheduler.kv.most_tokens,
            max_position=self.spec.max_position,
        )

    # -- start-up ------------------------------------------------------------------------------

    def _note_transformers(self) -> None:
        architecture = self.spec.architecture
        if self.config.compile.deterministic:
            raise ConfigError(
                f"deterministic=True is not supported for {architecture} as transformers runs it; "
                "leave it out"
            )
        asked = self.config.model.model_impl == "transformers"
        reason = "as asked" if asked else f"there is no family for {architecture}"
        self.choices["model_impl"] = Choice("transformers", reason)
        log.warning("transformers runs the model, over our paged attention (%s)", reason)

    def _choose_attention(self) -> None:
        config = self.config
        max_len, max_seqs = config.model.max_model_len, config.scheduler.max_num_seqs
        assert max_len is not None and max_seqs is not None
        block_size = config.cache.block_size
        preferred = self.platform.choose_attention_backend(
            config.compile.attention_backend, config.compile.deterministic
        )
        self.choices["attention_backend"], self._backend = choose_backend(
            preferred,
            self.spec,
            self.dtype,
            block_size,
            max_pages=(max_seqs + 1) * -(-max_len // block_size),
            device=self.platform.device,
        )
        if not self._backend.runs_ahead:
            reason = f"{self._backend.name} plans step by step"
            self.choices["async_scheduling"] = Choice(False, reason)
            self.config = config.replace(async_scheduling=False)
        self.groups, self.choices["kv_groups"] = choose_groups(self.spec, max_len, self._backend)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, str(self.choices["dtype"].value))
        return dtype

    def _build_model(self) -> Decoder:
        products = fixed_order(self.spec) if self.config.compile.deterministic else None
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.platform.device), torch.inference_mode():
                is_dummy = self.config.model.load_format == "dummy"
                model = build_model(
                    self.spec,
                    self._backend,
                    self.model_path,
                    dummy_seed=self.config.model.seed if is_dummy else None,
                    products=products,
                )
        finally:
            torch.set_default_dtype(default)
        return model.eval()

    def _build_runner(self, model: Decoder) -> tuple[ModelRunner, Scheduler]:
        config, device = self.config, self.platform.device
        max_len, max_seqs = config.model.max_model_len, config.scheduler.max_num_seqs
        max_tokens = config.scheduler.max_num_batched_tokens
        assert max_len is not None and max_seqs is not None and max_tokens is not None
        block_size = config.cache.block_size
        groups, sizes = self.groups, (block_size, max_seqs, max_tokens)
        num_blocks, self.choices["num_kv_blocks"] = plan_num_blocks(
            config.cache,
            block_bytes(self.spec, groups, block_size, self.dtype),
            self.platform,
            bytes_in_use=self._plan_memory(model, max_seqs, max_tokens),
            max_useful=most_blocks_of_all(groups.windows, *sizes, max_len),
        )
        pool = BlockPool(num_blocks, config.cache.enable_prefix_caching)
        policy = config.scheduler.scheduling_policy
        pace = Pace(BALANCED_TOKENS * self.spec.sparsity, config.scheduler.mixed_prompt_tokens)
        scheduler = Scheduler(pool, *sizes, policy, pace, groups.windows)
        caches = allocate_kv_caches(self.spec, groups, num_blocks, block_size, self.dtype, device)
        if scheduler.kv.most_tokens == 0:
            raise ConfigError(
                f"{num_blocks} KV blocks hold no token in each of {len(groups.windows)} groups of "
                f"layers; {num_blocks_needed(groups.windows, block_size, max_len)} hold a whole "
                "context: give the cache more room (num_kv_blocks, kv_cache_memory_bytes)"
            )
        max_blocks = -(-min(max_len, scheduler.kv.most_tokens) // block_size)
        runner = ModelRunner(model, groups, caches, *sizes, max_blocks)
        return runner, scheduler

    def _plan_memory(self, model: Decoder, max_num_seqs: int, max_tokens: int) -> int:
        """CUDA: bytes of the engine's memory that the KV cache cannot have. CPU: 0."""
        config = self.config
        if not self.platform.is_cuda:
            return 0
        activations = measure_activations(
            model,
            self.groups,
            config.cache.block_size,
            self.dtype,
            self.platform,
            max_num_seqs,
            max_tokens,
        )
        share = config.cache.gpu_memory_utilization
        budget = plan_memory(
            self.platform,
            share,
            activations,
            num_captures=len(self._shapes_to_capture()),
            sampling=max_sampling_bytes(max_num_seqs, self.spec.vocab_size),
        )
        self.choices["memory"] = Choice(budget, "activations measured")
        return budget.in_use

    def _why_not_capture(self) -> str | None:
        """The reason why steps cannot be captured, or None."""
        if not self.platform.is_cuda:
            return "CUDA graphs need a GPU"
        if self.config.compile.enforce_eager:
            return "enforce_eager"
        if not self._backend.captures:
            return f"attention_backend='{self._backend.name}' asks the host"
        return None

    def _shapes_to_capture(self) -> list[StepShape]:
        if self._why_not_capture():
            return []
        max_tokens = self.config.scheduler.max_num_batched_tokens
        max_rows = self.config.compile.max_cudagraph_capture_size
        assert max_tokens and max_rows
        shapes = step_shapes(max_rows, max_tokens)
        return [shape for shape in shapes if shape.is_decode or self._backend.captures_prompts]

    def _start_compiler(self) -> None:
        started = time.perf_counter()
        compiler, when = self.runner.compiler, self.choices["compile_when"]
        obstacle = self.platform.why_not_compile()
        if self.config.compile.enforce_eager:
            self.choices["compile"] = Choice("nothing", "enforce_eager")
        elif self.config.compile.deterministic:
            self.choices["compile"] = Choice("nothing", "deterministic")
        elif obstacle:
            self.choices["compile"] = Choice("nothing, running eagerly", obstacle)
        elif when.value == "busy":
            compiler.compile_after(BUSY_SECONDS)
            reason = f"after {BUSY_SECONDS:.0f} s of work, when it pays; eager until then"
            self.choices["compile"] = Choice("decoder block", reason)
        elif when.value == "background":
            compiler.compile_in_background()
            self.choices["compile"] = Choice("decoder block", "now; eager until it is ready")
        elif compiler.compile():
            self.choices["compile"] = Choice("decoder block", "before the first request")
        else:
            self.choices["compile"] = Choice("nothing, running eagerly", str(compiler.error))
        self.startup_s["compile"] = time.perf_counter() - started

    def _capture(self) -> None:
        """Capture steps as CUDA graphs, if the device and the attention backend allow it."""
        obstacle = self._why_not_capture()
        if obstacle:
            self.choices["capture"] = Choice("nothing", obstacle)
        else:
            graphs = self.runner.capture(self._shapes_to_capture())
            self.startup_s["capture"] = graphs.seconds
            self.choices["capture"] = Choice(
                f"{len(graphs.shapes)} step sizes", f"whole steps, {graphs.seconds:.1f} s"
            )

    def _report(self) -> None:
        spec, distinct = self.spec, len(self.spec.distinct_layers)
        lines = {
            "model": f"{self.model_path} ({spec.architecture}, {len(spec.layers)} layers, "
            f"{spec.num_parameters / 1e6:.1f} M parameters)",
            "run by": self.choices.get("model_impl"),
            "tied head": self.choices.get("tie_word_embeddings"),
            "device": f"{self.platform.device} ({self.platform.name}; {self.platform.versions()})",
            "dtype": self.choices["dtype"],
            "weights": spec.quantization or None,
            "attention": self.choices["attention_backend"],
            "memory": self.choices.get("memory"),
            "KV cache": self._describe_cache(),
            "KV groups": self.choices["kv_groups"] if spec.has_windows else None,
            "context": self.choices["max_model_len"],
            "batch": f"at most {self.choices['max_num_seqs'].value} requests, "
            f"{self.choices['max_num_batched_tokens']} tokens a step",
            "compile": f"{self.choices['compile']}, {distinct} distinct of {len(spec.layers)}",
            "capture": self.choices["capture"],
            "ready in": f"{self.startup_s['total']:.1f} s "
            f"(weights {self.startup_s['weights']:.1f} s)",
        }
        for name, value in lines.items():
            if value is not None:
                log.info("%-10s %s", name, value)

    def _describe_cache(self) -> str:
        size, blocks = self.config.cache.block_size, self.scheduler.block_pool.num_blocks
        mib = blocks * block_bytes(self.spec, self.groups, size, self.dtype) / 2**20
        max_len, windows = self.config.model.max_model_len, self.groups.windows
        assert max_len is not None
        room = f"= {blocks * size} tokens"
        if windows != (0,):
            needed = num_blocks_needed(windows, size, max_len)
            room = f"of a group of layers; {max_len} tokens of a request take {needed}"
        reason = self.choices["num_kv_blocks"].reason
        return f"{blocks} blocks of {size} tokens {room}, {mib:.0f} MiB ({reason})"


def _ids_of(step: SchedulerOutput) -> list[str]:
    return [line.request_id for line in step.scheduled]
