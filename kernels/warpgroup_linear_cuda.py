"""Products of many rows with matrices of 4- or 6-bit codes, on compute capability 9.0.

`cuda/warpgroup_linear.cu` decodes the codes in registers, while dequantising the matrix would write
and read four times as many bytes. `arrange_triton` first brings x into the order that the tensor
cores read.
"""

from __future__ import annotations

import functools
from ctypes import c_int, c_longlong
from dataclasses import dataclass

import torch
from torch import Tensor

from compiledllm.kernels.arrange_triton import arranged
from compiledllm.kernels.code_macros import options_of
from compiledllm.kernels.cuda_kernel import CudaKernel
from compiledllm.kernels.launch import launch_options, num_multiprocessors
from compiledllm.kernels.moe_routing_triton import Routing
from compiledllm.kernels.packed import Layout
from compiledllm.kernels.quantized import PACKED_BITS
from compiledllm.kernels.records import TILE, UNIT

MAX_TOKENS = 256  # rows of x of a thread block
_WARPS = 8  # that multiply; further warps copy
_SHARED = 227 * 1024  # bytes of shared memory of a multiprocessor that thread blocks can have
_RESERVED = 1024  # bytes of these that each thread block takes for itself
_MIN_ROWS, _MAX_ROWS = 17, 2048  # of `linear`
_MIN_SUMS = 64 * 6144  # of up to 64 rows


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
        free = _SHARED // self.blocks - _RESERVED
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
# Relative times of a block's unit of inputs, with as many blocks as run at once (one H200).
_TIMES = {
    _TILINGS[64]: 1.2,
    Tiling(128, 1, 1, 1): 0.92,
    _TILINGS[128]: 1.6,
    _TILINGS[256]: 1.44,
}


def tiling_of_blocks(rows: int) -> Tiling:
    """The tiling for blocks of up to so many items of an expert."""
    return next(tiling for most, tiling in _TILINGS.items() if rows <= most)


def tiling_of_matrix(num_rows: int, num_outputs: int) -> Tiling:
    """The tiling for a whole product: the one whose blocks are done first."""
    if num_rows <= 32:
        return _TILINGS[32]
    candidates = [t for t in _TIMES if t.tokens < 2 * num_rows]

    def time_of(t: Tiling) -> float:
        blocks = -(-num_outputs // t.outputs) * -(-num_rows // t.tokens)
        return -(-blocks // (t.blocks * num_multiprocessors())) * _TIMES[t]

    return min(candidates, key=time_of)


def can_read(layout: Layout, x: Tensor) -> bool:
    """Whether `product` multiplies x, of a 16-bit type, by codes of this layout."""
    return layout.code in PACKED_BITS and has_warpgroups(x.device)


@functools.cache
def has_warpgroups(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def max_rows(layout: Layout) -> int:
    """The most rows of `linear` on the current device; 0 if it has no warpgroup products."""
    can_read = layout.code in PACKED_BITS and has_warpgroups(torch.device("cuda"))
    return _MAX_ROWS if can_read else 0


def is_faster(layout: Layout, x: Tensor, num_outputs: int) -> bool:
    """Whether `linear` was measured to be faster than `quantized_cuda`'s other ways (one H200).

    Few rows need many outputs to keep all multiprocessors busy. For very many rows the time of
    dequantising a matrix does not matter, and the library multiplies faster.
    """
    num_rows = len(x)
    if not _MIN_ROWS <= num_rows <= _MAX_ROWS or not can_read(layout, x):
        return False
    return num_rows > 64 or num_rows * num_outputs >= _MIN_SUMS


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


def product(
    x: Tensor,
    codes: Tensor,
    row_scales: Tensor | None,
    bias: Tensor | None,
    layout: Layout,
    out: Tensor,
    t: Tiling,
    routing: Routing | None = None,
) -> Tensor:
    """Fill and return `out`, [rows or items, outputs] in x's dtype or float32.

    x: a result of `arranged` with `t.tokens` rows. codes: records, uint8 [tiles, units, bytes].
    With `routing`, codes, row_scales and bias have a first dimension of experts.
    """
    record_bytes = codes.shape[-1]
    kernel = _kernel(
        layout, t, x.dtype, record_bytes, bias is not None, routing is not None,
        out.dtype == torch.float32,
    )  # fmt: skip
    num_rows, num_outputs = out.shape
    kernel.launch(
        (-(-num_outputs // t.outputs), len(x)),
        t.threads,
        (
            x, codes, row_scales, bias, out, c_int(num_rows), c_int(num_outputs), c_int(x.shape[1]),
            None if routing is None else routing.items,
            None if routing is None else routing.block_experts,
            c_int(0 if routing is None else routing.num_items),
            c_int(0 if routing is None else routing.num_experts),
            c_longlong(0 if routing is None else codes.stride(0)),
        ),
    )  # fmt: skip
    return out


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
    t = tiling_of_matrix(num_rows, num_outputs)
    if out is None:
        out = x.new_empty((num_rows, num_outputs))
    rows = arranged(x, num_inputs, layout, t.tokens, None, None)
    return product(rows, codes, row_scales, bias, layout, out, t)
