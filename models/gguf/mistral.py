"""Conversion rules for files that name the architecture mistral: Llama's, perhaps with a window."""

from __future__ import annotations

from typing import Any

from compiledllm.models.gguf import llama
from compiledllm.models.gguf.file import GgufFile
from compiledllm.models.gguf.rules import (
    COMMON_KEYS,
    YARN_KEYS,
    Rule,
    common_config,
    rope_scaling,
    rope_theta,
)

KEYS = (*COMMON_KEYS, *YARN_KEYS, "attention.sliding_window")


def config(file: GgufFile) -> dict[str, Any]:
    """The config.json of a MistralForCausalLM."""
    window = "mistral.attention.sliding_window"
    return common_config(file, "mistral") | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "sliding_window": file.integer(window) if file.metadata.get(window) else None,
        "rope_theta": rope_theta(file, "mistral"),
        "rope_scaling": rope_scaling(file, "mistral"),
    }


def rules(config: dict[str, Any]) -> dict[str, Rule]:
    return llama.rules(config)
