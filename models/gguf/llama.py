"""Conversion rules for Llama and Mistral.

llama.cpp interleaves the rows of q and k, and stores Llama 3's RoPE scaling as a tensor of
frequency divisors. Its files of Mistral models name the architecture llama, and have no window.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from compiledllm.models.gguf.file import FloatArray, GgufFile
from compiledllm.models.gguf.rules import (
    COMMON_KEYS,
    LLAMA_BLOCK,
    YARN_KEYS,
    Rule,
    make_rules,
    shortest,
    silu_config,
)

KEYS = (*COMMON_KEYS, *YARN_KEYS, "tensor_data_layout")
ROPE_TENSORS = ("rope_freqs.weight",)
_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output")
_LLAMA3_ROPE = {  # the same in Llama 3.1 to 3.3; GGUF files store the resulting divisors only
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(file: GgufFile) -> dict[str, Any]:
    """The config.json of a LlamaForCausalLM."""
    found = silu_config(file, "llama", "LlamaForCausalLM")
    return found | {
        "attention_bias": all(f"blk.0.{name}.bias" in file.tensors for name in _BIASES),
        "mlp_bias": False,
        "rope_scaling": _rope_scaling(file, found),
    }


def _rope_scaling(file: GgufFile, found: dict[str, Any]) -> dict[str, Any] | None:
    """The config entry for the file's RoPE scaling. Raises ValueError if no entry is equivalent.

    found: the config so far, without Llama 3's scaling, which the file stores only as a tensor.
    """
    scaling: dict[str, Any] | None = found["rope_scaling"]
    if "rope_freqs.weight" not in file.tensors:
        return scaling
    if scaling is not None:
        raise ValueError(
            f"RoPE scaling {scaling['rope_type']!r} with factor {scaling['factor']} is not "
            "supported beside tensor 'rope_freqs.weight'"
        )
    divisors = file.load("rope_freqs.weight")
    scaling = {"rope_type": "llama3", "factor": shortest(divisors.max()), **_LLAMA3_ROPE}
    expected = _llama3_divisors(scaling, found["head_dim"], found["rope_theta"])
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError("tensor 'rope_freqs.weight' is a RoPE scaling other than Llama 3's")
    return scaling


def _llama3_divisors(scaling: dict[str, Any], head_dim: int, theta: float) -> FloatArray:
    """Llama 3's divisor of each RoPE frequency: 1 for short waves, `factor` for long ones."""
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / waves
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - smooth) / scaling["factor"] + smooth), dtype=np.float32)


def rules(config: dict[str, Any]) -> dict[str, Rule]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    return make_rules(config, LLAMA_BLOCK, _BIASES if config["attention_bias"] else (), heads)
