"""Launches `cuda/sum_over_ranks.cu`: sums over ranks in one kernel, with the residual and RMSNorm.

Every rank stores its summand in the memory of all other ranks. A sum therefore takes one trip over
NVLink, without a signal beside the data. Tensors that are too large for this are summed by other
means (`collectives`), and the kernel adds the residual and normalises.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_float, c_int, c_void_p

import torch
from torch import Tensor

from compiledllm.kernels.cuda_kernel import CudaKernel
from compiledllm.kernels.launch import num_multiprocessors

INBOX_BYTES = 64 * 2**20  # size of the memory in which a rank receives the others' summands
_NUM_BUFFERS = 2
_MAX_CHANNELS = 128  # a channel is a thread block of a sum, with its share of the inboxes
# Maximum number of bytes that one of more than two ranks sends to all others in one sum. A rank
# sends its whole summand to each of the others. Between two ranks, no other way sends less.
_MAX_SENT_BYTES = 4 * 2**20
_EMPTY = -(2**31) + 2**15  # the kernel's word for numbers that have not arrived, as int32
_MAX_THREADS = 1024
_VECTOR = 8  # numbers that a thread loads at once
_VECTOR_BYTES = 16
_MAX_PER_THREAD = 2  # vectors of a row
# Values of the kernel's macro NORM.
_SUM, _NORMALIZE, _NORMALIZE_ONE = range(3)


class RankSums:
    """Computes the sums over ranks on one rank.

    inboxes: each rank's memory, uint8 [INBOX_BYTES], mapped into this process. All ranks must have
    made their RankSums before the first sum, and must call the same methods in the same order.
    """

    def __init__(self, rank: int, inboxes: Sequence[Tensor]) -> None:
        self._rank, self._num_ranks = rank, len(inboxes)
        self._tensors = inboxes  # keeps the memory alive, as kernels get addresses only
        own = inboxes[rank]
        own.view(torch.int32).fill_(_EMPTY)
        self._kernel = functools.cache(_make_kernel)
        self._num_channels = min(_MAX_CHANNELS, num_multiprocessors())
        # Bytes of an inbox for one buffer, one sending rank and one channel.
        room = INBOX_BYTES // (_NUM_BUFFERS * self._num_ranks * _MAX_CHANNELS)
        self._channel_bytes = room - room % _VECTOR_BYTES
        self._rounds = torch.zeros(_MAX_CHANNELS, dtype=torch.int32, device=own.device)
        # A flag in pinned host memory, so that a running kernel sees the host change it.
        self._is_over = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=own.is_cuda)
        # Arguments of all launches.
        self._ranks = (_addresses(inboxes), own, self._rounds, self._is_over)
        self._sizes = self._channel_bytes * _MAX_CHANNELS, self._channel_bytes, rank

    def can_sum(self, part: Tensor) -> bool:
        """Whether the kernel can sum `part`, [rows, width], and is the fastest way."""
        num_others = self._num_ranks - 1
        is_small = num_others == 1 or num_others * part.nbytes <= _MAX_SENT_BYTES
        has_room = part.nbytes > 0 and part.shape[1] * part.itemsize <= self._channel_bytes
        return can_normalize(part) and is_small and has_room

    def sum(self, part: Tensor) -> Tensor:
        """The sum of `part` over all ranks, [rows, width]."""
        part = part.contiguous()
        total = torch.empty_like(part)
        self._launch(_SUM, part, None, None, total, None, 0.0)
        return total

    def sum_and_norm(
        self, part: Tensor, residual: Tensor, weight: Tensor, eps: float, adds_one: bool
    ) -> tuple[Tensor, Tensor]:
        """`residual` plus the sum of `part` over all ranks, and its RMSNorm, both [rows, width].

        adds_one: whether the norm's weight is stored minus one.
        """
        part, residual = part.contiguous(), residual.contiguous()
        total, normed = torch.empty_like(part), torch.empty_like(part)
        norm = _NORMALIZE_ONE if adds_one else _NORMALIZE
        self._launch(norm, part, residual, weight, total, normed, eps)
        return total, normed

    def can_gather(self, part: Tensor) -> bool:
        """Whether the kernel can gather `part`, [rows, width]."""
        is_aligned = part.shape[1] * part.itemsize % _VECTOR_BYTES == 0
        return is_aligned and 0 < self._share_bytes(part) <= self._channel_bytes

    def gather(self, part: Tensor, out: Tensor) -> Tensor:
        """The tensors [rows, width] of all ranks side by side, in `out`, [rows, ranks * width]."""
        assert self.can_gather(part) and out.is_contiguous()
        share = self._share_bytes(part)
        num_threads = min(share // _VECTOR_BYTES, _MAX_THREADS)
        num_blocks, row_bytes = -(-part.nbytes // share), part.shape[1] * part.itemsize
        sizes = map(c_int, (*self._sizes, part.nbytes, row_bytes, share))
        kernel = self._kernel("gather_over_ranks", part.dtype, self._num_ranks, _SUM, 1)
        part = part.contiguous()
        kernel.launch((num_blocks,), num_threads, (part, out, *self._ranks, *sizes))
        return out

    def _share_bytes(self, part: Tensor) -> int:
        """Bytes of `part` that a thread block gathers, whole loads of a warp."""
        of_warp = 32 * _VECTOR_BYTES
        return of_warp * -(-part.nbytes // (of_warp * self._num_channels))

    def abandon(self) -> None:
        """End running and later sums without waiting; their results are arbitrary."""
        self._is_over.fill_(1)

    def _launch(
        self, norm: int, part: Tensor, residual: Tensor | None, weight: Tensor | None,
        total: Tensor, normed: Tensor | None, eps: float,
    ) -> None:  # fmt: skip
        """Launch the kernel for as many rows at a time as fit into the channels."""
        (num_rows, width), row_bytes = part.shape, part.shape[1] * part.itemsize
        at_once = max_blocks = num_rows
        if self._num_ranks > 1:
            max_blocks = self._num_channels
            at_once = max_blocks * (self._channel_bytes // row_bytes)
        num_threads, per_thread = _threads_for(width)
        kernel = self._kernel("sum_over_ranks", part.dtype, self._num_ranks, norm, per_thread)
        for start in range(0, num_rows, at_once):
            rows = slice(start, start + at_once)
            tensors = (None if x is None else x[rows] for x in (part, residual, total, normed))
            count = min(at_once, num_rows - start)
            sizes = map(c_int, (*self._sizes, count, width))
            arguments = *tensors, weight, *self._ranks, *sizes, c_float(eps)
            kernel.launch((min(count, max_blocks),), num_threads, arguments)


def can_normalize(x: Tensor) -> bool:
    """Whether the kernel can normalise rows like those of x, [rows, width]."""
    width = x.shape[1]
    is_narrow = width <= _MAX_PER_THREAD * _VECTOR * _MAX_THREADS
    return x.dtype in (torch.bfloat16, torch.float16) and width % _VECTOR == 0 and is_narrow


def add_and_norm(
    update: Tensor, residual: Tensor, weight: Tensor, eps: float, adds_one: bool
) -> tuple[Tensor, Tensor]:
    """As `RankSums.sum_and_norm`, but `update` is already the sum over all ranks."""
    return _one_rank().sum_and_norm(update, residual, weight, eps, adds_one)


@functools.cache
def _one_rank() -> RankSums:
    return RankSums(0, [torch.empty(0, dtype=torch.uint8, device="cpu")])


def _threads_for(width: int) -> tuple[int, int]:
    """Threads of a block, and vectors of a row for each thread."""
    num_vectors = width // _VECTOR
    per_thread = -(-num_vectors // _MAX_THREADS)
    return 32 * -(-num_vectors // (32 * per_thread)), per_thread


def _make_kernel(
    name: str, dtype: torch.dtype, num_ranks: int, norm: int, per_thread: int
) -> CudaKernel:
    macros = {"BF16": dtype == torch.bfloat16, "RANKS": num_ranks}
    macros |= {"NORM": norm, "PER_THREAD": per_thread}
    return CudaKernel("sum_over_ranks.cu", name, macros)


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Structure:
    """The kernel's struct `Inboxes`."""
    array = c_void_p * len(tensors)
    kind = type("Inboxes", (ctypes.Structure,), {"_fields_": [("of", array)]})
    found: ctypes.Structure = kind(array(*(tensor.data_ptr() for tensor in tensors)))
    return found
