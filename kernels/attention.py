"""The two attention ops the compiled model is built around, and the metadata they read.

`compiledllm::store_kv` writes new keys and values into a layer's paged cache, `compiledllm::
paged_attention` reads it. Both are opaque to torch.compile (fake implementations give the shapes),
take the whole per-layer cache, and are dispatched to a backend by name. Which backend is used is
decided by `compiledllm.platform`; this file only knows the list.

    kv_cache   [2, num_blocks, block_size, num_kv_heads, head_dim]   0: keys, 1: values
    slot       block_id * block_size + offset;  -1 (padding) lands in the null block 0
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiledllm.kernels import paged_attention_torch


@functools.cache
def load_backend(name: str) -> ModuleType:
    """The module with `store_kv` and `paged_attention`, loaded when first asked for."""
    if name == "triton":
        from compiledllm.kernels import paged_attention_triton

        return paged_attention_triton
    if name == "flashinfer":
        from compiledllm.kernels import paged_attention_flashinfer

        return paged_attention_flashinfer
    if name == "fixed_order":
        from compiledllm.kernels import fixed_order_triton

        return fixed_order_triton
    assert name == "torch", name
    return paged_attention_torch


class AttentionMetadata(NamedTuple):
    """What the attention ops need to know of a step: tensors only, all on the model's device.

    A row is one request's tokens, contiguous in the flat token dimension. Padding rows have no
    tokens and `seq_lens` 0. Fewer tokens than rows mean that no row has more than one. Entries of a
    block table that lie left of a layer's window are stale, and no backend but FlashInfer, which is
    never given such, reads them or what they point at.
    """

    slot_mapping: Tensor  # int64 [tokens]
    block_tables: Tensor  # int32 [rows, max_blocks], 0-padded
    seq_lens: Tensor  # int32 [rows], context length including this step
    query_start_loc: Tensor  # int32 [rows + 1], prefix sums of tokens per row


def kv_cache_shape(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
) -> tuple[int, ...]:
    """Shape of one layer's cache; `num_blocks` counts the null block."""
    return (2, num_blocks, block_size, num_kv_heads, head_dim)


_LIBRARY: Any = torch.library.Library("compiledllm", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "store_kv(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, "
    "str backend) -> ()"
)
_LIBRARY.define(
    "paged_attention(Tensor query, Tensor kv_cache, Tensor block_tables, Tensor seq_lens, "
    "Tensor query_start_loc, float scale, int sliding_window, float soft_cap, Tensor? sinks, "
    "str backend) -> Tensor"
)
_LIBRARY.define(
    "rotate_and_store(Tensor qkv, Tensor? q_weight, Tensor? k_weight, float eps, Tensor cos, "
    "Tensor sin, Tensor(a!) kv_cache, Tensor slot_mapping, int num_heads) -> Tensor"
)


def _store_kv(
    key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor, backend: str
) -> None:
    load_backend(backend).store_kv(key, value, kv_cache, slot_mapping)


def _paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    sinks: Tensor | None,
    backend: str,
) -> Tensor:
    out: Tensor = load_backend(backend).paged_attention(
        query,
        kv_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        scale,
        sliding_window,
        soft_cap,
        sinks,
    )
    return out


def _store_kv_fake(
    key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor, backend: str
) -> None:
    return None


def _paged_attention_fake(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _rotate_and_store(*arguments: Any) -> Tensor:
    from compiledllm.kernels.rotate_store_triton import rotate_and_store

    return rotate_and_store(*arguments)


def _rotate_and_store_fake(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
) -> Tensor:
    return qkv.new_empty((qkv.shape[0], num_heads, kv_cache.shape[-1]))


_LIBRARY.impl("rotate_and_store", _rotate_and_store, "CompositeExplicitAutograd")
torch.library.register_fake("compiledllm::rotate_and_store", _rotate_and_store_fake, lib=_LIBRARY)
_LIBRARY.impl("store_kv", _store_kv, "CompositeExplicitAutograd")
_LIBRARY.impl("paged_attention", _paged_attention, "CompositeExplicitAutograd")
torch.library.register_fake("compiledllm::store_kv", _store_kv_fake, lib=_LIBRARY)
torch.library.register_fake("compiledllm::paged_attention", _paged_attention_fake, lib=_LIBRARY)


def store_kv(
    key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor, backend: str
) -> None:
    """Write `key`, `value` [tokens, num_kv_heads, head_dim] into slots. Mutates `kv_cache`."""
    torch.ops.compiledllm.store_kv(key, value, kv_cache, slot_mapping, backend)


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    attn: AttentionMetadata,
    scale: float,
    backend: str,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of each row's new tokens over its whole context.

    query: [tokens, num_heads, head_dim]; the keys and values of these tokens are stored already.
    sliding_window: how many of the latest positions a token sees, itself included; 0: all.
    soft_cap: logits become soft_cap * tanh(logits / soft_cap); 0: off.
    sinks: [num_heads], a logit of each head that only joins the sum its weights are divided by.
    Returns [tokens, num_heads, head_dim], same dtype; tokens outside every row are undefined.
    """
    out: Tensor = torch.ops.compiledllm.paged_attention(
        query,
        kv_cache,
        attn.block_tables,
        attn.seq_lens,
        attn.query_start_loc,
        scale,
        sliding_window,
        soft_cap,
        sinks,
        backend,
    )
    return out


def rotate_and_store(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
) -> Tensor:
    """Split `qkv`, normalise and rotate queries and keys, store keys and values. Triton only.

    qkv: [tokens, (num_heads + 2 * num_kv_heads) * head_dim]. q_weight, k_weight: [head_dim] of the
    heads' RMSNorm, None without one. cos, sin: [tokens, 1, rotary_dim]. Mutates `kv_cache`.
    Returns the queries, [tokens, num_heads, head_dim].
    """
    queries: Tensor = torch.ops.compiledllm.rotate_and_store(
        qkv, q_weight, k_weight, eps, cos, sin, kv_cache, slot_mapping, num_heads
    )
    return queries
