"""Falcon in the form of the 7B model: one KV head, parallel attention and MLP with one norm."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families.hf import activation_of, attention_of, expect, model_spec
from compiledllm.models.spec import LayerSpec, MlpSpec, ModelSpec, NormSpec

NAMES = {
    "transformer.word_embeddings.weight": "embedding",
    "transformer.h.*.input_layernorm.*": "layers.*.attn_norm.*",
    "transformer.h.*.self_attention.query_key_value.*": "layers.*.attn.qkv.*:q,k,v",
    "transformer.h.*.self_attention.dense.*": "layers.*.attn.out.*",
    "transformer.h.*.mlp.dense_h_to_4h.*": "layers.*.mlp.up.*",
    "transformer.h.*.mlp.dense_4h_to_h.*": "layers.*.mlp.down.*",
    "transformer.ln_f.*": "final_norm.*",
    "lm_head.*": "lm_head.*",
}


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers FalconConfig."""
    expect(hf, "new_decoder_architecture", False)
    expect(hf, "multi_query", True)
    expect(hf, "parallel_attn", True)
    expect(hf, "alibi", False)
    norm = NormSpec(hf.layer_norm_epsilon, "layer", bias=True)
    layer = LayerSpec(
        hf.hidden_size,
        attention_of(hf, num_kv_heads=1, qkv_bias=hf.bias, output_bias=hf.bias),
        MlpSpec(hf.ffn_hidden_size, hf.bias, activation_of(hf, "activation"), gated=False),
        norm,
        residual="parallel",
    )
    return model_spec(hf, "FalconForCausalLM", (layer,) * hf.num_hidden_layers, norm)
