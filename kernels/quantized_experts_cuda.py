"""Expert MLPs with quantised matrices on a GPU.

An item is a pair of a token and one of its experts, as in `moe_triton`. Products have blocks of
items of one expert. On Hopper, `warpgroup_linear_cuda` multiplies if experts have two items or more
on average, or eight if their codes have 8 bits. Otherwise `quantized_cuda` multiplies up to 32
items per expert on average, and for more items all experts are dequantised to 16 bits and
`moe_triton` multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from compiledllm.kernels import moe_triton, warpgroup_linear_cuda
from compiledllm.kernels.arrange_triton import Gate, arranged
from compiledllm.kernels.gate_triton import gate
from compiledllm.kernels.launch import is_hopper
from compiledllm.kernels.moe_routing_triton import Routing, sort_items
from compiledllm.kernels.packed import Layout
from compiledllm.kernels.quantized import PACKED_BITS
from compiledllm.kernels.quantized_cuda import Tiling, dequantized, launch_product
from compiledllm.kernels.tables import ExpertProduct, expert_tiling
from compiledllm.kernels.warpgroup_linear_cuda import Matrix

# The fewest items, on average over all experts, for `warpgroup_linear_cuda`
_MIN_ITEMS_OF_EXPERT = 2
_MIN_ITEMS_OF_8_BIT_EXPERT = 8
_MAX_ROWS = 64  # of a block of `quantized_cuda`
_MAX_ITEMS_OF_EXPERT = 32  # on average over all experts; with more, all experts are dequantised


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """The matrices of all experts: `packed.Packed`'s tensors with a first dimension of experts."""

    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    row_scales: Tensor  # float32 [experts, N]
    bias: Tensor | None
    layout: Layout

    @property
    def num_outputs(self) -> int:
        return self.row_scales.shape[1]

    @property
    def parts(self) -> Matrix:
        return Matrix(*self._tensors, self.layout)

    @property
    def _tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
        return self.codes, self.scales, self.zeros, self.row_scales, self.bias

    def times(
        self, x: Tensor, out: Tensor, routing: Routing, tiling: Tiling | None = None
    ) -> Tensor:
        """Fill and return `out` [items, N]: each item's row of x times its expert's matrix.

        tiling: of `cuda/linear.cu`; None: the one in the GPU's table, or else by the rule.
        """
        t = tiling or tiling_for(self.layout, routing, self.num_outputs, x.shape[1])
        return launch_product(x, *self._tensors, self.layout, out, t, routing)

    def dequantized(self, num_inputs: int, dtype: torch.dtype) -> Tensor:
        """All matrices in a 16-bit dtype, [experts, N, num_inputs]."""
        num_experts = len(self.codes)
        out = torch.empty(
            num_experts, self.num_outputs, num_inputs, dtype=dtype, device=self.codes.device
        )
        for expert in range(num_experts):
            parts = (
                self.codes[expert],
                None if self.scales is None else self.scales[expert],
                None if self.zeros is None else self.zeros[expert],
                self.row_scales[expert],
            )
            dequantized(*parts, self.layout, self.num_outputs, num_inputs, dtype, out[expert])
        return out


def tiling_for(layout: Layout, routing: Routing, num_outputs: int, num_inputs: int) -> Tiling:
    """The tiling in the GPU's table, or else by the rule."""
    sizes = routing.num_experts, routing.rows, num_outputs, num_inputs, routing.num_items
    measured = expert_tiling(ExpertProduct(str(layout), *sizes))
    return Tiling(*measured) if measured else rule_for(layout.code, routing.rows)


def rule_for(code: str, rows: int) -> Tiling:
    """rows: the most items of a block."""
    if code in ("fp8", "int8"):
        return Tiling(1, 1, 4, 1)
    return Tiling(1, 1, 4, 2, 2) if rows <= 8 else Tiling(1, 1, 4, 2, 1)


def experts(
    x: Tensor,
    expert_ids: Tensor,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    alpha: float,
    limit: float,
    activation: str = "silu",
) -> Tensor:
    """See `packed.packed_experts`. Returns float32 [tokens, top_k, hidden]."""
    (num_tokens, hidden), (_, top_k) = x.shape, expert_ids.shape
    num_items, num_experts = expert_ids.numel(), len(gate_up.codes)
    size = gate_up.num_outputs // 2
    if has_many_items(num_items, num_experts, gate_up.layout, down.layout):
        gate_of = Gate(alpha, limit, activation)
        return _experts_of_warpgroups(x, expert_ids, gate_up, down, gate_of)
    if num_items > _MAX_ITEMS_OF_EXPERT * num_experts:
        weights = gate_up.dequantized(hidden, x.dtype), down.dequantized(size, x.dtype)
        biases = gate_up.bias, down.bias
        return moe_triton.experts(x, expert_ids, *weights, *biases, alpha, limit, activation)
    routing = route(expert_ids, num_experts)
    both = gate_up.times(x, x.new_empty((num_items, 2 * size)), routing)
    inner = gate(both, alpha, limit, activation)
    out = x.new_empty((num_items, hidden), dtype=torch.float32)
    down.times(inner, out, replace(routing, items_per_row=1))  # `inner` has a row per item
    return out.view(num_tokens, top_k, hidden)


def _experts_of_warpgroups(
    x: Tensor,
    expert_ids: Tensor,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    gate_of: Gate,
) -> Tensor:
    routing = route(expert_ids, len(gate_up.codes), warpgroup_linear_cuda.MAX_ITEMS)
    (num_tokens, hidden), (_, top_k) = x.shape, expert_ids.shape
    t = warpgroup_linear_cuda.tiling_of_blocks(routing.rows)
    rows = arranged(x, hidden, gate_up.layout, t.tokens, routing, None)
    both = x.new_empty((routing.num_items, gate_up.num_outputs))
    warpgroup_linear_cuda.product(rows, gate_up.parts, both, t, routing)
    del rows  # tensors are freed as soon as possible, as their memory is taken from the KV cache
    by_item, size = replace(routing, items_per_row=1), gate_up.num_outputs // 2
    inner = arranged(both, size, down.layout, t.tokens, by_item, gate_of)
    del both
    out = x.new_empty((routing.num_items, hidden), dtype=torch.float32)
    warpgroup_linear_cuda.product(inner, down.parts, out, t, routing)
    return out.view(num_tokens, top_k, hidden)


def has_many_items(num_items: int, num_experts: int, *layouts: Layout) -> bool:
    """Whether `warpgroup_linear_cuda` multiplies by experts of these layouts."""
    are_packed = all(layout.code in PACKED_BITS for layout in layouts)
    fewest = _MIN_ITEMS_OF_EXPERT if are_packed else _MIN_ITEMS_OF_8_BIT_EXPERT
    return num_items >= fewest * num_experts and is_hopper()


def uses_few_rows(num_items: int, num_experts: int, layout: Layout) -> bool:
    """Whether `quantized_cuda` multiplies by experts that are all of this layout."""
    has_few = num_items <= _MAX_ITEMS_OF_EXPERT * num_experts
    return has_few and not has_many_items(num_items, num_experts, layout)


def route(expert_ids: Tensor, num_experts: int, max_rows: int = _MAX_ROWS) -> Routing:
    """Sort the items into blocks, of which the average expert fills half of one, or several.

    max_rows: the most items of a block.
    """
    num_tokens, top_k = expert_ids.shape
    num_items = num_tokens * top_k
    if not moe_triton.needs_sorting(num_tokens, top_k, num_experts):
        ids = expert_ids.reshape(-1)
        return Routing(ids, None, 1, num_items, num_experts, top_k)
    average = triton.cdiv(2 * num_items, num_experts)
    rows = min(max(triton.next_power_of_2(average), 8), max_rows)
    items, block_experts = sort_items(expert_ids, num_experts, rows)
    return Routing(block_experts, items, rows, num_items, num_experts, top_k)
