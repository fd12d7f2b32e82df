"""Conversion rules for Qwen2 and Qwen2.5: biases on q, k and v, and rows in the model's order."""

from __future__ import annotations

from typing import Any

from compiledllm.models.gguf.file import GgufFile
from compiledllm.models.gguf.rules import (
    COMMON_KEYS,
    LLAMA_BLOCK,
    YARN_KEYS,
    Rule,
    make_rules,
    silu_config,
)

KEYS = (*COMMON_KEYS, *YARN_KEYS)


def config(file: GgufFile) -> dict[str, Any]:
    """The config.json of a Qwen2ForCausalLM."""
    return silu_config(file, "qwen2", "Qwen2ForCausalLM") | {"use_sliding_window": False}


def rules(config: dict[str, Any]) -> dict[str, Rule]:
    return make_rules(config, LLAMA_BLOCK, biases=("attn_q", "attn_k", "attn_v"))
