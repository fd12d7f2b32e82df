"""Conversion rules that architectures share, and the common parts of config.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from compiledllm.models.gguf.file import GgufFile

COMMON_KEYS = (
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.layer_norm_rms_epsilon", "attention.value_length", "block_count"),
    *("context_length", "embedding_length", "feed_forward_length", "rope.dimension_count"),
    *("rope.freq_base", "rope.scaling.factor", "rope.scaling.finetuned"),
    *("rope.scaling.original_context_length", "rope.scaling.type", "vocab_size"),
)
YARN_KEYS = ("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow")

# Tensors of a Llama-like block in the file -> names in the checkpoint; both without ".weight".
LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


@dataclass(frozen=True, slots=True)
class Rule:
    """How to convert one tensor. name: the tensor's name in the checkpoint.

    num_heads: number of heads whose rows llama.cpp interleaves; 0: the rows are in order. offset:
    added to the stored values.
    """

    name: str
    shape: tuple[int, ...]
    num_heads: int = 0
    offset: float = 0.0


def common_config(file: GgufFile, prefix: str, is_rotary_partial: bool = False) -> dict[str, Any]:
    """The config.json entries of all architectures, named as in checkpoints on the hub."""
    hidden = file.integer(f"{prefix}.embedding_length")
    heads = file.integer(f"{prefix}.attention.head_count")
    kv_heads = file.integer(f"{prefix}.attention.head_count_kv", heads)
    head_dim = file.integer(f"{prefix}.attention.key_length", hidden // heads)
    sizes = [f"{prefix}.attention.value_length", f"{prefix}.rope.dimension_count"]
    for key in sizes[:1] if is_rotary_partial else sizes:
        if file.integer(key, head_dim) != head_dim:
            raise ValueError(f"{key} must be the head size {head_dim}, got {file.metadata[key]}")
    num_layers = file.integer(f"{prefix}.block_count")
    if num_layers > len(file.tensors):
        raise ValueError(f"{num_layers} layers cannot be in {len(file.tensors)} tensors")
    if head_dim % 2 or heads % kv_heads:
        raise ValueError(f"{heads} heads of {head_dim} with {kv_heads} KV heads are impossible")
    dtype = stored_dtype(file)
    return {
        "vocab_size": file.num_embeddings,
        "hidden_size": hidden,
        "intermediate_size": file.integer(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "attention_bias": False,
        "max_position_embeddings": file.integer(f"{prefix}.context_length"),
        "rms_norm_eps": shortest(file.number(f"{prefix}.attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.token_id("bos"),
        "eos_token_id": file.token_id("eos"),
        "pad_token_id": file.token_id("padding"),
        "dtype": dtype,
        "torch_dtype": dtype,  # name of `dtype` before transformers 5
    }


def silu_config(file: GgufFile, prefix: str, architecture: str) -> dict[str, Any]:
    """The config.json of architectures with SiLU whose RoPE is plain, linear or YaRN."""
    return common_config(file, prefix) | {
        "architectures": [architecture],
        "model_type": prefix,
        "hidden_act": "silu",
        "rope_theta": rope_theta(file, prefix),
        "rope_scaling": rope_scaling(file, prefix),
    }


def sliding_window(file: GgufFile, prefix: str) -> int | None:
    """The config entry for the window; None: every token sees its whole context."""
    key = f"{prefix}.attention.sliding_window"
    return file.integer(key) if file.metadata.get(key) else None


def rope_theta(file: GgufFile, prefix: str) -> float:
    return shortest(file.number(f"{prefix}.rope.freq_base", 10000.0))


def rope_scaling(file: GgufFile, prefix: str) -> dict[str, Any] | None:
    """The config entry for linear or YaRN scaling; None: there is none."""
    scaling = f"{prefix}.rope.scaling"
    kind = file.metadata.get(f"{scaling}.type", "linear")
    has_factor = file.metadata.get(f"{scaling}.factor")  # 0 means no scaling
    factor = shortest(file.number(f"{scaling}.factor")) if has_factor else 1.0
    if kind == "none" or (kind in ("linear", "yarn") and factor == 1.0):
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"RoPE scaling {kind!r} with factor {factor} is not supported")
    found = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = file.integer(f"{scaling}.original_context_length")
        found["original_max_position_embeddings"] = original
        for ours in ("beta_fast", "beta_slow"):
            if f"{scaling}.yarn_{ours}" in file.metadata:
                found[ours] = shortest(file.number(f"{scaling}.yarn_{ours}"))
    return found


def ends_rules(config: dict[str, Any], norm_offset: float = 0.0) -> dict[str, Rule]:
    """The rules of the tensors outside the layers: embedding, final norm and output head."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    rules = {
        "token_embd.weight": Rule("model.embed_tokens.weight", (vocab, hidden)),
        "output_norm.weight": Rule("model.norm.weight", (hidden,), offset=norm_offset),
    }
    if not config["tie_word_embeddings"]:
        rules["output.weight"] = Rule("lm_head.weight", (vocab, hidden))
    return rules


def make_rules(
    config: dict[str, Any],
    block: Mapping[str, str],
    biases: Collection[str] = (),
    interleaved: Mapping[str, int] | None = None,
    norm_offset: float = 0.0,
) -> dict[str, Rule]:
    """Tensor name in the file -> rule, in the order of the written safetensors file.

    block: tensors of a block, as in `LLAMA_BLOCK`. biases: names of the tensors that have a bias.
    interleaved: name of a tensor whose rows llama.cpp interleaves -> number of heads. norm_offset:
    added to the weights of all norms.
    """
    found, shapes = ends_rules(config, norm_offset), shapes_of_block(config)
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in block.items():
            rule = Rule(
                f"model.layers.{layer}.{ours}.weight",
                shapes.get(theirs, (config["hidden_size"],)),
                (interleaved or {}).get(theirs, 0),
                norm_offset if theirs.endswith("norm") else 0.0,
            )
            found[f"blk.{layer}.{theirs}.weight"] = rule
            if theirs in biases:
                name = f"model.layers.{layer}.{ours}.bias"
                found[f"blk.{layer}.{theirs}.bias"] = replace(rule, name=name, shape=rule.shape[:1])
    return found


def shapes_of_block(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a block's tensors, except for norms over the hidden size."""
    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    return {
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_qkv": (q + 2 * kv, hidden),
        "attn_output": (hidden, q),
        "attn_q_norm": (head_dim,),
        "attn_k_norm": (head_dim,),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }


def shortest(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 9.99999975e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def stored_dtype(file: GgufFile) -> str:
    """The dtype of the converted checkpoint, a name in torch."""
    kinds = {tensor.kind for tensor in file.tensors.values()}
    if kinds == {GGMLQuantizationType.F32}:
        return "float32"
    is_half = kinds <= {GGMLQuantizationType.F32, GGMLQuantizationType.F16}
    return "float16" if is_half else "bfloat16"
