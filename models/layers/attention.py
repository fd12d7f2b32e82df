"""Attention over the paged KV cache."""

from __future__ import annotations

from torch import Tensor, nn

from compiledllm.kernels.attention import AttentionMetadata, paged_attention, store_kv
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
        spec = self.spec
        q, k, v = self.qkv(x).split((spec.q_size, spec.kv_size, spec.kv_size), dim=-1)
        q = q.view(-1, spec.num_heads, spec.head_dim)  # [tokens, num_heads, head_dim]
        k = k.view(-1, spec.num_kv_heads, spec.head_dim)
        v = v.view(-1, spec.num_kv_heads, spec.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        store_kv(k, v, kv_cache, attn.slot_mapping, self.backend)
        context = paged_attention(q, kv_cache, attn, spec.scale, self.backend)
        out: Tensor = self.out(context.view(-1, spec.q_size))
        return out
