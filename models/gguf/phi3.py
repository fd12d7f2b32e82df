"""Conversion rules for Phi-3 and Phi-4.

q, k and v are one tensor, and so are gate and up. LongRoPE's divisors are tensors.
"""

from __future__ import annotations

from typing import Any

from compiledllm.models.gguf.file import GgufFile
from compiledllm.models.gguf.rules import (
    COMMON_KEYS,
    LLAMA_BLOCK,
    Rule,
    common_config,
    make_rules,
    rope_theta,
    shortest,
    sliding_window,
)

KEYS = (*COMMON_KEYS, "attention.sliding_window", "rope.scaling.attn_factor")
ROPE_TENSORS = ("rope_factors_long.weight", "rope_factors_short.weight")
_BLOCK = {
    "attn_norm": LLAMA_BLOCK["attn_norm"],
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": LLAMA_BLOCK["attn_output"],
    "ffn_norm": LLAMA_BLOCK["ffn_norm"],
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": LLAMA_BLOCK["ffn_down"],
}


def config(file: GgufFile) -> dict[str, Any]:
    """The config.json of a Phi3ForCausalLM."""
    common = common_config(file, "phi3", is_rotary_partial=True)
    head_dim, context = common["head_dim"], common["max_position_embeddings"]
    rotary_dim = file.integer("phi3.rope.dimension_count", head_dim)
    if rotary_dim > head_dim or rotary_dim % 2:
        raise ValueError(f"phi3.rope.dimension_count = {rotary_dim} of {head_dim} is impossible")
    return common | {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        "sliding_window": sliding_window(file, "phi3"),
        "partial_rotary_factor": rotary_dim / head_dim,
        "original_max_position_embeddings": file.integer(
            "phi3.rope.scaling.original_context_length", context
        ),
        "rope_theta": rope_theta(file, "phi3"),
        "rope_scaling": _rope_scaling(file, rotary_dim),
    }


def _rope_scaling(file: GgufFile, rotary_dim: int) -> dict[str, Any] | None:
    kind = file.metadata.get("phi3.rope.scaling.type", "longrope")
    if kind not in ("none", "longrope") or file.metadata.get("phi3.rope.scaling.factor"):
        raise ValueError(f"RoPE scaling {kind!r} is not supported")
    present = [name for name in ROPE_TENSORS if name in file.tensors]
    if not present:
        return None
    if len(present) != len(ROPE_TENSORS):
        raise ValueError(f"only {present[0]} of {' and '.join(ROPE_TENSORS)} is in the file")
    long, short = (file.load(name) for name in ROPE_TENSORS)
    for name, factors in zip(ROPE_TENSORS, (long, short), strict=True):
        if factors.shape != (rotary_dim // 2,):
            raise ValueError(
                f"tensor '{name}' has shape {factors.shape}, the metadata says {(rotary_dim // 2,)}"
            )
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": [shortest(factor) for factor in long],
        "short_factor": [shortest(factor) for factor in short],
    }
    if "phi3.rope.scaling.attn_factor" in file.metadata:
        factor = shortest(file.number("phi3.rope.scaling.attn_factor"))
        scaling["attention_factor"] = factor
    return scaling


def rules(config: dict[str, Any]) -> dict[str, Rule]:
    found = make_rules(config, _BLOCK)
    gate_up = (2 * config["intermediate_size"], config["hidden_size"])
    for layer in range(config["num_hidden_layers"]):
        name = f"blk.{layer}.ffn_up.weight"
        found[name] = Rule(found[name].name, gate_up)
    return found
