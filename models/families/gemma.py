"""Gemma 1: Llama with a scaled embedding, RMSNorm weights stored minus one, and GELU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiledllm.models.families import llama
from compiledllm.models.spec import LayerSpec, ModelSpec, NormSpec

NAMES = llama.NAMES


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers GemmaConfig."""
    norm = NormSpec(hf.rms_norm_eps, "rms_plus_one")

    def adapt(layer: LayerSpec, _index: int) -> LayerSpec:
        return replace(layer, norm=norm)

    scale = hf.hidden_size**0.5
    return llama.adapted(hf, "GemmaForCausalLM", adapt, final_norm=norm, embedding_scale=scale)
