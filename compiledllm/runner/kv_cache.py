"""Plans how many KV blocks the memory holds, and allocates them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from compiledllm.choices import Choice
from compiledllm.config import ConfigError
from compiledllm.engine_options import CacheConfig
from compiledllm.kernels import counters
from compiledllm.platform import Platform
from compiledllm.runner.device import to_device
from compiledllm.runner.kv_layout import KVLayout

CPU_MEMORY_SHARE = 0.25  # fraction of the available memory


def plan_num_blocks(
    cache: CacheConfig,
    per_block: int,
    platform: Platform,
    bytes_in_use: int,
    max_useful: int,
    snapshot_share: float = 0.0,
) -> tuple[int, Choice]:
    """Number of usable blocks (without the null block), and the reason for that number.

    per_block: bytes of a block. bytes_in_use: see `available_bytes`. max_useful: number of blocks
    of all requests that can run at once; limits the cache on a CPU only, because a GPU's share is
    reserved for the engine in any case. snapshot_share: memory for snapshots of states, as a share
    of the blocks' memory; it is taken from the cache's memory, unless `num_kv_blocks` is given.
    Raises ConfigError if no block fits, or if an option asks for more than the device's memory.
    """
    if cache.num_kv_blocks is not None:
        room, reason = (cache.num_kv_blocks + 1) * per_block, "num_kv_blocks"
    elif cache.kv_cache_memory_bytes is not None:
        room, reason = cache.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    else:
        room, reason = available_bytes(cache, platform, bytes_in_use)
        if not platform.is_cuda and max_useful * per_block < room:
            room, reason = (max_useful + 1) * per_block, "enough for max_num_seqs full contexts"
    if cache.num_kv_blocks is None:
        room = int(room / (1 + snapshot_share))
    num_blocks = room // per_block - 1
    if num_blocks < 1:
        raise ConfigError(
            f"no room for a KV cache: {room / 2**20:.1f} MiB ({reason}) holds no two blocks of "
            f"{per_block / 2**20:.2f} MiB; raise kv_cache_memory_bytes or gpu_memory_utilization"
        )
    if room > platform.memory_bytes:
        raise ConfigError(
            f"{reason} asks for a KV cache of {room / 2**30:.1f} GiB and there are "
            f"{platform.memory_bytes / 2**30:.1f} GiB; at most "
            f"{platform.memory_bytes // per_block - 1} blocks fit"
        )
    return num_blocks, Choice(num_blocks, reason)


def available_bytes(cache: CacheConfig, platform: Platform, bytes_in_use: int) -> tuple[int, str]:
    """Bytes for a KV cache (negative if there is no room), and the reason for that number.

    bytes_in_use: bytes of the engine's share that are not for the KV cache. On CUDA these are
    weights, activations, sampling and states. On a CPU, where the available memory is measured
    beside the weights, these are states.
    """
    if platform.is_cuda:
        share = cache.gpu_memory_utilization
        reason = f"what {share:.0%} of the GPU leaves beside weights and activations"
        return int(platform.memory_bytes * share) - bytes_in_use, reason
    reason = f"{CPU_MEMORY_SHARE:.0%} of the available memory"
    return int(platform.memory_bytes * CPU_MEMORY_SHARE) - bytes_in_use, reason


def allocate_kv_caches(
    layout: KVLayout, num_blocks: int, block_size: int, device: torch.device
) -> list[Tensor]:
    """One zeroed cache per layer that has KV: the null block, then `num_blocks` usable blocks.

    Layers in the same column share memory, in which each layer owns different blocks. Layers of
    equal shape share a tensor. Caches are zeroed, because masked positions are multiplied by zero
    and garbage may be NaN. Raises ConfigError if the GPU's free memory does not hold them.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    try:
        caches = _allocate(layout, num_blocks, block_size, device)
        if caches and device.type == "cuda":
            counters.allocate(caches[0].device)
        return caches
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a KV cache of {num_blocks} blocks does not fit beside weights and other processes, "
            f"as {free / 2**30:.1f} GiB of the GPU are left; use fewer (num_kv_blocks, "
            "kv_cache_memory_bytes or gpu_memory_utilization)"
        ) from error


def _allocate(
    layout: KVLayout, num_blocks: int, block_size: int, device: torch.device
) -> list[Tensor]:
    columns: dict[int, Tensor] = {}
    views: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    found, sizes = [], layout.block_sizes(block_size)
    for place, cache in zip(layout.places, layout.caches, strict=True):
        shape = cache.shape(num_blocks + 1, sizes[place.group])
        if place.column not in columns:
            columns[place.column] = lazy_zeros(shape, cache.dtype, device)
        column = columns[place.column]
        view = column if column.shape == shape else column.view(shape)
        found.append(views.setdefault((place.column, shape), view))
    return found


def zero_blocks(kv_caches: Iterable[Tensor], block_ids: Sequence[int]) -> None:
    """Zero KV blocks that may hold NaN, since masking by a product with zero keeps a NaN."""
    for kv_cache in {id(c): c for c in kv_caches}.values():  # layers may share a cache
        index = to_device(np.array(block_ids), kv_cache.device)
        kv_cache.view(torch.uint8)[:, index] = 0  # torch does not index all FP8 tensors


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros; on a CPU, pages take memory only once they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy lets the operating system zero each page on first use. torch.zeros would write all pages
    # now, which takes seconds for gigabytes that may never be used.
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
