"""Phi-3 and Phi-4: Llama with fused matrices in the checkpoint."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families import llama
from compiledllm.models.families.hf import common_window
from compiledllm.models.families.llama import with_attention
from compiledllm.models.spec import ModelSpec

NAMES = llama.NAMES | {
    "model.layers.*.self_attn.qkv_proj.*": "layers.*.attn.qkv.*:q,k,v",
    "model.layers.*.mlp.gate_up_proj.*": "layers.*.mlp.gate_up.*:gate,up",
}


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Phi3Config."""
    return llama.adapted(
        hf,
        "Phi3ForCausalLM",
        lambda layer, _index: with_attention(layer, sliding_window=common_window(hf)),
    )
