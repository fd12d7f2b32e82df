"""StarCoder2: LayerNorm, an ungated MLP, biases, optionally a sliding window."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families import stablelm
from compiledllm.models.families.hf import activation_of, attention_of, common_window, model_spec
from compiledllm.models.spec import LayerSpec, MlpSpec, ModelSpec, NormSpec

NAMES = stablelm.NAMES | {
    "model.layers.*.mlp.c_fc.*": "layers.*.mlp.up.*",
    "model.layers.*.mlp.c_proj.*": "layers.*.mlp.down.*",
}


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Starcoder2Config."""
    norm = NormSpec(hf.norm_epsilon, "layer", bias=True)
    layer = LayerSpec(
        hf.hidden_size,
        attention_of(
            hf, qkv_bias=hf.use_bias, output_bias=hf.use_bias, sliding_window=common_window(hf)
        ),
        MlpSpec(hf.intermediate_size, hf.use_bias, activation_of(hf), gated=False),
        norm,
    )
    return model_spec(hf, "Starcoder2ForCausalLM", (layer,) * hf.num_hidden_layers, norm)
