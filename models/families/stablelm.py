"""StableLM: Llama with LayerNorm and a partial rotation; MLP beside or behind attention."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families import llama
from compiledllm.models.families.hf import activation_of, expect, model_spec, rope_from_hf
from compiledllm.models.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec

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
    head_dim = hf.hidden_size // hf.num_attention_heads
    layer = LayerSpec(
        hf.hidden_size,
        AttentionSpec(
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=rope_from_hf(hf, head_dim),
            qkv_bias=hf.use_qkv_bias,
        ),
        MlpSpec(hf.intermediate_size, activation=activation_of(hf)),
        norm,
        residual="parallel" if hf.use_parallel_residual else "pre",
    )
    return model_spec(hf, "StableLmForCausalLM", (layer,) * hf.num_hidden_layers, norm)
