"""Converts a GGUF file into a Hugging Face checkpoint directory.

`convert_gguf` undoes llama.cpp's changes by the rules of an architecture's module, and writes
config, tokenizer and safetensors. It refuses a file that cannot be converted exactly and names the
obstacle: no model is better than a wrong one. The module knows neither the file layout nor the
cache.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from compiledllm.config import ConfigError
from compiledllm.models.gguf import gemma3, llama
from compiledllm.models.gguf.file import FloatArray, GgufFile, brief, read_gguf
from compiledllm.models.gguf.rules import Rule
from compiledllm.models.gguf.tokenizer import build_tokenizer, tokenizer_config

# general.architecture in the file -> architecture in the written config.json.
ARCHITECTURES = {"gemma3": "Gemma3ForCausalLM", "llama": "LlamaForCausalLM"}
_MODULES: dict[str, ModuleType] = {"gemma3": gemma3, "llama": llama}
_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def convert_gguf(gguf_path: Path, target_dir: Path) -> None:
    """Write the model of `gguf_path` into `target_dir` as config, safetensors and tokenizer files.

    Files with quantised weights become bfloat16; other files keep their dtype. One tensor is in
    memory at a time. Raises ConfigError for a damaged file and for a file that cannot be converted
    exactly.
    """
    try:
        file = read_gguf(gguf_path)
        architecture = _architecture_of(file)
        config = architecture.config(file)
        rules = architecture.rules(config)
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


def _architecture_of(file: GgufFile) -> ModuleType:
    """The architecture's module, which has KEYS, `config` and `rules`.

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
    """generation_config.json. End-of-answer tokens: eos, end of turn, end of message."""
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


def _check_tensors(file: GgufFile, rules: dict[str, Rule]) -> None:
    """Raise ValueError for a missing, unknown or misshapen tensor."""
    present = file.tensors.keys() - {"rope_freqs.weight"}  # its content goes into the config
    for what, names in (("missing", rules.keys() - present), ("unknown", present - rules.keys())):
        if names:
            raise ValueError(f"{len(names)} {what} tensors: {brief(sorted(names))}")
    for name, rule in rules.items():
        if (shape := file.tensors[name].shape) != rule.shape:
            raise ValueError(f"tensor '{name}' has shape {shape}, the metadata says {rule.shape}")


def _write_weights(file: GgufFile, rules: dict[str, Rule], dtype_name: str, path: Path) -> None:
    """Write a safetensors file tensor by tensor; `save_file` would need all tensors in memory."""
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
            if rule.offset:
                values = values + np.float32(rule.offset)
            out.write(torch.from_numpy(values).to(dtype).view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())


def _uninterleave(rows: FloatArray, num_heads: int) -> FloatArray:
    """Restore the row order of each head; llama.cpp stores the rows as 0 32 1 33 …"""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])  # [heads, head_dim / 2, 2, in]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
