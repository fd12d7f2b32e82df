"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compiledllm.models.layers.linear import empty_parameter
from compiledllm.models.spec import NormSpec


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, size: int, spec: NormSpec) -> None:
        super().__init__()
        self.weight = empty_parameter(size)
        self.eps = spec.eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        variance = wide.pow(2).mean(-1, keepdim=True)
        return self.weight * (wide * torch.rsqrt(variance + self.eps)).to(x.dtype)
