"""Qwen2-MoE and Qwen3-MoE: the dense models with experts on most layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiledllm.models.families import llama, qwen3
from compiledllm.models.families.hf import common_window, expect, positive, window_of
from compiledllm.models.families.llama import with_attention
from compiledllm.models.families.wrapper import experts_one_by_one
from compiledllm.models.spec import LayerSpec, ModelSpec, MoeSpec, RouterSpec

EXPERTS = {
    "model.layers.*.mlp.gate.*": "layers.*.mlp.router.*",
    **llama.names_of_experts("model.layers.*.mlp.experts"),
    # Names in checkpoints with one tensor for all experts, after the loader or `unpack` has taken
    # the tensor apart.
    "model.layers.*.mlp.experts.*.gate_up_proj.*": "layers.*.mlp.gate_up.*.*:gate,up",
}
NAMES = (
    EXPERTS
    | qwen3.NAMES
    | {
        "model.layers.*.mlp.shared_expert.gate_proj.*": "layers.*.mlp.shared.gate_up.*:gate",
        "model.layers.*.mlp.shared_expert.up_proj.*": "layers.*.mlp.shared.gate_up.*:up",
        "model.layers.*.mlp.shared_expert.down_proj.*": "layers.*.mlp.shared.down.*",
        "model.layers.*.mlp.shared_expert_gate.*": "layers.*.mlp.shared_gate.*",
    }
)


unpack = experts_one_by_one


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Qwen2MoeConfig or Qwen3MoeConfig."""
    expect(hf, "hidden_act", "silu")
    is_qwen3 = hf.model_type.startswith("qwen3")
    is_of_images = hf.model_type == "qwen3_vl_moe_text"  # always renormalises
    moe = MoeSpec(
        hf.moe_intermediate_size,
        hf.num_experts,
        hf.num_experts_per_tok,
        RouterSpec(renormalize=is_of_images or hf.norm_topk_prob),
        shared_size=0 if is_qwen3 else hf.shared_expert_intermediate_size,
    )

    def adapt(layer: LayerSpec, index: int) -> LayerSpec:
        attention = {"qk_norm": layer.norm} if is_qwen3 else {"qkv_bias": hf.qkv_bias}
        layer = with_attention(layer, sliding_window=_window(hf, index), **attention)
        is_sparse = (index + 1) % positive(hf, "decoder_sparse_step") == 0 and hf.num_experts > 0
        is_dense = index in (hf.mlp_only_layers or ()) or not is_sparse
        return layer if is_dense else replace(layer, mlp=moe)

    architecture = "Qwen3MoeForCausalLM" if is_qwen3 else "Qwen2MoeForCausalLM"
    return llama.adapted(hf, architecture, adapt)


def _window(hf: Any, index: int) -> int:
    """Qwen3-MoE has one window for all layers, and Qwen3-VL ignores the field."""
    if hf.model_type == "qwen2_moe":
        return window_of(hf, index)
    return common_window(hf) if hf.model_type == "qwen3_moe" else 0
