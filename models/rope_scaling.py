"""Scaled rotary frequencies, bit for bit as transformers' functions of the same names compute them.

Importing transformers for these functions would add seconds to a start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotary embedding before scaling.

    base: `rope_theta`. size: number of rotated dimensions of a head. max_position: length of the
    context. parameters: the config's RoPE parameters of one layer type.
    """

    base: float
    size: int
    max_position: int
    parameters: dict[str, Any]

    @property
    def original_length(self) -> int:
        length: int = self.parameters["original_max_position_embeddings"]
        return length

    def powers(self) -> Tensor:
        """base ** (2 i / size), float32 [size / 2]: the reciprocals of the unscaled frequencies."""
        exponents = torch.arange(0, self.size, 2, dtype=torch.int64).float() / self.size
        powers: Tensor = self.base**exponents
        return powers


@dataclass(frozen=True, slots=True)
class Scaled:
    """frequencies: float32 [size / 2], transformers' `inv_freq`. scale: of cosines and sines."""

    frequencies: Tensor
    scale: float = 1.0


def linear(rotation: Rotation) -> Scaled:
    """Divides all frequencies by a factor, which is as if all positions were divided."""
    return Scaled(1.0 / rotation.powers() / rotation.parameters["factor"])


def llama3(rotation: Rotation) -> Scaled:
    """Stretches long wavelengths by a factor, short ones not, and those between in part."""
    rope, length = rotation.parameters, rotation.original_length
    factor, low, high = (rope[n] for n in ("factor", "low_freq_factor", "high_freq_factor"))
    frequencies = 1.0 / rotation.powers()
    waves = 2 * math.pi / frequencies
    stretched = torch.where(waves > length / low, frequencies / factor, frequencies)
    share = (length / waves - low) / (high - low)
    between = (1 - share) * stretched / factor + share * stretched
    is_between = ~(waves < length / high) & ~(waves > length / low)
    return Scaled(torch.where(is_between, between, stretched))


def yarn(rotation: Rotation) -> Scaled:
    """Stretches as `llama3` does, by a ramp over the dimensions, and scales cosines and sines."""
    rope, size = rotation.parameters, rotation.size
    factor = rope["factor"]
    if factor is None:
        factor = rotation.max_position / rotation.original_length
    low = _dimension(rope.get("beta_fast") or 32, rotation)
    high = _dimension(rope.get("beta_slow") or 1, rotation)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # avoids a division by zero
    powers = rotation.powers()
    ramp = torch.clamp((torch.arange(len(powers), dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    frequencies = 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept
    return Scaled(frequencies, _yarn_scale(rope, factor))


def _dimension(turns: float, rotation: Rotation) -> float:
    """The dimension whose angle makes `turns` full turns within the original length."""
    length = rotation.original_length / (turns * 2 * math.pi)
    return (rotation.size * math.log(length)) / (2 * math.log(rotation.base))


def _yarn_scale(rope: dict[str, Any], factor: float) -> float:
    given = rope.get("attention_factor")
    if given is not None:
        return float(given)
    one, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
    if one and all_dims:
        return float(_mscale(factor, one) / _mscale(factor, all_dims))
    return float(_mscale(factor))


def _mscale(factor: float, weight: float = 1) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def longrope(rotation: Rotation) -> Scaled:
    """Divides each frequency by its own factor: by the long factors for long contexts.

    A context is long if it exceeds the original length.
    """
    rope, original = rotation.parameters, rotation.original_length
    name = "long_factor" if rotation.max_position > original else "short_factor"
    factors = torch.tensor(rope[name], dtype=torch.float32)
    return Scaled(1.0 / (factors * rotation.powers()), _longrope_scale(rotation))


def _longrope_scale(rotation: Rotation) -> float:
    rope, original = rotation.parameters, rotation.original_length
    given, factor = rope.get("attention_factor"), rope.get("factor")
    if given is not None:
        return float(given)
    if factor is None:
        factor = rotation.max_position / original
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
