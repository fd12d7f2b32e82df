"""Mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compiledllm.kernels.moe import moe_experts, moe_route
from compiledllm.models.layers.linear import Linear, empty_parameter
from compiledllm.models.layers.mlp import GatedMlp, PlainMlp
from compiledllm.models.spec import MlpSpec, MoeSpec, OpaqueSpec


class ExpertLinear(nn.Module):
    """The matrices of all experts, [experts, sum(parts), in_features]; `Linear` explains parts.

    Biases have the shape [experts, sum(parts)].
    """

    def __init__(
        self, num_experts: int, in_features: int, parts: dict[str, int], bias: bool
    ) -> None:
        super().__init__()
        self.parts = parts
        out_features = sum(parts.values())
        self.weight = empty_parameter(num_experts, out_features, in_features)
        self.bias = empty_parameter(num_experts, out_features) if bias else None


class MoeMlp(nn.Module):
    """Sends each token through its router's experts, and through the shared expert if there is one.

    [tokens, hidden] -> the same."""

    def __init__(self, hidden_size: int, spec: MoeSpec) -> None:
        super().__init__()
        self.spec = spec
        size, count = spec.intermediate_size, spec.num_experts
        self.router = Linear(hidden_size, {"": count}, spec.bias)
        self.gate_up = ExpertLinear(count, hidden_size, {"gate": size, "up": size}, spec.bias)
        self.down = ExpertLinear(count, size, {"": hidden_size}, spec.bias)
        self.shared = self.shared_gate = None
        if spec.shared_size:
            self.shared = GatedMlp(hidden_size, MlpSpec(spec.shared_size))
            self.shared_gate = Linear(hidden_size, {"": 1}, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = moe_route(self.router(x), self.spec.top_k, self.spec.renormalize)
        parts = moe_experts(
            x,
            ids,
            self.gate_up.weight,
            self.down.weight,
            self.gate_up.bias,
            self.down.bias,
            self.spec.alpha,
            self.spec.limit,
        )
        out = (parts * weights.unsqueeze(-1)).sum(1).to(x.dtype)
        if self.shared is not None and self.shared_gate is not None:
            out = out + torch.sigmoid(self.shared_gate(x)) * self.shared(x)
        return out


def make_mlp(hidden_size: int, spec: MlpSpec | MoeSpec | OpaqueSpec) -> nn.Module:
    assert not isinstance(spec, OpaqueSpec), spec  # only transformers' modules have one
    if isinstance(spec, MoeSpec):
        return MoeMlp(hidden_size, spec)
    return (GatedMlp if spec.gated else PlainMlp)(hidden_size, spec)
