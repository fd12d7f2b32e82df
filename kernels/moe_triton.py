"""Experts' products in Triton: tokens sorted by expert on the device, then two grouped products.

An item is a token at one of its experts. Items are laid out expert by expert, each expert's padded
to whole blocks of rows, so that a program has one expert's weights; how many blocks there are at
most follows from shapes alone. A captured call serves any routing.
"""

# Triton functions are typed by what they are called with.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_FOR_ONE_PROGRAM = 4096  # items that a single program sorts; more are sorted by torch
_TILE = 32  # items sorted at once


@dataclass(frozen=True, slots=True)
class Tiling:
    """Shape of a program's work. rows: items; columns: input features per iteration."""

    rows: int
    outputs: int
    columns: int
    num_warps: int
    num_stages: int


def tiling_for(num_items: int, num_experts: int, itemsize: int) -> Tiling:
    """By how many items an expert gets on average."""
    if itemsize == 4:
        return Tiling(16 if num_items < 16 * num_experts else 32, 32, 32, 4, 2)
    if num_items < 16 * num_experts:
        return Tiling(16, 32, 128, 4, 4)
    return Tiling(64, 64, 64, 4, 3) if num_items < 128 * num_experts else Tiling(128, 64, 64, 8, 3)


@triton.jit
def _sort_kernel(
    expert_ids, items, block_experts, num_items, num_blocks,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Where each item goes, and which expert each block belongs to; `items` is full of padding."""
    expert, lane = tl.arange(0, EXPERTS), tl.arange(0, TILE)
    counts = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, num_items, TILE):
        item = first + lane
        ids = tl.load(expert_ids + item, item < num_items, other=-1)
        counts += tl.sum((ids[:, None] == expert[None, :]).to(tl.int32), 0)
    padded = (counts + ROWS - 1) // ROWS * ROWS
    ends = tl.cumsum(padded, 0)
    following = ends - padded  # the next free place of each expert
    for first in range(0, num_items, TILE):
        item = first + lane
        ids = tl.load(expert_ids + item, item < num_items, other=-1)
        is_its = (ids[:, None] == expert[None, :]).to(tl.int32)
        place = tl.sum(is_its * (following[None, :] + tl.cumsum(is_its, 0) - 1), 1)
        tl.store(items + place, item, item < num_items)
        following += tl.sum(is_its, 0)
    for first in range(0, num_blocks, TILE):
        block = first + lane
        before = tl.sum((ends[None, :] <= (block * ROWS)[:, None]).to(tl.int32), 1)
        tl.store(block_experts + block, before, block < num_blocks)


def sort_items(expert_ids: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """int32 [blocks * rows], items by expert, padded with their number; int32 [blocks], experts.

    expert_ids: int64 [tokens, top_k]. Blocks without items have expert `num_experts` or above.
    """
    ids, num_items = expert_ids.reshape(-1), expert_ids.numel()
    num_blocks = min(num_items, num_experts) + num_items // rows
    items = torch.full((num_blocks * rows,), num_items, dtype=torch.int32, device=ids.device)
    block_experts = torch.empty(num_blocks, dtype=torch.int32, device=ids.device)
    if num_items <= _MOST_FOR_ONE_PROGRAM:
        _sort_kernel[(1,)](
            ids, items, block_experts, num_items, num_blocks,
            EXPERTS=triton.next_power_of_2(num_experts), ROWS=rows, TILE=_TILE,
        )  # fmt: skip
        return items, block_experts
    counts = torch.zeros(num_experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, ids, torch.ones_like(ids))
    padded = (counts + rows - 1) // rows * rows
    ends = padded.cumsum(0)
    order = ids.argsort(stable=True)
    sorted_ids = ids[order]
    rank = torch.arange(num_items, device=ids.device) - (counts.cumsum(0) - counts)[sorted_ids]
    items[(ends - padded)[sorted_ids] + rank] = order.int()
    starts = torch.arange(num_blocks, device=ids.device) * rows
    block_experts.copy_(torch.searchsorted(ends, starts, right=True))
    return items, block_experts


@triton.jit
def _grouped_kernel(
    x, weight, bias, out, items, block_experts, item_weights, num_items, num_experts, num_outputs,
    x_stride, weight_stride, out_stride, alpha, limit, NUM_INPUTS: tl.constexpr,
    ITEMS_PER_ROW: tl.constexpr, IS_GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[item] = x[item // ITEMS_PER_ROW] @ weight[expert].T, and bias[expert].

    IS_GATED: silu of it times the product with the rows `num_outputs` further on; HAS_LIMIT: the
    clamped form of that, see `moe.moe_experts`. Else: times the item's weight.
    """
    block = tl.program_id(0)
    expert = tl.load(block_experts + block)
    if expert >= num_experts:
        return
    item = tl.load(items + block * ROWS + tl.arange(0, ROWS))
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, COLUMNS)[None, :]
    is_item, is_output = (item < num_items)[:, None], (output < num_outputs)[:, None]
    inputs = x + (item // ITEMS_PER_ROW).to(tl.int64)[:, None] * x_stride + column
    weights = weight + expert.to(tl.int64) * weight_stride
    weights += output.to(tl.int64)[:, None] * NUM_INPUTS + column
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    other = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in range(0, NUM_INPUTS, COLUMNS):
        there = first + column < NUM_INPUTS
        a = tl.load(inputs + first, is_item & there, other=0.0)
        w = tl.load(weights + first, is_output & there, other=0.0)
        total = tl.dot(a, tl.trans(w), total, input_precision="ieee")
        if IS_GATED:
            up = weights + first + num_outputs.to(tl.int64) * NUM_INPUTS
            w = tl.load(up, is_output & there, other=0.0)
            other = tl.dot(a, tl.trans(w), other, input_precision="ieee")
    if HAS_BIAS:
        biases = bias + expert * num_outputs * (2 if IS_GATED else 1) + output
        total += tl.load(biases, output < num_outputs, other=0.0).to(tl.float32)[None, :]
        if IS_GATED:
            biases += num_outputs
            other += tl.load(biases, output < num_outputs, other=0.0).to(tl.float32)[None, :]
    if IS_GATED:
        # Rounded where torch rounds, between the products.
        gate = total.to(out.dtype.element_ty).to(tl.float32)
        up = other.to(out.dtype.element_ty).to(tl.float32)
        if HAS_LIMIT:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit) + 1
            gate = gate / (1 + tl.exp(-alpha * gate))
        else:
            gate = gate / (1 + tl.exp(-gate))
        total = gate.to(out.dtype.element_ty).to(tl.float32) * up
    else:
        scale = tl.load(item_weights + item, item < num_items, other=0.0).to(tl.float32)
        total = total * scale[:, None]
    target = out + item.to(tl.int64)[:, None] * out_stride + output[None, :]
    tl.store(target, total.to(out.dtype.element_ty), is_item & tl.trans(is_output))


def experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 1.0,
    limit: float = 0.0,
) -> Tensor:
    """See `moe.moe_experts`."""
    (num_tokens, hidden), top_k = x.shape, expert_ids.shape[1]
    if num_tokens == 0:
        return torch.empty_like(x)
    num_experts, _, size = down.shape
    assert x.stride(1) == 1 and gate_up.is_contiguous() and down.is_contiguous()
    num_items = num_tokens * top_k
    t = tiling_for(num_items, num_experts, x.element_size())
    items, block_experts = sort_items(expert_ids, num_experts, t.rows)
    inner = x.new_empty((num_items, size))
    outer = x.new_empty((num_items, hidden), dtype=torch.float32)
    plan = items, block_experts, expert_weights.contiguous()
    shape = {
        "ROWS": t.rows, "OUTPUTS": t.outputs, "COLUMNS": t.columns,
        "num_warps": t.num_warps, "num_stages": t.num_stages,
    }  # fmt: skip
    blocks = len(block_experts)
    _grouped_kernel[(blocks, triton.cdiv(size, t.outputs))](
        x, gate_up, x if gate_up_bias is None else gate_up_bias, inner, *plan, num_items,
        num_experts, size, x.stride(0), gate_up.stride(0), size, alpha, limit,
        NUM_INPUTS=hidden, ITEMS_PER_ROW=top_k, IS_GATED=True, HAS_BIAS=gate_up_bias is not None,
        HAS_LIMIT=limit != 0, **shape,
    )  # fmt: skip
    _grouped_kernel[(blocks, triton.cdiv(hidden, t.outputs))](
        inner, down, x if down_bias is None else down_bias, outer, *plan, num_items,
        num_experts, hidden, size, down.stride(0), hidden, alpha, limit,
        NUM_INPUTS=size, ITEMS_PER_ROW=1, IS_GATED=False, HAS_BIAS=down_bias is not None,
        HAS_LIMIT=False, **shape,
    )  # fmt: skip
    return outer.view(num_tokens, top_k, hidden).sum(1).to(x.dtype)
