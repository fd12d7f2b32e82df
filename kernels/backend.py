"""What an attention backend is given, and what it says of itself.

`attention.py` has the list of backends, the ops that call them and their shapes. A backend is a
class in a file of its own; nothing outside asks which one it is, only what it can do.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Container, Hashable, Iterable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class AttentionMetadata(NamedTuple):
    """What the attention ops need to know about a step: tensors only, on the model's device.

    A row is one request's tokens, contiguous in the flat token dimension. Padding rows have no
    tokens and `seq_lens` 0. If there are fewer tokens than rows, no row has more than one token.
    Entries of a block table left of a layer's window are stale: a backend that `reads_groups` reads
    neither them nor the blocks they name.
    """

    slot_mapping: Tensor  # int64 [tokens]
    block_tables: Tensor  # int32 [rows, max_blocks], 0-padded
    seq_lens: Tensor  # int32 [rows], context length including this step
    query_start_loc: Tensor  # int32 [rows + 1], prefix sums of tokens per row


class AttentionForm(NamedTuple):
    """How a layer turns the products of queries and keys into weights."""

    scale: float  # multiplies the products
    sliding_window: int = 0  # number of latest positions a token sees, itself included; 0: all
    soft_cap: float = 0.0  # scores become soft_cap * tanh(scores / soft_cap); 0: off
    sinks: Tensor | None = None  # [num_heads], a score that only joins the sum of the weights


class AttentionLayer(Protocol):
    """What a backend must know about a layer before it runs: `models.spec.AttentionSpec` has it."""

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


class AttentionBackend(ABC):
    """An implementation of `attention.store_kv` and `attention.paged_attention`, for one engine.

    The class attributes say what it can do. The ops find the class by `name`, as the compiler
    passes constants and tensors only; so `store_kv` and `paged_attention` are static.
    """

    dtypes: Container[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16)
    head_dims: Container[int] = range(1, sys.maxsize)
    takes_sinks = True
    captures = True  # whether a step can be recorded in a CUDA graph
    captures_prompts = True  # whether a step in which rows have several tokens can be, too
    fuses_rotation = True  # whether `attention.rotate_and_store` replaces `store_kv` where it can
    takes_ends = True  # whether the last block may run for the sampled tokens only (`Ends`)
    reads_groups = True  # whether layers may have block tables of their own
    runs_ahead = True  # whether a step may be launched before the one ahead of it has ended

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not(self, layers: Iterable[AttentionLayer], dtype: torch.dtype) -> str | None:
        """What these layers need and the backend lacks; None if it can run them all."""
        if dtype not in self.dtypes:
            return f"it has no kernels for {str(dtype).removeprefix('torch.')}"
        for layer in layers:
            if layer.head_dim not in self.head_dims:
                return f"it has no kernels for head_dim={layer.head_dim}"
            if layer.has_sinks and not self.takes_sinks:
                return "its kernels know no attention sinks"
        return None

    @staticmethod
    @abstractmethod
    def store_kv(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """See `attention.store_kv`."""

    @staticmethod
    @abstractmethod
    def paged_attention(
        query: Tensor, kv_cache: Tensor, attn: AttentionMetadata, form: AttentionForm
    ) -> Tensor:
        """See `attention.paged_attention`. `attn.slot_mapping` is for `store_kv`, not read here."""

    def prepare(  # noqa: B027  (most backends need nothing)
        self,
        layers: Iterable[AttentionLayer],
        dtype: torch.dtype,
        block_size: int,
        max_pages: int,
        device: torch.device,
    ) -> None:
        """Set up what the backend needs to run these layers. Raises whatever prevents that.

        block_size: tokens per block. max_pages: the most blocks that all rows of a step have.
        """

    def plan(  # noqa: B027
        self,
        rows: np.ndarray,
        computed: np.ndarray,
        counts: np.ndarray,
        block_tables: Tensor,
        graph: Hashable = None,
    ) -> None:
        """Called before every step, for backends that split a step's work on the host.

        rows: int64, the request rows of the step; those past the end of `computed` and `counts` are
        padding, one token each. computed, counts: int64, tokens in the cache and new tokens.
        block_tables: int32 [groups, request rows, max_blocks]. graph: names the captured step that
        will run, whose numbers of rows and tokens are fixed; None if the step is not captured.
        """

    def select(self, graph: Hashable) -> None:  # noqa: B027
        """Called while a step is captured: the ops that follow belong to the plan of `graph`."""
