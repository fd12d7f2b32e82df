"""Counters in a device's memory, by which the thread blocks of a launch share their work.

    allocate(device)                     # with the KV cache, before any step is captured
    of_rows(num_rows * num_kv_heads, device)
    of_cache(kv_cache)

Counters are zero before and after each launch. Their memory is never freed or moved, since captured
graphs hold its address. The memory must be allocated outside of captures: during a capture, the
kernel that zeroes the counters is only recorded, so that a launch before the graph's first replay
would find arbitrary numbers.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

# Counters allocated at first, one per row and KV head: more than captured steps usually need.
_ROWS = 2**20
_CACHES = 2**16  # one counter per layer's KV cache
_of_rows: dict[torch.device, list[Tensor]] = {}
_next_cache = itertools.count()


def allocate(device: torch.device) -> None:
    """Allocate the counters of a device. device: with an index, such as "cuda:0"."""
    of_rows(1, device)
    _of_caches(device)


def of_rows(size: int, device: torch.device) -> Tensor:
    """At least `size` counters, int32. Launches that use them must run in order, on one stream.

    A step that needs more counters than allocated allocates more, so it must first run uncaptured.
    """
    made = _of_rows.setdefault(device, [])
    if not made or len(made[-1]) < size:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a captured step has {size} rows times KV heads, more than {_ROWS}; use a smaller "
                "max_cudagraph_capture_size"
            )
        size = max(1 << (size - 1).bit_length(), _ROWS)
        made.append(torch.zeros(size, dtype=torch.int32, device=device))
    return made[-1]


def of_cache(kv_cache: Tensor) -> Tensor:
    """The counter of a KV cache, int32 [1]. Launches on the same cache must run in order.

    Launches on different caches may run at the same time.
    """
    index = _index_of(kv_cache.data_ptr()) % _CACHES
    return _of_caches(kv_cache.device)[index : index + 1]


@functools.cache
def _of_caches(device: torch.device) -> Tensor:
    return torch.zeros(_CACHES, dtype=torch.int32, device=device)


@functools.cache
def _index_of(address: int) -> int:
    return next(_next_cache)
