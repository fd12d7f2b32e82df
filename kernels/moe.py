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


def route_in_torch(
    logits: Tensor,
    top_k: int,
    renormalize: bool,
    bias: Tensor | None = None,
    scores: str = "softmax",
    num_groups: int = 1,
    top_groups: int = 1,
    eps: float = 0.0,
    scale: float = 1.0,
    has_shared: bool = False,
    shared_logit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `moe_route`."""
    num_experts = logits.shape[1]
    logits = logits.float()
    score = logits.softmax(-1) if scores == "softmax" else logits.sigmoid()
    # Logits have the same order as scores, but are not rounded. Groups need sums of scores.
    ranked = score if num_groups > 1 else logits
    if bias is not None:
        ranked = score + bias
    if num_groups > 1:
        ranked = _within_best_groups(ranked, num_groups, top_groups)
    ids = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = score.gather(-1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    weights = weights * scale
    if has_shared:
        ids = F.pad(ids, (0, 1), value=num_experts)
        weights = F.pad(weights, (0, 1), value=1.0)
        if shared_logit is not None:
            weights[:, -1:] = shared_logit.sigmoid()
    return ids.int(), weights


def _within_best_groups(ranked: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """`ranked` [tokens, experts], but -inf for all experts outside the best `top_groups` groups.

    The best groups have the largest sums of their two largest values.
    """
    grouped = ranked.view(len(ranked), num_groups, -1)
    sums = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    best = sums.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
    is_best = torch.zeros_like(sums, dtype=torch.bool).scatter(-1, best, True)
    return grouped.masked_fill(~is_best.unsqueeze(-1), float("-inf")).view_as(ranked)


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
    activation: str = "silu",
) -> Tensor:
    """See `moe_experts`."""
    out = x.new_empty((*expert_ids.shape, x.shape[1]), dtype=torch.float32)
    for expert in sorted(set(expert_ids.flatten().tolist())):
        token, place = (expert_ids == expert).nonzero(as_tuple=True)
        biases = [None if b is None else b[expert] for b in (gate_up_bias, down_bias)]
        gate, up = F.linear(x[token], gate_up[expert], biases[0]).chunk(2, dim=-1)
        result = F.linear(_gated(gate, up, alpha, limit, activation), down[expert], biases[1])
        out[token, place] = result.float()
    return out


def _gated(gate: Tensor, up: Tensor, alpha: float, limit: float, activation: str) -> Tensor:
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    assert activation == "silu", activation
    if not limit:
        return F.silu(gate) * up
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)


def _route_fake(
    logits: Tensor,
    top_k: int,
    renormalize: bool,
    bias: Tensor | None = None,
    scores: str = "softmax",
    num_groups: int = 1,
    top_groups: int = 1,
    eps: float = 0.0,
    scale: float = 1.0,
    has_shared: bool = False,
    shared_logit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = logits.shape[0], top_k + has_shared
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)


@define("moe_route", fake=_route_fake)
def moe_route(
    logits: Tensor,
    top_k: int,
    renormalize: bool,
    bias: Tensor | None = None,
    scores: str = "softmax",
    num_groups: int = 1,
    top_groups: int = 1,
    eps: float = 0.0,
    scale: float = 1.0,
    has_shared: bool = False,
    shared_logit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the `top_k` experts with the largest scores, and their weights. Ties: lowest index.

    logits: [tokens, experts]. scores: "softmax" or "sigmoid", the function that turns logits into
    scores, in float32. bias: float32 [experts], added to the scores for the choice, but not for the
    weights. num_groups, top_groups: the experts form `num_groups` groups of equally many
    consecutive experts, and only experts of `top_groups` groups are chosen: of the groups whose two
    largest scores, biases included, have the largest sums.

    The weights are the scores of the chosen experts. With `renormalize`, the weights are divided by
    their sum plus `eps`. Then the weights are multiplied by `scale`. A token with a NaN logit has a
    NaN weight. has_shared: each token also uses one more expert, whose index is the number of the
    others; its weight is the sigmoid of shared_logit, float32 [tokens, 1], or 1 without one.
    Returns ids int32 and weights float32, both [tokens, top_k or top_k + 1] in the order of the
    choice: the best expert first, the shared expert last.
    """
    options = bias, scores, num_groups, top_groups, eps, scale, has_shared, shared_logit
    if logits.is_cuda:
        from compiledllm.kernels.moe_routing_triton import route

        return route(logits, top_k, renormalize, *options)
    return route_in_torch(logits, top_k, renormalize, *options)


def experts_fake(x: Tensor, expert_ids: Tensor, *_: object) -> Tensor:
    """The fake (shape and dtype of the result) of ops that compute experts in any weight format."""
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
    activation: str = "silu",
) -> Tensor:
    """down(silu(gate(x)) * up(x)) for each expert of a token, not yet weighted and summed.

    x: [tokens, hidden]. expert_ids: integers, [tokens, top_k].
    gate_up: [experts, 2 * intermediate, hidden], gate first; down: [experts, hidden, intermediate].
    Biases: [experts, outputs]. limit: if not 0, the clamped form of gpt-oss: `gate(x)` is clamped
    to at most `limit` and `up(x)` to [-limit, limit], and the input of `down` is
    gate * sigmoid(alpha * gate) * (up + 1). alpha is used only by this form. activation: "silu", or
    "gelu_tanh", which replaces silu and ignores `limit`. Returns float32 [tokens, top_k, hidden];
    the compiler fuses the weighted sum with the next op.
    """
    biases = gate_up_bias, down_bias
    arguments = x, expert_ids, gate_up, down, *biases, alpha, limit, activation
    if x.is_cuda:
        from compiledllm.kernels.moe_triton import experts

        return experts(*arguments)
    return experts_in_torch(*arguments)
