"""Launches `cuda/decode_attention.cu`: rows with one new token each, on Hopper GPUs."""

from __future__ import annotations

import functools
from ctypes import c_float, c_int, c_longlong

import torch
from torch import Tensor

from compiledllm.kernels import compile_ahead, counters
from compiledllm.kernels.backend import FP8, AttentionMetadata, ScoreOptions
from compiledllm.kernels.cuda_kernel import CudaKernel, begins_at_16_bytes, kernel_unless_broken
from compiledllm.kernels.launch import is_hopper, launch_options, num_multiprocessors

_MAX_ROWS = 1024
_FEW_ROWS = 16
_MAX_HEAD_DIM = 256


def kernel_for(
    query: Tensor, kv_cache: Tensor, attn: AttentionMetadata, options: ScoreOptions
) -> CudaKernel | None:
    """The kernel for the step's rows of one new token, which skips others; None: there is none."""
    block_size, num_kv_heads, head_dim = kv_cache.shape[2:]
    num_heads, is_fp8 = query.shape[1], kv_cache.dtype == FP8
    if not is_hopper() or query.dtype.itemsize != 2 or kv_cache.dtype not in (query.dtype, FP8):
        return None
    if options.in_chunks or head_dim % 32 or head_dim > _MAX_HEAD_DIM or block_size % 16:
        return None
    num_rows = _num_rows(query, attn)
    if num_heads // num_kv_heads > 8 or num_rows > _MAX_ROWS:
        return None
    if not begins_at_16_bytes(query, kv_cache):
        return None
    return _kernel(
        query.dtype, is_fp8, _blocks_and_warps(num_rows, head_dim), head_dim, num_heads,
        num_kv_heads, block_size, options.sliding_window > 0, options.soft_cap > 0,
        0 if options.sinks is None else options.sinks.itemsize, compile_ahead.is_asking(),
    )  # fmt: skip


def _num_rows(query: Tensor, attn: AttentionMetadata) -> int:
    """The most rows that may have tokens: the last row of `attn` is always empty."""
    return min(len(query), len(attn.block_tables) - 1)


def _blocks_and_warps(num_rows: int, head_dim: int) -> tuple[int, int]:
    """Thread blocks of a multiprocessor, and the warps of each.

    Caches in 16 bits and in FP8 have the same, so that their keys are split and added alike.
    """
    if num_rows <= _FEW_ROWS or head_dim > 128:
        return 1, 8
    return (3, 4) if head_dim <= 64 else (2, 4)


@functools.cache
def _kernel(
    dtype: torch.dtype, is_fp8: bool, blocks_and_warps: tuple[int, int], head_dim: int,
    num_heads: int, num_kv_heads: int, block_size: int, has_window: bool, has_soft_cap: bool,
    sink_bytes: int, is_asked: bool,
) -> CudaKernel | None:  # fmt: skip
    """is_asked: whether another thread compiles the kernel. Only a part of the cache's key."""
    blocks, warps = blocks_and_warps
    options = {
        "BF16": dtype == torch.bfloat16, "FP8_CACHE": is_fp8, "MAX_ROWS": _MAX_ROWS,
        "NUM_BLOCKS": blocks * num_multiprocessors(), "BLOCKS": blocks, "WARPS": warps,
        "HEAD_DIM": head_dim, "NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads,
        "BLOCK_SIZE": block_size,
        "HAS_WINDOWS": has_window, "HAS_SOFT_CAP": has_soft_cap, "SINK_BYTES": sink_bytes,
        "OVERLAP": launch_options()["OVERLAP"],
    }  # fmt: skip
    shared_bytes = 4 * warps * (num_heads // num_kv_heads) * (head_dim + 2)
    instead = "Triton's kernel, which is slower, computes the attention of decode steps"
    name = "decode_attention"
    return kernel_unless_broken(instead, f"{name}.cu", name, options, shared_bytes)


def attend(
    kernel: CudaKernel,
    query: Tensor,
    kv_cache: Tensor,
    attn: AttentionMetadata,
    options: ScoreOptions,
    out: Tensor,
) -> None:
    """Write the attention of rows with one token to `out`, contiguous and of query's shape.

    kernel: from `kernel_for`. query: [tokens, num_heads, head_dim], with contiguous heads.
    """
    num_rows, num_kv_heads = _num_rows(query, attn), kv_cache.shape[3]
    _, num_heads, head_dim = query.shape
    blocks, warps = _blocks_and_warps(num_rows, head_dim)
    num_blocks = blocks * num_multiprocessors()
    most_units = 2 * num_blocks
    size = most_units * (num_heads // num_kv_heads) * (head_dim + 2)
    kernel.launch(
        (num_blocks,),
        32 * warps,
        (
            query, kv_cache[0], kv_cache[1], attn.block_tables, attn.seq_lens,
            attn.query_start_loc, options.sinks, options.kv_scales, out,
            query.new_empty(size, dtype=torch.float32),
            counters.of_rows(num_rows * num_kv_heads, query.device), c_longlong(query.stride(0)),
            c_longlong(attn.block_tables.stride(0)), c_int(num_rows),
            c_int(options.sliding_window), c_float(options.scale), c_float(options.soft_cap),
        ),
    )  # fmt: skip
