"""OLMo-2: post-norms, and an RMSNorm over all heads of the queries and of the keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiledllm.models.families import llama, qwen3
from compiledllm.models.families.llama import with_attention
from compiledllm.models.spec import LayerSpec, ModelSpec

NAMES = {name: target for name, target in qwen3.NAMES.items() if "layernorm" not in name} | {
    "model.layers.*.post_attention_layernorm.weight": "layers.*.attn_out_norm.weight",
    "model.layers.*.post_feedforward_layernorm.weight": "layers.*.mlp_out_norm.weight",
}


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Olmo2Config."""

    def adapt(layer: LayerSpec, _index: int) -> LayerSpec:
        layer = with_attention(layer, qk_norm=layer.norm, qk_norm_over="whole")
        return replace(layer, residual="post")

    return llama.adapted(hf, "Olmo2ForCausalLM", adapt)
