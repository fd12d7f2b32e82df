"""Inputs of `warpgroup_linear_cuda`, in the order in which the tensor cores read them."""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compiledllm.kernels.gate_triton import gated
from compiledllm.kernels.launch import launch_options
from compiledllm.kernels.moe_routing_triton import Routing
from compiledllm.kernels.packed import Layout
from compiledllm.kernels.records import UNIT

_COLUMNS = 512  # of a program
_ORDERS = {"int6": 1, "fp8": 2}  # of the inputs of codes; 0: all others


@triton.jit(do_not_specialize=["num_items", "num_rows", "num_units"])
def _arrange_kernel(
    x, out, items, block_experts, num_items, num_rows, num_experts, num_inputs, num_units, x_stride,
    alpha, limit, ITEMS_PER_ROW: tl.constexpr, HAS_EXPERTS: tl.constexpr, ORDER: tl.constexpr,
    IS_GATED: tl.constexpr, HAS_LIMIT: tl.constexpr, IS_GELU: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Each program writes some columns of eight rows. items: the rows' items, with HAS_EXPERTS."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    eight = tl.program_id(0).to(tl.int64)
    block, eight_of_block = eight // (ROWS // 8), eight % (ROWS // 8)
    within = tl.arange(0, 8)
    row = eight * 8 + within
    if HAS_EXPERTS:
        if tl.load(block_experts + block) >= num_experts:
            return
        if tl.load(items + eight * 8) >= num_items:
            return
        item = tl.load(items + row)
        is_row = item < num_items
        source = x + (item // ITEMS_PER_ROW).to(tl.int64)[:, None] * x_stride
    else:
        is_row = row < num_rows
        source = x + row[:, None] * x_stride
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_input = is_row[:, None] & (column < num_inputs)[None, :]
    value = tl.load(source + column[None, :], is_input, other=0.0)
    if IS_GATED:
        up = tl.load(source + num_inputs + column[None, :], is_input, other=0.0).to(tl.float32)
        first = value.to(tl.float32)
        value = gated(first, up, alpha, limit, x.dtype.element_ty, HAS_LIMIT, IS_GELU)
        value = tl.where(is_input, value, 0.0).to(out.dtype.element_ty)
    # A lane's eight inputs: two operands of 16 inputs, in each two halves, in each two neighbours.
    if ORDER == 0:
        parts = tl.reshape(value, [8, COLUMNS // 32, 4, 2, 2, 2])  # lane, operand, half, neighbour
        parts = tl.permute(parts, [0, 1, 3, 4, 2, 5])
    elif ORDER == 1:
        parts = tl.reshape(value, [8, COLUMNS // 32, 2, 4, 2, 2])  # operand, lane, half, neighbour
        parts = tl.permute(parts, [0, 1, 2, 4, 3, 5])
    else:  # a lane has eight neighbours in each of two quarters
        parts = tl.reshape(value, [8, COLUMNS // 64, 4, 2, 2, 2, 2])
        parts = tl.permute(parts, [0, 1, 3, 4, 5, 2, 6])
    value = tl.reshape(parts, [8, COLUMNS])
    unit, part, piece = column // 128, column // 64 % 2, column // 8 % 8
    start = (((block * num_units + unit) * (ROWS // 8) + eight_of_block) * 2 + part) * 512
    swizzled = within[:, None] * 64 + (piece[None, :] ^ within[:, None]) * 8 + column[None, :] % 8
    target = tl.max_contiguous(tl.multiple_of(start[None, :] + swizzled, [1, 8]), [1, 8])
    tl.store(out + target, value, (unit < num_units)[None, :])


@dataclass(frozen=True, slots=True)
class Gate:
    """The gate of `moe.moe_experts`, which is applied to [gate, up] while x is arranged."""

    alpha: float
    limit: float
    activation: str


def arranged(
    x: Tensor,
    num_inputs: int,
    layout: Layout,
    rows: int,
    routing: Routing | None,
    gate: Gate | None,
) -> Tensor:
    """x in the order of `cuda/warpgroup_linear.cu`: [blocks, units, rows / 8, 2, 8, 64].

    x: [any number of rows, num_inputs], or with `gate` [any, 2 * num_inputs], gate first. A unit is
    128 inputs, the last of which may be padding. rows: of a block, a multiple of 8. routing: which
    rows of x each block has; None: consecutive rows. Rows of the result without a row of x are
    undefined. Each 64 inputs are eight pieces, permuted by XOR with the row's number modulo 8. Each
    32 inputs are in the order in which a product's lanes have them (`kernels/records.py`).
    """
    num_blocks = -(-len(x) // rows) if routing is None else len(routing.block_experts)
    num_units = -(-num_inputs // UNIT)
    out = x.new_empty((num_blocks, num_units, rows // 8, 2, 8, 64))
    g = gate or Gate(1.0, 0.0, "silu")
    _arrange_kernel[(num_blocks * rows // 8, triton.cdiv(num_units * UNIT, _COLUMNS))](
        x, out, x if routing is None else routing.items,
        x if routing is None else routing.block_experts,
        0 if routing is None else routing.num_items, len(x),
        0 if routing is None else routing.num_experts, num_inputs, num_units, x.stride(0),
        g.alpha, g.limit,
        ITEMS_PER_ROW=1 if routing is None else routing.items_per_row,
        HAS_EXPERTS=routing is not None, ORDER=_ORDERS.get(layout.code, 0),
        IS_GATED=gate is not None, HAS_LIMIT=g.limit != 0, IS_GELU=g.activation == "gelu_tanh",
        ROWS=rows, COLUMNS=_COLUMNS, **launch_options(),
    )  # fmt: skip
    return out
