"""Paged attention in Triton: the default on GPUs.

One kernel stores keys and values. Two kernels read the cache. `decode_attention_triton` computes
rows with one new token, and all rows of a step whose rows are known to have at most `MAX_TOGETHER`
tokens. `prefill_attention_triton` computes the other rows. On Hopper, rows with one new token go to
`decode_attention_cuda`, and the other rows to `prefill_attention_cuda`. Grids follow from shapes
alone and the host reads nothing back, so a captured call serves rows of any length.
"""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from compiledllm.kernels import decode_attention_cuda, prefill_attention_cuda
from compiledllm.kernels.backend import (
    AttentionBackend,
    AttentionLayer,
    AttentionMetadata,
    ScoreOptions,
)
from compiledllm.kernels.decode_attention_triton import MAX_TOGETHER, attend_few_tokens
from compiledllm.kernels.launch import with_packed_heads
from compiledllm.kernels.online_softmax_triton import to_fp8
from compiledllm.kernels.prefill_attention_triton import attend_prompts


@triton.jit
def _store_kernel(
    key, value, kv_cache, slot_mapping, kv_scales, key_stride, value_stride, value_offset,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, HAS_KV_SCALES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    column = tl.arange(0, PADDED)
    inside = (column < WIDTH) & (slot >= 0)
    target = kv_cache + slot * WIDTH + column
    key = tl.load(key + token * key_stride + column, inside)
    value = tl.load(value + token * value_stride + column, inside)
    if HAS_KV_SCALES:
        key = to_fp8(key, tl.load(kv_scales))
        value = to_fp8(value, tl.load(kv_scales + 1))
    tl.store(target, key, inside)
    tl.store(target + value_offset, value, inside)


def store_kv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_scales: Tensor | None = None,
) -> None:
    """See `attention.store_kv`."""
    num_tokens, num_kv_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    width = num_kv_heads * head_dim
    key, value = map(with_packed_heads, (key, value))
    _store_kernel[(num_tokens,)](
        key, value, kv_cache, slot_mapping, key if kv_scales is None else kv_scales,
        key.stride(0), value.stride(0), kv_cache.stride(0),
        WIDTH=width, PADDED=triton.next_power_of_2(width), HAS_KV_SCALES=kv_scales is not None,
    )  # fmt: skip


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    attn: AttentionMetadata,
    options: ScoreOptions,
    max_split_programs: int | None = None,
    fixed_order: bool = False,
) -> Tensor:
    """See `attention.paged_attention`.

    max_split_programs: maximum number of extra programs for splits of decode rows; None: enough to
    keep the GPU busy. fixed_order: sum over keys in an order that does not depend on other rows,
    which is slower.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    num_tokens, num_heads, head_dim = query.shape
    if num_tokens == 0:
        return out
    query = with_packed_heads(query)
    _, _, block_size, num_kv_heads, _ = kv_cache.shape
    _, block_tables, seq_lens, query_start_loc, _ = attn
    sinks, kv_scales = (query if x is None else x for x in (options.sinks, options.kv_scales))
    tensors = query, kv_cache, block_tables, seq_lens, query_start_loc, sinks, kv_scales, out
    scalars = (
        *(options.scale, options.sliding_window, options.soft_cap),
        *(query.stride(0), block_tables.stride(0), kv_cache.stride(0)),
    )
    constants = {
        "GROUP": num_heads // num_kv_heads, "NUM_HEADS": num_heads, "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size, "TOKEN_STRIDE": num_kv_heads * head_dim,
        "HAS_WINDOW": options.sliding_window > 0, "IN_CHUNKS": options.in_chunks,
        "HAS_SOFT_CAP": options.soft_cap > 0,
        "HAS_SINKS": options.sinks is not None, "HAS_KV_SCALES": options.kv_scales is not None,
        "PADDED_DIM": max(16, triton.next_power_of_2(head_dim)),
    }  # fmt: skip
    if not fixed_order:
        are_few = 0 < attn.max_row_tokens <= MAX_TOGETHER
        together = attn.max_row_tokens if are_few else 1
        kernel = None
        if together == 1 and max_split_programs is None:
            kernel = decode_attention_cuda.kernel_for(query, kv_cache, attn, options)
        if kernel:
            decode_attention_cuda.attend(kernel, query, kv_cache, attn, options, out)
        else:
            attend_few_tokens(tensors, scalars, constants, together, max_split_programs)
        if are_few:
            return out
        if kernel := prefill_attention_cuda.kernel_for(query, kv_cache, options):
            prefill_attention_cuda.attend_prompts(kernel, query, kv_cache, attn, options, out)
            return out
    attend_prompts(tensors, scalars, constants, fixed_order)
    return out


class TritonBackend(AttentionBackend):
    head_dims = range(1, 513)
    store_kv = staticmethod(store_kv)
    paged_attention = staticmethod(paged_attention)

    def why_not(
        self,
        layers: Iterable[AttentionLayer],
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
    ) -> str | None:
        """See `AttentionBackend.why_not`. GPUs before compute capability 8.9 convert no FP8."""
        is_fp8 = kv_dtype is not None and kv_dtype.itemsize == 1
        if is_fp8 and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
            return "an FP8 KV cache needs a GPU of compute capability 8.9 or later"
        return super().why_not(layers, dtype, kv_dtype)
