"""Hunyuan, dense: Llama with an RMSNorm on each head of the rotated queries and keys."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families import llama
from compiledllm.models.families.hf import expect, head_dim_of, rope_from_base, rope_from_hf
from compiledllm.models.families.llama import with_attention
from compiledllm.models.spec import LayerSpec, ModelSpec, RopeSpec

NAMES = llama.NAMES | {
    "model.layers.*.self_attn.query_layernorm.weight": "layers.*.attn.q_norm.weight",
    "model.layers.*.self_attn.key_layernorm.weight": "layers.*.attn.k_norm.weight",
}


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers HunYuanDenseV1Config."""
    # Fields of published configs that transformers does not read.
    expect(hf, "use_qk_norm", None, True)
    expect(hf, "use_cla", None, False)
    rope = _rope(hf, head_dim_of(hf))

    def adapt(layer: LayerSpec, _index: int) -> LayerSpec:
        return with_attention(layer, qk_norm=layer.norm, norms_rotated=True)

    return llama.adapted(hf, "HunYuanDenseV1ForCausalLM", adapt, rope)


def _rope(hf: Any, head_dim: int) -> RopeSpec:
    """The rotation. "dynamic" scaling with a fixed `alpha` changes the base for every length."""
    rope = hf.rope_parameters
    alpha = rope.get("alpha")
    if rope.get("rope_type") != "dynamic" or not alpha:
        return rope_from_hf(hf, head_dim)
    return rope_from_base(rope["rope_theta"] * alpha ** (head_dim / (head_dim - 2)), head_dim)
