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
    make_rules,
    silu_config,
)

KEYS = (*COMMON_KEYS, *YARN_KEYS)


def config(file: GgufFile) -> dict[str, Any]:
    """The config.json of a Qwen3ForCausalLM."""
    return silu_config(file, "qwen3", "Qwen3ForCausalLM") | {"use_sliding_window": False}


def rules(config: dict[str, Any]) -> dict[str, Rule]:
    return make_rules(config, LLAMA_BLOCK | QK_NORMS)
