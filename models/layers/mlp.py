"""Feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from compiledllm.models.layers.linear import Linear
from compiledllm.models.spec import MlpSpec


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, hidden_size: int, spec: MlpSpec) -> None:
        super().__init__()
        size = spec.intermediate_size
        self.gate_up = Linear(hidden_size, {"gate": size, "up": size}, spec.bias)
        self.down = Linear(size, {"": hidden_size}, spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out
