"""Conversion rules for Qwen3: norms on the heads of q and k, and rows in the model's order."""

from __future__ import annotations

from typing import Any

from compiledllm.models.gguf.file import GgufFile
from compiledllm.models.gguf.rules import (
    COMMON_KEYS,
    LLAMA_BLOCK,
    QK_NORMS,
    YARN_KEYS,
    Rule,
    common_config,
    rope_scaling,
    rope_theta,
    rules_of,
)

KEYS = (*COMMON_KEYS, *YARN_KEYS)


def config(file: GgufFile) -> dict[str, Any]:
    """The config.json of a Qwen3ForCausalLM."""
    return common_config(file, "qwen3") | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "use_sliding_window": False,
        "rope_theta": rope_theta(file, "qwen3"),
        "rope_scaling": rope_scaling(file, "qwen3"),
    }


def rules(config: dict[str, Any]) -> dict[str, Rule]:
    return rules_of(config, LLAMA_BLOCK | QK_NORMS)
