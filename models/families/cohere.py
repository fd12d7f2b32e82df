"""Cohere, Command-R: attention and MLP side by side, neighbours rotated together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiledllm.models.families import llama, qwen3
from compiledllm.models.families.hf import activation_of, model_spec, rope_from_hf
from compiledllm.models.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec

NAMES = qwen3.NAMES
IGNORED = llama.IGNORED


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers CohereConfig."""
    norm = NormSpec(hf.layer_norm_eps, "layer")
    head_dim = hf.hidden_size // hf.num_attention_heads
    layer = LayerSpec(
        hf.hidden_size,
        AttentionSpec(
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=replace(rope_from_hf(hf, head_dim), interleaved=True),
            qkv_bias=hf.attention_bias,
            output_bias=hf.attention_bias,
            qk_norm=norm if hf.use_qk_norm else None,
            qk_norm_over="heads",
        ),
        MlpSpec(hf.intermediate_size, activation=activation_of(hf)),
        norm,
        residual="parallel",
    )
    layers = (layer,) * hf.num_hidden_layers
    return model_spec(hf, "CohereForCausalLM", layers, norm, logit_scale=hf.logit_scale)
