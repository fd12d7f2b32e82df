"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiledllm.models.formats.weight_format import empty_parameter
from compiledllm.models.layers.factory import Factory
from compiledllm.models.spec import MlpSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class Xielu(nn.Module):
    """Piecewise: a parabola for x > 0, an exponential below, whose shapes are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n = empty_parameter(1), empty_parameter(1)
        self.beta, self.eps = empty_parameter(1), empty_parameter(1)

    def forward(self, x: Tensor) -> Tensor:
        above, below = F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)
        curve = torch.where(
            x > 0, above * x * x, (torch.expm1(torch.minimum(x, self.eps)) - x) * below
        )
        return curve + self.beta * x


def make_activation(name: str) -> Callable[[Tensor], Tensor]:
    """name: of an `MlpSpec`."""
    return Xielu() if name == "xielu" else ACTIVATIONS[name]


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)), [tokens, hidden] -> [tokens, hidden]. Gate and up are fused."""

    def __init__(self, hidden_size: int, spec: MlpSpec, make: Factory) -> None:
        super().__init__()
        size = spec.intermediate_size
        self.activation = make_activation(spec.activation)
        self.cut = _deviations_below(spec.sparsity) if spec.sparsity else None
        parts = {"gate": size, "up": size}
        self.gate_up = make.linear("gate_up", hidden_size, parts, spec.bias, make.by_outputs(parts))
        self.down = make.linear("down", size, {"": hidden_size}, spec.bias, make.by_inputs(size))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        if self.cut is not None:
            gate = _above_the_cut(gate, self.cut)
        out: Tensor = self.down(self.activation(gate) * up)
        return out


def _deviations_below(share: float) -> float:
    """How many deviations above the mean the cut lies that is above a share of all values."""
    share_below = torch.tensor(share, dtype=torch.float32, device="cpu")
    return float(torch.special.ndtri(share_below))


def _above_the_cut(gate: Tensor, cut: float) -> Tensor:
    """What is above `cut` deviations over the mean of a token's gates, [tokens, size]."""
    mean, deviation = gate.mean(-1, keepdim=True), gate.std(-1, keepdim=True, unbiased=False)
    return F.relu(gate - (mean + deviation * cut))


class PlainMlp(nn.Module):
    """down(act(up(x))), [tokens, hidden] -> [tokens, hidden]."""

    def __init__(self, hidden_size: int, spec: MlpSpec, make: Factory) -> None:
        super().__init__()
        self.activation = make_activation(spec.activation)
        size = spec.intermediate_size
        self.up = make.linear("up", hidden_size, {"": size}, spec.bias, make.by_outputs({"": size}))
        self.down = make.linear("down", size, {"": hidden_size}, spec.bias, make.by_inputs(size))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.activation(self.up(x)))
        return out
