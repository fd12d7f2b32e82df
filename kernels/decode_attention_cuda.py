"""Launches `cuda/decode_attention.cu`: few rows with one new token each, on Hopper GPUs."""

from __future__ import annotations

import functools
from ctypes import c_float, c_int, c_longlong

import torch
from torch import Tensor

from compiledllm.kernels import compile_ahead, counters
from compiledllm.kernels.backend import AttentionMetadata, ScoreOptions
from compiledllm.kernels.cuda_kernel import CudaKernel, begins_at_16_bytes, kernel_unless_broken
from compiledllm.kernels.launch import is_hopper, launch_options, num_multiprocessors

_ROW_COUNTS = (1, 2, 4, 8, 16)  # of the variants of the kernel
_WARPS = 8


def kernel_for(query: Tensor, kv_cache: Tensor, options: ScoreOptions) -> CudaKernel | None:
    """The kernel for a decode step of these queries, [rows, heads, head_dim]; None: there is none.

    The rows' KV heads are at most half as many as the multiprocessors, which leaves room for splits
    of long rows among short ones.
    """
    block_size, num_kv_heads, head_dim = kv_cache.shape[2:]
    num_rows, num_heads, _ = query.shape
    if not is_hopper() or query.dtype != kv_cache.dtype or query.dtype.itemsize != 2:
        return None
    if options.in_chunks or head_dim not in (32, 64, 96, 128) or block_size % 16:
        return None
    if num_heads // num_kv_heads > 8 or num_rows > _ROW_COUNTS[-1]:
        return None
    if 2 * _max_rows(num_rows) * num_kv_heads > num_multiprocessors():
        return None
    if not begins_at_16_bytes(query, kv_cache):
        return None
    return _kernel(
        query.dtype, _max_rows(num_rows), num_multiprocessors(), head_dim, num_heads, num_kv_heads,
        block_size, options.sliding_window > 0, options.soft_cap > 0,
        0 if options.sinks is None else options.sinks.itemsize, compile_ahead.is_asking(),
    )  # fmt: skip


def _max_rows(num_rows: int) -> int:
    return next(n for n in _ROW_COUNTS if num_rows <= n)


@functools.cache
def _kernel(
    dtype: torch.dtype, max_rows: int, num_blocks: int, head_dim: int, num_heads: int,
    num_kv_heads: int, block_size: int, has_window: bool, has_soft_cap: bool, sink_bytes: int,
    is_asked: bool,
) -> CudaKernel | None:  # fmt: skip
    """is_asked: whether another thread compiles the kernel. Only a part of the cache's key."""
    options = {
        "BF16": dtype == torch.bfloat16, "ROWS": max_rows, "NUM_BLOCKS": num_blocks,
        "WARPS": _WARPS, "HEAD_DIM": head_dim, "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads, "BLOCK_SIZE": block_size, "HAS_WINDOWS": has_window,
        "HAS_SOFT_CAP": has_soft_cap, "SINK_BYTES": sink_bytes,
        "OVERLAP": launch_options()["OVERLAP"],
    }  # fmt: skip
    instead = "Triton's kernel, which is slower, computes the attention of decode steps"
    return kernel_unless_broken(instead, "decode_attention.cu", "decode_attention", options)


def attend(
    kernel: CudaKernel,
    query: Tensor,
    kv_cache: Tensor,
    attn: AttentionMetadata,
    options: ScoreOptions,
    out: Tensor,
) -> None:
    """Fill `out`, contiguous and of query's shape, for a step whose rows have one token each.

    kernel: from `kernel_for`. query: [rows, num_heads, head_dim], with contiguous heads.
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, num_blocks = kv_cache.shape[3], num_multiprocessors()
    units = num_blocks * -(-_max_rows(num_rows) * num_kv_heads // num_blocks)
    size = units * (num_heads // num_kv_heads) * (head_dim + 2)
    kernel.launch(
        (num_blocks,),
        32 * _WARPS,
        (
            query, kv_cache[0], kv_cache[1], attn.block_tables, attn.seq_lens, options.sinks, out,
            query.new_empty(size, dtype=torch.float32),
            counters.of_rows(num_rows * num_kv_heads, query.device), c_longlong(query.stride(0)),
            c_longlong(attn.block_tables.stride(0)), c_int(num_rows),
            c_int(options.sliding_window), c_float(options.scale), c_float(options.soft_cap),
        ),
    )  # fmt: skip
