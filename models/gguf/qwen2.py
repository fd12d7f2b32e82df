"""Conversion rules for Qwen2 and Qwen2.5: biases on q, k and v, and rows in the model's order."""

from __future__ import annotations

from typing import Any

from compiledllm.models.gguf.file import GgufFile
from compiledllm.models.gguf.rules import (
    COMMON_KEYS,
    LLAMA_BLOCK,
    YARN_KEYS,
    Rule,
    common_config,
    rope_scaling,
    rope_theta,
    rules_of,
)

KEYS = (*COMMON_KEYS, *YARN_KEYS)


def config(file: GgufFile) -> dict[str, Any]:
    """The config.json of a Qwen2ForCausalLM."""
    return common_config(file, "qwen2") | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "use_sliding_window": False,
        "rope_theta": rope_theta(file, "qwen2"),
        "rope_scaling": rope_scaling(file, "qwen2"),
    }


def rules(config: dict[str, Any]) -> dict[str, Rule]:
    return rules_of(config, LLAMA_BLOCK, biases=("attn_q", "attn_k", "attn_v"))
