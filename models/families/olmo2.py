"""OLMo-2 and OLMo-3: post-norms, and an RMSNorm over all heads of the queries and of the keys.

OLMo-3 has sliding windows on most layers, whose rotary frequencies are not scaled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiledllm.models.families import llama, qwen3
from compiledllm.models.families.hf import head_dim_of, rope_from_base, rope_from_hf, window_of
from compiledllm.models.families.llama import with_attention
from compiledllm.models.spec import LayerSpec, ModelSpec, RopeSpec

NAMES = {name: target for name, target in qwen3.NAMES.items() if "layernorm" not in name} | {
    "model.layers.*.post_attention_layernorm.weight": "layers.*.attn_out_norm.weight",
    "model.layers.*.post_feedforward_layernorm.weight": "layers.*.mlp_out_norm.weight",
}


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Olmo2Config or Olmo3Config."""

    def adapt(layer: LayerSpec, _index: int) -> LayerSpec:
        layer = with_attention(layer, qk_norm=layer.norm, qk_norm_over="whole")
        return replace(layer, residual="post")

    if hf.model_type == "olmo2":
        return llama.adapted(hf, "Olmo2ForCausalLM", adapt)

    def adapt_olmo3(layer: LayerSpec, index: int) -> LayerSpec:
        changes = {"sliding_window": window_of(hf, index), "rope": _rope(hf, index)}
        return with_attention(adapt(layer, index), **changes)

    return llama.adapted(hf, "Olmo3ForCausalLM", adapt_olmo3, rope=_rope(hf, 0))


def _rope(hf: Any, index: int) -> RopeSpec:
    head_dim, kind = head_dim_of(hf), hf.layer_types[index]
    if kind in hf.rope_parameters:
        return rope_from_hf(hf, head_dim, kind)
    # Older versions of transformers have one set of parameters, which scales full attention only.
    is_scaled = kind == "full_attention"
    base = hf.rope_parameters["rope_theta"]
    return rope_from_hf(hf, head_dim) if is_scaled else rope_from_base(base, head_dim)
