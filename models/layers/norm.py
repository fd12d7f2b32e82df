"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiledllm.kernels.collectives import all_reduce, fuses_norm, sum_and_norm
from compiledllm.models.formats.weight_format import empty_parameter
from compiledllm.models.spec import NormSpec


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x), in float32 and rounded to x's dtype, times weight."""
    return weight * _over_rms(x, eps).to(x.dtype)


def _over_rms(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


Normalize = Callable[[Tensor, Tensor, float], Tensor]


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension with a learned weight. normalize: computes the norm."""

    adds_one = False  # whether the weight is stored minus one

    def __init__(self, shape: tuple[int, ...], eps: float, normalize: Normalize = rms_norm) -> None:
        super().__init__()
        self.weight = empty_parameter(*shape)
        self.eps = eps
        self.normalize = normalize
        self.is_fused = fuses_norm(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.weight, self.eps)

    def after_sum(self, x: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """x plus the sum of `part` over all ranks, and its norm. All are [tokens, hidden]."""
        if self.is_fused:
            return sum_and_norm(part, x, self.weight, self.eps, self.adds_one)
        x = x + all_reduce(part)
        return x, self(x)


class DividedRMSNorm(RMSNorm):
    """RMSNorm over a dimension that is divided among ranks, each with its part of the weight.

    If several ranks hold the same part (replicas), the part counts several times, both in the sum
    of squares and in the size, so the mean is right.
    """

    def __init__(self, shape: tuple[int, ...], eps: float, num_ranks: int) -> None:
        super().__init__(shape, eps)
        self.size = num_ranks * shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        total = all_reduce(wide.pow(2).sum(-1, keepdim=True))
        return self.weight * (wide * torch.rsqrt(total / self.size + self.eps)).to(x.dtype)


class PlusOneRMSNorm(RMSNorm):
    """x / rms(x) * (1 + weight) in float32, rounded once at the end (Gemma)."""

    adds_one = True

    def forward(self, x: Tensor) -> Tensor:
        return (_over_rms(x, self.eps) * (1 + self.weight.float())).to(x.dtype)


class UnscaledRMSNorm(nn.Module):
    """x / rms(x) over the last dimension, in float32 and rounded to x's dtype."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _over_rms(x, self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / deviation * weight + bias over the last dimension, computed in float32."""

    def __init__(self, shape: tuple[int, ...], eps: float, has_bias: bool) -> None:
        super().__init__()
        self.weight = empty_parameter(*shape)
        self.bias = empty_parameter(*shape) if has_bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps) * self.weight.float()
        return (wide if self.bias is None else wide + self.bias.float()).to(x.dtype)


def make_norm(spec: NormSpec, shape: tuple[int, ...], normalize: Normalize) -> nn.Module:
    """The module of a NormSpec. shape: the shape of its weight. normalize: computes an RMSNorm."""
    if spec.kind == "none":
        return nn.Identity()
    if spec.kind == "rms_unscaled":
        return UnscaledRMSNorm(spec.eps)
    if spec.kind == "layer":
        return LayerNorm(shape, spec.eps, spec.bias)
    assert not spec.bias, spec
    if spec.kind == "rms_plus_one":
        return PlusOneRMSNorm(shape, spec.eps)
    assert spec.kind == "rms", spec
    return RMSNorm(shape, spec.eps, normalize)
