"""Recorded calls: examples to compile blocks and edges from, and to check saved functions with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compiledllm.graphs.variants import Variant

Args = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A recorded call, from which one variant of a block or an edge is compiled.

    name: the decoder's attribute that was called. spec: the spec of the block, None for an edge.
    module: the block, or the decoder for an edge. args: the further arguments of the call; for a
    block, the last two are the cache and the metadata.
    """

    name: str
    spec: Any
    variant: Variant
    module: nn.Module
    args: Args


BLOCK = "block_forward"


def mark_dynamic_sizes(example: Example) -> None:
    """Tell Dynamo which sizes differ between calls of a variant: tokens, rows, bounds and caches.

    Numbers of tokens and rows are first dimensions; in the variant for one token they are static.
    The bound on tokens per row is dynamic in every variant, since a single token may also be the
    end of a prompt. The numbers of a KV cache's blocks and of states' snapshots follow from free
    memory and options, so saved code must run with any number.
    """
    variant, tensors = example.variant, list(example.args)
    if example.name == BLOCK:
        *tensors, cache, metadata = tensors
        tensors = [tensor for tensor in tensors if tensor is not None]
        for part in [cache] if isinstance(cache, Tensor) else cache:
            torch._dynamo.mark_dynamic(part, metadata.cache_dim)
        for tensor in metadata.bound_tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
    if variant.max_tokens == 1:
        return
    if example.name == BLOCK:
        tensors += metadata.token_tensors
        for tensor in metadata.row_tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0, min=variant.min_tokens, max=variant.max_tokens)


def defined(example: Example, result: Any) -> list[Tensor]:
    """The tensors of a result, without tokens outside every row, whose values are undefined."""
    if result is None:
        return []
    if isinstance(result, Tensor):
        num_tokens = len(result)
        if example.name == BLOCK:
            num_tokens = int(example.args[-1].query_start_loc[-1])
        return [result[:num_tokens]]
    return [tensor for part in result for tensor in defined(example, part)]


def are_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal up to rounding errors, where NaN equals NaN.

    Two correct results may differ in rounding: tokens outside every row have undefined values, so a
    mixture of experts may route these tokens to any expert. They change how many tokens an expert
    computes together, and with that the order in which a library's matmul sums.
    """
    try:
        torch.testing.assert_close(first, second, equal_nan=True)
    except AssertionError:
        return False
    return True
