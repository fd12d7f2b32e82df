"""Products of few rows with 16-bit matrices, on compute capability 9.0 (`cuda/dense_linear.cu`)."""

from __future__ import annotations

import functools
from ctypes import c_int
from dataclasses import dataclass

import torch
from torch import Tensor

from compiledllm.kernels import compile_ahead
from compiledllm.kernels.cuda_kernel import CudaKernel, begins_at_16_bytes, kernel_unless_broken
from compiledllm.kernels.launch import is_hopper, launch_options, num_multiprocessors
from compiledllm.kernels.tensor_map import TensorMap, encoded

MAX_ROWS = 32
_TOKENS = (8, 16, MAX_ROWS)  # rows of the variants of the kernel
_INPUTS = 64  # of a stage
_THREADS = 320
_MAX_STAGES = 12
_RESERVED_BYTES = 1024  # of shared memory, which each thread block takes for itself
_MAX_OUTPUTS, _MIN_OUTPUTS = 128, 64  # of a thread block
_MIN_INPUTS_TO_SPLIT = 2048
_CLUSTERS_OF_FOUR = 30 / 132  # clusters that run at once for each multiprocessor
_MIN_BUSY = 0.35  # thread blocks for each multiprocessor; with fewer, other kernels are faster


@dataclass(frozen=True, slots=True)
class Tiling:
    """The work of a thread block.

    outputs: a multiple of 8, at most 128. splits: thread blocks of a cluster that share the inputs.
    shared_kib: shared memory.
    """

    outputs: int
    splits: int
    shared_kib: int = 112

    def num_blocks(self, num_outputs: int) -> int:
        return -(-num_outputs // self.outputs) * self.splits

    def stages(self, tokens: int) -> int:
        """The number of slots of the ring."""
        slot = 2 * _INPUTS * (tokens + self.outputs)
        free = self.shared_kib * 1024 - _RESERVED_BYTES - self._unused_bytes
        return min(free // (slot + 16), _MAX_STAGES)

    def shared_bytes(self, tokens: int) -> int:
        slot = 2 * _INPUTS * (tokens + self.outputs) + 16
        sums = 4 * tokens * (_MAX_OUTPUTS + 4)
        return max(self.stages(tokens) * slot + self._unused_bytes, sums)

    @property
    def _unused_bytes(self) -> int:
        """After the last slot, for outputs that the warps multiply and nobody wants."""
        return 2 * _INPUTS * (_MAX_OUTPUTS - self.outputs)


def serves(num_rows: int, num_outputs: int, num_inputs: int) -> bool:
    """Whether `product` multiplies by aligned 16-bit matrices of this shape on this device."""
    if not (is_hopper() and 2 <= num_rows <= MAX_ROWS) or num_outputs % 4 or num_inputs % 8:
        return False
    num_blocks = tiling_for(num_outputs, num_inputs).num_blocks(num_outputs)
    return num_blocks >= _MIN_BUSY * num_multiprocessors()


def kernel_for(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> CudaKernel | None:
    """The kernel for this product on the current device; None: there is none, or it is slower."""
    num_rows, (num_outputs, num_inputs) = x.shape[0], weight.shape
    if not (x.is_cuda and x.dtype.itemsize == 2 and serves(num_rows, num_outputs, num_inputs)):
        return None
    if weight.dtype != x.dtype or not begins_at_16_bytes(x, weight):
        return None
    if not x.stride(1) == weight.stride(1) == 1:
        return None
    if out is not None and (out.data_ptr() % 8 or not out.is_contiguous()):
        return None
    t = tiling_for(num_outputs, num_inputs)
    return _kernel(x.dtype, _tokens(num_rows), bias is not None, t, compile_ahead.is_asking())


@functools.cache
def tiling_for(num_outputs: int, num_inputs: int) -> Tiling:
    """One thread block for each multiprocessor, with all of its shared memory, or several.

    Few outputs are shared by two or four thread blocks, so that each has some 64 of them: with
    fewer, the blocks read x more often.
    """
    num_blocks = num_multiprocessors()
    splits = 1
    if num_inputs >= _MIN_INPUTS_TO_SPLIT:
        fewest = _MIN_OUTPUTS * num_blocks  # outputs of that many thread blocks
        splits = next((n for n in (1, 2) if num_outputs * n >= 0.94 * fewest), 4)
    if splits == 4:
        num_blocks = max(int(_CLUSTERS_OF_FOUR * num_blocks), 1) * splits
    rounds = -(-num_outputs * splits // (_MAX_OUTPUTS * num_blocks))
    outputs = -(-num_outputs * splits // (rounds * num_blocks))
    most = _MIN_OUTPUTS if splits == 1 else 8
    outputs = min(max(-(-outputs // 8) * 8, most), _MAX_OUTPUTS)
    return Tiling(outputs, splits, 224 if rounds == 1 else 112)


def _tokens(num_rows: int) -> int:
    """The rows of the variant for so many rows."""
    return next(n for n in _TOKENS if num_rows <= n)


@functools.cache
def _kernel(
    dtype: torch.dtype, tokens: int, has_bias: bool, tiling: Tiling, is_asked: bool
) -> CudaKernel | None:
    """is_asked: whether another thread compiles the kernel. Only a part of the cache's key."""
    options = {
        "BF16": dtype == torch.bfloat16,
        "TOKENS": tokens,
        "HAS_BIAS": has_bias,
        "OVERLAP": launch_options()["OVERLAP"],
    }
    instead = "other kernels, which are slower, multiply few rows"
    size = tiling.shared_bytes(tokens)
    return kernel_unless_broken(instead, "dense_linear.cu", "dense_linear", options, size)


def product(
    kernel: CudaKernel,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tiling: Tiling | None = None,
) -> Tensor:
    """Fill and return `out`: x [rows, inputs] times the transpose of weight [outputs, inputs].

    kernel: from `kernel_for`. bias: [outputs], added. tiling: the one that the kernel was made for;
    None: the one by the rule.
    """
    (num_rows, num_inputs), num_outputs = x.shape, len(weight)
    t, tokens = tiling or tiling_for(num_outputs, num_inputs), _tokens(num_rows)
    arguments = (
        _map_of(weight, t.outputs), _map_of(x, tokens), bias, out, c_int(num_rows),
        c_int(num_outputs), c_int(num_inputs), c_int(t.outputs), c_int(t.stages(tokens)),
    )  # fmt: skip
    kernel.launch((t.num_blocks(num_outputs),), _THREADS, arguments, t.splits)
    return out


def _map_of(matrix: Tensor, num_rows: int) -> TensorMap:
    """A box has 64 columns of so many rows."""
    length, width = matrix.shape
    strides = (matrix.stride(0),) * 4
    sizes, box = (width, length, 1, 1, 1), (_INPUTS, num_rows, 1, 1, 1)
    return encoded(matrix.data_ptr(), matrix.dtype, sizes, strides, box)
