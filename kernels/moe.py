"""Mixture of experts as two ops: the choice of experts, and their products for each token.

On a GPU a kernel chooses, the tokens are sorted by expert without asking the host, and two grouped
products follow. Elsewhere plain torch takes one expert after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LIBRARY: Any = torch.library.Library("compiledllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "moe_route(Tensor logits, int top_k, bool renormalize) -> (Tensor ids, Tensor weights)"
)
_LIBRARY.define(
    "moe_experts(Tensor x, Tensor expert_ids, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, float alpha, float limit) -> Tensor"
)


def route_in_torch(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """See `moe_route`."""
    logits = logits.float()
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = logits.softmax(-1).gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids.int(), weights


def experts_in_torch(
    x: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 1.0,
    limit: float = 0.0,
) -> Tensor:
    """See `moe_experts`."""
    out = x.new_empty((*expert_ids.shape, x.shape[1]), dtype=torch.float32)
    for expert in sorted(set(expert_ids.flatten().tolist())):
        token, place = (expert_ids == expert).nonzero(as_tuple=True)
        biases = [None if b is None else b[expert] for b in (gate_up_bias, down_bias)]
        gate, up = F.linear(x[token], gate_up[expert], biases[0]).chunk(2, dim=-1)
        result = F.linear(_swiglu(gate, up, alpha, limit), down[expert], biases[1])
        out[token, place] = result.float()
    return out


def _swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    if not limit:
        return F.silu(gate) * up
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)


def _moe_route(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    if logits.is_cuda:
        from compiledllm.kernels.moe_routing_triton import route

        return route(logits, top_k, renormalize)
    return route_in_torch(logits, top_k, renormalize)


def _moe_route_fake(logits: Tensor, top_k: int, _: bool) -> tuple[Tensor, Tensor]:
    shape = logits.shape[0], top_k
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)


def _moe_experts(x: Tensor, *rest: Any) -> Tensor:
    if x.is_cuda:
        from compiledllm.kernels.moe_triton import experts

        return experts(x, *rest)
    return experts_in_torch(x, *rest)


def _moe_experts_fake(x: Tensor, expert_ids: Tensor, *_: object) -> Tensor:
    return x.new_empty((*expert_ids.shape, x.shape[1]), dtype=torch.float32)


_LIBRARY.impl("moe_route", _moe_route, "CompositeExplicitAutograd")
torch.library.register_fake("compiledllm::moe_route", _moe_route_fake, lib=_LIBRARY)
_LIBRARY.impl("moe_experts", _moe_experts, "CompositeExplicitAutograd")
torch.library.register_fake("compiledllm::moe_experts", _moe_experts_fake, lib=_LIBRARY)


def moe_route(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The `top_k` experts of the largest logits, of equal ones the first, and their weights.

    logits: [tokens, experts]. Weights are the softmax over all experts, in float32; renormalised
    they sum to one, which is the softmax over the chosen. A token with a NaN has NaN weights.
    Returns int32 and float32, [tokens, top_k], by descending weight.
    """
    ids, weights = torch.ops.compiledllm.moe_route(logits, top_k, renormalize)
    return ids, weights


def moe_experts(
    x: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 1.0,
    limit: float = 0.0,
) -> Tensor:
    """down(silu(gate(x)) * up(x)) of each of a token's experts, still to be weighted and summed.

    x: [tokens, hidden]. expert_ids: integers, [tokens, top_k].
    gate_up: [experts, 2 * intermediate, hidden], gate first; down: [experts, hidden, intermediate].
    Biases: [experts, outputs]. limit: if not 0, the clamped form (gpt-oss), in which gate is at
    most that, up within it, and gate * sigmoid(alpha * gate) * (up + 1) goes down.
    Returns float32 [tokens, top_k, hidden]: the sum is the compiler's to fuse with what follows.
    """
    out: Tensor = torch.ops.compiledllm.moe_experts(
        x, expert_ids, gate_up, down, gate_up_bias, down_bias, alpha, limit
    )
    return out
