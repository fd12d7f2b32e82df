"""Mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compiledllm.kernels.moe import moe_route
from compiledllm.models.formats.weight_format import empty_parameter
from compiledllm.models.layers.factory import Factory
from compiledllm.models.layers.linear import Linear, SharedExpert
from compiledllm.models.layers.mlp import GatedMlp, PlainMlp
from compiledllm.models.spec import MlpSpec, MoeSpec, OpaqueSpec

_EPS = 1e-6  # added to sums of sigmoid scores


class MoeMlp(nn.Module):
    """Sends each token through its `top_k` experts, and through the shared expert if there is one.

    [tokens, hidden] -> [tokens, hidden]. A shared expert of the others' size and format is one more
    expert, which every token uses.
    """

    def __init__(self, hidden_size: int, spec: MoeSpec, make: Factory) -> None:
        super().__init__()
        self.spec = spec
        size, count = spec.intermediate_size, spec.num_experts
        gate_up = {"gate": size, "up": size}
        self.router = make.linear("router", hidden_size, {"": count}, spec.bias)
        self.joins_experts = _can_join_experts(spec, make)
        inner = hidden_size, gate_up, spec.bias, int(self.joins_experts)
        self.gate_up = make.experts("gate_up", count, *inner)
        outer = size, {"": hidden_size}, spec.bias, int(self.joins_experts)
        self.down = make.experts("down", count, *outer)
        has_bias = spec.has_score_bias
        self.score_bias = empty_parameter(count, dtype=torch.float32) if has_bias else None
        self.shared: nn.Module | None = None
        self.shared_gate: Linear | None = None
        if self.joins_experts:
            self.shared = SharedExpert(gate_up=self.gate_up, down=self.down)
        elif spec.shared_size:
            self.shared = GatedMlp(hidden_size, MlpSpec(spec.shared_size), make.within("shared"))
        if spec.shared_size:
            self.shared_gate = make.linear("shared_gate", hidden_size, {"": 1})

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self._route(self.router(x))
        share = None if self.shared_gate is None else torch.sigmoid(self.shared_gate(x))
        if share is not None and self.joins_experts:
            ids = torch.cat((ids, torch.full_like(ids[:, :1], self.spec.num_experts)), dim=1)
            weights = torch.cat((weights, share.float()), dim=1)
        gate_up, down = self.gate_up, self.down
        biases = gate_up.bias, down.bias
        params = gate_up.params, down.params, down.format
        parts = gate_up.format.experts(x, ids, *params, biases, self.spec.alpha, self.spec.limit)
        out = (parts * weights.unsqueeze(-1)).sum(1).to(x.dtype)
        if share is not None and self.shared is not None and not self.joins_experts:
            out = out + share * self.shared(x)
        return out

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and float32 weights of each token's experts, [tokens, top_k]."""
        spec = self.spec
        if spec.scores == "softmax":
            return moe_route(logits, spec.top_k, spec.renormalize)
        scores = torch.sigmoid(logits.float())
        ranked = scores if self.score_bias is None else scores + self.score_bias
        ids = ranked.topk(spec.top_k, dim=-1).indices
        weights = scores.gather(-1, ids)
        if spec.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + _EPS)
        return ids.int(), weights * spec.scale


def _can_join_experts(spec: MoeSpec, make: Factory) -> bool:
    """Whether the shared expert can be computed together with the others."""
    are_alike = make.are_alike("gate_up", "shared.gate_up") and make.are_alike(
        "down", "shared.down"
    )
    return spec.shared_size == spec.intermediate_size and not spec.bias and are_alike


def make_mlp(hidden_size: int, spec: MlpSpec | MoeSpec | OpaqueSpec, make: Factory) -> nn.Module:
    assert not isinstance(spec, OpaqueSpec), spec  # only transformers' modules have one
    if isinstance(spec, MoeSpec):
        return MoeMlp(hidden_size, spec, make)
    return (GatedMlp if spec.gated else PlainMlp)(hidden_size, spec, make)
