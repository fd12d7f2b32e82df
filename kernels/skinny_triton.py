"""Matmuls of 1 to 32 rows with a weight matrix, for decoding few requests on a GPU.

Such products are memory-bound: the time to read the weights dominates, and for one row a general
matmul leaves 10 to 60 % of the bandwidth unused. Each program owns a few output features and reads
their rows of the matrix. One row of inputs uses plain multiplication, several rows use the tensor
cores. Loads of the first weights start before the inputs are ready. Sums are in float32, in a fixed
order.
"""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compiledllm.kernels.launch import launch_options, stages_that_fit
from compiledllm.kernels.linear import MAX_SKINNY_ROWS
from compiledllm.kernels.tables import product_tiling


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tile of one program. outputs: output features. columns: input features per iteration."""

    outputs: int
    columns: int
    num_warps: int
    num_stages: int = 4


def tiling_for(num_rows: int, num_outputs: int, num_inputs: int) -> Tiling:
    """The tiling in the GPU's table, or else by the rules, within the GPU's shared memory."""
    measured = product_tiling(num_rows, num_outputs, num_inputs)
    t = Tiling(*measured) if measured else rule_for(num_rows, num_outputs, num_inputs)
    if num_rows == 1:
        return t  # the kernel of one row keeps its tiles in registers
    stage_bytes = 2 * t.columns * (max(16, t.outputs) + multiplied_rows(num_rows))
    return replace(t, num_stages=stages_that_fit(t.num_stages, stage_bytes))


def multiplied_rows(num_rows: int) -> int:
    """The number of rows that the tensor cores multiply for 2 to 32 rows: 8, 16 or 32.

    Each program loads all of these rows. For 8 rows of Llama-3.1-8B, loading 16 made a decode step
    on an H200 5 % slower.
    """
    return next(count for count in (8, 16, 32) if num_rows <= count)


def rule_for(num_rows: int, num_outputs: int, num_inputs: int) -> Tiling:
    """Choose few outputs per program for a small matrix, so that every multiprocessor has work.

    For up to 16 rows, the rules were fitted to the fastest of 10 to 45 tilings on an H200, for the
    layers and heads of models of 0.1 to 35 B parameters, with cold caches. One row reads matrices
    of more than 25 MB at 3.5 to 4.5 TB/s, and 8 rows at 3.2 to 4.4 TB/s. For more rows, the rules
    were fitted on an H100 to models of up to 8 B.

    For 2 to 16 rows, at least 2**24 weights and at most 8192 inputs, two warps are not the fastest
    tiling of the product alone. In a decode step, however, the next kernel begins its loads early,
    and a step of 8 rows of Llama-3.1-8B is 3 % faster with two warps.
    """
    size = num_outputs * num_inputs
    if num_rows > 16:
        if size < 2**22:
            return Tiling(16, 256, 2, 4)
        return Tiling(64, 128, 4, 4) if num_inputs <= 8192 else Tiling(32, 128, 4, 5)
    if num_rows > 1:
        if num_outputs < 2048 or size <= 2**21:
            return Tiling(16, 256, 4, 4)
        if size < 2**24:
            return Tiling(32, 128, 4, 6)
        return Tiling(32, 128, 2, 5) if num_inputs <= 8192 else Tiling(32, 256, 4, 5)
    # At least two iterations, unless there are so few inputs that each would have too few loads.
    columns = triton.next_power_of_2(num_inputs) // (2 if num_inputs >= 1024 else 1)
    return Tiling(2 if num_inputs > 1024 else 4, min(max(columns, 64), 2048), 4)


@triton.jit
def _one_row_kernel(
    x, weight, bias, out, num_outputs, row_stride,
    NUM_INPUTS: tl.constexpr, HAS_BIAS: tl.constexpr, OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < num_outputs
    column = tl.arange(0, COLUMNS)
    tile = weight + output.to(tl.int64)[:, None] * row_stride + column[None, :]
    mask = inside[:, None] & (column < NUM_INPUTS)[None, :]
    w = tl.load(tile, mask, other=0.0, eviction_policy="evict_first")
    if OVERLAP:
        gdc_wait()  # only the weights may be read before the wait
        gdc_launch_dependents()
    total = tl.zeros([OUTPUTS, COLUMNS], tl.float32)
    for first in range(0, NUM_INPUTS, COLUMNS):
        v = tl.load(x + first + column, first + column < NUM_INPUTS, other=0.0)
        following = first + COLUMNS
        mask = inside[:, None] & (following + column < NUM_INPUTS)[None, :]
        ahead = tl.load(tile + following, mask, other=0.0, eviction_policy="evict_first")
        total += w.to(tl.float32) * v.to(tl.float32)[None, :]
        w = ahead
    result = tl.sum(total, 1)
    if HAS_BIAS:
        result += tl.load(bias + output, inside, other=0.0).to(tl.float32)
    tl.store(out + output, result.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_rows"])  # steps that are not captured have any number
def _few_rows_kernel(
    x, weight, bias, out, num_rows, num_outputs, x_stride, row_stride,
    NUM_INPUTS: tl.constexpr, HAS_BIAS: tl.constexpr, OUTPUTS: tl.constexpr,
    PADDED_OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, PADDED_OUTPUTS)
    output = tl.program_id(0) * OUTPUTS + lane
    inside = ((output < num_outputs) & (lane < OUTPUTS))[:, None]
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tile = weight + output.to(tl.int64)[:, None] * row_stride + column[None, :]
    # Rows beyond the last repeat the last row, so that loads need no mask for rows.
    inputs = x + tl.minimum(row, num_rows - 1)[None, :] * x_stride + column[:, None]
    is_input = column < NUM_INPUTS
    w = tl.load(tile, inside & is_input[None, :], other=0.0, eviction_policy="evict_first")
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.dot(w, tl.load(inputs, is_input[:, None], other=0.0))
    for first in range(COLUMNS, NUM_INPUTS, COLUMNS):
        is_input = first + column < NUM_INPUTS
        w = tl.load(
            tile + first, inside & is_input[None, :], other=0.0, eviction_policy="evict_first"
        )
        v = tl.load(inputs + first, is_input[:, None], other=0.0)
        total = tl.dot(w, v, total)
    if HAS_BIAS:
        total += tl.load(bias + output[:, None], inside, other=0.0).to(tl.float32)
    target = out + row[None, :].to(tl.int64) * num_outputs + output[:, None]
    tl.store(target, total.to(out.dtype.element_ty), inside & (row < num_rows)[None, :])


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiling: Tiling | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [rows, inputs] with 1 to 32 rows, weight [outputs, inputs], bias [outputs].

    Returns [rows, outputs], in x's dtype, contiguous: `out` if it is given.
    """
    (num_rows, _), (num_outputs, num_inputs) = x.shape, weight.shape
    assert 1 <= num_rows <= MAX_SKINNY_ROWS, num_rows
    if out is None:
        out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    t = tiling or tiling_for(num_rows, num_outputs, num_inputs)
    tensors = x, weight, weight if bias is None else bias, out
    constants = {
        "NUM_INPUTS": num_inputs, "HAS_BIAS": bias is not None, "OUTPUTS": t.outputs,
        "COLUMNS": t.columns, "num_warps": t.num_warps, **launch_options(),
    }  # fmt: skip
    grid = (triton.cdiv(num_outputs, t.outputs),)
    if num_rows == 1:
        _one_row_kernel[grid](*tensors, num_outputs, weight.stride(0), **constants)
    else:
        _few_rows_kernel[grid](
            *tensors, num_rows, num_outputs, x.stride(0), weight.stride(0),
            PADDED_OUTPUTS=max(16, t.outputs), ROWS=multiplied_rows(num_rows),
            num_stages=t.num_stages, **constants,
        )  # fmt: skip
    return out
