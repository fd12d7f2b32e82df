"""GLM-4, dense: interleaved partial rotary embedding, norms before and after attention and MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiledllm.models.families import phi3
from compiledllm.models.families.hf import activation_of, attention_of, model_spec
from compiledllm.models.spec import LayerSpec, MlpSpec, ModelSpec, NormSpec

NAMES = phi3.NAMES | {
    "model.layers.*.post_self_attn_layernorm.weight": "layers.*.attn_out_norm.weight",
    "model.layers.*.post_mlp_layernorm.weight": "layers.*.mlp_out_norm.weight",
}


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers GlmConfig, Glm4Config or Glm4vTextConfig.

    Models of a GlmConfig have no norms after attention and MLP.
    """
    norm = NormSpec(hf.rms_norm_eps)
    attn = attention_of(hf, qkv_bias=hf.model_type == "glm4v_text" or hf.attention_bias)
    layer = LayerSpec(
        hf.hidden_size,
        replace(attn, rope=replace(attn.rope, interleaved=True)),
        MlpSpec(hf.intermediate_size, activation=activation_of(hf)),
        norm,
        residual="pre" if hf.model_type == "glm" else "sandwich",
    )
    architecture = "GlmForCausalLM" if hf.model_type == "glm" else "Glm4ForCausalLM"
    return model_spec(hf, architecture, (layer,) * hf.num_hidden_layers, norm)
