"""Experts' products: each token through the gated MLPs it was sent to, as an op.

On a GPU the tokens are sorted by expert without asking the host, and two grouped products follow.
Elsewhere plain torch takes one expert after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LIBRARY: Any = torch.library.Library("compiledllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "moe_experts(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, float alpha, float limit) -> Tensor"
)


def experts_in_torch(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 1.0,
    limit: float = 0.0,
) -> Tensor:
    """See `moe_experts`."""
    out = torch.zeros_like(x)
    for expert in sorted(set(expert_ids.flatten().tolist())):
        token, place = (expert_ids == expert).nonzero(as_tuple=True)
        biases = [None if b is None else b[expert] for b in (gate_up_bias, down_bias)]
        gate, up = F.linear(x[token], gate_up[expert], biases[0]).chunk(2, dim=-1)
        result = F.linear(_swiglu(gate, up, alpha, limit), down[expert], biases[1])
        out.index_add_(0, token, (result * expert_weights[token, place, None]).to(x.dtype))
    return out


def _swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    if not limit:
        return F.silu(gate) * up
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)


def _moe_experts(x: Tensor, *rest: Any) -> Tensor:
    if x.is_cuda:
        from compiledllm.kernels.moe_triton import experts

        return experts(x, *rest)
    return experts_in_torch(x, *rest)


def _moe_experts_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_LIBRARY.impl("moe_experts", _moe_experts, "CompositeExplicitAutograd")
torch.library.register_fake("compiledllm::moe_experts", _moe_experts_fake, lib=_LIBRARY)


def moe_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 1.0,
    limit: float = 0.0,
) -> Tensor:
    """Sum over a token's experts of weight * down(silu(gate(x)) * up(x)).

    x: [tokens, hidden]. expert_ids: int64, expert_weights: any float, both [tokens, top_k].
    gate_up: [experts, 2 * intermediate, hidden], gate first; down: [experts, hidden, intermediate].
    Biases: [experts, outputs]. limit: if not 0, the clamped form (gpt-oss), in which gate is at
    most that, up within it, and gate * sigmoid(alpha * gate) * (up + 1) goes down.
    Returns [tokens, hidden] in x's dtype.
    """
    out: Tensor = torch.ops.compiledllm.moe_experts(
        x, expert_ids, expert_weights, gate_up, down, gate_up_bias, down_bias, alpha, limit
    )
    return out
