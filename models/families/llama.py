"""Llama 2 and 3, and what shares their architecture (SmolLM2, Yi, DeepSeek-LLM dense)."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families.hf import dtype_of, eos_token_ids, expect, rope_from_hf
from compiledllm.models.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec

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
    "lm_head.weight": "lm_head",
}
IGNORED = ("model.layers.*.self_attn.rotary_emb.inv_freq",)  # old checkpoints; we compute it


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers LlamaConfig, or one like it.

    Raises ConfigError for a variant we lack.
    """
    expect(hf, "hidden_act", "silu")
    num_heads = hf.num_attention_heads
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // num_heads
    norm = NormSpec(hf.rms_norm_eps)
    layer = LayerSpec(
        hidden_size=hf.hidden_size,
        attn=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=hf.num_key_value_heads or num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=rope_from_hf(hf, head_dim),
            qkv_bias=hf.attention_bias,
            output_bias=hf.attention_bias,
        ),
        mlp=MlpSpec(hf.intermediate_size, bias=getattr(hf, "mlp_bias", False)),
        norm=norm,
    )
    return ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        layers=(layer,) * hf.num_hidden_layers,
        final_norm=norm,
        tie_word_embeddings=hf.tie_word_embeddings,
        max_position=hf.max_position_embeddings,
        dtype=dtype_of(hf),
        eos_token_ids=eos_token_ids(hf),
        initializer_range=hf.initializer_range,
    )
