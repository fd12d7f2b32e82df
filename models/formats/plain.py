"""The format of unquantised weights: one tensor in the model's dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiledllm.kernels.linear import linear
from compiledllm.kernels.moe import moe_experts
from compiledllm.models.formats.weight_format import (
    MatrixFormat,
    Params,
    Slot,
    empty_parameter,
    slots_by_part,
)


@dataclass(frozen=True, slots=True)
class Plain:
    """A matrix in the model's dtype. multiply: (x, weight, bias, out) -> y. params: [weight]."""

    multiply: Callable[..., Tensor] = linear
    products = ""
    num_params = 1

    def parameters(
        self, parts: Mapping[str, int], in_features: int, lead: tuple[int, ...] = ()
    ) -> dict[str, nn.Parameter | None]:
        return {"weight": empty_parameter(*lead, sum(parts.values()), in_features)}

    def slots(self, parts: Mapping[str, int], in_features: int, params: Params) -> dict[str, Slot]:
        (weight,) = params
        assert weight is not None
        return slots_by_part("weight", parts, weight)

    def randomize(self, params: Params, spread: float, generator: torch.Generator) -> None:
        (weight,) = params
        assert weight is not None
        weight.normal_(0, spread, generator=generator)

    def finish(self, params: Params, in_features: int) -> None:
        return None

    def product(
        self,
        x: Tensor,
        params: Params,
        bias: Tensor | None,
        first_row: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        (weight,) = params
        assert weight is not None
        return self.multiply(x, weight[first_row:] if first_row else weight, bias, out)

    def rows(self, ids: Tensor, params: Params, in_features: int, dtype: torch.dtype) -> Tensor:
        (weight,) = params
        assert weight is not None
        return F.embedding(ids, weight)

    def experts(
        self,
        x: Tensor,
        expert_ids: Tensor,
        gate_up: Params,
        down: Params,
        down_format: MatrixFormat,
        biases: tuple[Tensor | None, Tensor | None],
        alpha: float,
        limit: float,
        activation: str,
    ) -> Tensor:
        (up_weight,), (down_weight,) = gate_up, down
        assert up_weight is not None and down_weight is not None
        return moe_experts(x, expert_ids, up_weight, down_weight, *biases, alpha, limit, activation)
