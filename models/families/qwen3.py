"""Qwen3, dense: Llama with an RMSNorm on each head of the queries and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiledllm.models.families import llama
from compiledllm.models.families.hf import expect
from compiledllm.models.spec import ModelSpec

NAMES = llama.NAMES | {
    "model.layers.*.self_attn.q_norm.weight": "layers.*.attn.q_norm.weight",
    "model.layers.*.self_attn.k_norm.weight": "layers.*.attn.k_norm.weight",
}
IGNORED = llama.IGNORED


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Qwen3Config. Raises ConfigError for a variant we lack."""
    expect(hf, "use_sliding_window", False)
    like_llama = llama.spec_from_hf(hf)
    layer = like_llama.layers[0]
    layer = replace(layer, attn=replace(layer.attn, qk_norm=layer.norm))
    return replace(
        like_llama,
        architecture="Qwen3ForCausalLM",
        layers=(layer,) * len(like_llama.layers),
    )
