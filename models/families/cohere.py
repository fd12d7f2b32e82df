"""Cohere Command-R: parallel attention and MLP, interleaved rotary embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiledllm.models.families import qwen3
from compiledllm.models.families.hf import activation_of, attention_of, model_spec
from compiledllm.models.spec import LayerSpec, MlpSpec, ModelSpec, NormSpec

NAMES = qwen3.NAMES


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers CohereConfig."""
    norm = NormSpec(hf.layer_norm_eps, "layer")
    attn = attention_of(
        hf,
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
        qk_norm=norm if hf.use_qk_norm else None,
        qk_norm_over="heads",
    )
    layer = LayerSpec(
        hf.hidden_size,
        replace(attn, rope=replace(attn.rope, interleaved=True)),
        MlpSpec(hf.intermediate_size, activation=activation_of(hf)),
        norm,
        residual="parallel",
    )
    layers = (layer,) * hf.num_hidden_layers
    return model_spec(hf, "CohereForCausalLM", layers, norm, logit_scale=hf.logit_scale)
