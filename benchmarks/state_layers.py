"""Measures the ops of state layers, and compares them with the machine's ceilings.

    python -m compiledllm.benchmarks.state_layers --output-json FILE
    python -m compiledllm.benchmarks.state_layers --sweep

The delta rule and the convolution have the shapes of Qwen3.5-9B and Qwen3.6-35B-A3B, which are
equal: 16 key heads and 32 value heads of 128, convolutions of width 4. The state space (Mamba-2)
has the same value heads and states, and one group. As in a model's step, a CUDA graph calls an op
for several layers, each of which has its own states, so that states come from memory and not from a
cache. `--sweep` also measures other tilings of the delta rule's kernels.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiledllm.benchmarks.ceilings import measure_ceilings
from compiledllm.benchmarks.floor import Ceilings
from compiledllm.benchmarks.report import Row, collected, run_script, script_facts, write_facts
from compiledllm.kernels.backend import make_row_bound
from compiledllm.kernels.delta_rule import CHUNK, gated_delta_rule
from compiledllm.kernels.short_convolution import short_convolution
from compiledllm.kernels.state_space import state_space
from compiledllm.platform import Platform

_REPEATS = 5
_MIN_S = 0.02  # duration of a repeat


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a layer. dim: dimensions of a head. width: inputs per channel of the convolution."""

    key_heads: int = 16
    value_heads: int = 32
    dim: int = 128
    width: int = 4

    @property
    def channels(self) -> int:
        return (2 * self.key_heads + self.value_heads) * self.dim

    def state_bytes(self, state_dtype: torch.dtype) -> int:
        return self.value_heads * self.dim**2 * state_dtype.itemsize


@dataclass(frozen=True, slots=True)
class Step:
    """The work of a call: `count` tokens for each of `rows` rows."""

    rows: int
    count: int

    def metadata(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """rows, query_start_loc and seq_lens. Rows have earlier tokens; the last row is empty."""
        own = torch.arange(self.rows, device=device)
        starts = [min(row, self.rows) * self.count for row in range(self.rows + 2)]
        lengths = torch.full((self.rows + 1,), self.count + 100, device=device)
        return own, torch.tensor(starts, dtype=torch.int32, device=device), lengths.int()


class Inputs:
    """Inputs of a step, which all layers share, and states, which each layer has for itself."""

    def __init__(
        self,
        shape: Shape,
        step: Step,
        layers: int,
        state_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        tokens, dtype = step.rows * step.count, torch.bfloat16
        sizes = [n * shape.dim for n in (shape.key_heads, shape.key_heads, shape.value_heads)]
        self.mixed = torch.randn(tokens, shape.channels, device=device).to(dtype)
        q, k, v = torch.split(self.mixed, sizes, dim=1)
        heads = shape.key_heads, shape.key_heads, shape.value_heads
        self.tokens = [x.view(tokens, n, shape.dim) for x, n in zip((q, k, v), heads, strict=True)]
        gates = torch.randn(tokens, 2 * shape.value_heads, device=device).to(dtype)
        self.tokens += gates.chunk(2, dim=1)
        self.of_heads = torch.randn(2, shape.value_heads, device=device).unbind()
        self.weight = torch.randn(shape.channels, shape.width, device=device).to(dtype)
        num_states = step.rows * (1 if step.count == 1 else 2)  # the second half is for snapshots
        matrix = num_states, shape.value_heads, shape.dim, shape.dim
        window = num_states, shape.channels, shape.width - 1
        self.states = [torch.randn(matrix, device=device).to(state_dtype) for _ in range(layers)]
        self.windows = [torch.randn(window, device=device).to(dtype) for _ in range(layers)]
        self.metadata = step.metadata(device)
        row_bound = make_row_bound(1 if step.count == 1 else 0, device)
        # As in an engine, each prompt takes a snapshot after its last full block of 16 tokens.
        border = (step.count - 1) // 16 * 16
        snapshots = [(border, step.rows + row if border else 0) for row in range(step.rows)]
        self.others = row_bound, torch.tensor([*snapshots, (0, 0)], device=device)

    def delta_rules(self, **tilings: Any) -> Iterator[Callable[[], object]]:
        """A call of the delta rule for each layer. tilings: `step`, `chunk` or `scan`."""
        rule: Callable[..., object] = gated_delta_rule
        if tilings:
            from compiledllm.kernels.delta_rule_triton import delta_rule as rule
        for state in self.states:
            tensors = *self.tokens, *self.of_heads, state, *self.metadata, *self.others
            yield functools.partial(rule, *tensors, **tilings)

    def state_spaces(self) -> Iterator[Callable[[], object]]:
        """A call of the state space for each layer."""
        query, key, value, step, _ = self.tokens
        of_heads = *self.of_heads, self.of_heads[0]
        compute: Callable[..., object] = state_space
        for state in self.states:
            tensors = value, key[:, :1], query[:, :1], step, *of_heads, state
            yield functools.partial(compute, *tensors, *self.metadata, *self.others)

    def convolutions(self) -> Iterator[Callable[[], object]]:
        """A call of the convolution for each layer."""
        for window in self.windows:
            tensors = self.mixed, self.weight, None, window, *self.metadata
            yield functools.partial(short_convolution, *tensors, "silu", *self.others)


def seconds_per_call(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    num_repeats: int = _REPEATS,
    min_s: float = _MIN_S,
) -> float:
    """Seconds of the fastest of several repeats. On a GPU the calls are replayed from a graph.

    min_s: duration of a repeat.
    """

    def run() -> None:
        for call in calls:
            call()

    run()  # compiles
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    once, best = _seconds(run, 1, device), float("inf")
    times = max(1, int(min_s / once))
    for _ in range(num_repeats):
        best = min(best, _seconds(run, times, device))
    return best / len(calls)


def _seconds(run: Callable[[], object], times: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    _synchronize(device)
    return (time.perf_counter() - start) / times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def delta_rule_cost(shape: Shape, step: Step, state_dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that must be moved, and FLOPs: of the recurrence for a row of one token, or of chunks.

    Per token and value head, a chunk of CHUNK tokens has three products with the state, and four
    with the chunk's other tokens: keys with keys, queries with keys, the inverse with values, and
    the scores with values. The inversion is not counted.
    """
    tokens, per_token = step.rows * step.count, (shape.channels + shape.value_heads * shape.dim) * 2
    num_bytes = 2 * step.rows * shape.state_bytes(state_dtype) + tokens * per_token
    products = 3 * shape.dim**2 + (4 * CHUNK * shape.dim if step.count > 1 else 0)
    return num_bytes, 2 * products * shape.value_heads * tokens


def state_space_cost(shape: Shape, step: Step, state_dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that must be moved, and FLOPs: of the recurrence for a row of one token, or of chunks.

    Per token and head, a chunk of CHUNK tokens has two products with the state, and two with the
    chunk's other tokens.
    """
    tokens, inner = step.rows * step.count, shape.value_heads * shape.dim
    num_bytes = 2 * step.rows * shape.state_bytes(state_dtype)
    num_bytes += 2 * tokens * (2 * inner + 2 * shape.dim + shape.value_heads)
    products = 2 * shape.dim**2 + (2 * CHUNK * shape.dim if step.count > 1 else 0)
    return num_bytes, 2 * products * shape.value_heads * tokens


def convolution_cost(shape: Shape, step: Step) -> tuple[int, int]:
    """Bytes that must be moved (states, weights, inputs, outputs), and FLOPs."""
    tokens = step.rows * step.count
    per_channel = 2 * tokens + 2 * step.rows * (shape.width - 1) + shape.width
    return 2 * shape.channels * per_channel, 2 * shape.width * shape.channels * tokens


def make_row(
    op: str, step: Step, seconds: float, cost: tuple[int, int], ceilings: Ceilings, **facts: Any
) -> Row:
    num_bytes, flops = cost
    return {
        "op": op,
        **asdict(step),
        **facts,
        "us": round(seconds * 1e6, 2),
        "bytes": num_bytes,
        "share_of_copy_rate": ceilings.share_of_copy_rate(num_bytes, seconds),
        "flops": flops,
        "tflops_per_s": round(flops / seconds / 1e12, 2),
    }


def tilings(step: Step) -> Iterator[dict[str, Any]]:
    """Other tilings of the kernels that compute this step, one kernel at a time."""
    from compiledllm.kernels.chunked_delta_rule_triton import ChunkTiling, ScanTiling
    from compiledllm.kernels.delta_rule_triton import StepTiling

    if step.count == 1:
        for columns in (8, 16, 32, 64, 128):
            for warps in (1, 2, 4, 8):
                yield {"step": StepTiling(columns, warps)}
        return
    for warps in (4, 8):
        for precision in ("tf32", "tf32x3"):
            yield {"chunk": ChunkTiling(warps, precision)}
    for columns in (16, 32, 64, 128):
        for warps in (4, 8):
            for stages in (1, 2, 3):
                yield {"scan": ScanTiling(columns, warps, stages)}


def measure(arguments: argparse.Namespace, platform: Platform, ceilings: Ceilings) -> Iterator[Row]:
    shape, device = Shape(), platform.device
    steps = [Step(rows, 1) for rows in arguments.rows] + arguments.prompts
    for step in steps:
        layers = arguments.layers if step.count == 1 else min(arguments.layers, 4)
        for state_dtype in (torch.float32, torch.bfloat16):
            inputs = Inputs(shape, step, layers, state_dtype, device)
            cost = delta_rule_cost(shape, step, state_dtype)
            name = str(state_dtype).removeprefix("torch.")
            seconds = seconds_per_call(list(inputs.delta_rules()), device)
            yield make_row("gated_delta_rule", step, seconds, cost, ceilings, state=name)
            if state_dtype != torch.float32:
                continue
            seconds = seconds_per_call(list(inputs.convolutions()), device)
            cost_of_convolution = convolution_cost(shape, step)
            yield make_row("short_convolution", step, seconds, cost_of_convolution, ceilings)
            seconds = seconds_per_call(list(inputs.state_spaces()), device)
            cost_of_space = state_space_cost(shape, step, state_dtype)
            yield make_row("state_space", step, seconds, cost_of_space, ceilings, state=name)
            for tiling in tilings(step) if arguments.sweep else ():
                facts = {"state": name, "tiling": repr(next(iter(tiling.values())))}
                try:
                    seconds = seconds_per_call(list(inputs.delta_rules(**tiling)), device)
                except Exception as error:  # more registers or shared memory than there are
                    yield {"op": "gated_delta_rule", **asdict(step), **facts, "error": repr(error)}
                    continue
                yield make_row("gated_delta_rule", step, seconds, cost, ceilings, **facts)


def _prompts(text: str) -> Step:
    rows, _, count = text.partition("x")
    return Step(int(rows), int(count))


@torch.inference_mode()
def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--rows", type=int, nargs="*", default=[1, 8, 64], help="of decode steps")
    default = [Step(1, 1024), Step(1, 8192), Step(8, 8192)]
    add("--prompts", type=_prompts, nargs="*", default=default, help="ROWSxTOKENS")
    add("--layers", type=int, default=24, help="with states of their own (24)")
    add("--sweep", action="store_true", help="measure other tilings too (CUDA only)")
    add("--output-json", type=Path, help="default: standard output")
    options = parser.parse_args(arguments)
    platform = Platform.detect()
    ceilings = measure_ceilings(platform, torch.bfloat16)
    rows = collected(measure(options, platform, ceilings))
    facts = {"ceilings": asdict(ceilings), "shape": asdict(Shape()), "rows": rows}
    write_facts(script_facts("state_layers", platform) | facts, options.output_json)


if __name__ == "__main__":
    run_script(main)
