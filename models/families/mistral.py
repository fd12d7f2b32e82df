"""Mistral and Ministral: Llama, with a sliding window on all layers, on some, or on none."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families import llama
from compiledllm.models.families.hf import window_of
from compiledllm.models.families.llama import with_attention
from compiledllm.models.spec import ModelSpec

NAMES = llama.NAMES


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers MistralConfig or MinistralConfig."""
    return llama.adapted(
        hf,
        "MistralForCausalLM",
        lambda layer, index: with_attention(layer, sliding_window=window_of(hf, index)),
    )
