"""LFM2, dense and MoE: gated short convolutions on most layers, attention on the others."""

from __future__ import annotations

from typing import Any

from compiledllm.config import ConfigError
from compiledllm.models.families.hf import attention_of, model_spec
from compiledllm.models.families.llama import names_of_experts
from compiledllm.models.families.wrapper import experts_one_by_one
from compiledllm.models.spec import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RouterSpec,
)
from compiledllm.models.state_specs import ConvSpec, StateSpec

_EXPERTS = "model.layers.*.feed_forward.experts"
NAMES = {
    "model.embed_tokens.weight": "embedding",
    "model.embedding_norm.weight": "final_norm.weight",
    "lm_head.*": "lm_head.*",
    "model.layers.*.operator_norm.weight": "layers.*.attn_norm.weight",
    "model.layers.*.ffn_norm.weight": "layers.*.mlp_norm.weight",
    "model.layers.*.conv.in_proj.*": "layers.*.attn.bcx.*",
    "model.layers.*.conv.conv.*": "layers.*.attn.*",
    "model.layers.*.conv.out_proj.*": "layers.*.attn.out.*",
    "model.layers.*.self_attn.q_proj.*": "layers.*.attn.qkv.*:q",
    "model.layers.*.self_attn.k_proj.*": "layers.*.attn.qkv.*:k",
    "model.layers.*.self_attn.v_proj.*": "layers.*.attn.qkv.*:v",
    "model.layers.*.self_attn.out_proj.*": "layers.*.attn.out.*",
    "model.layers.*.self_attn.q_layernorm.weight": "layers.*.attn.q_norm.weight",
    "model.layers.*.self_attn.k_layernorm.weight": "layers.*.attn.k_norm.weight",
    "model.layers.*.feed_forward.w1.*": "layers.*.mlp.gate_up.*:gate",
    "model.layers.*.feed_forward.w3.*": "layers.*.mlp.gate_up.*:up",
    "model.layers.*.feed_forward.w2.*": "layers.*.mlp.down.*",
    "model.layers.*.feed_forward.gate.*": "layers.*.mlp.router.*",
    "model.layers.*.feed_forward.expert_bias": "layers.*.mlp.score_bias",
    f"{_EXPERTS}.*.w1.*": "layers.*.mlp.gate_up.*.*:gate",
    f"{_EXPERTS}.*.w3.*": "layers.*.mlp.gate_up.*.*:up",
    f"{_EXPERTS}.*.w2.*": "layers.*.mlp.down.*.*",
    **names_of_experts(_EXPERTS),
    # As `unpack` yields it.
    f"{_EXPERTS}.*.gate_up_proj.*": "layers.*.mlp.gate_up.*.*:gate,up",
}
unpack = experts_one_by_one


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Lfm2Config or Lfm2MoeConfig."""
    is_moe = hf.model_type == "lfm2_moe"
    norm = NormSpec(hf.norm_eps)
    mixers: dict[str, AttentionSpec | StateSpec] = {
        "full_attention": attention_of(hf, qk_norm=norm),
        "conv": ConvSpec(hf.conv_L_cache, hf.hidden_size, hf.conv_bias),
    }
    if unknown := set(hf.layer_types) - mixers.keys():
        raise ConfigError(f"{hf.model_type}: layer_types has {min(unknown)!r}: not supported")
    dense = MlpSpec(hf.intermediate_size if is_moe else _intermediate_size(hf))
    num_dense = hf.num_dense_layers if is_moe else hf.num_hidden_layers
    layers = (
        LayerSpec(hf.hidden_size, mixers[kind], dense if i < num_dense else _experts(hf), norm)
        for i, kind in enumerate(hf.layer_types)
    )
    architecture = "Lfm2MoeForCausalLM" if is_moe else "Lfm2ForCausalLM"
    return model_spec(hf, architecture, layers, norm)


def _experts(hf: Any) -> MoeSpec:
    return MoeSpec(
        hf.moe_intermediate_size,
        hf.num_experts,
        hf.num_experts_per_tok,
        RouterSpec(
            scores="sigmoid",
            renormalize=hf.norm_topk_prob,
            has_bias=hf.use_expert_bias,
            eps=1e-6,
            scale=hf.routed_scaling_factor,
        ),
    )


def _intermediate_size(hf: Any) -> int:
    """The intermediate size, which transformers computes from the config's size."""
    size: int = hf.intermediate_size
    if not hf.block_auto_adjust_ff_dim:
        return size
    size = int(2 * size / 3)
    if hf.block_ffn_dim_multiplier is None:
        return size
    multiple: int = hf.block_multiple_of
    return -(-int(hf.block_ffn_dim_multiplier * size) // multiple) * multiple
