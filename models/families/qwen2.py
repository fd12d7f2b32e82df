"""Qwen2 and Qwen2.5, dense: Llama with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families import llama
from compiledllm.models.families.hf import window_of
from compiledllm.models.families.llama import with_attention
from compiledllm.models.spec import ModelSpec

NAMES = llama.NAMES


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Qwen2Config."""
    return llama.adapted(
        hf,
        "Qwen2ForCausalLM",
        lambda layer, index: with_attention(
            layer, qkv_bias=True, sliding_window=window_of(hf, index)
        ),
    )
