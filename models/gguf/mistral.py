"""Conversion rules for files that name the architecture mistral: Llama's, perhaps with a window."""

from __future__ import annotations

from typing import Any

from compiledllm.models.gguf import llama
from compiledllm.models.gguf.file import GgufFile
from compiledllm.models.gguf.rules import (
    COMMON_KEYS,
    YARN_KEYS,
    Rule,
    silu_config,
    sliding_window,
)

KEYS = (*COMMON_KEYS, *YARN_KEYS, "attention.sliding_window")


def config(file: GgufFile) -> dict[str, Any]:
    """The config.json of a MistralForCausalLM."""
    window = {"sliding_window": sliding_window(file, "mistral")}
    return silu_config(file, "mistral", "MistralForCausalLM") | window


def rules(config: dict[str, Any]) -> dict[str, Rule]:
    return llama.rules(config)
