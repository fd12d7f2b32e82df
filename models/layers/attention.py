"""Attention over the paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compiledllm.kernels.attention import (
    AttentionMetadata,
    paged_attention,
    rotate_and_store,
    store_kv,
)
from compiledllm.models.layers.linear import Linear
from compiledllm.models.layers.norm import RMSNorm
from compiledllm.models.layers.rope import apply_rope
from compiledllm.models.spec import AttentionSpec


class PagedAttention(nn.Module):
    """Grouped-query attention: project, normalise, rotate, store keys and values, attend."""

    def __init__(self, hidden_size: int, spec: AttentionSpec, backend: str) -> None:
        super().__init__()
        self.spec = spec
        self.backend = backend
        qkv_parts = {"q": spec.q_size, "k": spec.kv_size, "v": spec.kv_size}
        self.qkv = Linear(hidden_size, qkv_parts, spec.qkv_bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.qk_norm) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.qk_norm) if spec.qk_norm else None
        self.out = Linear(spec.q_size, {"": hidden_size}, spec.output_bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, attn: AttentionMetadata
    ) -> Tensor:
        qkv: Tensor = self.qkv(x)
        if self.backend != "torch":
            q = self._rotate_and_store(qkv, cos, sin, kv_cache, attn)
        else:
            q = self._rotate_then_store(qkv, cos, sin, kv_cache, attn)
        context = paged_attention(q, kv_cache, attn, self.spec.scale, self.backend)
        out: Tensor = self.out(context.view(-1, self.spec.q_size))
        return out

    def _rotate_and_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, attn: AttentionMetadata
    ) -> Tensor:
        """In one kernel. Queries [tokens, num_heads, head_dim]."""
        q_norm, k_norm = self.q_norm, self.k_norm
        return rotate_and_store(
            qkv,
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            0.0 if q_norm is None else q_norm.eps,
            cos,
            sin,
            kv_cache,
            attn.slot_mapping,
            self.spec.num_heads,
        )

    def _rotate_then_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, attn: AttentionMetadata
    ) -> Tensor:
        """In plain torch, for the compiler to fuse. Queries [tokens, num_heads, head_dim]."""
        spec = self.spec
        q, k, v = torch.split(qkv, [spec.q_size, spec.kv_size, spec.kv_size], dim=-1)
        q = q.view(-1, spec.num_heads, spec.head_dim)
        k = k.view(-1, spec.num_kv_heads, spec.head_dim)
        v = v.view(-1, spec.num_kv_heads, spec.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        store_kv(k, v, kv_cache, attn.slot_mapping, self.backend)
        return q
