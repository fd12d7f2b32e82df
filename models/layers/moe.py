"""Mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compiledllm.kernels.collectives import all_reduce
from compiledllm.kernels.moe import moe_route
from compiledllm.models.formats.weight_format import empty_parameter
from compiledllm.models.layers.factory import Factory
from compiledllm.models.layers.linear import Linear, SharedExpert
from compiledllm.models.layers.mlp import GatedMlp, PlainMlp
from compiledllm.models.spec import MlpSpec, MoeSpec, NormSpec, OpaqueSpec


class MoeMlp(nn.Module):
    """Sends each token through its `top_k` experts, and through the shared expert if there is one.

    [tokens, hidden] -> [tokens, hidden]. If the shared expert has the size and the formats of the
    other experts, it is computed as one more expert, which every token uses (`joins_experts`).
    """

    def __init__(self, hidden_size: int, spec: MoeSpec, make: Factory) -> None:
        super().__init__()
        self.spec = spec
        size, count = spec.intermediate_size, spec.num_experts
        gate_up = {"gate": size, "up": size}
        self.router = make.linear("router", hidden_size, {"": count}, spec.bias)
        if spec.router.in_float32:
            self.router.float()
        self.joins_experts = _can_join_experts(spec, make)
        inner = hidden_size, gate_up, spec.bias, int(self.joins_experts)
        self.gate_up = make.experts("gate_up", count, *inner, make.by_outputs(gate_up))
        outer = size, {"": hidden_size}, spec.bias, int(self.joins_experts)
        self.down = make.experts("down", count, *outer, make.by_inputs(size))
        has_bias = spec.router.has_bias
        self.score_bias = empty_parameter(count, dtype=torch.float32) if has_bias else None
        has_scales = spec.router.has_expert_scales
        assert not (has_scales and self.joins_experts), "the shared expert would have no scale"
        self.expert_scales = empty_parameter(count) if has_scales else None
        self.shared: nn.Module | None = None
        self.shared_gate: Linear | None = None
        if self.joins_experts:
            self.shared = SharedExpert(gate_up=self.gate_up, down=self.down)
        elif spec.shared_size:
            self.shared = GatedMlp(hidden_size, MlpSpec(spec.shared_size), make.within("shared"))
        if spec.shared_size and spec.has_shared_gate:
            self.shared_gate = make.linear("shared_gate", hidden_size, {"": 1})

    def forward(self, x: Tensor, routed: Tensor | None = None) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden].

        routed: the router's input, [tokens, hidden]; None: x.
        """
        shared_logit = None if self.shared_gate is None else self.shared_gate.sums(x)
        ids, weights = self._route(x if routed is None else routed, shared_logit)
        gate_up, down = self.gate_up, self.down
        biases = gate_up.bias, down.bias
        params = gate_up.params, down.params, down.format
        gate = self.spec.alpha, self.spec.limit, self.spec.activation
        if self.spec.scales_inputs:
            scaled = (x.unsqueeze(1) * weights.unsqueeze(-1).to(x.dtype)).flatten(0, 1)
            parts = gate_up.format.experts(scaled, ids.view(-1, 1), *params, biases, *gate)
            out = parts.view(*ids.shape, -1).sum(1).to(x.dtype)
        else:
            parts = gate_up.format.experts(x, ids, *params, biases, *gate)
            out = (parts * weights.unsqueeze(-1)).sum(1).to(x.dtype)
        if self.shared is None or self.joins_experts:
            return out
        shared: Tensor = self.shared(x)
        if shared_logit is not None:
            shared = shared_logit.sigmoid().to(x.dtype) * shared
        return out + shared

    def _route(self, x: Tensor, shared_logit: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ids and float32 weights of each token's experts, the joined shared expert last."""
        router = self.spec.router
        ids, weights = moe_route(
            self.router(x.float() if router.in_float32 else x),
            self.spec.top_k,
            router.renormalize,
            self.score_bias,
            router.scores,
            router.num_groups,
            router.top_groups,
            router.eps,
            router.scale,
            self.joins_experts,
            shared_logit if self.joins_experts else None,
        )
        return ids, weights if self.expert_scales is None else weights * self.expert_scales[ids]


class ExpertsBesideMlp(nn.Module):
    """norm(dense MLP's output) + norm(experts' output). The router reads the residual stream."""

    def __init__(self, hidden_size: int, spec: MoeSpec, norm: NormSpec, make: Factory) -> None:
        super().__init__()
        self.norm, self.out_norm, self.dense_norm, self.router_norm = (
            make.norm(norm, hidden_size) for _ in range(4)
        )
        self.router_scale = hidden_size**-0.5
        self.has_ranks = make.ranks.are_many
        self.moe = MoeMlp(hidden_size, spec, make.within("moe"))

    def forward(self, x: Tensor, dense: Tensor) -> Tensor:
        """x, dense: the residual stream and the dense MLP's output, [tokens, hidden].

        With several ranks, `dense` is the rank's summand, and the result is summed over the ranks.
        """
        routed = self.router_norm(x) * self.router_scale
        experts = self.moe(self.norm(x), routed)
        if self.has_ranks:
            dense, experts = all_reduce(torch.stack((dense, experts))).unbind()
        out: Tensor = self.dense_norm(dense) + self.out_norm(experts)
        return out


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
