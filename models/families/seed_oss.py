"""Seed-OSS: Llama with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families import llama
from compiledllm.models.families.llama import with_attention
from compiledllm.models.spec import ModelSpec

NAMES = llama.NAMES


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers SeedOssConfig."""
    return llama.adapted(
        hf,
        "SeedOssForCausalLM",
        lambda layer, _index: with_attention(layer, output_bias=hf.attention_out_bias),
    )
