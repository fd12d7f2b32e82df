"""Conversion rules that all architectures share, and the common part of config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from compiledllm.models.gguf.file import GgufFile


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


def common_config(file: GgufFile, prefix: str) -> dict[str, Any]:
    """The config.json entries of all architectures, named as in checkpoints on the hub."""
    hidden = file.integer(f"{prefix}.embedding_length")
    heads = file.integer(f"{prefix}.attention.head_count")
    kv_heads = file.integer(f"{prefix}.attention.head_count_kv", heads)
    head_dim = file.integer(f"{prefix}.attention.key_length", hidden // heads)
    for key in (f"{prefix}.attention.value_length", f"{prefix}.rope.dimension_count"):
        if file.integer(key, head_dim) != head_dim:
            raise ValueError(f"{key} must be the head size {head_dim}, got {file.metadata[key]}")
    num_layers = file.integer(f"{prefix}.block_count")
    if num_layers > len(file.tensors):
        raise ValueError(f"{num_layers} layers cannot be in {len(file.tensors)} tensors")
    if head_dim % 2 or heads % kv_heads:
        raise ValueError(f"{heads} heads of {head_dim} with {kv_heads} KV heads are impossible")
    dtype = _stored_dtype(file)
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


def shortest(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 9.99999975e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _stored_dtype(file: GgufFile) -> str:
    kinds = {tensor.kind for tensor in file.tensors.values()}
    if kinds == {GGMLQuantizationType.F32}:
        return "float32"
    is_half = kinds <= {GGMLQuantizationType.F32, GGMLQuantizationType.F16}
    return "float16" if is_half else "bfloat16"
