"""Conversion rules for Llama.

llama.cpp interleaves the rows of q and k, and stores Llama 3's RoPE scaling as a tensor of
frequency divisors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from compiledllm.models.gguf.file import FloatArray, GgufFile
from compiledllm.models.gguf.rules import Rule, common_config, ends_rules, shortest

KEYS = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
)
_LLAMA3_ROPE = {  # the same in Llama 3.1 to 3.3; GGUF files store the resulting divisors only
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(file: GgufFile) -> dict[str, Any]:
    """The config.json of a LlamaForCausalLM."""
    common = common_config(file, "llama")
    theta = shortest(file.number("llama.rope.freq_base", 10000.0))
    return common | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "mlp_bias": False,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, common["head_dim"], theta),
    }


def _rope_scaling(file: GgufFile, head_dim: int, theta: float) -> dict[str, Any] | None:
    """The config entry for the file's RoPE scaling. Raises ValueError if no entry is equivalent."""
    kind = file.metadata.get("llama.rope.scaling.type", "linear")
    has_factor = file.metadata.get("llama.rope.scaling.factor")  # 0 means no scaling
    factor = shortest(file.number("llama.rope.scaling.factor")) if has_factor else 1.0
    is_scaled = kind != "none" and factor != 1.0
    has_divisors = "rope_freqs.weight" in file.tensors
    if kind not in ("none", "linear") or (is_scaled and has_divisors):
        raise ValueError(f"RoPE scaling {kind!r} with factor {factor} is not supported")
    if not has_divisors:
        return {"rope_type": "linear", "factor": factor} if is_scaled else None
    divisors = file.load("rope_freqs.weight")
    scaling = {"rope_type": "llama3", "factor": shortest(divisors.max()), **_LLAMA3_ROPE}
    expected = _llama3_divisors(scaling, head_dim, theta)
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
    """Tensor name in the file -> rule, in the order of the written safetensors file."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q, kv = heads * config["head_dim"], kv_heads * config["head_dim"]
    found = ends_rules(config)
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours, shape, num_heads in (
            ("attn_norm", "input_layernorm", (hidden,), 0),
            ("attn_q", "self_attn.q_proj", (q, hidden), heads),
            ("attn_k", "self_attn.k_proj", (kv, hidden), kv_heads),
            ("attn_v", "self_attn.v_proj", (kv, hidden), 0),
            ("attn_output", "self_attn.o_proj", (hidden, q), 0),
            ("ffn_norm", "post_attention_layernorm", (hidden,), 0),
            ("ffn_gate", "mlp.gate_proj", (ffn, hidden), 0),
            ("ffn_up", "mlp.up_proj", (ffn, hidden), 0),
            ("ffn_down", "mlp.down_proj", (hidden, ffn), 0),
        ):
            name = f"model.layers.{layer}.{ours}.weight"
            found[f"blk.{layer}.{theirs}.weight"] = Rule(name, shape, num_heads)
    return found
