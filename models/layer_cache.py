"""The kinds of cache that a layer keeps of the tokens it has seen: window, shape, dtype and bytes.

`PagedKV` grows with the number of a request's tokens, and is stored in blocks.
`runner/kv_layout.py` puts layers into groups and `runner/kv_cache.py` allocates the tensors. A
layer with `SharedKV` reads the KV of an earlier layer. A `State` has a fixed size for a request of
any length; `runner/state_caches.py` allocates one for each request row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from compiledllm.kernels.attention import kv_cache_shape


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Keys and values of each token, in blocks. The only owner of their size in bytes.

    window: number of latest tokens that a token sees, itself included; 0: all. dtype: of keys and
    values.
    """

    num_heads: int
    head_dim: int
    window: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return math.prod(self.shape(num_blocks=1, block_size=1)) * self.dtype.itemsize

    def shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """Shape of the layer's cache tensor; `num_blocks` counts the null block."""
        return kv_cache_shape(num_blocks, block_size, self.num_heads, self.head_dim)


@dataclass(frozen=True, slots=True)
class State:
    """Tensors of a fixed size for each request. parts: shape and dtype of each tensor."""

    parts: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    @property
    def bytes_per_request(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.parts)


@dataclass(frozen=True, slots=True)
class SharedKV:
    """Nothing of its own: the layer reads the keys and values of the earlier layer `layer`."""

    layer: int


LayerCache = PagedKV | State | SharedKV
