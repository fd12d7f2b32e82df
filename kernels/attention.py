"""The attention ops of the compiled model, and the list of attention backends.

`store_kv` writes new keys and values into a layer's paged cache and `paged_attention` reads the
cache. `rotate_and_store` fuses `store_kv` with the norms and the rotary embedding before it. All
three ops are opaque to torch.compile and take a layer's whole cache. `compiledllm.platform` names
the preferred backend of a machine; each backend says whether it can run a model
(`AttentionBackend.why_not`).

    kv_cache   [2, num_blocks, block_size, num_kv_heads, head_dim]   0: keys, 1: values
    slot       block_id * block_size + offset;  -1: padding, which is not stored. Storing several
               padding tokens in one slot of the null block would be a race, and a padding row that
               reads the slot would give another result in each run.
    kv_scales  float32 [2], only for an FP8 cache: keys are cache[0] * kv_scales[0], values are
               cache[1] * kv_scales[1]
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from compiledllm.kernels.backend import AttentionBackend, AttentionMetadata, ScoreOptions
from compiledllm.kernels.ops import define

REFERENCE = "torch"  # runs every model on every device
# For each backend that may be unable to run a model, the backend that replaces it.
STAND_INS = {"flashinfer": "triton", "triton": REFERENCE}


@functools.cache
def backend_class(name: str) -> type[AttentionBackend]:
    """The backend class of this name. Its module is imported on first use."""
    if name == "triton":
        from compiledllm.kernels.paged_attention_triton import TritonBackend

        return TritonBackend
    if name == "flashinfer":
        from compiledllm.kernels.paged_attention_flashinfer import FlashInferBackend

        return FlashInferBackend
    if name == "fixed_order":
        from compiledllm.kernels.fixed_order_triton import FixedOrderBackend

        return FixedOrderBackend
    assert name == REFERENCE, name
    from compiledllm.kernels.paged_attention_torch import TorchBackend

    return TorchBackend


def make_backend(name: str) -> AttentionBackend:
    """A new backend for one engine. Call `prepare` before the first step."""
    return backend_class(name)(name)


def kv_cache_shape(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
) -> tuple[int, ...]:
    """Shape of one layer's cache; `num_blocks` counts the null block."""
    return (2, num_blocks, block_size, num_kv_heads, head_dim)


@define("store_kv", fake=lambda *_: None, mutates=("kv_cache",))
def _store_kv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    backend: str,
    kv_scales: Tensor | None = None,
) -> None:
    backend_class(backend).store_kv(key, value, kv_cache, slot_mapping, kv_scales)


def store_kv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    backend: AttentionBackend,
    kv_scales: Tensor | None = None,
) -> None:
    """Write `key`, `value` [tokens, num_kv_heads, head_dim] to their slots. Mutates `kv_cache`.

    slot_mapping: int64 [tokens]. kv_scales: float32 [2], only for an FP8 cache: keys are divided by
    the first scale and values by the second, and the quotients are clamped to the range of FP8.
    """
    _store_kv(key, value, kv_cache, slot_mapping, backend.name, kv_scales)


def _like_queries(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@define("paged_attention", fake=_like_queries)
def _paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    row_bound: Tensor,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    sinks: Tensor | None,
    kv_scales: Tensor | None,
    in_chunks: bool,
    backend: str,
) -> Tensor:
    attn = AttentionMetadata(slot_mapping, block_tables, seq_lens, query_start_loc, row_bound)
    options = ScoreOptions(scale, sliding_window, soft_cap, sinks, kv_scales, in_chunks)
    return backend_class(backend).paged_attention(query, kv_cache, attn, options)


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    attn: AttentionMetadata,
    options: ScoreOptions,
    backend: AttentionBackend,
) -> Tensor:
    """Causal attention of each row's new tokens over the row's whole context.

    query: [tokens, num_heads, head_dim]; the keys and values of the tokens must already be stored.
    Returns [tokens, num_heads, head_dim] in query's dtype, undefined for tokens outside every row.
    """
    scale, sliding_window, soft_cap, sinks, kv_scales, in_chunks = options
    return _paged_attention(
        *(query, kv_cache, *attn, scale, sliding_window, soft_cap, sinks, kv_scales, in_chunks),
        backend.name,
    )


def _queries_of_qkv(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    kv_scales: Tensor | None = None,
    *_options: bool,
) -> Tensor:
    return qkv.new_empty((qkv.shape[0], num_heads, kv_cache.shape[-1]))


@define("rotate_and_store", fake=_queries_of_qkv, mutates=("kv_cache",))
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
    kv_scales: Tensor | None = None,
    has_gate: bool = False,
    plus_one: bool = False,
    norms_values: bool = False,
    keys_are_values: bool = False,
    stores_kv: bool = True,
) -> Tensor:
    """Split `qkv`, normalise and rotate queries and keys, store keys and values.

    The only implementation is in Triton, for backends with `fuses_rotation`.

    qkv: [tokens, (num_heads + 2 * num_kv_heads) * head_dim]; with has_gate [tokens, (2 * num_heads
    + 2 * num_kv_heads) * head_dim], where each query head is followed by its gate, which this op
    ignores. q_weight, k_weight: [head_dim], weights of the RMSNorm of each query and key head;
    None: there is no norm. plus_one: the norm multiplies by 1 + weight in float32. norms_values:
    each head of the values is normalised by an RMSNorm without a weight, with the same eps.
    keys_are_values: `qkv` has no values; the values are the keys before norm and rotation.
    stores_kv: if False, `qkv` has queries only, and nothing is stored. cos, sin: [tokens, 1,
    rotary_dim].
    slot_mapping, kv_scales: see `store_kv`. Mutates `kv_cache`. Returns the queries, [tokens,
    num_heads, head_dim].
    """
    from compiledllm.kernels import rotate_store_triton

    return rotate_store_triton.rotate_and_store(
        *(qkv, q_weight, k_weight, eps, cos, sin, kv_cache, slot_mapping, num_heads, kv_scales),
        *(has_gate, plus_one, norms_values, keys_are_values, stores_kv),
    )
