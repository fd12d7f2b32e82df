"""Linear layers, possibly several checkpoint matrices fused into one product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compiledllm.kernels.linear import linear


def empty_parameter(*shape: int) -> nn.Parameter:
    """An unfilled weight; the loader fills each exactly once."""
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class Linear(nn.Module):
    """y = x W^T + b with W [sum(parts), in_features].

    parts: output rows of each fused matrix, by the name the loading rules use; a plain linear layer
    has one part named "". product: (x, weight, bias) -> y.
    """

    product: Callable[..., Tensor] = staticmethod(linear)

    def __init__(self, in_features: int, parts: dict[str, int], bias: bool) -> None:
        super().__init__()
        self.parts = parts
        out_features = sum(parts.values())
        self.weight = empty_parameter(out_features, in_features)
        self.bias = empty_parameter(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)
