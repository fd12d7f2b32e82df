"""Qwen3, dense: Llama with an RMSNorm on each head of the queries and keys."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families import llama
from compiledllm.models.families.hf import window_of
from compiledllm.models.families.llama import with_attention
from compiledllm.models.spec import LayerSpec, ModelSpec

NAMES = llama.NAMES | {
    "model.layers.*.self_attn.q_norm.weight": "layers.*.attn.q_norm.weight",
    "model.layers.*.self_attn.k_norm.weight": "layers.*.attn.k_norm.weight",
}


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Qwen3Config or Qwen3VLTextConfig."""
    has_windows = hf.model_type == "qwen3"  # Qwen3-VL ignores the field

    def adapt(layer: LayerSpec, index: int) -> LayerSpec:
        window = window_of(hf, index) if has_windows else 0
        return with_attention(layer, qk_norm=layer.norm, sliding_window=window)

    return llama.adapted(hf, "Qwen3ForCausalLM", adapt)
