"""Which attention a model really gets: the backend that was chosen, or what stands in for it.

Triton and torch take every step as it comes. FlashInfer has to be told of each step beforehand, by
the `Planner` made here; where it cannot be had, Triton takes over and one line says why. And which
layers have a block table in common: FlashInfer is told of a single one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compiledllm.config import Choice, ConfigError
from compiledllm.kernels.paged_attention_flashinfer import HEAD_DIMS, AttentionKind, Planner
from compiledllm.log import log
from compiledllm.models.cache_groups import (
    CacheGroups,
    cache_groups,
    has_one_kv_shape,
    whole_contexts,
)
from compiledllm.models.deterministic import FIXED_ORDER_BACKEND
from compiledllm.models.spec import ModelSpec
from compiledllm.runner.device import to_device
from compiledllm.runner.request_table import RequestTable

LARGEST_TRITON_HEAD_DIM = 256


def settle_backend(
    choice: Choice,
    spec: ModelSpec,
    dtype: torch.dtype,
    block_size: int,
    max_pages: int,
    device: torch.device,
) -> tuple[Choice, Planner | None]:
    """`choice`, or what replaces it and why; and FlashInfer's planner, if it is that.

    max_pages: most blocks of all rows of a step together.
    """
    planner = None
    if choice.value == "flashinfer":
        try:
            _check_flashinfer(spec, dtype)
            planner = Planner(attention_kinds(spec), dtype, block_size, max_pages, device)
        except Exception as error:  # missing, no nvcc, a GPU it does not know: whatever it raises
            cause = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
            log.warning("attention_backend='flashinfer' cannot be used (%s); using triton", cause)
            choice = Choice("triton", f"flashinfer cannot be used: {cause}")
    largest = max(layer.attn.head_dim for layer in spec.layers)
    if choice.value == FIXED_ORDER_BACKEND and largest > LARGEST_TRITON_HEAD_DIM:
        raise ConfigError(
            f"deterministic=True cannot be had: head_dim={largest} of this model is more than "
            f"{LARGEST_TRITON_HEAD_DIM}; leave it out"
        )
    if choice.value == "triton" and largest > LARGEST_TRITON_HEAD_DIM:
        reason = f"slow: head_dim={largest}, and triton goes up to {LARGEST_TRITON_HEAD_DIM}"
        log.warning("attention runs on the torch backend (%s)", reason)
        choice = Choice("torch", reason)
    return choice, planner


def settle_groups(spec: ModelSpec, max_len: int, is_planned: bool) -> tuple[CacheGroups, Choice]:
    """Which layers share block tables, and why. is_planned: there is FlashInfer's planner."""
    groups, reason = cache_groups(spec, max_len), "layers that see equally far share a block table"
    if is_planned:
        groups, reason = whole_contexts(spec), "flashinfer reads whole contexts"
    elif spec.implementation == "transformers":
        groups, reason = whole_contexts(spec), "transformers' module is given one block table"
    elif not has_one_kv_shape(spec):
        reason = "one block table, as the layers' KV differ in shape"
    return groups, Choice(groups, reason)


def attention_kinds(spec: ModelSpec) -> list[AttentionKind]:
    """What FlashInfer must know of each layer."""
    specs = [layer.attn for layer in spec.layers]
    return [
        AttentionKind(
            a.num_heads, a.num_kv_heads, a.head_dim, a.scale, a.sliding_window, a.soft_cap
        )
        for a in specs
    ]


def pages_of(table: RequestTable, rows: np.ndarray, lengths: np.ndarray, block_size: int) -> Tensor:
    """int32, on the device: the blocks of `rows` that hold `lengths` tokens, row after row.

    Of the only group of layers there is.
    """
    counts = -(-lengths // block_size)
    starts = np.cumsum(counts) - counts
    columns = np.arange(counts.sum()) - np.repeat(starts, counts)
    index = to_device(np.array([np.repeat(rows, counts), columns]), table.device)
    return table.block_tables[0, index[0], index[1]]


def _check_flashinfer(spec: ModelSpec, dtype: torch.dtype) -> None:
    if dtype.itemsize != 2:
        raise ValueError(f"it has no kernels for {str(dtype).removeprefix('torch.')}")
    for layer in spec.layers:
        if layer.attn.head_dim not in HEAD_DIMS:
            raise ValueError(f"it has no kernels for head_dim={layer.attn.head_dim}")
        if layer.attn.has_sinks:
            raise ValueError("its kernels know no attention sinks")
