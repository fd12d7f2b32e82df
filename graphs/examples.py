"""Recorded calls from which blocks and edges are compiled, and saved functions are checked."""

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
    """

    name: str
    spec: Any
    variant: Variant
    module: nn.Module
    args: Args


BLOCK = "block_forward"
_BLOCKS_DIM = 1  # of a KV cache


def mark_dynamic_sizes(example: Example) -> None:
    """Mark the first dimension of all tensors but the cache as dynamic, and the cache's blocks.

    With a single token, tokens and rows are static. The bound of tokens per row is not, since the
    token may be a prompt's. The number of blocks follows from free memory and options.
    """
    variant, tensors = example.variant, list(example.args)
    if example.name == BLOCK:
        *tensors, cache, metadata = tensors
        tensors = [tensor for tensor in tensors if tensor is not None]
        if isinstance(cache, Tensor):
            torch._dynamo.mark_dynamic(cache, _BLOCKS_DIM)
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
    """The tensors of a result, without tokens outside of all rows, whose values are undefined."""
    if result is None:
        return []
    if isinstance(result, Tensor):
        num_tokens = len(result)
        if example.name == BLOCK:
            num_tokens = int(example.args[-1].query_start_loc[-1])
        return [result[:num_tokens]]
    return [tensor for part in result for tensor in defined(example, part)]


def are_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal but for rounding, NaN included.

    Libraries' sums differ in their order with the values of tokens outside of all rows, by which a
    mixture of experts groups the other tokens.
    """
    try:
        torch.testing.assert_close(first, second, equal_nan=True)
    except AssertionError:
        return False
    return True
