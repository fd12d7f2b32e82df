"""Batch-invariant kernels: a row's result does not depend on the other rows, bit for bit.

Libraries choose the order of a sum by the number of rows, so a request's last bits depend on the
rest of the batch. In these kernels the order follows from the weights' shape alone: matmuls iterate
over the inputs with the same instruction for any number of rows, one program normalises a row, and
attention iterates over the keys in tiles at fixed positions (`paged_attention_triton`,
fixed_order).
"""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from compiledllm.kernels.paged_attention_triton import TritonBackend


class FixedOrderBackend(TritonBackend):
    """Triton's backend with a fixed order of sums over keys.

    It takes no `SampledTokens`: whether a step runs its last blocks for sampled tokens only depends
    on the number of tokens in the step, and so on other requests.
    """

    takes_sampled_tokens = False
    paged_attention = staticmethod(partial(TritonBackend.paged_attention, fixed_order=True))


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tile of one program. columns: input features per iteration."""

    rows: int
    outputs: int
    columns: int
    num_warps: int
    num_stages: int


def tiling_for(num_rows: int, num_outputs: int, dtype: torch.dtype) -> Tiling:
    """Choose few outputs per program for few rows, so that every multiprocessor has work.

    All tilings of a dtype sum in the same order: 16-bit types in steps of 16 inputs, as the tensor
    cores do for any tile of at least 64 rows; float32 in steps of one input.
    """
    if dtype == torch.float32:
        return Tiling(32, 32, 32, 4, 2)
    if num_rows > 64:
        return Tiling(128, 128, 64, 8, 3)
    return Tiling(64, 16 if num_outputs < 4096 else 32, 128, 4, 4)


@triton.jit
def _linear_kernel(
    x, weight, bias, out, num_rows, num_outputs, x_stride, weight_stride, out_stride,
    NUM_INPUTS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    num_row_tiles = tl.cdiv(num_rows, ROWS)
    tile = tl.program_id(0)
    row = (tile % num_row_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    output = (tile // num_row_tiles * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in range(0, NUM_INPUTS, COLUMNS):
        is_input = first + column < NUM_INPUTS
        inputs = x + row * x_stride + first + column
        weights = weight + output * weight_stride + first + column
        a = tl.load(inputs, (row < num_rows) & is_input, other=0.0)
        b = tl.load(weights, (output < num_outputs) & is_input, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    output = tl.trans(output)
    inside = (row < num_rows) & (output < num_outputs)
    if HAS_BIAS:
        total += tl.load(bias + output, output < num_outputs, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + output, total.to(out.dtype.element_ty), inside)


@triton.jit
def _rms_norm_kernel(
    x, weight, out, eps, x_stride, SIZE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    inside = column < SIZE
    wide = tl.load(x + row * x_stride + column, inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    normal = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + column, (normal * factor).to(out.dtype.element_ty), inside)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """See `linear.linear`."""
    (num_rows, num_inputs), num_outputs = x.shape, len(weight)
    if out is None:
        out = x.new_empty((num_rows, num_outputs))
    if num_rows == 0:
        return out
    assert x.stride(1) == weight.stride(1) == out.stride(1) == 1
    t = tiling_for(num_rows, num_outputs, x.dtype)
    _linear_kernel[(triton.cdiv(num_rows, t.rows) * triton.cdiv(num_outputs, t.outputs),)](
        x, weight, weight if bias is None else bias, out, num_rows, num_outputs,
        x.stride(0), weight.stride(0), out.stride(0), NUM_INPUTS=num_inputs,
        HAS_BIAS=bias is not None, ROWS=t.rows, OUTPUTS=t.outputs, COLUMNS=t.columns,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight for x [rows, size], computed in float32."""
    num_rows, size = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if num_rows:
        _rms_norm_kernel[(num_rows,)](
            x, weight, out, eps, x.stride(0), SIZE=size, PADDED=triton.next_power_of_2(size),
        )  # fmt: skip
    return out
