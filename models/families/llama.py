"""Llama 2 and 3, and models of the same architecture (SmolLM2, Yi, DeepSeek-LLM dense)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from compiledllm.models.families.hf import activation_of, attention_of, model_spec
from compiledllm.models.spec import LayerSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec

NAMES = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.*.input_layernorm.weight": "layers.*.attn_norm.weight",
    "model.layers.*.self_attn.q_proj.*": "layers.*.attn.qkv.*:q",
    "model.layers.*.self_attn.k_proj.*": "layers.*.attn.qkv.*:k",
    "model.layers.*.self_attn.v_proj.*": "layers.*.attn.qkv.*:v",
    "model.layers.*.self_attn.o_proj.*": "layers.*.attn.out.*",
    "model.layers.*.post_attention_layernorm.weight": "layers.*.mlp_norm.weight",
    "model.layers.*.mlp.gate_proj.*": "layers.*.mlp.gate_up.*:gate",
    "model.layers.*.mlp.up_proj.*": "layers.*.mlp.gate_up.*:up",
    "model.layers.*.mlp.down_proj.*": "layers.*.mlp.down.*",
    "model.norm.weight": "final_norm.weight",
    "lm_head.*": "lm_head.*",
}


def names_of_experts(path: str) -> dict[str, str]:
    """NAMES of experts with three matrices each, as tools name them that quantise linear layers.

    path: the experts' path in a checkpoint, such as "model.layers.*.mlp.experts".
    """
    return {
        f"{path}.*.gate_proj.*": "layers.*.mlp.gate_up.*.*:gate",
        f"{path}.*.up_proj.*": "layers.*.mlp.gate_up.*.*:up",
        f"{path}.*.down_proj.*": "layers.*.mlp.down.*.*",
    }


def spec_from_hf(hf: Any, rope: RopeSpec | None = None) -> ModelSpec:
    """ModelSpec of a transformers LlamaConfig, or of a config with the same fields.

    rope: the rotation of all layers; None: that of the config. Raises ConfigError for an
    unsupported variant.
    """
    has_bias = getattr(hf, "attention_bias", False)
    norm = NormSpec(hf.rms_norm_eps)
    layer = LayerSpec(
        hidden_size=hf.hidden_size,
        mixer=attention_of(hf, rope=rope, qkv_bias=has_bias, output_bias=has_bias),
        mlp=MlpSpec(
            hf.intermediate_size,
            bias=getattr(hf, "mlp_bias", False),
            activation=activation_of(hf),
        ),
        norm=norm,
    )
    return model_spec(hf, "LlamaForCausalLM", (layer,) * hf.num_hidden_layers, norm)


def adapted(
    hf: Any,
    architecture: str,
    adapt: Callable[[LayerSpec, int], LayerSpec],
    rope: RopeSpec | None = None,
    **changes: Any,
) -> ModelSpec:
    """The spec of a Llama-like config with changed layers.

    adapt: (Llama's layer, layer index) -> the family's layer. rope: see `spec_from_hf`. changes:
    fields of the ModelSpec.
    """
    like_llama = spec_from_hf(hf, rope)
    layers = tuple(adapt(layer, index) for index, layer in enumerate(like_llama.layers))
    return replace(like_llama, architecture=architecture, layers=layers, **changes)


def with_attention(layer: LayerSpec, **changes: Any) -> LayerSpec:
    """The layer with changed fields of its AttentionSpec."""
    return replace(layer, mixer=replace(layer.mixer, **changes))
