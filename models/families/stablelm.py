"""StableLM: Llama with LayerNorm and a partial rotation; MLP beside or behind attention."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families import llama
from compiledllm.models.families.hf import activation_of, attention_of, expect, model_spec
from compiledllm.models.spec import LayerSpec, MlpSpec, ModelSpec, NormSpec

NAMES = llama.NAMES | {
    "model.layers.*.input_layernorm.*": "layers.*.attn_norm.*",
    "model.layers.*.post_attention_layernorm.*": "layers.*.mlp_norm.*",
    "model.norm.*": "final_norm.*",
}
IGNORED = llama.IGNORED


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers StableLmConfig."""
    expect(hf, "qk_layernorm", False)
    norm = NormSpec(hf.layer_norm_eps, "layer", bias=True)
    layer = LayerSpec(
        hf.hidden_size,
        attention_of(hf, qkv_bias=hf.use_qkv_bias),
        MlpSpec(hf.intermediate_size, activation=activation_of(hf)),
        norm,
        residual="parallel" if hf.use_parallel_residual else "pre",
    )
    return model_spec(hf, "StableLmForCausalLM", (layer,) * hf.num_hidden_layers, norm)
