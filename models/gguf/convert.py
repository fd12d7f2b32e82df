"""A GGUF file as an ordinary Hugging Face checkpoint directory.

`convert_gguf` undoes what llama.cpp changed (the row order of q and k, RoPE scaling stored as a
tensor) and writes config, tokenizer and safetensors. What cannot be converted exactly is refused by
name: no model rather than a wrong one. Knows neither how the file is laid out nor the cache.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from tqdm import tqdm

from compiledllm.config import ConfigError
from compiledllm.models.gguf.file import FloatArray, GgufFile, brief, read_gguf
from compiledllm.models.gguf.tokenizer import build_tokenizer, tokenizer_config

# general.architecture -> architecture of the config that is written.
ARCHITECTURES = {"llama": "LlamaForCausalLM"}
_LLAMA_KEYS = frozenset(
    f"llama.{key}"
    for key in (
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
)
_LLAMA3_ROPE = {  # of all Llama 3.1 to 3.3 releases; a GGUF keeps only the divisors they lead to
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def convert_gguf(gguf_path: Path, target_dir: Path) -> None:
    """Write the model of `gguf_path` into `target_dir` as config, safetensors and tokenizer files.

    Quantised weights become bfloat16, others keep their dtype. Memory: one tensor at a time.
    Raises ConfigError for a damaged file and for anything that could not be converted exactly.
    """
    try:
        file = read_gguf(gguf_path)
        _check_kind(file)
        config = _llama_config(file)
        rules = _llama_rules(config)
        _check_tensors(file, rules)
        tokenizer = build_tokenizer(file)
        target_dir.mkdir(parents=True, exist_ok=True)
        _write_json(target_dir / "config.json", config)
        _write_json(target_dir / "generation_config.json", _generation_config(file, config))
        _write_json(
            target_dir / "tokenizer_config.json",
            tokenizer_config(file, config["max_position_embeddings"]),
        )
        tokenizer.save(str(target_dir / "tokenizer.json"))
        if isinstance(template := file.metadata.get("tokenizer.chat_template"), str):
            (target_dir / "chat_template.jinja").write_text(template, encoding="utf-8")
        _write_weights(file, rules, config["dtype"], target_dir / "model.safetensors")
    except ValueError as error:
        raise ConfigError(f"cannot convert {gguf_path}: {error}") from error


def _check_kind(file: GgufFile) -> None:
    """A whole Llama, with nothing in its metadata that changes what it computes unnoticed."""
    if (architecture := file.metadata.get("general.architecture")) != "llama":
        raise ValueError(f"architecture {brief(architecture)} is not supported; supported: llama")
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise ValueError(
            "it is one part of a split model; join the parts with 'llama-gguf-split --merge'"
        )
    for key, value in file.metadata.items():  # such as experts or a logit scale; 0 is none
        if key.startswith("llama.") and key not in _LLAMA_KEYS and value:
            raise ValueError(f"metadata key '{key}' = {brief(value)} is not supported")


# config.json and generation_config.json


def _llama_config(file: GgufFile) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM, in the names that checkpoints on the hub use."""
    hidden = file.integer("llama.embedding_length")
    heads = file.integer("llama.attention.head_count")
    kv_heads = file.integer("llama.attention.head_count_kv", heads)
    head_dim = file.integer("llama.attention.key_length", hidden // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if file.integer(key, head_dim) != head_dim:
            raise ValueError(f"{key} must be the head size {head_dim}, got {file.metadata[key]}")
    num_layers = file.integer("llama.block_count")
    if num_layers > len(file.tensors):
        raise ValueError(f"{num_layers} layers cannot be in {len(file.tensors)} tensors")
    if head_dim % 2 or heads % kv_heads:
        raise ValueError(f"{heads} heads of {head_dim} with {kv_heads} KV heads are impossible")
    theta = _shortest(file.number("llama.rope.freq_base", 10000.0))
    dtype = _stored_dtype(file)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": file.num_embeddings,
        "hidden_size": hidden,
        "intermediate_size": file.integer("llama.feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": file.integer("llama.context_length"),
        "rms_norm_eps": _shortest(file.number("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, head_dim, theta),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.token_id("bos"),
        "eos_token_id": file.token_id("eos"),
        "pad_token_id": file.token_id("padding"),
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before transformers 5
    }


def _shortest(value: float) -> float:
    """The short decimal that a float32 of the metadata stands for: 9.99999975e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GgufFile, head_dim: int, theta: float) -> dict[str, Any] | None:
    """The config entry that means the same as the file's RoPE scaling; ValueError if none does."""
    kind = file.metadata.get("llama.rope.scaling.type", "linear")
    has_factor = file.metadata.get("llama.rope.scaling.factor")  # llama.cpp takes 0 for none
    factor = _shortest(file.number("llama.rope.scaling.factor")) if has_factor else 1.0
    is_scaled = kind != "none" and factor != 1.0
    has_divisors = "rope_freqs.weight" in file.tensors
    if kind not in ("none", "linear") or (is_scaled and has_divisors):
        raise ValueError(f"RoPE scaling {kind!r} with factor {factor} is not supported")
    if not has_divisors:
        return {"rope_type": "linear", "factor": factor} if is_scaled else None
    divisors = file.load("rope_freqs.weight")
    scaling = {"rope_type": "llama3", "factor": _shortest(divisors.max()), **_LLAMA3_ROPE}
    expected = _llama3_divisors(scaling, head_dim, theta)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError("tensor 'rope_freqs.weight' is a RoPE scaling other than Llama 3's")
    return scaling


def _llama3_divisors(scaling: dict[str, Any], head_dim: int, theta: float) -> FloatArray:
    """What Llama 3 divides each RoPE frequency by: 1 for short waves, factor for long ones."""
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / waves
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - smooth) / scaling["factor"] + smooth), dtype=np.float32)


def _stored_dtype(file: GgufFile) -> str:
    kinds = {tensor.kind for tensor in file.tensors.values()}
    if kinds == {GGMLQuantizationType.F32}:
        return "float32"
    is_half = kinds <= {GGMLQuantizationType.F32, GGMLQuantizationType.F16}
    return "float16" if is_half else "bfloat16"


def _generation_config(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json: all tokens that end an answer (eos, end of turn, of message)."""
    ids = dict.fromkeys(file.token_id(role) for role in ("eos", "eot", "eom"))
    eos = [i for i in ids if i is not None]
    return {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config["pad_token_id"],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# The weights


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a tensor is called in the checkpoint, and its shape.

    num_heads: of how many heads the rows are interleaved; 0 if they are not.
    """

    name: str
    shape: tuple[int, ...]
    num_heads: int = 0


def _llama_rules(config: dict[str, Any]) -> dict[str, _Rule]:
    """Tensor name in the file -> its rule, in the order they are written."""
    hidden, ffn, vocab = (config[f"{key}_size"] for key in ("hidden", "intermediate", "vocab"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q, kv = heads * config["head_dim"], kv_heads * config["head_dim"]
    rules = {
        "token_embd.weight": _Rule("model.embed_tokens.weight", (vocab, hidden)),
        "output_norm.weight": _Rule("model.norm.weight", (hidden,)),
    }
    if not config["tie_word_embeddings"]:
        rules["output.weight"] = _Rule("lm_head.weight", (vocab, hidden))
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
            rules[f"blk.{layer}.{theirs}.weight"] = _Rule(name, shape, num_heads)
    return rules


def _check_tensors(file: GgufFile, rules: dict[str, _Rule]) -> None:
    """ValueError for a tensor that is missing, unknown or misshapen."""
    present = file.tensors.keys() - {"rope_freqs.weight"}  # that one went into the config
    for what, names in (("missing", rules.keys() - present), ("unknown", present - rules.keys())):
        if names:
            raise ValueError(f"{len(names)} {what} tensors: {brief(sorted(names))}")
    for name, rule in rules.items():
        if (shape := file.tensors[name].shape) != rule.shape:
            raise ValueError(f"tensor '{name}' has shape {shape}, the metadata says {rule.shape}")


def _write_weights(file: GgufFile, rules: dict[str, _Rule], dtype_name: str, path: Path) -> None:
    """A safetensors file, tensor by tensor (safetensors' own save_file wants all in memory)."""
    dtype: torch.dtype = getattr(torch, dtype_name)
    code = _SAFETENSORS_DTYPES[dtype_name]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for rule in rules.values():
        start, end = end, end + math.prod(rule.shape) * dtype.itemsize
        header[rule.name] = {"dtype": code, "shape": rule.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, rule in tqdm(rules.items(), desc="Converting GGUF", unit="tensor", disable=None):
            values = file.load(name)
            if rule.num_heads:
                values = _uninterleave(values, rule.num_heads)
            out.write(torch.from_numpy(values).to(dtype).view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())


def _uninterleave(rows: FloatArray, num_heads: int) -> FloatArray:
    """Put the rows of each head, which llama.cpp stores as 0 32 1 33 …, in order again."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])  # [heads, head_dim / 2, 2, in]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
