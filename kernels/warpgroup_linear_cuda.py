"""Products of many rows with matrices of 4- or 6-bit codes, on compute capability 9.0.

`cuda/warpgroup_linear.cu` decodes the codes in registers, while dequantising the matrix would write
and read four times as many bytes. `arrange_triton` first brings x into the order that the tensor
cores read.
"""

from __future__ import annotations

import functools
from ctypes import c_int
from dataclasses import dataclass

import torch
from torch import Tensor

from compiledllm.kernels.arrange_triton import arranged
from compiledllm.kernels.code_macros import options_of
from compiledllm.kernels.cuda_kernel import CudaKernel
from compiledllm.kernels.launch import (
    HOPPER_SHARED_MEMORY,
    is_hopper,
    launch_options,
    num_multiprocessors,
)
from compiledllm.kernels.moe_routing_triton import Routing, arguments_of
from compiledllm.kernels.packed import MAX_FEW_ROWS, Layout
from compiledllm.kernels.quantized import PACKED_BITS
from compiledllm.kernels.records import TILE, UNIT
from compiledllm.kernels.tensor_map import TensorMap, encoded

MAX_ITEMS = 128  # of a block of experts; more rows were no faster
_WARPS = 8  # that multiply; further warps copy
_RESERVED = 1024  # bytes of shared memory that each thread block takes for itself
_MIN_ROWS, MAX_ROWS = 17, 1024  # of x in `linear`
_MIN_WEIGHTS = 20_000_000  # of a matrix, for rows that `linear.cu` multiplies, too


@dataclass(frozen=True, slots=True)
class Tiling:
    """The work of a thread block; the kernel's macros have the same names.

    tokens: rows of x. row_tiles: products of 64 outputs of a warpgroup, of which there are two.
    units: units of 128 inputs that are copied at a time. blocks: thread blocks that share a
    multiprocessor.
    """

    tokens: int
    row_tiles: int
    units: int
    blocks: int

    @property
    def outputs(self) -> int:
        return TILE * _WARPS * self.row_tiles

    @property
    def threads(self) -> int:
        """Of a block: those that multiply and those that copy."""
        return 32 * (_WARPS + (4 if self.blocks == 1 else 2))

    def stages(self, record_bytes: int) -> int:
        """The number of copies that fit into shared memory."""
        free = HOPPER_SHARED_MEMORY // self.blocks - _RESERVED
        return free // (self._slot_bytes(record_bytes) + 16)

    def shared_bytes(self, record_bytes: int) -> int:
        slots = self.stages(record_bytes) * (self._slot_bytes(record_bytes) + 16)
        return max(slots, 4 * self.tokens * (self.outputs + 4))

    def _slot_bytes(self, record_bytes: int) -> int:
        x = 2 * UNIT * self.tokens
        return self.units * (x + _WARPS * self.row_tiles * record_bytes)


# For blocks of up to so many rows of x.
_TILINGS = {
    8: Tiling(8, 1, 2, 3),
    16: Tiling(16, 1, 2, 2),
    32: Tiling(32, 1, 2, 2),
    64: Tiling(64, 1, 1, 2),
    128: Tiling(128, 2, 1, 1),
    256: Tiling(256, 1, 1, 1),
}
# Microseconds of a block on a multiprocessor (one H200): for each unit of inputs, and for the rest.
_TIMES = {
    _TILINGS[32]: (0.45, 3.5),
    _TILINGS[64]: (0.57, 4.5),
    Tiling(128, 1, 1, 1): (0.8, 5.0),
    _TILINGS[128]: (1.4, 7.3),
    _TILINGS[256]: (1.25, 7.4),
}
_TIME_OF_SPLIT = 2.5  # microseconds, for the sums of a cluster
_SPLITS = (1, 2, 4, 6)


def tiling_of_blocks(rows: int) -> Tiling:
    """The tiling for blocks of up to so many items of an expert."""
    return next(tiling for most, tiling in _TILINGS.items() if rows <= most)


@functools.cache  # steps that are not captured ask for every product
def tiling_of_matrix(num_rows: int, num_outputs: int, num_inputs: int) -> tuple[Tiling, int]:
    """The tiling and the number of splits for a whole product: those that are done first.

    The number of rows is rounded up to a power of two. Steps of these sizes are captured when an
    engine starts, so that no step of another size needs a kernel that is not compiled yet.
    """
    num_rows = max(1 << (num_rows - 1).bit_length(), 32)

    def time_of(tiling: Tiling, splits: int) -> float:
        blocks = -(-num_outputs // tiling.outputs) * -(-num_rows // tiling.tokens) * splits
        turns = -(-blocks // _blocks_at_once(tiling, splits))
        of_unit, of_block = _TIMES[tiling]
        units = turns * -(-num_inputs // (UNIT * splits))
        rest = -(-turns // tiling.blocks) * of_block + (splits > 1) * _TIME_OF_SPLIT
        return units * of_unit + rest

    fitting = [t for t in _TIMES if t.tokens < 2 * num_rows]
    pairs = [(t, s) for t in fitting for s in _SPLITS if s <= 4 or t.blocks > 1]
    return min(pairs, key=lambda pair: time_of(*pair))


def _blocks_at_once(tiling: Tiling, splits: int) -> int:
    """Blocks that run at once, each on a multiprocessor of its own, as measured on one H200.

    Large clusters leave some multiprocessors of their groups unused. Blocks that may share a
    multiprocessor do so before all others are busy.
    """
    count = num_multiprocessors()
    return count if tiling.blocks == 1 and splits <= 2 else max(count * 10 // 11, 1)


def can_read(layout: Layout) -> bool:
    """Whether `linear` multiplies by codes of this layout on the current device."""
    return layout.code in PACKED_BITS and is_hopper()


def is_faster(layout: Layout, num_rows: int, num_outputs: int, num_inputs: int) -> bool:
    """Whether `linear` multiplies: it was faster for the matrices of a layer together (one H200).

    With few rows and few weights, arranging x and the sums of clusters take too long. For very many
    rows the time of dequantising a matrix does not matter, and the library multiplies faster.
    """
    if not _MIN_ROWS <= num_rows <= MAX_ROWS or not can_read(layout):
        return False
    return num_rows > MAX_FEW_ROWS or num_outputs * num_inputs >= _MIN_WEIGHTS


@functools.cache
def _kernel(
    layout: Layout, tiling: Tiling, dtype: torch.dtype, record_bytes: int, has_bias: bool,
    has_experts: bool, is_float: bool,
) -> CudaKernel:  # fmt: skip
    options = options_of(layout) | {
        "BF16": dtype == torch.bfloat16,
        "TOKENS": tiling.tokens,
        "ROW_TILES": tiling.row_tiles,
        "UNITS": tiling.units,
        "STAGES": tiling.stages(record_bytes),
        "BLOCKS": tiling.blocks,
        "HAS_BIAS": has_bias,
        "EXPERTS": has_experts,
        "OUT32": is_float,
        "OVERLAP": launch_options()["OVERLAP"],
    }
    shared_bytes = tiling.shared_bytes(record_bytes)
    return CudaKernel("warpgroup_linear.cu", "warpgroup_linear", options, shared_bytes)


@dataclass(frozen=True, slots=True)
class Matrix:
    """The tensors of a `packed.Packed` matrix, and the bias. With experts, all have them first."""

    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    row_scales: Tensor | None
    bias: Tensor | None
    layout: Layout


def product(
    x: Tensor,
    matrix: Matrix,
    out: Tensor,
    t: Tiling,
    routing: Routing | None = None,
    splits: int = 1,
) -> Tensor:
    """Fill and return `out`, [rows or items, outputs] in x's dtype or float32.

    x: a result of `arranged` with `t.tokens` rows. With `routing`, the matrix is one of experts.
    splits: thread blocks of a cluster that share the inputs.
    """
    codes, layout, scales = matrix.codes, matrix.layout, matrix.scales
    num_rows, num_outputs = out.shape
    is_record = codes.dtype == torch.uint8
    kernel = _kernel(
        layout, t, x.dtype, codes.shape[-1] if is_record else TILE * UNIT,
        matrix.bias is not None, routing is not None, out.dtype == torch.float32,
    )  # fmt: skip
    kernel.launch(
        (-(-num_outputs // t.outputs) * splits, len(x)),
        t.threads,
        (
            x, codes, TensorMap() if is_record else _map_of_rows(codes, t.outputs), scales,
            matrix.zeros, c_int(layout.block_rows.bit_length() - 1),
            c_int(0 if scales is None else scales.shape[-1]), matrix.row_scales, matrix.bias, out,
            c_int(num_rows), c_int(num_outputs), c_int(x.shape[1]), *arguments_of(routing, codes),
        ),
        cluster=splits,
    )  # fmt: skip
    return out


def _map_of_rows(codes: Tensor, num_outputs: int) -> TensorMap:
    """A box is a unit of the rows of a block's outputs."""
    rows = codes.view(torch.uint8).flatten(0, -2)
    length, width = rows.shape
    sizes, strides = (width, length, 1, 1, 1), (width, width, width, width)
    box = UNIT, num_outputs, 1, 1, 1
    return encoded(rows.data_ptr(), torch.uint8, sizes, strides, box)


def linear(
    x: Tensor,
    codes: Tensor,
    row_scales: Tensor | None,
    bias: Tensor | None,
    layout: Layout,
    num_outputs: int,
    out: Tensor | None = None,
) -> Tensor:
    """x [rows, K] times the transpose of a matrix in records, plus bias: [rows, num_outputs].

    out: contiguous, filled and returned; None: a new tensor of x's dtype.
    """
    num_rows, num_inputs = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    t, splits = tiling_of_matrix(num_rows, num_outputs, num_inputs)
    if out is None:
        out = x.new_empty((num_rows, num_outputs))
    rows = arranged(x, num_inputs, layout, t.tokens, None, None)
    matrix = Matrix(codes, None, None, row_scales, bias, layout)
    return product(rows, matrix, out, t, splits=splits)
