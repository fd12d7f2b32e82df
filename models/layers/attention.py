"""Attention over the paged KV cache."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from compiledllm.kernels.attention import paged_attention, rotate_and_store, store_kv
from compiledllm.kernels.backend import AttentionBackend, AttentionMetadata, ScoreOptions
from compiledllm.models.formats.weight_format import empty_parameter
from compiledllm.models.layers.factory import Factory
from compiledllm.models.layers.norm import DividedRMSNorm, PlusOneRMSNorm, RMSNorm
from compiledllm.models.layers.rope import apply_rope
from compiledllm.models.spec import AttentionSpec

_Norms = tuple[RMSNorm | None, RMSNorm | None]


class PagedAttention(nn.Module):
    """Grouped-query attention: project, normalise, rotate, store keys and values, attend."""

    def __init__(
        self,
        hidden_size: int,
        spec: AttentionSpec,
        backend: AttentionBackend,
        make: Factory,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backend = backend
        self.is_fused = backend.fuses_rotation and can_fuse(spec)
        replicas = dict.fromkeys(("k", "v"), spec.kv_replicas)
        division = make.by_outputs(spec.qkv_parts, replicas=replicas)
        self.qkv = make.linear("qkv", hidden_size, spec.qkv_parts, spec.qkv_bias, division)
        self.q_norm = _make_norm(spec, spec.num_heads, make)
        self.k_norm = self.v_norm = None
        if spec.kv_layer is None:
            self.k_norm = _make_norm(spec, spec.num_kv_heads, make, spec.kv_replicas)
        if spec.v_norm is not None:
            self.v_norm = make.norm(spec.v_norm, spec.head_dim)
        self.sinks = empty_parameter(spec.num_heads) if spec.has_sinks else None
        self.shards = {"sinks": make.ranks.shard(spec.num_heads)}
        # Used with an FP8 cache only. The scales are a tensor, not numbers, so that layers with
        # equal specs share compiled code.
        self.kv_scales: Tensor
        self.register_buffer("kv_scales", torch.ones(2, dtype=torch.float32), persistent=False)
        division = make.by_inputs(spec.q_size)
        self.out = make.linear("out", spec.q_size, {"": hidden_size}, spec.output_bias, division)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, attn: AttentionMetadata
    ) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]. cos, sin: of RotaryTable."""
        spec = self.spec
        qkv: Tensor = self.qkv(x)
        q, kv = qkv[:, : spec.q_rows], qkv[:, spec.q_rows :]
        gate = None
        if spec.has_gate:
            q, gate = q.view(-1, spec.num_heads, 2, spec.head_dim).unbind(2)
        if self.is_fused:
            slots = attn.slot_mapping
            q = self._rotate_and_store(qkv, cos, sin, kv_cache, slots, spec.num_heads)
        else:
            q = self._rotate(q, self.q_norm, cos[:, :1], sin[:, :1])
            if spec.kv_layer is None:
                self._rotate_then_store(kv, cos, sin, kv_cache, attn.slot_mapping)
        options = ScoreOptions(
            spec.scale,
            spec.sliding_window,
            spec.soft_cap,
            self.sinks,
            scales_for(kv_cache, self.kv_scales),
            spec.in_chunks,
        )
        context = paged_attention(q, kv_cache, attn, options, self.backend)
        if gate is not None:
            context = context * torch.sigmoid(gate)
        out: Tensor = self.out(context.view(-1, spec.q_size))
        return out

    def store(
        self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Store the keys and values of x [tokens, hidden], without queries and attention."""
        kv: Tensor = self.qkv(x, first_row=self.spec.q_rows)
        if self.is_fused:
            self._rotate_and_store(kv, cos, sin, kv_cache, slot_mapping, num_heads=0)
        else:
            self._rotate_then_store(kv, cos, sin, kv_cache, slot_mapping)

    def _rotate_and_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        num_heads: int,
    ) -> Tensor:
        """Normalise, rotate and store in one kernel. Returns [tokens, num_heads, head_dim]."""
        q_norm, k_norm = cast("_Norms", (self.q_norm, self.k_norm))
        eps_of = q_norm if self.v_norm is None else self.v_norm
        return rotate_and_store(
            qkv,
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            0.0 if eps_of is None else cast("RMSNorm", eps_of).eps,
            cos,
            sin,
            kv_cache,
            slot_mapping,
            num_heads,
            scales_for(kv_cache, self.kv_scales),
            self.spec.has_gate and num_heads > 0,
            isinstance(q_norm, PlusOneRMSNorm),
            self.v_norm is not None,
            self.spec.keys_are_values,
            self.spec.kv_layer is None,
        )

    def _rotate_then_store(
        self, kv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Rotate in plain torch, which the compiler fuses, then store.

        kv: [tokens, kv_size or 2 * kv_size], keys and perhaps values, as they were projected.
        """
        size = self.spec.kv_size
        k, v = kv[:, :size], kv[:, -size:]
        v = v.view(len(v), -1, self.spec.head_dim)
        if self.v_norm is not None:
            v = self.v_norm(v)
        k = self._rotate(k, self.k_norm, cos[:, -1:], sin[:, -1:])
        scales = scales_for(kv_cache, self.kv_scales)
        store_kv(k, v, kv_cache, slot_mapping, self.backend, scales)

    def _rotate(self, part: Tensor, norm: nn.Module | None, cos: Tensor, sin: Tensor) -> Tensor:
        """Normalise and rotate: [tokens, heads * head_dim] -> [tokens, heads, head_dim]."""
        spec = self.spec
        if norm is not None and spec.qk_norm_over == "whole":
            part, norm = norm(part), None
        part = part.view(len(part), -1, spec.head_dim)
        if norm is not None and not spec.norms_rotated:
            part = norm(part)
        if spec.rope.rotary_dim:
            part = apply_rope(part, cos, sin, spec.rope.interleaved)
        return norm(part) if norm is not None and spec.norms_rotated else part


def _make_norm(
    spec: AttentionSpec, num_heads: int, make: Factory, replicas: int = 1
) -> nn.Module | None:
    """The norm of queries or keys of `num_heads` heads, which `replicas` ranks share."""
    if spec.qk_norm is None:
        return None
    shape = spec.qk_norm_shape(num_heads)
    is_divided = spec.qk_norm_over != "head" and make.ranks.are_many
    if not is_divided:
        return make.norm(spec.qk_norm, *shape)
    norm = make.norm(spec.qk_norm, *shape)
    if spec.qk_norm_over == "whole":
        assert spec.qk_norm.kind == "rms", spec
        norm = DividedRMSNorm(shape, spec.qk_norm.eps, make.ranks.count)
    shard = make.ranks.shard(shape[0], replicas=replicas)
    cast("Any", norm).shards = {"weight": shard, "bias": shard}
    return norm


def scales_for(kv_cache: Tensor, kv_scales: Tensor) -> Tensor | None:
    """The scales if the cache is FP8, else None: other caches hold keys and values unscaled."""
    return kv_scales if kv_cache.dtype.itemsize == 1 else None


def can_fuse(spec: AttentionSpec) -> bool:
    """Whether `rotate_and_store` can do all the work between the qkv product and attention."""
    norm, rope = spec.qk_norm, spec.rope
    is_rms = norm is None or norm.kind in ("rms", "rms_plus_one")
    is_of_heads = norm is None or (spec.qk_norm_over == "head" and not spec.norms_rotated)
    is_rotated_by_halves = rope.rotary_dim > 0 and not rope.interleaved and rope.growth is None
    v_norm = spec.v_norm
    has_one_eps = v_norm is None or norm is None or v_norm.eps == norm.eps
    norms_values_plainly = v_norm is None or v_norm.kind == "rms_unscaled"
    return is_rms and is_of_heads and is_rotated_by_halves and has_one_eps and norms_values_plainly
