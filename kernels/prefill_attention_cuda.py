"""Launches `cuda/prefill_attention.cu`: rows with several new tokens on Hopper GPUs."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from ctypes import c_float, c_int, c_longlong
from dataclasses import dataclass

import torch
from torch import Tensor

from compiledllm.kernels.backend import AttentionMetadata, ScoreOptions
from compiledllm.kernels.cuda_kernel import CudaKernel, compile_together
from compiledllm.kernels.launch import launch_options
from compiledllm.kernels.machine_code import CudaError, check, driver

log = logging.getLogger("compiledllm")

ROWS = 128  # query rows of a thread block: query tokens times the heads of a KV head
_THREADS = 384
_PART_COLUMNS = 64  # 128 bytes, the widest row that the copies can swizzle
_LONG_KEYS = 176  # KV tokens of a tile, in steps of at least _LONG_STEP tokens
_LONG_STEP = 2048
_CLUSTERS = (8, 4, 2)  # numbers of thread blocks that may share the keys of a context
# Values of the driver's enums for `cuTensorMapEncodeTiled`.
_FLOAT16, _BFLOAT16 = 6, 9
_SWIZZLE_128B, _PROMOTE_256B = 3, 3


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tile of a thread block.

    keys: KV tokens per iteration. stages: number of tiles of keys, and of tiles of values, in
    shared memory.
    """

    keys: int
    stages: int

    def shared_bytes(self, head_dim: int) -> int:
        columns = -(-head_dim // _PART_COLUMNS) * _PART_COLUMNS
        tiles = (ROWS + 2 * self.stages * self.keys) * columns * 2
        return tiles + 4 * self.stages * 8 + 1024  # barriers, alignment


def tilings_for(head_dim: int, block_size: int) -> tuple[Tiling, Tiling]:
    """The tilings for short and for long steps. Registers of the two warpgroups bound the tiles.

    Much of a short prompt's work lies in masked tiles, where a smaller tile wastes fewer keys. As
    only the device knows the rows, a long step is taken for one of long prompts. Large tiles make
    one prompt of 8192 or 16384 tokens 3 to 5 % faster, but a step of 8 prompts of 1024 tokens,
    which takes far less time, 5 % slower.
    """
    if head_dim > 128:
        return Tiling(64, 2), Tiling(64, 2)
    return Tiling(128, 2), Tiling(128 if _LONG_KEYS % block_size else _LONG_KEYS, 2)


@dataclass(frozen=True, slots=True)
class Launch:
    """The grid of a step. The kernel assigns its thread blocks by the lengths on the device.

    num_blocks: number of thread blocks, a multiple of `cluster`, and at least `max_at_once` if
    blocks may share keys. cluster: number of thread blocks that may share the keys of one piece and
    KV head. max_at_once: number of thread blocks that the GPU runs at once.
    """

    num_blocks: int
    cluster: int
    max_at_once: int


def launch_for(
    num_tokens: int, num_kv_heads: int, group: int, max_clusters: Callable[[int], int]
) -> Launch:
    """The grid for steps of up to this many tokens.

    A row is computed in pieces of `ROWS // group` tokens. There are as many thread blocks as one
    row with all tokens would have pieces, times KV heads. More rows have partial pieces, too, which
    the blocks compute one after another: a captured step has room for far more rows than it mostly
    has, and blocks without work take time, too. The cluster size is the largest at which all pieces
    of one row would run at once, such as those of a question on a long document. If the step's rows
    have more pieces, the kernel lets fewer blocks, or only one, share keys.
    max_clusters: cluster size -> number of clusters that run at once.
    """
    num_programs = max(num_tokens * group // ROWS, 1) * num_kv_heads
    cluster = next((size for size in _CLUSTERS if num_programs <= max_clusters(size)), 1)
    max_at_once = cluster * max_clusters(cluster)
    num_blocks = max(num_programs, max_at_once)
    return Launch(-(-num_blocks // cluster) * cluster, cluster, max_at_once)


def kernel_for(query: Tensor, kv_cache: Tensor, options: ScoreOptions) -> CudaKernel | None:
    """The kernel for these queries and this cache on the current device; None: there is none."""
    block_size, num_kv_heads, head_dim = kv_cache.shape[2:]
    sink_bytes = 0 if options.sinks is None else options.sinks.itemsize
    if not _is_hopper() or query.dtype != kv_cache.dtype or query.dtype.itemsize != 2:
        return None
    if options.in_chunks:
        return None
    if any(x.stride(0) % 8 or x.data_ptr() % 16 for x in (query, kv_cache)):  # read by 16 bytes
        return None
    kernels = _kernels(
        query.dtype, head_dim, query.shape[1] // num_kv_heads, num_kv_heads, block_size,
        options.sliding_window > 0, options.soft_cap > 0, sink_bytes,
    )  # fmt: skip
    return None if kernels is None else kernels[len(query) >= _LONG_STEP]


@functools.cache
def _is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@functools.cache
def _kernels(
    dtype: torch.dtype, head_dim: int, group: int, num_kv_heads: int, block_size: int,
    has_window: bool, has_soft_cap: bool, sink_bytes: int,
) -> tuple[CudaKernel, ...] | None:  # fmt: skip
    """The kernels for short and for long steps, both compiled at the start of an engine."""
    if head_dim not in range(64, 257, 8) or block_size not in (8, 16, 32, 64) or group > ROWS:
        return None
    macros = {
        "BF16": dtype == torch.bfloat16, "HEAD_DIM": head_dim, "GROUP": group,
        "NUM_KV_HEADS": num_kv_heads, "BLOCK_SIZE": block_size, "HAS_WINDOW": has_window,
        "HAS_SOFT_CAP": has_soft_cap, "SINK_BYTES": sink_bytes,
        "OVERLAP": launch_options()["OVERLAP"],
    }  # fmt: skip
    tilings = tilings_for(head_dim, block_size)
    options = [macros | {"KEYS": tiling.keys, "STAGES": tiling.stages} for tiling in tilings]
    source, name = "prefill_attention.cu", "prefill_attention"
    try:
        compile_together(source, options)
        return tuple(
            CudaKernel(source, name, each, tiling.shared_bytes(head_dim))
            for each, tiling in zip(options, tilings, strict=True)
        )
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
    _, num_blocks, _, num_kv_heads, _ = kv_cache.shape
    _, block_tables, seq_lens, query_start_loc, _ = attn
    num_rows, group = len(block_tables), query.shape[1] // num_kv_heads
    launch = launch_for(
        len(query), num_kv_heads, group, lambda cluster: kernel.max_clusters(_THREADS, cluster)
    )
    arguments = (
        _map_of(kv_cache), query, block_tables, seq_lens, query_start_loc, options.sinks, out,
        c_float(options.scale), c_int(options.sliding_window), c_float(options.soft_cap),
        c_longlong(query.stride(0)), c_longlong(block_tables.stride(0)), c_int(num_blocks),
        c_int(num_rows), c_int(launch.max_at_once),
    )  # fmt: skip
    kernel.launch((launch.num_blocks,), _THREADS, arguments, launch.cluster)


class _TensorMap(ctypes.Structure):
    """`CUtensorMap`, which describes a tensor to the tensor memory accelerator."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


def _map_of(kv_cache: Tensor) -> _TensorMap:
    shape = tuple(kv_cache.shape)
    return _encode(kv_cache.data_ptr(), kv_cache.dtype, shape, kv_cache.stride(0))


@functools.lru_cache(maxsize=4096)
def _encode(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], value_offset: int
) -> _TensorMap:
    """The tensor map of a cache. A box is 64 columns of all tokens of one page in one head."""
    kinds, num_blocks, block_size, num_kv_heads, head_dim = shape
    token_bytes = num_kv_heads * head_dim * 2
    sizes = (ctypes.c_uint64 * 5)(head_dim, block_size, num_kv_heads, num_blocks, kinds)
    strides = (ctypes.c_uint64 * 4)(
        token_bytes, head_dim * 2, block_size * token_bytes, value_offset * 2
    )
    box = (ctypes.c_uint32 * 5)(_PART_COLUMNS, block_size, 1, 1, 1)
    steps = (ctypes.c_uint32 * 5)(1, 1, 1, 1, 1)
    memory = ctypes.create_string_buffer(128 + 63)
    made = _TensorMap.from_buffer(memory, -ctypes.addressof(memory) % 64)  # 64-byte aligned
    check(
        driver().cuTensorMapEncodeTiled(
            ctypes.byref(made), _BFLOAT16 if dtype == torch.bfloat16 else _FLOAT16, 5,
            ctypes.c_void_p(address), sizes, strides, box, steps,
            0, _SWIZZLE_128B, _PROMOTE_256B, 0,
        )
    )  # fmt: skip
    return made
