"""Reads the KV cache's format and scales from a checkpoint. Tools give the scales different names.

keys               self_attn.k_scale, self_attn.attn.k_scale, k_proj.k_scale,
                   k_proj.output_scale, qkv_proj.k_scale
values             the same with v instead of k
keys and values    self_attn.kv_scale, self_attn.attn.kv_scale
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from compiledllm.config import ConfigError
from compiledllm.models.checkpoint import files_by_tensor, opened, weight_files
from compiledllm.models.formats.stored import quantization_config

_NAME = re.compile(
    r"(?:(?P<path>.+)\.)?(?P<layer>\d+)\.(?:self_attn|self_attention|attn|attention)\.(?:"
    r"(?:attn\.)?(?P<plain>k|v|kv)_scale"
    r"|(?P<matrix>[kv])_proj\.(?:output_scale|(?P=matrix)_scale)"
    r"|qkv_proj\.(?P<fused>k|v)_scale)"
)


def parse_name(name: str) -> tuple[int, str] | None:
    """Parse the name of a KV scale into (layer, "k", "v" or "kv"); None for other names."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return int(match["layer"]), match["plain"] or match["matrix"] or match["fused"]


def stored_kv_scales(checkpoint: Path, paths: Collection[str] = ()) -> dict[int, Tensor]:
    """Layer -> float32 [2], scales of keys and values; only layers with positive scales of both.

    paths: the names before the numbers of the model's layers, such as "model.layers", as towers and
    layers for multi-token prediction may have scales, too; empty: any name. If a checkpoint has a
    scale for each head, the largest becomes the layer's. Scales of a cache other than FP8 are not
    used. Raises ConfigError for a scale that is empty, infinite or NaN.
    """
    if stored_kv_format(checkpoint) not in ("", "fp8"):
        return {}
    found: dict[int, dict[str, float]] = {}
    for name, path in files_by_tensor(weight_files(checkpoint)).items():
        if (parsed := parse_name(name)) is not None and _is_of_layers(name, paths):
            layer, part = parsed
            with opened(path) as file:
                scale = _largest(path, name, file.get_tensor(name))
            found.setdefault(layer, {}).update(dict.fromkeys(part, scale))
    return {
        layer: torch.tensor([scales["k"], scales["v"]])
        for layer, scales in found.items()
        if set(scales) == {"k", "v"} and all(0 < s < float("inf") for s in scales.values())
    }


def _is_of_layers(name: str, paths: Collection[str]) -> bool:
    match = _NAME.fullmatch(name)
    return match is not None and (not paths or match["path"] in paths)


def _largest(path: Path, name: str, scales: Tensor) -> float:
    if not scales.numel() or not bool(scales.float().isfinite().all()):
        raise ConfigError(
            f"{path}: tensor '{name}' holds {scales.flatten()[:8].tolist()}, expected a KV cache's "
            "scale; download the checkpoint again"
        )
    return float(scales.float().max())


def stored_kv_format(checkpoint: Path) -> str:
    """The format of the KV cache in the quantization_config: "fp8", or "" if there is none.

    A format that the engine does not support is returned as the config names it.
    """
    fields = quantization_config(checkpoint) or {}
    nested = fields.get("quantization")  # where ModelOpt's own file has all fields
    fields = nested if isinstance(nested, dict) else fields
    scheme = fields.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        kind, num_bits = scheme.get("type"), scheme.get("num_bits")
        return "fp8" if (kind, num_bits) == ("float", 8) else f"{kind} of {num_bits} bits"
    if scheme is not None:
        raise ConfigError(
            f"{checkpoint}: kv_cache_scheme={scheme!r:.40} is not supported (expected an object "
            "with type and num_bits); download the checkpoint again"
        )
    algorithm = fields.get("kv_cache_quant_algo")
    named = "" if algorithm is None else str(algorithm)
    return {"fp8": "fp8", "none": ""}.get(named.lower(), named)
