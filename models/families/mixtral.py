"""Mixtral: Mistral with experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiledllm.models.families import llama, qwen_moe
from compiledllm.models.families.hf import common_window, expect
from compiledllm.models.families.llama import names_of_experts, with_attention
from compiledllm.models.spec import LayerSpec, ModelSpec, MoeSpec

_EXPERTS = "model.layers.*.block_sparse_moe.experts"
NAMES = llama.NAMES | {
    "model.layers.*.block_sparse_moe.gate.*": "layers.*.mlp.router.*",
    f"{_EXPERTS}.*.w1.*": "layers.*.mlp.gate_up.*.*:gate",
    f"{_EXPERTS}.*.w3.*": "layers.*.mlp.gate_up.*.*:up",
    f"{_EXPERTS}.*.w2.*": "layers.*.mlp.down.*.*",
    **names_of_experts(_EXPERTS),
    # As transformers 5's modules, and tools that quantise these modules, name router and experts.
    **qwen_moe.EXPERTS,
}
unpack = qwen_moe.unpack


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers MixtralConfig."""
    expect(hf, "hidden_act", "silu")
    moe = MoeSpec(hf.intermediate_size, hf.num_local_experts, hf.num_experts_per_tok)

    def adapt(layer: LayerSpec, _index: int) -> LayerSpec:
        layer = with_attention(layer, sliding_window=common_window(hf))
        return replace(layer, mlp=moe)

    return llama.adapted(hf, "MixtralForCausalLM", adapt)
