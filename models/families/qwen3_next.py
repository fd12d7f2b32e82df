"""Qwen3-Next: Gated DeltaNet on most layers, gated attention on the others, experts."""

from __future__ import annotations

from typing import Any

from compiledllm.config import ConfigError
from compiledllm.models.families import qwen_moe
from compiledllm.models.families.hf import activation_of, attention_of, expect, model_spec, positive
from compiledllm.models.spec import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RouterSpec,
)
from compiledllm.models.state_specs import DeltaNetSpec, StateSpec

DELTA_NET = {
    "model.layers.*.linear_attn.A_log": "layers.*.attn.log_decay_rate",
    "model.layers.*.linear_attn.dt_bias": "layers.*.attn.step_bias",
    "model.layers.*.linear_attn.conv1d.weight": "layers.*.attn.convolution",
    "model.layers.*.linear_attn.norm.weight": "layers.*.attn.norm",
    "model.layers.*.linear_attn.out_proj.*": "layers.*.attn.out.*",
}
NAMES = (
    qwen_moe.NAMES
    | DELTA_NET
    | {
        "model.layers.*.linear_attn.in_proj_qkvz.*": "layers.*.attn.qkvzba.*:qkvz",
        "model.layers.*.linear_attn.in_proj_ba.*": "layers.*.attn.qkvzba.*:ba",
    }
)
IGNORED = ("mtp.**",)  # multi-token prediction
unpack = qwen_moe.unpack


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Qwen3NextConfig."""
    dense = MlpSpec(hf.intermediate_size, activation=activation_of(hf))
    experts = moe_spec(hf, renormalize=hf.norm_topk_prob)

    def is_sparse(index: int) -> bool:
        is_due = (index + 1) % positive(hf, "decoder_sparse_step") == 0 and hf.num_experts > 0
        return is_due and index not in hf.mlp_only_layers

    mlps = [experts if is_sparse(index) else dense for index in range(hf.num_hidden_layers)]
    return hybrid_spec(hf, "Qwen3NextForCausalLM", mlps, is_grouped=True)


def moe_spec(hf: Any, renormalize: bool) -> MoeSpec:
    return MoeSpec(
        hf.moe_intermediate_size,
        hf.num_experts,
        hf.num_experts_per_tok,
        RouterSpec(renormalize=renormalize),
        shared_size=hf.shared_expert_intermediate_size,
    )


def hybrid_spec(
    hf: Any, architecture: str, mlps: list[MlpSpec | MoeSpec], is_grouped: bool
) -> ModelSpec:
    """The spec of a config with Gated DeltaNet layers. mlps: one per layer."""
    expect(hf, "hidden_act", "silu")  # also of the short convolutions
    norm = NormSpec(hf.rms_norm_eps, "rms_plus_one")
    bias = hf.attention_bias
    attention = attention_of(
        hf, hf.head_dim, qkv_bias=bias, output_bias=bias, qk_norm=norm, has_gate=True
    )
    delta_net = DeltaNetSpec(
        hf.linear_num_key_heads,
        hf.linear_num_value_heads,
        hf.linear_key_head_dim,
        hf.linear_value_head_dim,
        hf.linear_conv_kernel_dim,
        hf.rms_norm_eps,
        is_grouped,
    )
    mixers: dict[str, AttentionSpec | StateSpec] = {
        "full_attention": attention,
        "linear_attention": delta_net,
    }
    if unknown := set(hf.layer_types) - mixers.keys():
        raise ConfigError(f"{hf.model_type}: layer_types has {min(unknown)!r}: not supported")
    layers = (
        LayerSpec(hf.hidden_size, mixers[kind], mlp, norm)
        for kind, mlp in zip(hf.layer_types, mlps, strict=True)
    )
    return model_spec(hf, architecture, layers, norm)
