"""Reads the scales of an FP8 KV cache from a checkpoint, under the names that tools give them.

self_attn.k_scale, self_attn.attn.k_scale, k_proj.k_scale, k_proj.output_scale     keys
the same with v                                                                    values
self_attn.kv_scale                                                                 both
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiledllm.models.checkpoint import files_by_tensor, opened, weight_files

_NAME = re.compile(
    r"(?:.+\.)?(?P<layer>\d+)\.(?:self_attn|self_attention|attn|attention)\.(?:"
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


def stored_kv_scales(checkpoint: Path) -> dict[int, Tensor]:
    """Layer -> float32 [2], scales of keys and values; only layers with positive scales of both.

    If a checkpoint has a scale for each head, the largest becomes the layer's. Scales of a cache
    other than FP8 are not used.
    """
    if not _is_for_fp8(checkpoint):
        return {}
    found: dict[int, dict[str, float]] = {}
    for name, path in files_by_tensor(weight_files(checkpoint)).items():
        if (parsed := parse_name(name)) is not None:
            layer, part = parsed
            with opened(path) as file:
                scale = float(file.get_tensor(name).float().max())
            found.setdefault(layer, {}).update(dict.fromkeys(part, scale))
    return {
        layer: torch.tensor([scales["k"], scales["v"]])
        for layer, scales in found.items()
        if set(scales) == {"k", "v"} and all(0 < s < float("inf") for s in scales.values())
    }


def _is_for_fp8(checkpoint: Path) -> bool:
    """Whether the quantization_config names FP8 as the KV cache's format, or names none."""
    fields = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    quantization: Any = fields.get("quantization_config") or {}
    scheme = quantization.get("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        return scheme.get("type") == "float" and scheme.get("num_bits") == 8
    return quantization.get("kv_cache_quant_algo") in (None, "FP8")
