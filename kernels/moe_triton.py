"""Expert MLPs in Triton: two grouped matmuls over the items of a step.

An item is a pair of a token and one of its experts. Items are sorted by expert, and the items of
each expert are padded to whole blocks of rows, so that a program reads the weights of one expert.
The maximum number of blocks follows from shapes alone. If there are few items, each item is a block
and nothing is sorted.
"""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compiledllm.kernels.gate_triton import gated
from compiledllm.kernels.launch import launch_options
from compiledllm.kernels.moe_routing_triton import sort_items
from compiledllm.kernels.tables import SIXTEEN_BITS, ExpertProduct, expert_tiling


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tile of one program.

    rows: items, the same for both matmuls. outputs: rows of a weight matrix; in the first matmul
    half of them are gate and half up. columns: input features per iteration. group: number of item
    blocks that consecutive programs compute for the same outputs, so that shared weights stay in
    the L2 cache.
    """

    rows: int
    outputs: int
    columns: int
    num_warps: int
    num_stages: int
    group: int = 8

    @property
    def measured(self) -> tuple[int, ...]:
        """The fields that the GPU's table has."""
        return self.outputs, self.columns, self.num_warps, self.num_stages

    def with_measured(self, fields: Sequence[int]) -> Tiling:
        """This tiling with other values of `measured`."""
        outputs, columns, num_warps, num_stages = fields
        return Tiling(self.rows, outputs, columns, num_warps, num_stages, self.group)


def tiling_for(num_items: int, weight: Tensor) -> Tiling:
    """The tiling in the GPU's table, or else by the rules. weight: see `grouped_product`."""
    rule = rule_for(num_items, len(weight), weight.dtype)
    if weight.dtype == torch.float32:
        return rule
    num_experts, num_outputs, num_inputs = weight.shape
    sizes = num_experts, rule.rows, num_outputs, num_inputs, num_items
    measured = expert_tiling(ExpertProduct(SIXTEEN_BITS, *sizes))
    return rule.with_measured(measured) if measured else rule


def rule_for(num_items: int, num_experts: int, dtype: torch.dtype) -> Tiling:
    """Choose rows for twice the average number of items per expert, or the next power of two.

    An expert with more items needs a second block, which reads the expert's weights again. With few
    items the matmuls are bound by reading weights: each of two programs per multiprocessor has up
    to 96 KiB of loads in flight. For 14 shapes on an H100 (1 to 64 tokens; 8, 32 and 128 experts)
    the tiling is the fastest or within 4 % of the fastest: weights are read at 2.3 TB/s for 8 small
    experts and at 2.9 to 3.1 TB/s for larger weights.
    """
    rows = triton.next_power_of_2(triton.cdiv(2 * num_items, num_experts))
    if dtype == torch.float32:
        return Tiling(min(max(rows, 16), 32), 32, 32, 4, 2)
    if rows <= 16:
        return Tiling(16, 64, 128, 4, 4)
    if rows <= 32:
        return Tiling(32, 64, 128, 4, 4)
    return Tiling(64, 128, 64, 4, 4) if rows <= 64 else Tiling(128, 128, 64, 8, 3)


def needs_sorting(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether enough items share an expert to make sorting worthwhile."""
    return num_tokens > 1 and 4 * num_tokens * top_k > num_experts


@triton.jit
def _gated(total, alpha, limit, dtype, HAS_LIMIT: tl.constexpr, IS_GELU: tl.constexpr):
    """`gate_triton.gated`, [n, rows]. total: [2 * n, rows], alternately 8 gate and 8 up outputs."""
    n: tl.constexpr = total.shape[0] // 2
    parts = tl.reshape(total, [n // 8, 2, 8, total.shape[1]])
    gate, up = tl.split(tl.permute(parts, [0, 2, 3, 1]))
    # Round to the output dtype at the same points as torch.
    gate = tl.reshape(gate, [n, total.shape[1]]).to(dtype).to(tl.float32)
    up = tl.reshape(up, [n, total.shape[1]]).to(dtype).to(tl.float32)
    return gated(gate, up, alpha, limit, dtype, HAS_LIMIT, IS_GELU)


@triton.jit(do_not_specialize=["num_items", "num_blocks"])
def _grouped_kernel(
    x, weight, bias, out, items, block_experts, num_items, num_blocks, num_experts, x_stride, alpha,
    limit, NUM_OUTPUTS: tl.constexpr, NUM_INPUTS: tl.constexpr, ITEMS_PER_ROW: tl.constexpr,
    IS_SORTED: tl.constexpr, IS_GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr, IS_GELU: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out[item] = x[item // ITEMS_PER_ROW] @ weight[expert].T + bias[expert].

    IS_GATED: out is silu(gate) * up, where weight rows 0 to NUM_OUTPUTS - 1 of an expert are those
    of gate, and the next NUM_OUTPUTS rows are those of up. HAS_LIMIT, IS_GELU: other forms, see
    `moe.moe_experts`. Without IS_SORTED, each item is a block and `block_experts` holds the items'
    experts.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    outputs_at_once: tl.constexpr = OUTPUTS // 2 if IS_GATED else OUTPUTS
    num_tiles: tl.constexpr = (NUM_OUTPUTS + outputs_at_once - 1) // outputs_at_once
    program = tl.program_id(0)
    group = program // (GROUP * num_tiles)
    in_group = program - group * GROUP * num_tiles
    group_size = tl.minimum(num_blocks - group * GROUP, GROUP)
    block, tile = group * GROUP + in_group % group_size, in_group // group_size

    expert = tl.load(block_experts + block).to(tl.int32)
    if expert >= num_experts:
        return
    lane, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    if IS_SORTED:
        item = tl.load(items + block * ROWS + lane)
    else:
        item = tl.where(lane == 0, block, num_items)
    is_item = (item < num_items)[None, :]

    row = tl.arange(0, OUTPUTS)
    if IS_GATED:
        output = tile * outputs_at_once + row // 16 * 8 + row % 8
        row = tl.minimum(output, NUM_OUTPUTS - 1) + row // 8 % 2 * NUM_OUTPUTS
        row += expert * 2 * NUM_OUTPUTS
    else:
        row = expert * NUM_OUTPUTS + tl.minimum(tile * outputs_at_once + row, NUM_OUTPUTS - 1)
    weights = weight + row.to(tl.int64)[:, None] * NUM_INPUTS + column[None, :]
    inputs = x + (item // ITEMS_PER_ROW).to(tl.int64)[None, :] * x_stride + column[:, None]
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for first in range(0, NUM_INPUTS, COLUMNS):
        if NUM_INPUTS % COLUMNS == 0:
            w = tl.load(weights + first)
            v = tl.load(inputs + first, is_item, other=0.0)
        else:
            is_input = first + column < NUM_INPUTS
            w = tl.load(weights + first, is_input[None, :], other=0.0)
            v = tl.load(inputs + first, is_item & is_input[:, None], other=0.0)
        total = tl.dot(w, v, total, input_precision="ieee")

    if HAS_BIAS:
        total += tl.load(bias + row).to(tl.float32)[:, None]
    if IS_GATED:
        total = _gated(total, alpha, limit, out.dtype.element_ty, HAS_LIMIT, IS_GELU)
    output = tile * outputs_at_once + tl.arange(0, outputs_at_once)
    target = out + item.to(tl.int64)[None, :] * NUM_OUTPUTS + output[:, None]
    tl.store(target, total.to(out.dtype.element_ty), (output < NUM_OUTPUTS)[:, None] & is_item)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which items and which expert each block has, see `moe_routing_triton.sort_items`.

    items: None if the items are not sorted. Then block i has item i only, and `block_experts`
    contains the items' experts.
    """

    block_experts: Tensor
    items: Tensor | None

    @classmethod
    def of(cls, expert_ids: Tensor, num_experts: int, rows: int) -> Plan:
        num_tokens, top_k = expert_ids.shape
        if not needs_sorting(num_tokens, top_k, num_experts):
            return cls(expert_ids.reshape(-1), None)
        items, block_experts = sort_items(expert_ids, num_experts, rows)
        return cls(block_experts, items)


def grouped_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    plan: Plan,
    t: Tiling,
    is_gated: bool = False,
    alpha: float = 1.0,
    limit: float = 0.0,
    activation: str = "silu",
) -> Tensor:
    """Run one grouped matmul. Fills and returns `out`, [items, outputs].

    x: [tokens or items, inputs]. weight: [experts, outputs, inputs], or [experts, 2 * outputs,
    inputs] if gated. bias: [experts, weight.shape[1]]. t.rows: the `rows` of the plan. is_gated,
    alpha, limit, activation: apply the gate of `moe.moe_experts` to the product.
    """
    num_experts, num_rows, num_inputs = weight.shape
    num_items, num_outputs = out.shape
    num_blocks = len(plan.block_experts)
    grid = (num_blocks * triton.cdiv(num_rows, t.outputs),)
    _grouped_kernel[grid](
        x, weight, x if bias is None else bias, out,
        plan.block_experts if plan.items is None else plan.items, plan.block_experts,
        num_items, num_blocks, num_experts, x.stride(0), alpha, limit,
        NUM_OUTPUTS=num_outputs, NUM_INPUTS=num_inputs, ITEMS_PER_ROW=num_items // len(x),
        IS_SORTED=plan.items is not None, IS_GATED=is_gated, HAS_BIAS=bias is not None,
        HAS_LIMIT=limit != 0, IS_GELU=activation == "gelu_tanh", ROWS=t.rows, OUTPUTS=t.outputs,
        COLUMNS=t.columns, GROUP=t.group,
        num_warps=t.num_warps, num_stages=t.num_stages, **launch_options(),
    )  # fmt: skip
    return out


def experts(
    x: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 1.0,
    limit: float = 0.0,
    activation: str = "silu",
) -> Tensor:
    """See `moe.moe_experts`."""
    (num_tokens, hidden), top_k = x.shape, expert_ids.shape[1]
    num_experts, _, size = down.shape
    assert x.stride(1) == 1 and gate_up.is_contiguous() and down.is_contiguous()
    out = x.new_empty((num_tokens, top_k, hidden), dtype=torch.float32)
    if num_tokens == 0:
        return out
    num_items = num_tokens * top_k
    first, second = tiling_for(num_items, gate_up), tiling_for(num_items, down)
    plan = Plan.of(expert_ids, num_experts, first.rows)
    inner = x.new_empty((num_items, size))
    grouped_product(x, gate_up, gate_up_bias, inner, plan, first, True, alpha, limit, activation)
    grouped_product(inner, down, down_bias, out.view(num_items, hidden), plan, second)
    return out
