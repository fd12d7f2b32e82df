"""One device's part of an engine: builds a plan's model, measures, allocates, compiles, runs steps.

    worker = Worker(plan)            # the model and its weights
    num_blocks = worker.count_kv_blocks()
    worker.start(num_blocks, max_blocks)
    pending = worker.launch(step)    # -> PendingOutput
    output = worker.collect(pending)

A worker knows only the requests of the current step, and no scheduler. The caller of `start` gives
the two sizes, since devices that share a model must agree on both.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from compiledllm.caches import cache_dir
from compiledllm.choices import Choice, Report
from compiledllm.graphs.artifact import Artifact
from compiledllm.graphs.buckets import StepShape, is_needed_first
from compiledllm.kernels import late_compiles
from compiledllm.kernels.decode_step import DecodeStep
from compiledllm.kernels.tables import use_folder
from compiledllm.ledger import Ledger
from compiledllm.log import log
from compiledllm.models.build import build_model
from compiledllm.models.checkpoint import weight_files
from compiledllm.models.decoder import Decoder
from compiledllm.models.deterministic import fixed_order
from compiledllm.models.formats.kv_scales import stored_kv_scales
from compiledllm.models.layers.linear import Matrix
from compiledllm.models.weights import paths_of_layers
from compiledllm.runner.decode_step import decode_step_for, use_decode_step
from compiledllm.runner.kv_cache import allocate_kv_caches, plan_num_blocks
from compiledllm.runner.kv_scales import set_kv_scales
from compiledllm.runner.memory import (
    Measured,
    check_gpu_is_free,
    max_sampling_bytes,
    measure_activations,
    plan_memory,
)
from compiledllm.runner.model_runner import ModelRunner
from compiledllm.runner.pending import PendingOutput
from compiledllm.runner.plan import Plan
from compiledllm.runner.start_cache import StartCache, label_of
from compiledllm.runner.step_times import measure_step_times
from compiledllm.types import SchedulerOutput, StepOutput, StepTimes

# Seconds of work before compiling in the background, since shorter runs never regain the time. On
# two CPU cores, compiling takes 10 to 30 s, during which the model has one core fewer. Afterwards
# steps of 16 requests are up to 14 % faster, and steps of one request are not.
BUSY_S = 60.0


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """num_recompiles: number of compilations after the start, each of which delays a step."""

    num_recompiles: int


class Worker:
    """The model of a plan on the plan's device.

    Attributes: `spec` (as loaded: the checkpoint may have a head of its own), `report` (choices
    that needed the device), `ledger` (seconds by phase), `is_restored` (whether an earlier start
    compiled), and after `start` `num_kv_blocks` (without the null block) and `runner`.

    The constructor loads the weights, without waiting for other ranks. Raises ConfigError if they
    do not fit the spec, or if other processes hold the GPU's memory.
    """

    is_broken = False  # a single worker can always run another step, unlike `FirstRank`

    def __init__(self, plan: Plan, ledger: Ledger) -> None:
        self.plan = plan
        self.report = Report()
        self.ledger = ledger
        self.num_kv_blocks = 0
        self._max_blocks = 0  # width of the block tables
        self.runner: ModelRunner
        self.cache = StartCache(plan)
        self._measured: Measured | None = None
        self.is_restored = False
        self.step_times: StepTimes | None = None  # measured by `start`, if target_itl_ms is given
        use_folder(cache_dir() / "tilings")
        cache = plan.config.requested.cache
        is_sized = cache.num_kv_blocks or cache.kv_cache_memory_bytes
        if plan.platform.is_cuda and not is_sized:
            check_gpu_is_free(plan.platform, cache.gpu_memory_utilization)
        if plan.spec.is_quantized:
            self.cache.artifact()  # waits for its binaries: kernels that repack weights
        with ledger.phase("weights"):
            self._model = self._build_model()
        if plan.config.requested.model.load_format != "dummy":
            ledger.weight_bytes = sum(f.stat().st_size for f in weight_files(plan.checkpoint))
        self.spec = self._model.spec
        if self.spec.tie_word_embeddings != plan.spec.tie_word_embeddings:
            own_head = Choice(False, "the checkpoint has its own head")
            self.report.note("tie_word_embeddings", own_head)
        if products := _products(self._model):
            self.report.note("products", Choice(products, self.spec.quantization))
        self._decode_step: DecodeStep | str | None = None  # str: why there is none
        if plan.platform.is_cuda:
            if plan.config.requested.compile.persistent_decode:
                self.cache.artifact()  # waits for its binaries: the decode step's kernel
            self._decode_step = decode_step_for(plan, self._model)

    # -- steps ---------------------------------------------------------------------------------

    def launch(self, step: SchedulerOutput) -> PendingOutput:
        """Launch one step. A GPU may still be running the step when the method returns."""
        return self.runner.launch(step)

    def collect(self, pending: PendingOutput) -> StepOutput:
        """Wait for the results of a launched step. Steps must be collected in launch order."""
        return self.runner.collect(pending)

    def reset(self) -> None:
        """Forget all requests after a failed step; the scheduler sends them again as new ones."""
        self.runner.reset()

    def stats(self) -> WorkerStats:
        late = self.runner.compiler.num_recompiles + late_compiles.num_kernels
        return WorkerStats(late)

    # -- start-up ------------------------------------------------------------------------------

    def count_kv_blocks(self) -> int:
        """Number of KV blocks for which this device has room, without the null block.

        Measures the scales of an FP8 cache first. On CUDA, runs the largest step to measure
        activations. Raises ConfigError without room.
        """
        plan = self.plan
        with self.ledger.phase("memory"):
            if plan.has_fp8_cache:
                self.report.note("kv_scales", self._set_kv_scales())
            in_use = self._plan_memory() if plan.platform.is_cuda else plan.state_bytes
        num_blocks, choice = plan_num_blocks(
            plan.config.requested.cache,
            plan.block_bytes,
            plan.platform,
            bytes_in_use=in_use,
            max_useful=plan.max_useful_blocks,
            snapshot_share=plan.snapshot_share,
        )
        self.report.note("num_kv_blocks", choice)
        if plan.spec.bytes_per_request:
            self.report.note("enable_prefix_caching", plan.caches_prefixes(num_blocks))
        return num_blocks

    def start(self, num_kv_blocks: int, max_blocks: int) -> None:
        """Allocate the KV cache, compile and capture. max_blocks: width of the block tables."""
        layout, limits = self.plan.kv_layout, self.plan.config.limits
        device = self.plan.platform.device
        self.num_kv_blocks, self._max_blocks = num_kv_blocks, max_blocks
        with self.ledger.phase("memory"):
            caches = allocate_kv_caches(layout, num_kv_blocks, limits.block_size, device)
            num_snapshots = self.plan.num_snapshots(num_kv_blocks)
            self.runner = ModelRunner(
                self._model, layout, caches, limits, max_blocks, num_snapshots
            )
        with self.ledger.phase("compile"):
            self.runner.compiler.saves = bool(self.cache.key)
            self.report.note("compile", Choice(*self._compile()))
            if self._decode_step is not None:
                self.report.note("decode_step", use_decode_step(self.runner, self._decode_step))
        with self.ledger.phase("capture"):
            self._capture()
            if target_ms := self.plan.config.requested.scheduler.target_itl_ms:
                self._measure_steps(target_ms / 1e3, max_blocks)

    def _build_model(self) -> Decoder:
        plan, options = self.plan, self.plan.config.requested
        default = torch.get_default_dtype()
        torch.set_default_dtype(plan.spec.torch_dtype)
        try:
            with torch.device(plan.platform.device), torch.inference_mode():
                model = build_model(
                    plan.spec,
                    plan.backend,
                    plan.checkpoint,
                    dummy_seed=options.model.seed if options.model.load_format == "dummy" else None,
                    products=fixed_order(plan.spec) if options.compile.deterministic else None,
                    rank=plan.ranks.index,
                )
        finally:
            torch.set_default_dtype(default)
        return model.eval()

    def _set_kv_scales(self) -> Choice:
        plan, stored = self.plan, dict[int, torch.Tensor]()
        if plan.config.requested.model.load_format != "dummy":
            paths = paths_of_layers(plan.spec.whole, plan.checkpoint)
            stored = stored_kv_scales(plan.checkpoint, paths)
        return set_kv_scales(self._model, stored, plan.config.limits)

    def _plan_memory(self) -> int:
        """Bytes of the engine's share of a GPU that other uses than the KV cache take."""
        plan, limits = self.plan, self.plan.config.limits
        known = artifact.memory if (artifact := self.cache.artifact()) else {}
        if known:
            self._measured, reason = Measured(**known), "activations measured by an earlier start"
        else:
            found = measure_activations(
                self._model, plan.kv_layout, limits, plan.platform, self._shapes_to_rehearse()
            )
            self._measured, reason = found, "activations measured"
        budget = plan_memory(
            plan.platform,
            plan.config.requested.cache.gpu_memory_utilization,
            self._measured.activations,
            num_captures=len(plan.shapes_to_capture()),
            sampling=max_sampling_bytes(limits.max_num_seqs, self.spec.vocab_size),
            states=plan.state_bytes,
            workspaces=self._measured.workspaces if known else 0,
        )
        self.report.note("memory", Choice(budget, reason))
        return budget.in_use

    def _shapes_to_rehearse(self) -> list[StepShape]:
        """The shapes to capture, unless a step also needs the host or other ranks."""
        plan = self.plan
        can_rehearse = plan.backend.runs_ahead and not plan.ranks.are_many
        return plan.shapes_to_capture() if can_rehearse else []

    def _compile(self) -> tuple[str, str]:
        """Compile, or arrange for compiling later. Returns what is compiled, and why or when."""
        compiler, config = self.runner.compiler, self.plan.config
        if config.requested.compile.enforce_eager:
            return "nothing", "enforce_eager"
        if config.requested.compile.deterministic:
            return "nothing", "deterministic"
        if self._restore():
            return "decoder block", f"by an earlier start, {self.cache.reason}"
        self.cache.wait_for_compiler()
        if obstacle := self.plan.platform.why_not_compile():
            return "nothing, running eagerly", obstacle
        if self.plan.ranks.are_many and config.compile_when != "start":
            reason = f"ranks do not compile at the same time with '{config.compile_when}'"
            return "nothing, running eagerly", f"{reason}; use compile_when='start'"
        if config.compile_when == "busy":
            compiler.compile_after(BUSY_S)
            return "decoder block", f"after {BUSY_S:.0f} s of work, when it pays; eager until then"
        if config.compile_when == "background":
            compiler.compile_in_background()
            return "decoder block", "now; eager until it is ready"
        if compiler.compile():
            return "decoder block", "before the first request"
        return "nothing, running eagerly", str(compiler.error)

    def use_idle_time(self) -> bool:
        """Do a piece of postponed start-up work. False if there is none left."""
        graphs = self.runner.graphs
        return graphs is not None and graphs.capture_next()

    def finish_start(self) -> None:
        """Keep an artifact, now or once the compiler is ready. To be called after a warm-up."""
        if not self.is_restored:
            self.runner.compiler.call_when_ready(self._keep)

    def _restore(self) -> bool:
        """Load the compiled functions of an earlier start. False if there are none that fit."""
        artifact = self.cache.artifact()
        if artifact is None:
            return False
        if artifact.max_blocks != self._max_blocks:
            log.warning(
                "%s is not used: it was compiled for block tables of %d blocks, not %d",
                *(self.cache.reason, artifact.max_blocks, self._max_blocks),
            )
            return False
        try:
            self.runner.compiler.restore(artifact.graphs)
        except Exception as error:  # stored code may fail to load in any way: compile instead
            reason = f"{type(error).__name__}: {error}"
            log.warning("%s cannot be loaded (%s): compiling", self.cache.reason, reason)
            return False
        self.is_restored = True
        return True

    def _keep(self) -> None:
        """Keep what this start compiled for the next start."""
        if (artifact := self.make_artifact()) is not None:
            self.cache.keep(artifact)

    def make_artifact(self) -> Artifact | None:
        """The compiled functions of this start, also if restored; None if there are none."""
        compiler = self.runner.compiler
        if not self.cache.key or not compiler.is_ready or compiler.why_not_saved:
            return None
        if self.is_restored:
            return self.cache.artifact()
        return Artifact(
            self.cache.key,
            label_of(self.plan),
            compiler.saved,
            {} if self._measured is None else asdict(self._measured),
            self._captured(),
            self._max_blocks,
        )

    def _captured(self) -> list[tuple[int, int, int]]:
        graphs = self.runner.graphs
        return [] if graphs is None else [(*shape,) for shape in graphs.shapes]

    def _capture(self) -> None:
        """Capture steps as CUDA graphs, if the device and the attention backend allow it."""
        if obstacle := self.plan.why_not_capture():
            self.report.note("capture", Choice("nothing", obstacle))
            return
        # With compiled kernels, capturing a step takes milliseconds and can wait. A backend that
        # plans each step on the host plans all captures at once.
        can_wait = self.is_restored and self.plan.backend.runs_ahead
        first = is_needed_first if can_wait else None
        graphs = self.runner.capture(self.plan.shapes_to_capture(), first)
        sizes = f"{len(graphs.shapes)} step sizes"
        if graphs.num_waiting:
            sizes += f" now, {graphs.num_waiting} when idle or needed"
        self.report.note("capture", Choice(sizes, f"whole steps, {graphs.capture_s:.1f} s"))

    def _measure_steps(self, target_s: float, max_blocks: int) -> None:
        """Measure how long steps take, for `target_itl_ms`, and report which of them fit."""
        limits, shapes = self.plan.config.limits, self.plan.shapes_to_capture()
        captured = [shape.num_tokens for shape in shapes if not shape.is_decode]
        self.step_times = measure_step_times(self.runner, limits, max_blocks, captured, target_s)
        self.report.note(
            "target_itl_ms", Choice(target_s * 1e3, _which_fit(self.step_times, target_s))
        )


def _which_fit(times: StepTimes, target_s: float) -> str:
    """Describe the largest measured step within a target; warn if not even a decode step is."""
    fitting = [(tokens, seconds) for tokens, seconds in times.sizes if seconds <= target_s]
    if fitting:
        return f"{fitting[-1][0]} tokens take {fitting[-1][1] * 1e3:.1f} ms"
    decode_ms = times.sizes[0][1] * 1e3
    log.warning("target_itl_ms cannot be held: one request's decode step takes %.1f ms", decode_ms)
    return f"cannot be held: one request's decode step takes {decode_ms:.1f} ms"


def _products(model: Decoder) -> str:
    """Describe the kernels that multiply by the model's quantised matrices; "" without any."""
    formats = (m.format.products for m in model.modules() if isinstance(m, Matrix))
    products = {product for format in formats for product in format.split("; ")}
    return "; ".join(sorted(products - {""}))
