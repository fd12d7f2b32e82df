"""The kernels of a decode step: their times, and the floors of the step's parts.

The profiler reports the time of each kernel but not the bytes that it moves. Bytes and floors are
therefore given for whole parts of the step, from the model's spec: "products" (matmuls) read the
weights, attention reads the KV cache, and layers with states read and write their states.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from compiledllm.benchmarks.ceilings import measure_ceilings
from compiledllm.benchmarks.floor import Ceilings, decode_cost, product_flops
from compiledllm.benchmarks.model import Model
from compiledllm.benchmarks.peers import CompiledLLM
from compiledllm.benchmarks.profile import Event, StepProfile, num_steps
from compiledllm.benchmarks.workload import random_requests
from compiledllm.models.matrices import Weights
from compiledllm.models.spec import ModelSpec
from compiledllm.platform import Platform

PRODUCTS, ATTENTION, OTHER = "products", "attention and states", "other"
LAYERS = "all of the layers"  # one kernel that computes all layers of a step of few rows
# (part of the step, pattern of the names of its kernels, or on a CPU of its operators). The first
# pattern that is found counts.
_KINDS = (
    (LAYERS, r"^decode_step"),
    (ATTENTION, r"attention|_decode_kernel|_prefill_kernel|_step_kernel|_ragged_kernel"),
    (
        ATTENTION,
        r"_scan_kernel|BatchDecode|BatchPrefill|flash|delta_rule|short_convolution|state_space",
    ),
    (PRODUCTS, r"_one_row_kernel|_few_rows_kernel|_grouped_kernel|_linear|triton_tem"),
    (PRODUCTS, r"dequantize|gemm|gemv|splitK|nvjet|cutlass|xmma|scaled_mm"),
    (PRODUCTS, r"aten::(b?mm|addmm|baddbmm|linear|matmul)|onednn|mkldnn|skinny|experts"),
)
_NAME_LENGTH = 60  # characters of a kernel's name; names of C++ templates have thousands
_VOCABULARY_SEED = 0


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel of a step. calls: per step. us: by how much all its calls prolong a step.

    A call counts from the end of all kernels that started earlier: with programmatic dependent
    launch, it starts early and waits for them. The times of all kernels add up to the busy time.
    """

    name: str
    kind: str
    calls: float
    us: float


@dataclass(frozen=True, slots=True)
class Part:
    """All kernels of one part of the step. floor_us: None for "other", which has no floor."""

    kind: str
    us: float
    num_bytes: int
    floor_us: float | None

    @property
    def share_of_floor(self) -> float | None:
        return self.floor_us / self.us if self.floor_us is not None and self.us else None


@dataclass(frozen=True, slots=True)
class StepKernels:
    """A decode step of `rows` requests. context: tokens of each request, halfway through.

    bucket: rows of the captured step that ran; None: the step was not captured. wall_us: duration
    of a step without the profiler. busy_us: how long at least one kernel ran.
    """

    rows: int
    bucket: int | None
    context: int
    wall_us: float
    busy_us: float
    floor_us: float
    parts: list[Part]
    kernels: list[Kernel]

    def facts(self) -> dict[str, Any]:
        parts = [asdict(part) | {"share_of_floor": part.share_of_floor} for part in self.parts]
        return asdict(self) | {"parts": parts, "share_of_floor": self.floor_us / self.wall_us}


def measure_kernels(
    options: dict[str, Any], row_counts: Sequence[int], context: int
) -> list[StepKernels]:
    """Measure a decode step for each number of requests, with dummy weights.

    options: options of an engine. context: tokens of each prompt. Raises ConfigError for wrong
    options and for prompts that are too long.
    """
    own = {"max_num_seqs": max(row_counts), "load_format": "dummy"}
    model = Model.from_options(options | own, ("compiledllm",))
    model.check_length(context + num_steps(model.platform.device) + 1)
    ceilings = measure_ceilings(model.platform, model.torch_dtype)  # before the engine's memory
    if model.platform.is_cuda:
        torch.cuda.empty_cache()
    engine = CompiledLLM(model)
    return [_measure(engine, rows, context, ceilings, model.platform) for rows in row_counts]


def _measure(
    engine: CompiledLLM, rows: int, context: int, ceilings: Ceilings, platform: Platform
) -> StepKernels:
    core = engine.engine.core
    requests = random_requests(rows, context, 1, core.spec.vocab_size, _VOCABULARY_SEED)
    profile = engine.while_decoding(requests, lambda step: StepProfile.of(step, platform.device))
    graphs = core.runner.graphs
    buckets = [] if graphs is None else [s.num_rows for s in graphs.shapes if s.is_decode]
    bucket = min((size for size in buckets if size >= rows), default=None)
    kernels = kernels_of(profile.events, profile.num_recorded)
    middle = context + num_steps(platform.device) // 2
    parts = parts_of(kernels, core.spec, rows, middle, ceilings)
    return StepKernels(
        rows,
        bucket,
        middle,
        wall_us=profile.step_s * 1e6,
        busy_us=profile.times().device_s * 1e6,
        floor_us=decode_cost(core.spec, rows, middle).floor_s(ceilings) * 1e6,
        parts=parts,
        kernels=kernels,
    )


def kernels_of(events: Iterable[Event], num_steps: int) -> list[Kernel]:
    """The kernels among the events of `num_steps` steps, those that take longest first.

    events: sorted by start.
    """
    spans: dict[tuple[str, str], list[float]] = defaultdict(list)
    ended = float("-inf")
    for event in events:
        us = max(event.end - max(event.start, ended), 0.0)
        spans[_short(event.name), kind_of(event.name)].append(us)
        ended = max(ended, event.end)
    kernels = [
        Kernel(*name, calls=len(us) / num_steps, us=sum(us) / num_steps)
        for name, us in spans.items()
    ]
    return sorted(kernels, key=lambda kernel: -kernel.us)


def kind_of(name: str) -> str:
    """The part of a step to which a kernel belongs. name: its full name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), OTHER)


def parts_of(
    kernels: Sequence[Kernel], spec: ModelSpec, rows: int, context: int, ceilings: Ceilings
) -> list[Part]:
    """The step's parts, each with the least number of bytes that it must move, and its floor."""
    cost, empty = decode_cost(spec, rows, context), decode_cost(spec, rows, 0)
    flops = rows * product_flops(spec.weights_read)
    products_s = max(cost.weight_bytes / ceilings.bytes_per_s, flops / ceilings.flops_per_s)
    mixed_flops = cost.flops - empty.flops
    mixed_s = max(cost.kv_bytes / ceilings.bytes_per_s, mixed_flops / ceilings.flops_per_s)
    floors = {
        PRODUCTS: (cost.weight_bytes, products_s * 1e6),
        ATTENTION: (cost.kv_bytes, mixed_s * 1e6),
        OTHER: (0, None),
    }
    if any(kernel.kind == LAYERS for kernel in kernels):
        of_layers = Weights().plus(*(layer.weights_used for layer in spec.layers))
        num_bytes = spec.num_bytes(of_layers)
        layers_s = products_s * num_bytes / cost.weight_bytes
        floors = {
            LAYERS: (num_bytes + cost.kv_bytes, (layers_s + mixed_s) * 1e6),
            PRODUCTS: (cost.weight_bytes - num_bytes, (products_s - layers_s) * 1e6),
            OTHER: (0, None),
        }
    return [
        Part(kind, sum(k.us for k in kernels if k.kind == kind), *floor)
        for kind, floor in floors.items()
    ]


def _short(name: str) -> str:
    name = re.sub(r"^void |<.*|\(.*", "", name, flags=re.DOTALL)
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


def lines_of(step: StepKernels, max_kernels: int = 24) -> list[str]:
    """A table for the terminal: the step, its parts, and its longest kernels."""
    captured = f"captured for {step.bucket}" if step.bucket else "not captured"
    rows = f"{step.rows} request{'s' * (step.rows > 1)}"
    lines = [
        f"decode step of {rows}, {step.context} tokens each ({captured}): {step.wall_us:.0f} us, "
        f"device busy {step.busy_us:.0f}, floor {step.floor_us:.0f} "
        f"({step.floor_us / step.wall_us:.0%})",
        "",
        f"  {'part':{_NAME_LENGTH}} {'us':>9} {'MB':>9} {'floor us':>9} {'of floor':>9}",
    ]
    for part in step.parts:
        floor = "-" if part.floor_us is None else f"{part.floor_us:.1f}"
        share = "-" if part.share_of_floor is None else f"{part.share_of_floor:.0%}"
        line = f"  {part.kind:{_NAME_LENGTH}} {part.us:9.1f} {part.num_bytes / 1e6:9.1f}"
        lines.append(f"{line} {floor:>9} {share:>9}")
    lines += ["", f"  {'kernel':{_NAME_LENGTH}} {'us':>9} {'calls':>9} {'us/call':>9}  part"]
    for k in step.kernels[:max_kernels]:
        line = f"  {k.name:{_NAME_LENGTH}} {k.us:9.1f} {k.calls:9.1f} {k.us / k.calls:9.2f}"
        lines.append(f"{line}  {k.kind}")
    if rest := step.kernels[max_kernels:]:
        us, calls = sum(k.us for k in rest), sum(k.calls for k in rest)
        lines.append(f"  {f'{len(rest)} more kernels':{_NAME_LENGTH}} {us:9.1f} {calls:9.1f}")
    return [*lines, ""]
