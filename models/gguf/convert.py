"""Converts a GGUF file into a Hugging Face checkpoint directory.

`convert_gguf` undoes llama.cpp's changes by the rules of an architecture's module, and writes
config, tokenizer and safetensors. Matrices may stay as packed as they are: their blocks become a
tensor of bytes, and config.json names their types (`formats.gguf_config`). A file that cannot be
converted exactly is refused with the obstacle: no model is better than a wrong one. The module
knows neither the file layout nor the cache.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from compiledllm.config import ConfigError
from compiledllm.models.formats.gguf_blocks import KINDS, check_blocks
from compiledllm.models.formats.gguf_config import BLOCKS, METHOD
from compiledllm.models.gguf import gemma3, gemma4, llama, mistral, phi3, qwen2, qwen3
from compiledllm.models.gguf.file import GgufFile, brief, read_gguf
from compiledllm.models.gguf.rules import Rule
from compiledllm.models.gguf.tokenizer import build_tokenizer, tokenizer_config

# general.architecture in the file -> architecture in the written config.json.
ARCHITECTURES = {
    "gemma3": "Gemma3ForCausalLM",
    "gemma4": "Gemma4ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_MODULES: dict[str, ModuleType] = {
    "gemma3": gemma3,
    "gemma4": gemma4,
    "llama": llama,
    "mistral": mistral,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
}
# GGUF's types of numbers that are not quantised -> dtypes in torch.
_FLOATS = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def convert_gguf(gguf_path: Path, target_dir: Path, keep_packed: bool = False) -> None:
    """Write the model of `gguf_path` into `target_dir` as config, safetensors and tokenizer files.

    Files with quantised weights become bfloat16; other files keep their dtype. keep_packed: the
    matrices whose types are in `gguf_blocks.KINDS` stay packed, and tensors that are not quantised
    keep their dtypes. One tensor is in memory at a time. Raises ConfigError for a damaged file and
    for a file that cannot be converted exactly.
    """
    try:
        file = read_gguf(gguf_path)
        architecture = _architecture_of(file)
        config = architecture.config(file)
        rules = architecture.rules(config)
        others = [*getattr(architecture, "ROPE_TENSORS", ())]
        if (unused := getattr(architecture, "unused", None)) is not None:
            others += unused(config)
        _check_tensors(file, rules, others)
        if keep_packed and (quantization := _quantization_config(file, rules)):
            config["quantization_config"] = quantization
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
        _write_weights(file, rules, config["dtype"], keep_packed, target_dir / "model.safetensors")
    except ValueError as error:
        way_out = "" if ";" in str(error) else "; use the model's Hugging Face checkpoint"
        raise ConfigError(f"cannot convert {gguf_path}: {error}{way_out}") from error


def _architecture_of(file: GgufFile) -> ModuleType:
    """The module with the conversion rules of the file's architecture.

    A module has KEYS (known metadata keys), `config` and `rules`. Optional: ROPE_TENSORS, tensors
    that only `config` reads; `unused(config)`, names of tensors that the model does not need.
    Raises ValueError if the file is one part of a split model, or if its metadata has an unknown
    key, which might change the model's computation.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _MODULES:
        known = ", ".join(_MODULES)
        raise ValueError(f"architecture {brief(name)} is not supported; supported: {known}")
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise ValueError(
            "it is one part of a split model; join the parts with 'llama-gguf-split --merge'"
        )
    known_keys = {f"{name}.{key}" for key in _MODULES[name].KEYS}
    for key, value in file.metadata.items():  # e.g. experts or a logit scale; 0 means unused
        if key.startswith(f"{name}.") and key not in known_keys and value:
            raise ValueError(f"metadata key '{key}' = {brief(value)} is not supported")
    return _MODULES[name]


def _generation_config(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json. Its eos ids are the tokens eos, end of turn and end of message."""
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


def _check_tensors(file: GgufFile, rules: dict[str, Rule], others: Iterable[str]) -> None:
    """Raise ValueError for a missing, unknown or misshapen tensor.

    others: names of tensors that the file may have and that no rule converts.
    """
    present = file.tensors.keys() - set(others)
    for what, names in (("missing", rules.keys() - present), ("unknown", present - rules.keys())):
        if names:
            raise ValueError(f"{len(names)} {what} tensors: {brief(sorted(names))}")
    for name, rule in rules.items():
        if (shape := file.tensors[name].shape) != rule.shape:
            raise ValueError(f"tensor '{name}' has shape {shape}, the metadata says {rule.shape}")


def _stays_packed(file: GgufFile, name: str) -> bool:
    tensor = file.tensors[name]
    return len(tensor.shape) == 2 and tensor.kind.name in KINDS


def _quantization_config(file: GgufFile, rules: dict[str, Rule]) -> dict[str, Any] | None:
    """The quantization_config for config.json; None if the file has no quantised tensors."""
    kinds: dict[str, str] = {}
    dequantized: dict[str, dict[str, int]] = {}
    for name, rule in rules.items():
        kind, matrix = file.tensors[name].kind.name, rule.name.removesuffix(".weight")
        if _stays_packed(file, name):
            kinds[matrix] = kind
        elif kind not in _FLOATS:
            count = dequantized.setdefault(kind, {"tensors": 0, "numbers": 0})
            count["tensors"] += 1
            count["numbers"] += math.prod(rule.shape)
    if not kinds and not dequantized:
        return None
    return {"quant_method": METHOD, "kinds": kinds, "dequantized": dequantized}


@dataclass(frozen=True, slots=True)
class _Written:
    """A tensor of the safetensors file. dtype: a name in torch; None for blocks, as uint8."""

    name: str
    rule: Rule
    dtype: str | None
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        itemsize = 1 if self.dtype is None else getattr(torch, self.dtype).itemsize
        return int(math.prod(self.shape) * itemsize)


def _written(file: GgufFile, name: str, rule: Rule, dtype: str, keep_packed: bool) -> _Written:
    """How a tensor is written. dtype: the dtype of dequantised tensors, a name in torch."""
    if not keep_packed:
        return _Written(rule.name, rule, dtype, rule.shape)
    if _stays_packed(file, name):
        row_bytes = file.tensors[name].num_bytes // rule.shape[0]
        matrix = rule.name.removesuffix(".weight")
        return _Written(matrix + BLOCKS, rule, None, (rule.shape[0], row_bytes))
    return _Written(rule.name, rule, _FLOATS.get(file.tensors[name].kind.name, dtype), rule.shape)


def _write_weights(
    file: GgufFile, rules: dict[str, Rule], dtype: str, keep_packed: bool, path: Path
) -> None:
    """Write a safetensors file tensor by tensor; `save_file` would need all tensors in memory."""
    tensors = {name: _written(file, name, rules[name], dtype, keep_packed) for name in rules}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors.values():
        start, end = end, end + tensor.num_bytes
        code = "U8" if tensor.dtype is None else _SAFETENSORS_DTYPES[tensor.dtype]
        place = {"dtype": code, "shape": tensor.shape, "data_offsets": [start, end]}
        header[tensor.name] = place
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        progress = tqdm(tensors.items(), desc="Converting GGUF", unit="tensor", disable=None)
        for name, tensor in progress:
            out.write(_content(file, name, tensor))
        out.flush()
        os.fsync(out.fileno())


def _content(file: GgufFile, name: str, tensor: _Written) -> memoryview:
    """A converted tensor's bytes. Rows of packed tensors are reordered as a whole."""
    rule = tensor.rule
    if tensor.dtype is None:
        blocks = np.array(file.raw(name))
        if rule.num_heads:
            blocks = _uninterleave(blocks, rule.num_heads)
        try:
            check_blocks(torch.from_numpy(blocks), file.tensors[name].kind.name)
        except ValueError as error:
            raise ValueError(f"tensor '{name}': {error}") from error
        return blocks.data
    values = file.load(name)
    if not np.isfinite(values).all():
        raise ValueError(f"tensor '{name}' holds an infinity or NaN; the file is damaged")
    if rule.num_heads:
        values = _uninterleave(values, rule.num_heads)
    if rule.offset:
        values = values + np.float32(rule.offset)
    converted = torch.from_numpy(values).to(getattr(torch, tensor.dtype))
    return converted.view(torch.uint8).numpy().data


def _uninterleave(rows: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Restore the row order of each head; llama.cpp stores the rows as 0 32 1 33 …"""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])  # [heads, head_dim / 2, 2, in]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
