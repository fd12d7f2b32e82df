"""Mistral and Ministral: Llama, with a sliding window on all layers, on some, or on none.

In Ministral 3, queries grow with the position beyond the original context length.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiledllm.models.families import llama
from compiledllm.models.families.hf import common_window, window_of
from compiledllm.models.families.llama import with_attention
from compiledllm.models.spec import AttentionSpec, LayerSpec, ModelSpec

NAMES = llama.NAMES


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers MistralConfig, MinistralConfig or Ministral3Config."""
    growth = _growth_of_queries(hf)

    def adapt(layer: LayerSpec, index: int) -> LayerSpec:
        window = window_of(hf, index) if hf.model_type == "ministral" else common_window(hf)
        layer = with_attention(layer, sliding_window=window)
        attention = layer.mixer
        assert isinstance(attention, AttentionSpec)
        return with_attention(layer, rope=replace(attention.rope, growth=growth))

    return llama.adapted(hf, "MistralForCausalLM", adapt)


def _growth_of_queries(hf: Any) -> tuple[float, int] | None:
    rope = hf.rope_parameters
    factor, length = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    return (float(factor), int(length)) if factor else None
