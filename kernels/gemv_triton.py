"""The product of a weight matrix and one row, for decoding a single request on a GPU.

It is bound by reading the weights, and a general matrix product leaves up to half of that rate
unused at these sizes. Each program owns a few output features and reads their rows of the matrix.
"""

# Triton functions are typed by what they are called with.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GemvTiling:
    """Shape of a program's work: output features, input features per iteration."""

    rows: int
    columns: int
    num_warps: int


def gemv_tiling(num_outputs: int, num_inputs: int) -> GemvTiling:
    """Few rows a program where there are few outputs, so that every multiprocessor has work."""
    columns = min(triton.next_power_of_2(num_inputs), 1024)
    rows = 2 if num_outputs <= 4096 else 4
    return GemvTiling(rows, columns, 4)


@triton.jit
def _gemv_kernel(
    x, weight, bias, out, num_outputs, row_stride,
    NUM_INPUTS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_outputs
    start = weight + row.to(tl.int64)[:, None] * row_stride
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, NUM_INPUTS, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < NUM_INPUTS)[None, :]
        w = tl.load(start + column[None, :], mask, other=0.0, eviction_policy="evict_first")
        v = tl.load(x + column, column < NUM_INPUTS, other=0.0)
        total += w.to(tl.float32) * v.to(tl.float32)[None, :]
    result = tl.sum(total, 1)
    if HAS_BIAS:
        result += tl.load(bias + row, inside, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), inside)


def gemv(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiling: GemvTiling | None = None
) -> Tensor:
    """x [1, num_inputs], weight [num_outputs, num_inputs], bias [num_outputs] -> [1, num_outputs].

    Sums in float32.
    """
    num_outputs, num_inputs = weight.shape
    out = torch.empty(1, num_outputs, dtype=x.dtype, device=x.device)
    tiling = tiling or gemv_tiling(num_outputs, num_inputs)
    _gemv_kernel[(triton.cdiv(num_outputs, tiling.rows),)](
        x, weight, weight if bias is None else bias, out, num_outputs, weight.stride(0),
        NUM_INPUTS=num_inputs, HAS_BIAS=bias is not None, ROWS=tiling.rows, COLUMNS=tiling.columns,
        num_warps=tiling.num_warps,
    )  # fmt: skip
    return out
