"""Conversion rules for the text model of Gemma 4.

Sizes may differ between layers with sliding windows and layers with full attention, which the file
says by lists or by keys that end in "_swa". Partial rotation is a tensor of factors: 1 for pairs of
dimensions that are rotated, and a huge number for the others. All experts of a layer are in one
tensor, which is dequantised.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compiledllm.models.gguf import gemma3
from compiledllm.models.gguf.file import GgufFile, brief
from compiledllm.models.gguf.rules import (
    COMMON_KEYS,
    Rule,
    ends_rules,
    shapes_of_block,
    shortest,
    stored_dtype,
)

KEYS = (
    *COMMON_KEYS,
    *("attention.key_length_swa", "attention.value_length_swa", "attention.shared_kv_layers"),
    *("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"),
    *("rope.dimension_count_swa", "embedding_length_per_layer_input", "final_logit_softcapping"),
    *("expert_count", "expert_used_count", "expert_feed_forward_length"),
)
_ROPE = "rope_freqs.weight"
ROPE_TENSORS = (_ROPE,)
_NOT_ROTATED = 1e20
_TOKEN_INPUT = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
_OF_KV = ("attn_k", "attn_v", "attn_k_norm")


def config(file: GgufFile) -> dict[str, Any]:
    """The config.json of a Gemma4ForCausalLM."""

    def whole(key: str, default: int | None = None) -> int:
        return file.integer(f"gemma4.{key}", default)

    num_layers, head_dim = whole("block_count"), whole("attention.key_length")
    sliding = _list(file, "attention.sliding_window_pattern", num_layers)
    kv_heads = _list(file, "attention.head_count_kv", num_layers)
    ffn, num_shared = _list(file, "feed_forward_length", num_layers), _shared(file)
    full = sliding.index(False) if False in sliding else 0
    windowed = sliding.index(True) if True in sliding else full
    has_values = f"blk.{full}.attn_v.weight" in file.tensors
    soft_cap = file.metadata.get("gemma4.final_logit_softcapping")
    dtype = stored_dtype(file)
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "vocab_size": file.num_embeddings,
        "vocab_size_per_layer_input": file.num_embeddings,
        "hidden_size": whole("embedding_length"),
        "hidden_size_per_layer_input": _optional(file, "embedding_length_per_layer_input"),
        "intermediate_size": ffn[0],
        "use_double_wide_mlp": bool(num_shared) and ffn[-1] == 2 * ffn[0],
        "num_hidden_layers": num_layers,
        "num_kv_shared_layers": num_shared,
        "num_attention_heads": whole("attention.head_count"),
        "num_key_value_heads": kv_heads[windowed],
        "num_global_key_value_heads": None if has_values else kv_heads[full],
        "attention_k_eq_v": not has_values,
        "head_dim": whole("attention.key_length_swa", head_dim),
        "global_head_dim": head_dim,
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": None if soft_cap is None else shortest(soft_cap),
        "sliding_window": whole("attention.sliding_window"),
        "layer_types": [("full_attention", "sliding_attention")[bool(kind)] for kind in sliding],
        "rope_parameters": _rope_parameters(file, head_dim),
        "max_position_embeddings": whole("context_length"),
        "rms_norm_eps": shortest(file.number("gemma4.attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "enable_moe_block": bool(_optional(file, "expert_count")),
        "num_experts": _optional(file, "expert_count") or None,
        "top_k_experts": _optional(file, "expert_used_count") or None,
        "moe_intermediate_size": _optional(file, "expert_feed_forward_length") or None,
        "bos_token_id": file.token_id("bos"),
        "eos_token_id": file.token_id("eos"),
        "pad_token_id": file.token_id("padding"),
        "dtype": dtype,
        "torch_dtype": dtype,  # name of `dtype` before transformers 5
    }


def _optional(file: GgufFile, key: str) -> int:
    """A number that may be missing or 0."""
    return file.integer(f"gemma4.{key}") if file.metadata.get(f"gemma4.{key}") else 0


def _shared(file: GgufFile) -> int:
    return _optional(file, "attention.shared_kv_layers")


def _list(file: GgufFile, key: str, count: int) -> list[Any]:
    """A list with one value for each layer. The file may have a single value for all layers."""
    value = file.metadata.get(f"gemma4.{key}")
    found = value if isinstance(value, list) else [value] * count
    if len(found) != count or not all(isinstance(item, int) for item in found):
        raise ValueError(f"metadata key 'gemma4.{key}' must have {count} values: {brief(value)}")
    return found


def _rope_parameters(file: GgufFile, head_dim: int) -> dict[str, dict[str, Any]]:
    full: dict[str, Any] = {
        "rope_type": "proportional",
        "rope_theta": shortest(file.number("gemma4.rope.freq_base", 1e6)),
        "partial_rotary_factor": _share_rotated(file, head_dim),
    }
    sliding = shortest(file.number("gemma4.rope.freq_base_swa", 10000.0))
    return {
        "full_attention": full,
        "sliding_attention": {"rope_type": "default", "rope_theta": sliding},
    }


def _share_rotated(file: GgufFile, head_dim: int) -> float:
    if _ROPE not in file.tensors:
        return 1.0
    factors = file.load(_ROPE)
    rotated = factors == 1
    count = int(rotated.sum())
    if len(factors) != head_dim // 2 or not np.all(rotated | (factors > _NOT_ROTATED)):
        raise ValueError(
            f"tensor '{_ROPE}' must have {head_dim // 2} values of 1 or above {_NOT_ROTATED:g}"
        )
    if not rotated[:count].all():
        raise ValueError(f"tensor '{_ROPE}' rotates {count} pairs that are not the first ones")
    return 2 * count / head_dim


def rules(config: dict[str, Any]) -> dict[str, Rule]:
    found, hidden = ends_rules(config), config["hidden_size"]
    size, num_layers = config["hidden_size_per_layer_input"], config["num_hidden_layers"]
    if size:
        model, width = "model.per_layer", size * num_layers
        table = Rule("model.embed_tokens_per_layer.weight", (config["vocab_size"], width))
        found |= {
            "per_layer_token_embd.weight": table,
            "per_layer_model_proj.weight": Rule(
                f"{model}_model_projection.weight", (width, hidden)
            ),
            "per_layer_proj_norm.weight": Rule(f"{model}_projection_norm.weight", (size,)),
        }
    for index in range(num_layers):
        shapes = _shapes(config, index)
        block = dict(gemma3.BLOCK) | (_TOKEN_INPUT if size else {})
        for theirs in _absent(config, index):
            del block[theirs]
        for theirs, ours in block.items():
            rule = Rule(f"model.layers.{index}.{ours}.weight", shapes.get(theirs, (hidden,)))
            found[f"blk.{index}.{theirs}.weight"] = rule
        scalar = Rule(f"model.layers.{index}.layer_scalar", (1,))
        found[f"blk.{index}.layer_output_scale.weight"] = scalar
        if config["enable_moe_block"]:
            found |= _rules_of_experts(config, index)
    return found


def unused(config: dict[str, Any]) -> list[str]:
    """Tensors that a file may have and the model does not need: KV of layers that share KV."""
    layers = range(config["num_hidden_layers"])
    shared = (index for index in layers if _absent(config, index) == _OF_KV)
    return [f"blk.{index}.{name}.weight" for index in shared for name in _OF_KV]


def _absent(config: dict[str, Any], index: int) -> tuple[str, ...]:
    """Tensors of keys and values that a layer lacks."""
    if index >= config["num_hidden_layers"] - config["num_kv_shared_layers"]:
        return _OF_KV
    is_full = config["layer_types"][index] == "full_attention"
    return ("attn_v",) if is_full and config["attention_k_eq_v"] else ()


def _shapes(config: dict[str, Any], index: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors, except for norms over the hidden size."""
    hidden, size = config["hidden_size"], config["hidden_size_per_layer_input"]
    is_full = config["layer_types"][index] == "full_attention"
    head_dim = config["global_head_dim" if is_full else "head_dim"]
    own_heads = config["num_global_key_value_heads"] if is_full else None
    is_shared = index >= config["num_hidden_layers"] - config["num_kv_shared_layers"]
    factor = 2 if is_shared and config["use_double_wide_mlp"] else 1
    of_layer = {
        "head_dim": head_dim,
        "num_key_value_heads": own_heads or config["num_key_value_heads"],
        "intermediate_size": config["intermediate_size"] * factor,
    }
    token_inputs = {"inp_gate": (size, hidden), "proj": (hidden, size)}
    return shapes_of_block(config | of_layer) | token_inputs


def _rules_of_experts(config: dict[str, Any], index: int) -> dict[str, Rule]:
    hidden, size = config["hidden_size"], config["moe_intermediate_size"]
    count, layer, block = config["num_experts"], f"model.layers.{index}", f"blk.{index}"
    return {
        f"{block}.ffn_gate_inp.weight": Rule(f"{layer}.router.proj.weight", (count, hidden)),
        f"{block}.ffn_gate_inp.scale": Rule(f"{layer}.router.scale", (hidden,)),
        f"{block}.ffn_down_exps.scale": Rule(f"{layer}.router.per_expert_scale", (count,)),
        f"{block}.ffn_gate_up_exps.weight": Rule(
            f"{layer}.experts.gate_up_proj", (count, 2 * size, hidden)
        ),
        f"{block}.ffn_down_exps.weight": Rule(f"{layer}.experts.down_proj", (count, hidden, size)),
        f"{block}.post_ffw_norm_1.weight": Rule(
            f"{layer}.post_feedforward_layernorm_1.weight", (hidden,)
        ),
        f"{block}.pre_ffw_norm_2.weight": Rule(
            f"{layer}.pre_feedforward_layernorm_2.weight", (hidden,)
        ),
        f"{block}.post_ffw_norm_2.weight": Rule(
            f"{layer}.post_feedforward_layernorm_2.weight", (hidden,)
        ),
    }
