"""Phi-1, 1.5 and 2: parallel attention and ungated MLP with one LayerNorm; biases everywhere."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families import llama
from compiledllm.models.families.hf import activation_of, attention_of, model_spec
from compiledllm.models.spec import LayerSpec, MlpSpec, ModelSpec, NormSpec

NAMES = llama.NAMES | {
    "model.layers.*.input_layernorm.*": "layers.*.attn_norm.*",
    "model.layers.*.self_attn.dense.*": "layers.*.attn.out.*",
    "model.layers.*.self_attn.q_layernorm.*": "layers.*.attn.q_norm.*",
    "model.layers.*.self_attn.k_layernorm.*": "layers.*.attn.k_norm.*",
    "model.layers.*.mlp.fc1.*": "layers.*.mlp.up.*",
    "model.layers.*.mlp.fc2.*": "layers.*.mlp.down.*",
    "model.final_layernorm.*": "final_norm.*",
}


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers PhiConfig."""
    norm = NormSpec(hf.layer_norm_eps, "layer", bias=True)
    layer = LayerSpec(
        hf.hidden_size,
        attention_of(
            hf, qkv_bias=True, output_bias=True, qk_norm=norm if hf.qk_layernorm else None
        ),
        MlpSpec(hf.intermediate_size, True, activation_of(hf), gated=False),
        norm,
        residual="parallel",
    )
    layers = (layer,) * hf.num_hidden_layers
    return model_spec(hf, "PhiForCausalLM", layers, norm, lm_head_bias=True)
