"""Launches `cuda/prefill_attention.cu`: rows with several new tokens on Hopper GPUs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from ctypes import c_float, c_int, c_longlong
from dataclasses import dataclass

import torch
from torch import Tensor

from compiledllm.kernels import compile_ahead, counters
from compiledllm.kernels.backend import FP8, AttentionMetadata, ScoreOptions
from compiledllm.kernels.cuda_kernel import CudaKernel, begins_at_16_bytes, compile_together
from compiledllm.kernels.launch import is_hopper, launch_options
from compiledllm.kernels.machine_code import CudaError
from compiledllm.kernels.tensor_map import TensorMap, encoded

log = logging.getLogger("compiledllm")

ROWS = 128  # query rows of a program: query tokens times the heads of a KV head
_THREADS = 384
_PART_BYTES = 128  # the widest row that the copies can swizzle
_PART_COLUMNS = _PART_BYTES // 2  # of 16 bits
_LONG_KEYS = 176  # KV tokens of a tile, in steps of long rows
_LONG_KEYS_OF_FP8 = 160  # as the codes need shared memory, too
_CHUNK_BYTES = 4096  # of an FP8 cache
_CHUNKS = 8  # in shared memory
_CLUSTERS = (8, 4, 2)  # numbers of thread blocks that may share the keys of a context


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tiles of a thread block.

    keys: KV tokens per iteration. stages: number of tiles of keys, and of tiles of values, in
    shared memory. query_stages: number of programs whose queries are in shared memory. chunk: KV
    tokens of an FP8 cache that a warp converts at a time. chunks: number of chunks of codes in
    shared memory. Both are 0 for a cache of 16 bits.
    """

    keys: int
    stages: int
    query_stages: int
    chunk: int = 0
    chunks: int = 0

    @property
    def macros(self) -> dict[str, int]:
        return {
            "KEYS": self.keys, "STAGES": self.stages, "QUERY_STAGES": self.query_stages,
            "CHUNK": self.chunk, "CHUNKS": self.chunks,
        }  # fmt: skip

    def shared_bytes(self, head_dim: int) -> int:
        row_bytes = -(-head_dim // _PART_COLUMNS) * _PART_BYTES
        tiles = (self.query_stages * ROWS + 2 * self.stages * self.keys) * row_bytes
        codes = self.chunks * self.chunk * _row_of_codes(head_dim)
        return tiles + codes + 2 * 1024  # barriers, descriptions of programs and chunks; alignment


def _row_of_codes(head_dim: int) -> int:
    """The bytes in shared memory of a token's FP8 codes in one head."""
    return -(-head_dim // _PART_BYTES) * _PART_BYTES


def _chunk_of(head_dim: int) -> int:
    """`Tiling.chunk` for an FP8 cache."""
    return _CHUNK_BYTES // _row_of_codes(head_dim)


def tilings_for(head_dim: int, block_size: int, is_fp8: bool = False) -> tuple[Tiling, Tiling]:
    """The tilings for steps of short and of long rows. Registers bound the tiles.

    With heads of 128, larger tiles leave shared memory for the queries of one program only, so that
    the next program's queries are copied late. On an H200, a prompt of 16384 tokens takes 6 % less
    time with larger tiles, and 64 prompts of 256 tokens take 38 % more (32 heads, 8 KV heads).
    """
    chunks = (_chunk_of(head_dim), _CHUNKS) if is_fp8 else (0, 0)
    long_keys = _LONG_KEYS_OF_FP8 if is_fp8 else _LONG_KEYS
    if head_dim > 128:
        return Tiling(64, 2, 1, *chunks), Tiling(64, 2, 1, *chunks)
    short = Tiling(128, 2, 2, *chunks)
    query_stages = 2 if head_dim <= _PART_COLUMNS else 1
    long = Tiling(long_keys, 2, query_stages, *chunks)
    return short, short if long_keys % block_size else long


def cluster_for(
    num_tokens: int, num_kv_heads: int, group: int, max_clusters: Callable[[int], int]
) -> int:
    """The number of thread blocks of a cluster, which may share the keys of one program.

    It is the largest at which the programs of one row with all tokens would run at once, such as
    those of a question on a long document. If the step's rows have more programs, the kernel lets
    fewer blocks, or only one, share keys. max_clusters: cluster size -> number of clusters that run
    at once.
    """
    num_programs = max(num_tokens * group // ROWS, 1) * num_kv_heads
    return next((size for size in _CLUSTERS if num_programs <= max_clusters(size)), 1)


def _long_step(head_dim: int) -> int:
    """The number of tokens from which on a step is assumed to have long rows.

    Only the device knows the rows of a captured step. If a step of many tokens has short rows, the
    wrong tiles cost little, since attention is then a small part of the step's time.
    """
    return 8192 if head_dim <= _PART_COLUMNS else 12288


def kernel_for(query: Tensor, kv_cache: Tensor, options: ScoreOptions) -> CudaKernel | None:
    """The kernel for these queries and this cache on the current device; None: there is none."""
    block_size, num_kv_heads, head_dim = kv_cache.shape[2:]
    sink_bytes = 0 if options.sinks is None else options.sinks.itemsize
    if not is_hopper() or query.dtype.itemsize != 2 or options.in_chunks:
        return None
    if kv_cache.dtype not in (query.dtype, FP8):
        return None
    if not begins_at_16_bytes(query, kv_cache):
        return None
    kernels = _kernels(
        query.dtype, kv_cache.dtype == FP8, head_dim, query.shape[1] // num_kv_heads, num_kv_heads,
        block_size, options.sliding_window > 0, options.soft_cap > 0, sink_bytes,
        compile_ahead.is_asking(),
    )  # fmt: skip
    return None if kernels is None else kernels[len(query) >= _long_step(head_dim)]


@functools.cache
def _kernels(
    dtype: torch.dtype, is_fp8: bool, head_dim: int, group: int, num_kv_heads: int, block_size: int,
    has_window: bool, has_soft_cap: bool, sink_bytes: int, are_asked: bool,
) -> tuple[CudaKernel, ...] | None:  # fmt: skip
    """The kernels for short and for long rows, both compiled at the start of an engine.

    are_asked: whether other threads compile the kernels (`compile_ahead.asking`), so that errors
    are not known yet. Only a part of the cache's key.
    """
    multiple = 16 if is_fp8 else 8  # 16 bytes, of which TMA's strides are multiples
    if head_dim not in range(64, 257, multiple) or block_size not in (8, 16, 32, 64):
        return None
    if group > ROWS:
        return None
    macros = {
        "BF16": dtype == torch.bfloat16, "HEAD_DIM": head_dim, "GROUP": group,
        "NUM_KV_HEADS": num_kv_heads, "BLOCK_SIZE": block_size, "HAS_WINDOW": has_window,
        "HAS_SOFT_CAP": has_soft_cap, "SINK_BYTES": sink_bytes,
        "OVERLAP": launch_options()["OVERLAP"],
    }  # fmt: skip
    tilings = tilings_for(head_dim, block_size, is_fp8)
    options = {each: macros | each.macros for each in tilings}  # tilings may be equal
    source, name = "prefill_attention.cu", "prefill_attention"
    try:
        compile_together(source, list(options.values()))
        kernels = {
            each: CudaKernel(source, name, macros, each.shared_bytes(head_dim))
            for each, macros in options.items()
        }
        return tuple(kernels[each] for each in tilings)
    except CudaError as error:
        log.warning("Triton's kernel, which is slower, computes prompts' attention: %s", error)
        return None


def attend_prompts(
    kernel: CudaKernel,
    query: Tensor,
    kv_cache: Tensor,
    attn: AttentionMetadata,
    options: ScoreOptions,
    out: Tensor,
) -> None:
    """Write the attention of rows with two or more tokens to `out`.

    kernel: from `kernel_for`. query: [tokens, num_heads, head_dim], with contiguous heads. out: of
    query's shape, contiguous.
    """
    if compile_ahead.is_asking():  # `max_clusters` needs the kernel, which may not be compiled yet
        return
    _, num_blocks, _, num_kv_heads, _ = kv_cache.shape
    _, block_tables, seq_lens, query_start_loc, _ = attn
    num_rows, group = len(block_tables), query.shape[1] // num_kv_heads
    max_clusters = functools.partial(kernel.max_clusters, _THREADS)
    cluster = cluster_for(len(query), num_kv_heads, group, max_clusters)
    arguments = (
        _map_of_cache(kv_cache), _map_of_queries(query, group), block_tables, seq_lens,
        query_start_loc, options.sinks, out, counters.of_cache(kv_cache),
        c_float(options.scale), c_int(options.sliding_window), c_float(options.soft_cap),
        c_longlong(block_tables.stride(0)), c_int(num_blocks), c_int(num_rows), options.kv_scales,
    )  # fmt: skip
    kernel.launch((cluster * max_clusters(cluster),), _THREADS, arguments, cluster)


def _map_of_cache(kv_cache: Tensor) -> TensorMap:
    """A box is 128 bytes of the tokens of one page in one head, for FP8 of at most a chunk."""
    kinds, num_blocks, block_size, num_kv_heads, head_dim = kv_cache.shape
    token, is_fp8 = num_kv_heads * head_dim, kv_cache.dtype == FP8
    box_tokens = min(block_size, _chunk_of(head_dim)) if is_fp8 else block_size
    return encoded(
        kv_cache.data_ptr(), torch.uint8 if is_fp8 else kv_cache.dtype,
        (head_dim, block_size, num_kv_heads, num_blocks, kinds),
        (token, head_dim, block_size * token, kv_cache.stride(0)),
        (_PART_BYTES // kv_cache.itemsize, box_tokens, 1, 1, 1),
    )  # fmt: skip


def _map_of_queries(query: Tensor, group: int) -> TensorMap:
    """A box is 64 columns of the heads that share a KV head, for the tokens of a program."""
    num_tokens, num_heads, head_dim = query.shape
    stride = query.stride(0)
    return encoded(
        query.data_ptr(), query.dtype, (head_dim, num_heads, num_tokens, 1, 1),
        (head_dim, stride, stride, stride), (_PART_COLUMNS, group, ROWS // group, 1, 1),
    )  # fmt: skip
