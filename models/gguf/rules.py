"""What the architectures of GGUF files share: a config's common part, and rules for tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from compiledllm.models.gguf.file import GgufFile


@dataclass(frozen=True, slots=True)
class Rule:
    """What a tensor is called in the checkpoint, and its shape.

    num_heads: of how many heads the rows are interleaved; 0 if they are not. offset: what is added
    to the stored values.
    """

    name: str
    shape: tuple[int, ...]
    num_heads: int = 0
    offset: float = 0.0


def common_config(file: GgufFile, prefix: str) -> dict[str, Any]:
    """What every config.json has, by the names that checkpoints on the hub use."""
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
        "torch_dtype": dtype,  # its name before transformers 5
    }


def ends_rules(config: dict[str, Any], norm_offset: float = 0.0) -> dict[str, Rule]:
    """Of the tensors outside the layers."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    rules = {
        "token_embd.weight": Rule("model.embed_tokens.weight", (vocab, hidden)),
        "output_norm.weight": Rule("model.norm.weight", (hidden,), offset=norm_offset),
    }
    if not config["tie_word_embeddings"]:
        rules["output.weight"] = Rule("lm_head.weight", (vocab, hidden))
    return rules


def shortest(value: float) -> float:
    """The short decimal that a float32 of the metadata stands for: 9.99999975e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _stored_dtype(file: GgufFile) -> str:
    kinds = {tensor.kind for tensor in file.tensors.values()}
    if kinds == {GGMLQuantizationType.F32}:
        return "float32"
    is_half = kinds <= {GGMLQuantizationType.F32, GGMLQuantizationType.F16}
    return "float16" if is_half else "bfloat16"
