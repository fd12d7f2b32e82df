"""Linear layers. Several matrices of a checkpoint may be fused into one product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compiledllm.kernels.linear import linear


def empty_parameter(*shape: int) -> nn.Parameter:
    """An uninitialised weight of this shape; the loader fills each weight exactly once."""
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class Linear(nn.Module):
    """y = x W^T + b with W [sum(parts), in_features].

    parts: number of output rows of each fused matrix, by the part name in the family's NAMES; an
    unfused layer has one part named "". product: (x, weight, bias) -> y.
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
