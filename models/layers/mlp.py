"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from compiledllm.models.layers.factory import Factory
from compiledllm.models.spec import MlpSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)), [tokens, hidden] -> [tokens, hidden]. Gate and up are fused."""

    def __init__(self, hidden_size: int, spec: MlpSpec, make: Factory) -> None:
        super().__init__()
        size = spec.intermediate_size
        self.activation = ACTIVATIONS[spec.activation]
        self.gate_up = make.linear("gate_up", hidden_size, {"gate": size, "up": size}, spec.bias)
        self.down = make.linear("down", size, {"": hidden_size}, spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(self.activation(gate) * up)
        return out


class PlainMlp(nn.Module):
    """down(act(up(x))), [tokens, hidden] -> [tokens, hidden]."""

    def __init__(self, hidden_size: int, spec: MlpSpec, make: Factory) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        size = spec.intermediate_size
        self.up = make.linear("up", hidden_size, {"": size}, spec.bias)
        self.down = make.linear("down", size, {"": hidden_size}, spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.activation(self.up(x)))
        return out
