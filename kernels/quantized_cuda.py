"""Launches the CUDA kernels that multiply by a `Packed` matrix, on compute capability 9.0 or later.

For few rows of x, `cuda/linear.cu` multiplies and reads each code once. More rows of 4- and 6-bit
codes are multiplied by `warpgroup_linear_cuda`, where the GPU can run it and `is_faster` says so.
For more than MAX_FEW_ROWS rows of other codes or on other GPUs, and for very many rows,
`cuda/dequantize.cu` writes the matrix in 16 bits and `kernels.linear` multiplies.
"""

from __future__ import annotations

import functools
from ctypes import c_int, c_longlong
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compiledllm.kernels import warpgroup_linear_cuda
from compiledllm.kernels.code_macros import options_of
from compiledllm.kernels.cuda_kernel import CudaKernel, begins_at_16_bytes
from compiledllm.kernels.launch import launch_options, max_shared_memory
from compiledllm.kernels.linear import linear
from compiledllm.kernels.moe_routing_triton import Routing, arguments_of
from compiledllm.kernels.packed import MAX_FEW_ROWS, Layout
from compiledllm.kernels.quantized import BLOCK_ROWS
from compiledllm.kernels.records import TILE, UNIT
from compiledllm.kernels.tables import quantized_tiling

_MAX_DEQUANTIZED = 2**28  # weights of one matrix that are dequantised at a time


@dataclass(frozen=True, slots=True)
class Tiling:
    """The work of a thread block of `cuda/linear.cu`; the kernel's macros have the same names.

    row_tiles: tiles of 16 outputs per warp. n_warps: warps along the outputs. k_warps: warps along
    the inputs, whose partial sums are added at the end. depth: number of loads in flight per warp.
    chunk: units of 128 inputs per load, for codes in records; a load of 8-bit codes is one unit.
    """

    row_tiles: int
    n_warps: int
    k_warps: int
    depth: int
    chunk: int = 1

    def ring_bytes(self, record_bytes: int) -> int:
        """Bytes of shared memory for the loads of a thread block.

        record_bytes: size of a record; 0 for codes in rows, whose loads take registers instead.
        """
        warps = self.n_warps * self.k_warps
        return self.row_tiles * warps * self.depth * self.chunk * record_bytes

    def fitted(self, record_bytes: int, tokens: int) -> Tiling:
        """This tiling, with `chunk` reduced until the loads fit into a block's shared memory.

        record_bytes: see `ring_bytes`. tokens: rows of x that a block computes.
        """
        t, warps = self, self.n_warps * self.k_warps
        sums = self.k_warps * tokens * (16 * self.row_tiles * self.n_warps + 4) * 4
        others = sums + 8 * warps * self.depth
        while t.chunk > 1 and t.ring_bytes(record_bytes) + others > max_shared_memory():
            t = replace(t, chunk=t.chunk // 2)
        return t


def tiling_for(layout: Layout, num_rows: int, num_outputs: int, num_inputs: int) -> Tiling:
    """The tiling in the GPU's table, or else by the rules."""
    measured = quantized_tiling(str(layout), num_rows, num_outputs, num_inputs)
    return Tiling(*measured) if measured else rule_for(layout, num_rows, num_outputs, num_inputs)


def rule_for(layout: Layout, num_rows: int, num_outputs: int, num_inputs: int) -> Tiling:
    """Choose a tiling by rules that were fitted to the fastest of some 40 tilings on an H200.

    The measurements used the layers of an 8B model, with cold caches. For one row of x, the kernel
    reads 8-bit weights at 65 to 89 % of the bandwidth of a device-to-device copy, and 4-bit weights
    at 49 to 73 %.
    """
    is_wide, is_long = num_outputs >= 16384, num_inputs >= 8192
    if num_rows > 32:
        return Tiling(2, 1, 4, 2) if is_wide else Tiling(1, 1, 4, 2)
    if layout.code in ("fp8", "int8"):
        if num_rows > 16:
            return Tiling(2, 2, 4, 1) if is_wide else Tiling(2, 1, 8, 1)
        if num_rows > 8:
            return Tiling(1, 1, 4, 1) if is_wide else Tiling(1, 1, 8, 1 + (num_outputs <= 4096))
        if is_wide:
            return Tiling(1, 1, 4, 1)
        return Tiling(1, 1, 16, 1) if num_outputs <= 4096 else Tiling(1, 1, 8, 2)
    if num_rows > 16:
        return Tiling(2, 1, 4, 2) if is_wide else Tiling(2, 1, 8, 1)
    if num_rows > 8:
        if is_wide:
            return Tiling(2, 1, 4, 2)
        if is_long:
            return Tiling(1, 1, 8, 2)
        return Tiling(2, 1, 8 if num_outputs <= 4096 else 4, 2, 4)
    if is_wide:
        return Tiling(1, 1, 2, 2, 4)
    if is_long:
        return Tiling(1, 1, 8, 3, 2)
    return Tiling(1, 1, 4, 2, 4)


@functools.cache
def _linear_kernel(
    layout: Layout, tiling: Tiling, dtype: torch.dtype, tokens: int, has_bias: bool, has_tail: bool,
    has_experts: bool, is_float: bool, record_bytes: int,
) -> CudaKernel:  # fmt: skip
    options = options_of(layout) | {
        "BF16": dtype == torch.bfloat16,
        "TOKEN_TILES": tokens // 8,
        "ROW_TILES": tiling.row_tiles,
        "N_WARPS": tiling.n_warps,
        "K_WARPS": tiling.k_warps,
        "DEPTH": tiling.depth,
        "CHUNK": tiling.chunk,
        "HAS_BIAS": has_bias,
        "TAIL": has_tail,
        "EXPERTS": has_experts,
        "OUT32": is_float,
        "OVERLAP": launch_options()["OVERLAP"],
    }
    shared_bytes = tiling.ring_bytes(record_bytes)
    return CudaKernel("linear.cu", "quantized_linear", options, shared_bytes)


def quantized_product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    row_scales: Tensor | None,
    bias: Tensor | None,
    layout: Layout,
    num_outputs: int,
    tiling: Tiling | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `packed.packed_linear`. tiling: of `cuda/linear.cu`; None: the fastest way multiplies.

    out: [rows, num_outputs], filled and returned; None: a new tensor.
    """
    num_rows, num_inputs = x.shape
    shape = num_rows, num_outputs, num_inputs
    if tiling is None and warpgroup_linear_cuda.is_faster(layout, *shape):
        return warpgroup_linear_cuda.linear(x, codes, row_scales, bias, layout, num_outputs, out)
    if num_rows > MAX_FEW_ROWS:
        matrix = codes, scales, zeros, row_scales
        return _dequantized_product(x, matrix, bias, layout, num_outputs, out)
    if out is None:
        out = x.new_empty((num_rows, num_outputs))
    parts = codes, scales, zeros, row_scales, bias
    t = tiling or tiling_for(layout, *shape)
    return launch_product(_aligned(x), *parts, layout, out, t)


_Parts = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def _dequantized_product(
    x: Tensor,
    parts: _Parts,
    bias: Tensor | None,
    layout: Layout,
    num_outputs: int,
    out: Tensor | None,
) -> Tensor:
    """A product of many rows. Large matrices, such as heads, are dequantised slice by slice."""
    num_inputs = x.shape[1]
    size = max(_MAX_DEQUANTIZED // num_inputs // BLOCK_ROWS, 1) * BLOCK_ROWS
    if size >= num_outputs and (out is None or bias is None):
        weight = dequantized(*parts, layout, num_outputs, num_inputs, x.dtype)
        return linear(x, weight, bias, out)
    out = x.new_empty((x.shape[0], num_outputs)) if out is None else out
    for first in range(0, num_outputs, size):
        count = min(size, num_outputs - first)
        rows = _rows_from(first, parts, layout)
        weight = dequantized(*rows, layout, count, num_inputs, x.dtype)
        linear(x, weight, out=out[:, first : first + count])
    return out if bias is None else out.add_(bias)


def _rows_from(first: int, parts: _Parts, layout: Layout) -> _Parts:
    """The parts of a matrix from the output `first` on, a multiple of BLOCK_ROWS."""
    codes, scales, zeros, row_scales = parts
    first_code = first // TILE if codes.dtype == torch.uint8 else first
    scale_row = first // layout.block_rows
    return (
        codes[first_code:],
        None if scales is None else scales[scale_row:],
        None if zeros is None else zeros[scale_row:],
        None if row_scales is None else row_scales[first:],
    )


def launch_product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    row_scales: Tensor | None,
    bias: Tensor | None,
    layout: Layout,
    out: Tensor,
    t: Tiling,
    routing: Routing | None = None,
) -> Tensor:
    """Launch `cuda/linear.cu`. Fills and returns `out`, [rows, outputs] in x's dtype or float32.

    x: [rows, K] with up to MAX_FEW_ROWS rows that begin at multiples of 16 bytes. With `routing`,
    `out` is [items, outputs], x may have any number of rows, and all tensors of the matrix have a
    first dimension of experts.
    """
    (num_rows, num_inputs), num_outputs = x.shape, out.shape[1]
    rows_at_once = num_rows if routing is None else routing.rows
    tokens = next(n for n in (8, 16, 32, 64) if rows_at_once <= n)
    is_record = codes.dtype == torch.uint8
    record_bytes = codes.shape[-1] if is_record else 0
    t = t.fitted(record_bytes, tokens)
    kernel = _linear_kernel(
        layout, t, x.dtype, tokens, bias is not None, num_inputs % UNIT != 0, routing is not None,
        out.dtype == torch.float32, record_bytes,
    )  # fmt: skip
    num_tiles = -(-num_outputs // (TILE * t.row_tiles * t.n_warps))
    kernel.launch(
        (num_tiles, 1 if routing is None else len(routing.block_experts)),
        32 * t.n_warps * t.k_warps,
        (
            x, codes, scales, zeros, row_scales, bias, out, c_int(num_rows), c_int(num_outputs),
            c_int(num_inputs), c_longlong(x.stride(0)),
            c_longlong(0 if is_record else codes.stride(-2)),
            c_int(layout.block_rows.bit_length() - 1),
            c_int(0 if scales is None else scales.shape[-1]),
            c_int(1 if routing is None else routing.items_per_row), *arguments_of(routing, codes),
        ),
    )  # fmt: skip
    return out


def _aligned(x: Tensor) -> Tensor:
    """x with rows that begin at multiples of 16 bytes."""
    is_aligned = x.stride(1) == 1 and begins_at_16_bytes(x)
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def _dequantize_kernel(layout: Layout, dtype: torch.dtype, has_ids: bool) -> CudaKernel:
    options = options_of(layout) | {"BF16": dtype == torch.bfloat16, "HAS_IDS": has_ids}
    return CudaKernel("dequantize.cu", "dequantize", options)


def dequantized(
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    row_scales: Tensor | None,
    layout: Layout,
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """Write a `Packed` matrix as [num_outputs, num_inputs] in a 16-bit dtype; returns `out`.

    Each weight is computed in float32 and rounded once. out: None allocates the result. ids: int64
    [num_outputs], the rows to write; None: all.
    """
    if out is None:
        out = torch.empty(num_outputs, num_inputs, dtype=dtype, device=codes.device)
    num_units = -(-num_inputs // UNIT)
    _dequantize_kernel(layout, dtype, ids is not None).launch(
        (-(-num_outputs // TILE), -(-num_units // 8)),
        256,
        (
            codes, scales, zeros, row_scales, ids, out, c_int(num_outputs), c_int(num_inputs),
            c_longlong(0 if codes.dtype == torch.uint8 else codes.stride(0)),
            c_int(layout.block_rows.bit_length() - 1),
            c_int(0 if scales is None else scales.shape[1]),
        ),
    )  # fmt: skip
    return out
