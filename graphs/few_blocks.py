"""Lets a step run only a few blocks of each kind, which use the same kernels as all blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from compiledllm.graphs.saved_graph import ALIGNMENT

_RUNS_PER_KIND = 2  # the first block's inputs may differ in layout from those of later blocks


class Decoder(Protocol):
    """A decoder as in `compile.Decoder`."""

    block_forward: Callable[..., Any]


@contextmanager
def few_blocks(decoder: Decoder) -> Iterator[None]:
    """A context in which the decoder's forward runs the first two blocks of each kind only.

    Blocks are of one kind if they have the same spec, metadata and alignment of tensors, because
    Triton then uses the same kernels for them. Use the context for a single forward; the results of
    the forward are meaningless.
    """
    run, counts = decoder.block_forward, Counter[tuple[Any, ...]]()

    def forward(block: Any, x: Tensor, update: Tensor, *args: Any) -> Any:
        *tensors, cache, metadata = args
        caches = [cache] if isinstance(cache, Tensor) else cache
        held = *block.parameters(), *block.buffers(), *tensors, *caches
        kind = block.spec, id(metadata), tuple(map(_is_aligned, held))
        counts[kind] += 1
        return run(block, x, update, *args) if counts[kind] <= _RUNS_PER_KIND else (x, update)

    decoder.block_forward = forward
    try:
        yield
    finally:
        decoder.block_forward = run


def _is_aligned(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.data_ptr() % ALIGNMENT == 0
