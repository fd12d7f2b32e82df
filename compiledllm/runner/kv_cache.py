"""Plans how many KV blocks the memory holds, and allocates them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from compiledllm.config import CacheConfig, Choice, ConfigError
from compiledllm.kernels.attention import kv_cache_shape
from compiledllm.models.spec import ModelSpec
from compiledllm.platform import Platform

CPU_MEMORY_SHARE = 0.25


def block_bytes(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block over all layers."""
    return spec.kv_bytes_per_token(dtype.itemsize) * block_size


def plan_num_blocks(
    cache: CacheConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    platform: Platform,
    bytes_in_use: int,
    most_useful_tokens: int,
) -> tuple[int, Choice]:
    """Usable blocks (without the null block), and why that many.

    bytes_in_use: on CUDA, what weights and activations take of the engine's share.
    most_useful_tokens: tokens of all requests that can run at once; more blocks would idle.
    """
    per_block = block_bytes(spec, cache.block_size, dtype)
    if cache.num_kv_blocks is not None:
        room, reason = (cache.num_kv_blocks + 1) * per_block, "num_kv_blocks"
    elif cache.kv_cache_memory_bytes is not None:
        room, reason = cache.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    elif platform.is_cuda:
        share = cache.gpu_memory_utilization
        room = int(platform.memory_bytes * share) - bytes_in_use
        reason = f"what {share:.0%} of the GPU leaves beside weights and activations"
    else:
        room = int(platform.memory_bytes * CPU_MEMORY_SHARE)
        reason = f"{CPU_MEMORY_SHARE:.0%} of the available memory"
        most_useful = -(-most_useful_tokens // cache.block_size)
        if most_useful * per_block < room:
            room, reason = (most_useful + 1) * per_block, "enough for max_num_seqs full contexts"
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


def allocate_kv_caches(
    spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """One zeroed cache per layer, with the null block in front of the `num_blocks` usable ones.

    Zeroed, because masked positions are multiplied by zero and garbage may be NaN.
    """
    shapes = [
        kv_cache_shape(num_blocks + 1, block_size, layer.attn.num_kv_heads, layer.attn.head_dim)
        for layer in spec.layers
    ]
    return [_zeros(shape, dtype, device) for shape in shapes]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy leaves zeroing to the operating system, page by page on first use; torch.zeros would
    # touch all of it now, seconds for gigabytes that may never be used.
    flat = torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8))
    return flat.view(dtype).view(shape)
