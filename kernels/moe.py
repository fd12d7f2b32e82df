"""Mixture of experts as two ops: routing, and the expert MLPs.

On a GPU, one kernel routes, the tokens are sorted by expert without a host synchronisation, and two
grouped matmuls follow. On other devices plain torch computes one expert after the other.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.ops import define


def route_in_torch(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """See `moe_route`."""
    logits = logits.float()
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = logits.softmax(-1).gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids.int(), weights


class Matrices(Protocol):
    """One matrix per expert, by index: a tensor, or an object that makes each matrix on access."""

    def __getitem__(self, expert: int, /) -> Tensor: ...


def experts_in_torch(
    x: Tensor,
    expert_ids: Tensor,
    gate_up: Matrices,
    down: Matrices,
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


def _route_fake(logits: Tensor, top_k: int, _: bool) -> tuple[Tensor, Tensor]:
    shape = logits.shape[0], top_k
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)


@define("moe_route", fake=_route_fake)
def moe_route(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Choose the `top_k` experts with the largest logits, and their weights. Ties: lowest index.

    logits: [tokens, experts]. Weights are the float32 softmax over all experts; with `renormalize`,
    the softmax over the chosen experts. A token with a NaN logit has NaN weights. Returns ids int32
    and weights float32, [tokens, top_k], by descending weight.
    """
    if logits.is_cuda:
        from compiledllm.kernels.moe_routing_triton import route

        return route(logits, top_k, renormalize)
    return route_in_torch(logits, top_k, renormalize)


def experts_fake(x: Tensor, expert_ids: Tensor, *_: object) -> Tensor:
    """The fake (shape and dtype only) of ops that compute experts, in any weight format."""
    return x.new_empty((*expert_ids.shape, x.shape[1]), dtype=torch.float32)


@define("moe_experts", fake=experts_fake)
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
    """down(silu(gate(x)) * up(x)) for each expert of a token, not yet weighted and summed.

    x: [tokens, hidden]. expert_ids: integers, [tokens, top_k].
    gate_up: [experts, 2 * intermediate, hidden], gate first; down: [experts, hidden, intermediate].
    Biases: [experts, outputs]. limit: if not 0, the clamped form of gpt-oss: `gate(x)` is clamped
    to at most `limit` and `up(x)` to [-limit, limit], and the input of `down` is
    gate * sigmoid(alpha * gate) * (up + 1). Returns float32 [tokens, top_k, hidden]; the compiler
    fuses the weighted sum with the next op.
    """
    arguments = x, expert_ids, gate_up, down, gate_up_bias, down_bias, alpha, limit
    if x.is_cuda:
        from compiledllm.kernels.moe_triton import experts

        return experts(*arguments)
    return experts_in_torch(*arguments)
