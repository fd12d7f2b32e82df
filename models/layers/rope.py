"""Rotary position embeddings, computed once a step for all layers with the same RopeSpec."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compiledllm.models.spec import RopeScaling, RopeSpec


def inverse_frequencies(spec: RopeSpec) -> Tensor:
    """float32 [rotary_dim / 2]."""
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.int64).float() / spec.rotary_dim
    frequencies = 1.0 / (spec.theta**exponents)
    if spec.scaling is None:
        return frequencies
    if spec.scaling.kind == "linear":
        return frequencies / spec.scaling.factor
    assert spec.scaling.kind == "llama3", spec.scaling.kind
    return _llama3_frequencies(frequencies, spec.scaling)


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    rotations = scaling.original_max_position * frequencies / (2 * math.pi)
    keep = ((rotations - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


class RotaryTable(nn.Module):
    """positions -> (cos, sin), each [tokens, 1, rotary_dim] in the model's dtype."""

    def __init__(self, spec: RopeSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("inverse_frequencies", inverse_frequencies(spec), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequencies: Tensor = self.get_buffer("inverse_frequencies").float()
        angles = positions.float()[:, None] * frequencies
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [tokens, heads, head_dim]; dimensions past the tables' width pass through."""
    width = cos.shape[-1]
    rotated, rest = x[..., :width], x[..., width:]
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
