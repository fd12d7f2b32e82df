"""The interface of attention backends: their inputs, their capabilities and their methods.

`attention.py` has the list of backends, the ops that call them and the ops' shapes. Each backend is
a class in its own file. Callers read a backend's capabilities, never its identity.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Container, Hashable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
MAX_FP8 = 448.0  # the largest finite value; a cast of a larger value gives NaN


# Added to every bound: torch.compile would compile sizes 0 and 1 separately from all other sizes.
_SHORTEST_BOUND = 2


def make_row_bound(max_row_tokens: int, device: torch.device | None = None) -> Tensor:
    """A tensor whose length carries `max_row_tokens` to the kernels; its values mean nothing.

    max_row_tokens: the maximum number of tokens of a row; 0: no maximum is known. A Python number
    would be a constant of the compiled code, so that each maximum would be compiled separately; the
    length of a tensor can be a dynamic size.
    """
    return torch.empty(max_row_tokens + _SHORTEST_BOUND, dtype=torch.int8, device=device)


def max_row_tokens(row_bound: Tensor) -> int:
    """The maximum number of tokens of a row, from `make_row_bound`; 0: no maximum is known."""
    return len(row_bound) - _SHORTEST_BOUND


class AttentionMetadata(NamedTuple):
    """The attention ops' description of a step: tensors only, on the model's device.

    Rows are ragged: a row is the contiguous tokens of one request in the flat token dimension.
    Padding rows have no tokens and `seq_lens` 0. Block table entries for positions before a layer's
    window are stale: a backend that `reads_groups` reads neither these entries nor the blocks they
    name.
    """

    slot_mapping: Tensor  # int64 [tokens]
    block_tables: Tensor  # int32 [rows, max_blocks], 0-padded
    seq_lens: Tensor  # int32 [rows], context lengths including this step's tokens
    query_start_loc: Tensor  # int32 [rows + 1], prefix sums of tokens per row
    row_bound: Tensor = make_row_bound(0)  # carries `max_row_tokens` in its length; never read

    @property
    def cache_dim(self) -> int:
        """The dimension of a KV cache that counts blocks."""
        return 1

    @property
    def max_row_tokens(self) -> int:
        """The maximum number of tokens of a row; 0: no maximum is known."""
        return max_row_tokens(self.row_bound)

    @property
    def token_tensors(self) -> tuple[Tensor, ...]:
        """The tensors whose first dimension is the tokens."""
        return (self.slot_mapping,)

    @property
    def row_tensors(self) -> tuple[Tensor, ...]:
        """The tensors whose first dimension follows the number of rows."""
        return self.block_tables, self.seq_lens, self.query_start_loc

    @property
    def bound_tensors(self) -> tuple[Tensor, ...]:
        """The tensors whose length carries a bound; see `make_row_bound`."""
        return (self.row_bound,)


class StateMetadata(NamedTuple):
    """The description of a step for layers that keep one state per request instead of a KV cache.

    A row without tokens leaves its state unchanged. A row without earlier tokens (its context
    length is its number of tokens in this step) starts from a state of zeros and ignores the stored
    state.
    """

    rows: Tensor  # int64 [rows], request rows: the index of each row's state
    query_start_loc: Tensor  # int32 [rows + 1], prefix sums of tokens per row
    seq_lens: Tensor  # int32 [rows], context lengths including this step's tokens
    row_bound: Tensor  # see `make_row_bound`
    snapshots: Tensor  # int64 [rows, 2], see `short_convolution.short_convolution`

    @property
    def cache_dim(self) -> int:
        """The dimension of a state tensor that counts request rows and snapshots."""
        return 0

    @property
    def token_tensors(self) -> tuple[Tensor, ...]:
        return ()

    @property
    def row_tensors(self) -> tuple[Tensor, ...]:
        return self.rows, self.query_start_loc, self.seq_lens, self.snapshots

    @property
    def bound_tensors(self) -> tuple[Tensor, ...]:
        return (self.row_bound,)


class ScoreOptions(NamedTuple):
    """How a layer turns query-key products into attention weights."""

    scale: float  # multiplies the products
    sliding_window: int = 0  # number of latest positions a token sees, itself included; 0: all
    soft_cap: float = 0.0  # scores become soft_cap * tanh(scores / soft_cap); 0: off
    sinks: Tensor | None = None  # [num_heads], scores that only add to the softmax denominator
    kv_scales: Tensor | None = None  # float32 [2], see `attention.py`; None: not scaled
    in_chunks: bool = False  # a token sees its chunk of `sliding_window` positions up to itself


class AttentionLayer(Protocol):
    """What a backend must know about a layer in advance; `models.spec.AttentionSpec` is one."""

    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def sliding_window(self) -> int: ...
    @property
    def soft_cap(self) -> float: ...
    @property
    def has_sinks(self) -> bool: ...
    @property
    def in_chunks(self) -> bool: ...


class AttentionBackend(ABC):
    """An engine's implementation of `attention.store_kv` and `attention.paged_attention`.

    The class attributes are the backend's capabilities. The ops find the class by `name`, because
    the compiler passes only constants and tensors to ops; `store_kv` and `paged_attention` are
    therefore static methods.
    """

    dtypes: Container[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16)
    # KV cache dtypes other than the dtype of queries. Every backend supports the dtype of queries.
    kv_dtypes: Container[torch.dtype] = (FP8,)
    head_dims: Container[int] = range(1, sys.maxsize)
    takes_sinks = True
    takes_chunks = True  # whether a token may see the positions of its chunk only
    captures = True  # whether a CUDA graph can capture a step
    captures_prompts = True  # whether a graph can capture a step with several tokens per row
    fuses_rotation = True  # whether the model may call `attention.rotate_and_store`
    takes_sampled_tokens = True  # whether the last decoder blocks may run for sampled tokens only
    reads_groups = True  # whether each cache group of layers may have its own block tables
    runs_ahead = True  # whether a step may be launched before the previous step ends

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not(
        self,
        layers: Iterable[AttentionLayer],
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
    ) -> str | None:
        """The reason why the backend cannot run these layers; None if it can run all of them.

        dtype: the dtype of queries. kv_dtype: the dtype of the KV cache; None: the same as `dtype`.
        """
        if kv_dtype not in (None, dtype) and kv_dtype not in self.kv_dtypes:
            return f"it has no kernels for a KV cache in {str(kv_dtype).removeprefix('torch.')}"
        if dtype not in self.dtypes:
            return f"it has no kernels for {str(dtype).removeprefix('torch.')}"
        for layer in layers:
            if layer.head_dim not in self.head_dims:
                return f"it has no kernels for head_dim={layer.head_dim}"
            if layer.has_sinks and not self.takes_sinks:
                return "its kernels do not support attention sinks"
            if layer.in_chunks and not self.takes_chunks:
                return "its kernels do not support attention in chunks of the context"
        return None

    @staticmethod
    @abstractmethod
    def store_kv(
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_scales: Tensor | None = None,
    ) -> None:
        """See `attention.store_kv`."""

    @staticmethod
    @abstractmethod
    def paged_attention(
        query: Tensor, kv_cache: Tensor, attn: AttentionMetadata, options: ScoreOptions
    ) -> Tensor:
        """See `attention.paged_attention`.

        Must not read `attn.slot_mapping`, which is padding in blocks that run for sampled tokens
        only.
        """

    def prepare(  # noqa: B027  (most backends need nothing)
        self,
        layers: Iterable[AttentionLayer],
        dtype: torch.dtype,
        block_size: int,
        max_pages: int,
        device: torch.device,
    ) -> None:
        """Allocate and compile what the layers need. Raises any exception if that fails.

        block_size: tokens per block. max_pages: maximum total number of blocks of a step's rows.
        """

    def plan(  # noqa: B027
        self,
        rows: np.ndarray,
        computed: np.ndarray,
        counts: np.ndarray,
        block_tables: Sequence[Tensor],
        graph: Hashable = None,
    ) -> None:
        """Called before every step: a backend that divides a step's work on the host does so here.

        rows: int64, the step's request rows; rows past the end of `computed` and `counts` are
        padding with one token each. computed, counts: int64, each row's numbers of tokens in the
        cache and of new tokens.
        block_tables: per group of layers, int32 [request rows, blocks]. graph: identifies the
        captured step that will run, whose numbers of rows and tokens are fixed; None for a step
        that is not captured.
        """

    def select(self, graph: Hashable) -> None:  # noqa: B027
        """Called at the start of a capture: the ops that follow use the plan of `graph`."""
