"""OPT: learned positions, pre-norm (post-norm in the 350M model), an ungated MLP with ReLU."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families.hf import activation_of, attention_of, expect, model_spec
from compiledllm.models.spec import (
    LayerSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)

_NAMES = {
    "decoder.embed_tokens.weight": "embedding",
    "decoder.embed_positions.weight": "positions",
    "decoder.layers.*.self_attn_layer_norm.*": "layers.*.attn_norm.*",
    "decoder.layers.*.self_attn.q_proj.*": "layers.*.attn.qkv.*:q",
    "decoder.layers.*.self_attn.k_proj.*": "layers.*.attn.qkv.*:k",
    "decoder.layers.*.self_attn.v_proj.*": "layers.*.attn.qkv.*:v",
    "decoder.layers.*.self_attn.out_proj.*": "layers.*.attn.out.*",
    "decoder.layers.*.final_layer_norm.*": "layers.*.mlp_norm.*",
    "decoder.layers.*.fc1.*": "layers.*.mlp.up.*",
    "decoder.layers.*.fc2.*": "layers.*.mlp.down.*",
    "decoder.final_layer_norm.*": "final_norm.*",
    "decoder.project_in.*": "project_in.*",
    "decoder.project_out.*": "project_out.*",
}
# Names in old checkpoints lack the prefix "model.".
NAMES = {f"model.{name}": target for name, target in _NAMES.items()} | _NAMES
NAMES["lm_head.*"] = "lm_head.*"
_FIRST_POSITION = 2


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers OPTConfig."""
    expect(hf, "layer_norm_elementwise_affine", True)
    has_final_norm = hf.do_layer_norm_before and not hf._remove_final_layer_norm
    is_projected = hf.word_embed_proj_dim not in (None, hf.hidden_size)
    norm = NormSpec(1e-5, "layer", bias=True)
    layer = LayerSpec(
        hf.hidden_size,
        attention_of(
            hf,
            rope=RopeSpec(()),
            num_kv_heads=hf.num_attention_heads,
            qkv_bias=hf.enable_bias,
            output_bias=hf.enable_bias,
        ),
        MlpSpec(hf.ffn_dim, hf.enable_bias, activation_of(hf, "activation_function"), gated=False),
        norm,
        residual="pre" if hf.do_layer_norm_before else "sums",
    )
    return model_spec(
        hf,
        "OPTForCausalLM",
        (layer,) * hf.num_hidden_layers,
        norm if has_final_norm else NormSpec(0.0, "none"),
        embedding_size=hf.word_embed_proj_dim if is_projected else 0,
        num_learned_positions=hf.max_position_embeddings + _FIRST_POSITION,
        first_position=_FIRST_POSITION,
    )
