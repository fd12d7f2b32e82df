"""Routing, sorting and experts' products in Triton against torch and against what they promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from compiledllm.kernels import moe_routing_triton as routing
from compiledllm.kernels import moe_triton
from compiledllm.kernels.moe import experts_in_torch, moe_route, route_in_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter


@pytest.mark.pairwise
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(0, 8, 2), (1, 8, 2), (17, 32, 4), (300, 128, 8), (5, 60, 4), (2, 3, 3)],
)
def test_the_route_is_that_of_torch(
    num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype, renormalize: bool
) -> None:
    torch.manual_seed(num_experts)
    logits = (3 * torch.randn(num_tokens, num_experts, device=DEVICE)).to(dtype)  # ties in bfloat16
    ids, weights = routing.route(logits, top_k, renormalize)
    expected_ids, expected_weights = route_in_torch(logits, top_k, renormalize)
    torch.testing.assert_close(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights)
    shares = logits.float().softmax(-1).topk(top_k).values
    if renormalize:
        shares = shares / shares.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, shares)


@pytest.mark.pairwise
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_groups", "top_groups"),
    [(8, 3, 1, 1), (60, 4, 6, 2), (64, 8, 8, 4), (6, 2, 6, 3), (256, 8, 8, 4)],
)
def test_scores_biases_and_groups_choose_as_in_torch(
    num_experts: int,
    top_k: int,
    num_groups: int,
    top_groups: int,
    has_bias: bool,
    scores: str,
    renormalize: bool,
) -> None:
    torch.manual_seed(num_experts)
    logits = 2 * torch.randn(19, num_experts, device=DEVICE)
    logits[3] = 0.0  # nothing but ties
    logits[4, 2] = math.nan
    bias = torch.rand(num_experts, device=DEVICE) if has_bias else None
    options = bias, scores, num_groups, top_groups, 1e-6, 1.7
    ids, weights = routing.route(logits, top_k, renormalize, *options)
    expected = route_in_torch(logits, top_k, renormalize, *options)
    torch.testing.assert_close(ids, expected[0])
    torch.testing.assert_close(weights, expected[1], equal_nan=True)
    assert weights[4].isnan().any() and not weights[5:].isnan().any()
    groups = ids[5:] // (num_experts // num_groups)
    assert max(len(set(row)) for row in groups.tolist()) <= top_groups


@pytest.mark.parametrize("has_logit", [True, False])
@pytest.mark.parametrize("top_k", [3, 4])
def test_a_shared_expert_is_the_last_of_each_token(top_k: int, has_logit: bool) -> None:
    torch.manual_seed(top_k)
    logits = torch.randn(5, 12, device=DEVICE)
    logit = torch.randn(5, 1, device=DEVICE) if has_logit else None
    options = None, "sigmoid", 1, 1, 1e-20, 2.5
    ids, weights = routing.route(logits, top_k, True, *options, True, logit)
    others = routing.route(logits, top_k, True, *options)
    torch.testing.assert_close((ids[:, :-1], weights[:, :-1]), others)
    assert ids[:, -1].tolist() == [12] * 5
    expected = torch.ones(5, device=DEVICE) if logit is None else logit.sigmoid()[:, 0]
    torch.testing.assert_close(weights[:, -1], expected)
    expected_both = route_in_torch(logits, top_k, True, *options, True, logit)
    torch.testing.assert_close((ids, weights), expected_both)


def odd_logits() -> Tensor:
    """Rows of 12: equal, zeros of both signs, with and of NaN, with and of each infinity."""
    logits = torch.zeros(8, 12, device=DEVICE)
    logits[1, ::2] = -0.0
    logits[2:] = torch.arange(12)
    logits[2, 7] = logits[3] = math.nan
    logits[4, 3] = math.inf
    logits[5, 3] = logits[6] = -math.inf
    logits[6, 9] = 1
    logits[7] = -math.inf
    return logits


@pytest.mark.parametrize("renormalize", [True, False])
def test_odd_logits_route_as_in_torch_and_to_experts_that_exist(renormalize: bool) -> None:
    actual = routing.route(odd_logits(), 4, renormalize)
    expected = route_in_torch(odd_logits(), 4, renormalize)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    ids, weights = actual
    assert ids[:2].tolist() == [[0, 1, 2, 3]] * 2  # ties go to the first
    assert all(len(set(row)) == 4 and set(row) <= set(range(12)) for row in ids.tolist())
    assert weights.isnan().all(1).tolist() == weights.isnan().any(1).tolist()
    assert weights.isnan().any(1).tolist() == [False, False, True, True, True, False, False, True]


def test_the_op_routes() -> None:
    logits = torch.randn(3, 8, device=DEVICE)
    torch.testing.assert_close(moe_route(logits, 2, True), route_in_torch(logits, 2, True))
    bias = torch.rand(8, device=DEVICE)
    options = logits, 2, True, bias, "sigmoid", 4, 2, 1e-20, 2.5, True, logits[:, :1].clone()
    torch.testing.assert_close(moe_route(*options), route_in_torch(*options))
    torch.library.opcheck(torch.ops.compiledllm.moe_route.default, options)


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("by_counting", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(1, 8, 2), (40, 6, 3), (7, 128, 8), (64, 128, 8), (300, 60, 4), (1500, 8, 2)],
)
def test_items_are_sorted_by_expert_in_blocks(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    by_counting: bool,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing, "_MAX_SORTED_BY_COUNTING", 16384 if by_counting else 0)
    torch.manual_seed(num_tokens)
    ids = torch.rand(num_tokens, num_experts).topk(top_k).indices.to(DEVICE)
    check_sorted(ids.int(), num_experts, rows)


@pytest.mark.parametrize("expert", [0, 5, 7])
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 1023, 1024, 1025])
def test_items_of_one_expert_are_sorted(num_tokens: int, expert: int) -> None:
    check_sorted(torch.full((num_tokens, 1), expert, device=DEVICE), 8, 16)


def check_sorted(ids: Tensor, num_experts: int, rows: int) -> None:
    items, experts = routing.sort_items(ids, num_experts, rows)
    flat, found = ids.flatten().tolist(), []
    used = [expert for expert in experts.tolist() if expert < num_experts]
    assert used == sorted(used) == experts.tolist()[: len(used)]
    assert (experts[len(used) :] == num_experts).all()
    for expert, block in zip(used, items.view(-1, rows).tolist(), strict=False):
        real = [item for item in block if item < len(flat)]
        assert real and block == real + [len(flat)] * (rows - len(real))
        assert all(flat[item] == expert for item in real)
        found += real
    assert found == sorted(range(len(flat)), key=lambda item: (flat[item], item))
    assert len(used) == sum(-(-flat.count(expert) // rows) for expert in set(flat))


@pytest.mark.pairwise
@pytest.mark.parametrize("form", ["plain", "biased", "clamped", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 70, 300])
@pytest.mark.parametrize(("hidden", "size"), [(64, 48), (100, 130)])
def test_experts_are_those_of_torch(
    hidden: int, size: int, num_tokens: int, dtype: torch.dtype, form: str
) -> None:
    check_experts(6, 2, hidden, size, num_tokens, dtype, form)


def test_few_items_for_many_experts_are_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_triton, "sort_items", None)
    for num_tokens in (1, 2):
        check_experts(32, 4, 64, 48, num_tokens, torch.float32, "biased")


def check_experts(
    num_experts: int,
    top_k: int,
    hidden: int,
    size: int,
    num_tokens: int,
    dtype: torch.dtype,
    form: str,
) -> None:
    torch.manual_seed(size)
    x = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype)
    gate_up = (torch.randn(num_experts, 2 * size, hidden, device=DEVICE) * 0.1).to(dtype)
    down = (torch.randn(num_experts, hidden, size, device=DEVICE) * 0.1).to(dtype)
    shares = torch.rand(num_tokens, num_experts, device=DEVICE)
    shares[:, 3] = 0  # an expert that nobody asks for
    ids = shares.topk(top_k, dim=-1).indices
    rest: list[Any] = []
    if form != "plain":
        rest = [torch.randn(num_experts, n, device=DEVICE).to(dtype) for n in (2 * size, hidden)]
    if form == "clamped":
        rest += [1.7, 0.6]
    if form == "gelu":
        rest += [1.0, 0.0, "gelu_tanh"]
    expected = experts_in_torch(x, ids, gate_up, down, *rest)
    actual = moe_triton.experts(x, ids.int(), gate_up, down, *rest)
    assert actual.shape == (num_tokens, top_k, hidden)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
