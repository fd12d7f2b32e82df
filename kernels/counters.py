"""Counters in a device's memory by which thread blocks share the work of a launch.

    allocate(device)                     # with the KV cache, before any step is captured
    of_rows(num_rows * num_kv_heads, device)
    of_cache(kv_cache)

Kernels find their counters at zero and leave them so. The memory is never freed or moved, since
captured graphs hold its address. It must be allocated outside of captures: a fill of a stream that
is being captured runs with the graph only, so a launch before that would find other numbers.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

_ROWS = 2**20  # counters of rows, one per row and KV head: more than steps are captured with
_CACHES = 2**16
_of_rows: dict[torch.device, list[Tensor]] = {}
_next_cache = itertools.count()


def allocate(device: torch.device) -> None:
    """Allocate the counters of a device. device: with an index, as tensors have it."""
    of_rows(1, device)
    _of_caches(device)


def of_rows(size: int, device: torch.device) -> Tensor:
    """At least `size` counters, int32. Launches that use them must run in order, on one stream.

    A larger step allocates further memory, for which it must run uncaptured first.
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
    """A counter, int32 [1], for launches on a KV cache, which must run in order.

    Launches on other caches may run at the same time.
    """
    index = _index_of(kv_cache.data_ptr()) % _CACHES
    return _of_caches(kv_cache.device)[index : index + 1]


@functools.cache
def _of_caches(device: torch.device) -> Tensor:
    return torch.zeros(_CACHES, dtype=torch.int32, device=device)


@functools.cache
def _index_of(address: int) -> int:
    return next(_next_cache)
