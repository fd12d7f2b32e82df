"""Launches `cuda/sum_over_ranks.cu`: sums over ranks in one kernel, with the residual and RMSNorm.

Every rank stores its summand in the memory of all other ranks, so a sum takes one way over NVLink,
and no signal beside the data. Sums that are too large for that are added up elsewhere, and the
kernel adds the residual and normalises.
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

_MAX_CHANNELS = 128  # thread blocks of a sum
_CHANNEL_BYTES = 32 * 2**10  # room for the rows of one rank that a thread block sums
_BUFFER_BYTES = _MAX_CHANNELS * _CHANNEL_BYTES  # room for all rows of one rank
_NUM_BUFFERS = 2
_MAX_SENT_BYTES = 4 * 2**20  # that a rank sends to all others in one sum
_EMPTY = -(2**31) + 2**15  # the kernel's word for numbers that have not arrived, as int32
_MAX_THREADS = 1024
_VECTOR = 8  # numbers that a thread loads at once
_VECTOR_BYTES = 16
_MAX_PER_THREAD = 2  # vectors of a row
# Values of the kernel's macro NORM.
_SUM, _NORMALIZE, _NORMALIZE_ONE = range(3)


def inbox_bytes(num_ranks: int) -> int:
    """Bytes of the memory in which a rank receives the summands of the others."""
    return _NUM_BUFFERS * num_ranks * _BUFFER_BYTES


class RankSums:
    """The sums of one rank.

    inboxes: each rank's memory of `inbox_bytes`, uint8, mapped into this process. All ranks must
    have made their RankSums before the first sum, and ask for the same sums in the same order.
    """

    def __init__(self, rank: int, inboxes: Sequence[Tensor]) -> None:
        self._rank, self._num_ranks = rank, len(inboxes)
        self._tensors = inboxes  # whose memory lives as long as this object
        own = inboxes[rank]
        own.view(torch.int32).fill_(_EMPTY)
        self._kernel = functools.cache(_make_kernel)
        self._num_channels = min(_MAX_CHANNELS, num_multiprocessors())
        self._rounds = torch.zeros(_MAX_CHANNELS, dtype=torch.int32, device=own.device)
        # The host's memory, which a running kernel sees change.
        self._is_over = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=own.is_cuda)
        # Arguments of all launches.
        self._ranks = (_addresses(inboxes), own, self._rounds, self._is_over)

    def fits(self, part: Tensor) -> bool:
        """Whether the kernel can sum `part`, [rows, width]."""
        num_bytes = part.numel() * part.element_size()
        turns = -(-len(part) // self._num_channels)
        return (
            can_normalize(part)
            and turns * part.shape[1] * part.element_size() <= _CHANNEL_BYTES
            and 0 < num_bytes * (self._num_ranks - 1) <= _MAX_SENT_BYTES
        )

    def sum(self, part: Tensor) -> Tensor:
        """The sum of `part` over all ranks, [rows, width]."""
        total = torch.empty_like(part, memory_format=torch.contiguous_format)
        self._launch(_SUM, part.contiguous(), None, None, total, None, 0.0)
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
        num_bytes = part.numel() * part.element_size()
        is_aligned = part.shape[1] * part.element_size() % _VECTOR_BYTES == 0
        num_others = self._num_ranks - 1
        return (
            is_aligned
            and 0 < num_bytes <= self._num_channels * _CHANNEL_BYTES
            and num_others * num_bytes <= _MAX_SENT_BYTES
        )

    def gather(self, part: Tensor, out: Tensor) -> Tensor:
        """The tensors [rows, width] of all ranks side by side, in `out`, [rows, ranks * width]."""
        assert self.can_gather(part) and out.is_contiguous()
        num_bytes, row_bytes = (x.numel() * x.element_size() for x in (part, part[0]))
        num_vectors = -(-num_bytes // (_VECTOR_BYTES * self._num_channels))
        num_warps = min(-(-num_vectors // 32), _MAX_THREADS // 32)
        share = num_warps * 32 * _VECTOR_BYTES * -(-num_vectors // (32 * num_warps))
        kernel = self._kernel("gather_over_ranks", part.dtype, self._num_ranks, _SUM, 1)
        sizes = _BUFFER_BYTES, _CHANNEL_BYTES, self._rank, num_bytes, row_bytes, share
        tensors = part.contiguous(), out
        num_blocks = -(-num_bytes // share)
        kernel.launch((num_blocks,), 32 * num_warps, (*tensors, *self._ranks, *map(c_int, sizes)))
        return out

    def abandon(self) -> None:
        """Let running and later sums end without waiting, with any values: a rank has ended."""
        self._is_over.fill_(1)

    def _launch(
        self, norm: int, part: Tensor, residual: Tensor | None, weight: Tensor | None,
        total: Tensor, normed: Tensor | None, eps: float,
    ) -> None:  # fmt: skip
        assert self._num_ranks == 1 or self.fits(part), part.shape
        num_rows, width = part.shape
        num_threads, per_thread = _threads_for(width)
        num_blocks = min(num_rows, self._num_channels) if self._num_ranks > 1 else num_rows
        kernel = self._kernel("sum_over_ranks", part.dtype, self._num_ranks, norm, per_thread)
        tensors = part, residual, weight, total, normed
        sizes = map(c_int, (_BUFFER_BYTES, _CHANNEL_BYTES, self._rank, num_rows, width))
        kernel.launch((num_blocks,), num_threads, (*tensors, *self._ranks, *sizes, c_float(eps)))


def can_normalize(x: Tensor) -> bool:
    """Whether the kernel can normalise rows like those of x, [rows, width]."""
    width = x.shape[1]
    is_narrow = width <= _MAX_PER_THREAD * _VECTOR * _MAX_THREADS
    return x.dtype in (torch.bfloat16, torch.float16) and width % _VECTOR == 0 and is_narrow


def add_and_norm(
    update: Tensor, residual: Tensor, weight: Tensor, eps: float, adds_one: bool
) -> tuple[Tensor, Tensor]:
    """As `RankSums.sum_and_norm`, where `update` is the sum already."""
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
