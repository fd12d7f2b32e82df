"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compiledllm.models.layers.linear import empty_parameter
from compiledllm.models.spec import NormSpec


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, computed in float32."""
    wide = x.float()
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a weight of its own, or what `normalize` is replaced by."""

    normalize: Callable[[Tensor, Tensor, float], Tensor] = staticmethod(rms_norm)

    def __init__(self, size: int, spec: NormSpec) -> None:
        super().__init__()
        self.weight = empty_parameter(size)
        self.eps = spec.eps

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.weight, self.eps)
