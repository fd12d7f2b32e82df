"""Everything between the qkv matmul and attention, in one Triton kernel instead of four.

The kernel normalises each head of queries and keys (if the model has q and k norms), rotates the
heads (RoPE), writes queries to a new tensor, and writes keys and values to the paged cache. Values
may be normalised too, or be the projected keys before norm and rotation. A layer that reads the
keys and values of an earlier layer has queries only.
"""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compiledllm.kernels.launch import launch_options
from compiledllm.kernels.online_softmax_triton import to_fp8

_MAX_HEADS = 8  # heads per program
_MAX_ELEMENTS = 2048  # of all heads of a program, which are kept in registers


@triton.jit
def _rotate_store_kernel(
    qkv, q_weight, k_weight, cos, sin, slot_mapping, kv_cache, kv_scales, out, eps, token_stride,
    value_offset,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr, HAS_NORM: tl.constexpr, PLUS_ONE: tl.constexpr,
    HAS_GATE: tl.constexpr, NORMS_VALUES: tl.constexpr, KEYS_ARE_VALUES: tl.constexpr,
    HEADS: tl.constexpr, PADDED_DIM: tl.constexpr, HAS_KV_SCALES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, PADDED_DIM)[None, :]
    inside = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & (dim < HEAD_DIM)
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    half = ROTARY_DIM // 2
    is_rotated = dim < ROTARY_DIM
    # Each dimension's partner in the rotation; the dimension itself if it is not rotated.
    partner = tl.where(dim < half, dim + half, tl.where(is_rotated, dim - half, dim))

    place = head
    if HAS_GATE:  # a query's gate follows the query
        place += tl.minimum(head, NUM_HEADS)
    if KEYS_ARE_VALUES:
        place = tl.where(is_value, place - NUM_KV_HEADS, place)
    row = qkv + token * token_stride + place * HEAD_DIM
    x = tl.load(row + dim, inside, other=0.0)
    y = tl.load(row + partner, inside, other=0.0)
    dtype = x.dtype
    raw, x, y = x, x.to(tl.float32), y.to(tl.float32)
    if HAS_NORM or NORMS_VALUES:
        scale = tl.rsqrt(tl.sum(x * x, 1)[:, None] / HEAD_DIM + eps)
    if NORMS_VALUES:
        raw = (x * scale).to(dtype)
    if HAS_NORM:
        in_dim = dim < HEAD_DIM
        x_weight = tl.where(
            is_query,
            tl.load(q_weight + dim, in_dim, other=0.0),
            tl.load(k_weight + dim, in_dim, other=0.0),
        )
        y_weight = tl.where(
            is_query,
            tl.load(q_weight + partner, in_dim, other=0.0),
            tl.load(k_weight + partner, in_dim, other=0.0),
        )
        if PLUS_ONE:
            x = (x * scale * (1 + x_weight.to(tl.float32))).to(dtype).to(tl.float32)
            y = (y * scale * (1 + y_weight.to(tl.float32))).to(dtype).to(tl.float32)
        else:
            x = (x * scale).to(dtype).to(tl.float32) * x_weight
            y = (y * scale).to(dtype).to(tl.float32) * y_weight
    angle = token * ROTARY_DIM + dim
    c = tl.load(cos + angle, is_rotated, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, is_rotated, other=0.0).to(tl.float32)
    turned = (x * c + tl.where(dim < half, -y, y) * s).to(dtype)
    result = tl.where(is_value, raw, turned)

    tl.store(out + (token * NUM_HEADS + head) * HEAD_DIM + dim, result, inside & is_query)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    kv_head = tl.where(is_value, head - NUM_KV_HEADS, head) - NUM_HEADS
    target = kv_cache + (slot * NUM_KV_HEADS + kv_head) * HEAD_DIM + dim
    target = target + tl.where(is_value, value_offset, 0)
    if HAS_KV_SCALES:
        result = to_fp8(result, tl.load(kv_scales + is_value.to(tl.int32)))
    tl.store(target, result, inside & (head >= NUM_HEADS) & (slot >= 0))


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
    """See `attention.rotate_and_store`."""
    num_tokens, rotary_dim = len(qkv), cos.shape[-1]
    num_kv_heads, head_dim = kv_cache.shape[-2:]
    num_kv_heads = num_kv_heads if stores_kv else 0
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return out
    padded_dim = triton.next_power_of_2(head_dim)
    heads = min(_MAX_HEADS, max(_MAX_ELEMENTS // padded_dim, 1))
    grid = num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, heads)
    _rotate_store_kernel[grid](
        qkv, qkv if q_weight is None else q_weight, qkv if k_weight is None else k_weight, cos, sin,
        slot_mapping, kv_cache, qkv if kv_scales is None else kv_scales, out, eps, qkv.stride(0),
        kv_cache.stride(0),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, ROTARY_DIM=rotary_dim,
        HAS_NORM=q_weight is not None, PLUS_ONE=plus_one, HAS_GATE=has_gate,
        NORMS_VALUES=norms_values, KEYS_ARE_VALUES=keys_are_values, HEADS=heads,
        PADDED_DIM=padded_dim, HAS_KV_SCALES=kv_scales is not None, **launch_options(),
    )  # fmt: skip
    return out
