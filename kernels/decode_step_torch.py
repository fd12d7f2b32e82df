"""The decoder blocks of a decode step in plain torch: the reference of `decode_step_cuda`.

Each value is rounded where the modules of `models.layers` round it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels import paged_attention_torch as paged
from compiledllm.kernels.backend import AttentionMetadata, ScoreOptions
from compiledllm.kernels.decode_step import (
    ALL_ROWS,
    DecodeLayer,
    DecodeMatrix,
    DecodeShape,
    DecodeStep,
)
from compiledllm.kernels.packed import Packed, packed_linear

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def why_not(shape: DecodeShape, device: torch.device) -> str | None:
    """See `decode_step.Kernel`."""
    return None


def faster_rows(shape: DecodeShape) -> range:
    """See `decode_step.Kernel`."""
    return ALL_ROWS


def workspace_bytes(shape: DecodeShape) -> int:
    return 0


def compile(shape: DecodeShape, rows: range) -> None:
    pass


def load(shape: DecodeShape, rows: range) -> None:
    pass


def run(
    step: DecodeStep, x: Tensor, cos: Tensor, sin: Tensor, attn: AttentionMetadata
) -> tuple[Tensor, Tensor]:
    """See `DecodeStep.__call__`."""
    update = torch.zeros_like(x)
    for layer, kv_cache in zip(step.layers, step.kv_caches, strict=True):
        x, update = run_block(step.shape, layer, x, update, cos, sin, kv_cache, attn)
    return x, update


def run_block(
    shape: DecodeShape,
    layer: DecodeLayer,
    x: Tensor,
    update: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    attn: AttentionMetadata,
) -> tuple[Tensor, Tensor]:
    """One block: x and update [rows, hidden_size] -> the next block's."""
    x = x + update
    qkv = _product(_norm(x, layer.attn_norm, shape.eps, shape.plus_one), layer.qkv)
    x = x + _product(_attend(shape, layer, qkv, cos, sin, kv_cache, attn), layer.out)
    normed = _norm(x, layer.mlp_norm, shape.eps, shape.plus_one)
    gate, up = _product(normed, layer.gate_up).chunk(2, dim=-1)
    return x, _product(_ACTIVATIONS[shape.activation](gate) * up, layer.down)


def _attend(
    shape: DecodeShape,
    layer: DecodeLayer,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    attn: AttentionMetadata,
) -> Tensor:
    """Store keys and values, and attend: [rows, qkv_size] -> [rows, q_size]."""
    heads = qkv.view(len(qkv), -1, shape.head_dim)
    sizes = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    q, k, v = torch.split(heads, sizes, dim=1)
    q, k = (
        _rotate(x if weight is None else _norm(x, weight, shape.qk_eps, shape.plus_one), cos, sin)
        for x, weight in ((q, layer.q_norm), (k, layer.k_norm))
    )
    scales = layer.kv_scales if kv_cache.dtype.itemsize == 1 else None
    paged.store_kv(k, v, kv_cache, attn.slot_mapping, scales)
    options = ScoreOptions(shape.scale, layer.window, shape.soft_cap, layer.sinks, scales)
    return paged.paged_attention(q, kv_cache, attn, options).reshape(len(qkv), -1)


def _product(x: Tensor, matrix: DecodeMatrix) -> Tensor:
    weight = matrix.weight
    if isinstance(weight, Packed):
        parts = weight.codes, weight.scales, weight.zeros, weight.row_scales, matrix.bias
        return packed_linear(x, *parts, str(weight.layout), len(weight.row_scales))
    return F.linear(x, weight, matrix.bias)


def _norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    wide = x.float()
    over_rms = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if plus_one:
        return (over_rms * (1 + weight.float())).to(x.dtype)
    return weight * over_rms.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [rows, heads, head_dim]."""
    width = cos.shape[-1]
    first, second = x[..., : width // 2], x[..., width // 2 : width]
    partner = torch.cat((-second, first), dim=-1)
    return torch.cat((x[..., :width] * cos + partner * sin, x[..., width:]), dim=-1)
