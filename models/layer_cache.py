"""The kinds of cache that a layer keeps of the tokens it has seen: window, shape, dtype and bytes.

`runner/kv_layout.py` puts layers with equal caches into groups and `runner/kv_cache.py` allocates
the tensors. Both ask a cache for its window, shape, dtype and bytes, and never for its kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from compiledllm.kernels.attention import kv_cache_shape


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Keys and values of each token, in blocks. The only owner of their size in bytes.

    window: number of latest tokens that a token sees, itself included; 0: all. dtype: of keys and
    values. bytes_per_request: bytes that a request takes whatever its length.
    """

    num_heads: int
    head_dim: int
    window: int
    dtype: torch.dtype
    bytes_per_request: ClassVar[int] = 0

    @property
    def bytes_per_token(self) -> int:
        return math.prod(self.shape(num_blocks=1, block_size=1)) * self.dtype.itemsize

    def shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """Shape of the layer's cache tensor; `num_blocks` counts the null block."""
        return kv_cache_shape(num_blocks, block_size, self.num_heads, self.head_dim)


LayerCache = PagedKV  # becomes a union of kinds with the same interface
