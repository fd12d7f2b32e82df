"""Gemma 2 and the text model of Gemma 3: pre- and post-norms, sliding windows on most layers.

Gemma 2 soft-caps the attention logits and the final logits. Gemma 3 normalises queries and keys
instead, and its sliding-window layers have rotary frequencies of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiledllm.config import ConfigError
from compiledllm.models.families import qwen3
from compiledllm.models.families.hf import (
    activation_of,
    attention_of,
    expect,
    model_spec,
    positive,
    rope_from_hf,
    window_of,
)
from compiledllm.models.spec import LayerSpec, MlpSpec, ModelSpec, NormSpec

NAMES = qwen3.NAMES | {
    "model.layers.*.post_attention_layernorm.weight": "layers.*.attn_out_norm.weight",
    "model.layers.*.pre_feedforward_layernorm.weight": "layers.*.mlp_norm.weight",
    "model.layers.*.post_feedforward_layernorm.weight": "layers.*.mlp_out_norm.weight",
}


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Gemma2Config or Gemma3TextConfig."""
    expect(hf, "use_bidirectional_attention", None, False)
    norm = NormSpec(hf.rms_norm_eps, "rms_plus_one")
    has_qk_norm = hf.model_type != "gemma2"
    cap = hf.attn_logit_softcapping
    if has_qk_norm and cap is not None:  # transformers has the field and does not read it
        raise ConfigError(f"{hf.model_type}: attn_logit_softcapping={cap} is not supported")
    attn = attention_of(
        hf,
        hf.head_dim,
        rope_from_hf(hf, hf.head_dim, hf.layer_types[0] if has_qk_norm else None),
        scale=positive(hf, "query_pre_attn_scalar") ** -0.5,
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
        qk_norm=norm if has_qk_norm else None,
        soft_cap=cap or 0.0,
    )
    mlp = MlpSpec(hf.intermediate_size, activation=activation_of(hf, "hidden_activation"))
    layer = LayerSpec(hf.hidden_size, attn, mlp, norm, residual="sandwich")

    def adapted(index: int) -> LayerSpec:
        changes: dict[str, Any] = {"sliding_window": window_of(hf, index)}
        if has_qk_norm:
            changes["rope"] = rope_from_hf(hf, hf.head_dim, hf.layer_types[index])
        return replace(layer, mixer=replace(attn, **changes))

    return model_spec(
        hf,
        "Gemma3ForCausalLM" if has_qk_norm else "Gemma2ForCausalLM",
        map(adapted, range(hf.num_hidden_layers)),
        norm,
        embedding_scale=hf.hidden_size**0.5,
        logit_soft_cap=hf.final_logit_softcapping or 0.0,
    )
