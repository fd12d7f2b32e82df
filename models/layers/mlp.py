"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiledllm.kernels.collectives import all_reduce
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
    """The xIELU activation: a parabola for x > 0 and an exponential below, with learned shapes."""

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
    """The activation function that `MlpSpec.activation` names."""
    return Xielu() if name == "xielu" else ACTIVATIONS[name]


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)), [tokens, hidden] -> [tokens, hidden]. Gate and up are fused."""

    def __init__(self, hidden_size: int, spec: MlpSpec, make: Factory) -> None:
        super().__init__()
        size = spec.intermediate_size
        self.activation = make_activation(spec.activation)
        self.sparse = None
        if spec.sparsity:
            self.sparse = SparseGates(spec.sparsity, size, make.ranks.count)
        parts = {"gate": size, "up": size}
        self.gate_up = make.linear("gate_up", hidden_size, parts, spec.bias, make.by_outputs(parts))
        self.down = make.linear("down", size, {"": hidden_size}, spec.bias, make.by_inputs(size))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        if self.sparse is not None:
            gate = self.sparse(gate)
        out: Tensor = self.down(self.activation(gate) * up)
        return out


class SparseGates(nn.Module):
    """relu(gate - cut), which is zero for about a `share` of a token's gates (Gemma 3n).

    The cut is the `share` quantile of a normal distribution with the mean and the deviation of the
    token's gates. [tokens, size] -> [tokens, size]. Ranks hold equal parts of the gates.
    """

    def __init__(self, share: float, size: int, num_ranks: int) -> None:
        super().__init__()
        share_below = torch.tensor(share, dtype=torch.float32, device="cpu")
        self.cut = float(torch.special.ndtri(share_below))  # in standard deviations above the mean
        self.size, self.has_ranks = size * num_ranks, num_ranks > 1

    def forward(self, gate: Tensor) -> Tensor:
        if self.has_ranks:
            mean = self._mean_over_ranks(gate)
            deviation = self._mean_over_ranks((gate - mean).square()).sqrt()
        else:
            mean = gate.mean(-1, keepdim=True)
            deviation = gate.std(-1, keepdim=True, unbiased=False)
        return F.relu(gate - (mean + deviation * self.cut))

    def _mean_over_ranks(self, part: Tensor) -> Tensor:
        return all_reduce(part.sum(-1, keepdim=True)) / self.size


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
