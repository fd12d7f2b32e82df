"""Experts' products in Triton against those in torch, and the sorting against what it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compiledllm.kernels import moe_triton
from compiledllm.kernels.moe import experts_in_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("one_program", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(1, 8, 2), (40, 6, 3), (7, 128, 8)]
)
def test_items_are_sorted_by_expert_in_blocks(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    one_program: bool,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moe_triton, "_MOST_FOR_ONE_PROGRAM", 4096 if one_program else 0)
    torch.manual_seed(num_tokens)
    ids = torch.rand(num_tokens, num_experts).topk(top_k).indices.to(DEVICE)
    items, experts = moe_triton.sort_items(ids, num_experts, rows)
    found = []
    for expert, block in zip(experts.tolist(), items.view(-1, rows).tolist(), strict=True):
        real = [item for item in block if item < ids.numel()]
        assert expert < num_experts or not real
        assert all(ids.flatten()[item] == expert for item in real)
        found += real
    assert sorted(found) == list(range(ids.numel()))


@pytest.mark.parametrize("form", ["plain", "biased", "clamped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 70])
@pytest.mark.parametrize(("hidden", "size"), [(64, 48), (100, 130)])
def test_experts_are_those_of_torch(
    hidden: int, size: int, num_tokens: int, dtype: torch.dtype, form: str
) -> None:
    torch.manual_seed(size)
    num_experts, top_k = 6, 2
    x = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype)
    gate_up = (torch.randn(num_experts, 2 * size, hidden, device=DEVICE) * 0.1).to(dtype)
    down = (torch.randn(num_experts, hidden, size, device=DEVICE) * 0.1).to(dtype)
    shares = torch.rand(num_tokens, num_experts, device=DEVICE)
    shares[:, 3] = 0  # an expert that nobody asks for
    weights, ids = shares.topk(top_k, dim=-1)
    rest: list[Any] = []
    if form != "plain":
        rest = [torch.randn(num_experts, n, device=DEVICE).to(dtype) for n in (2 * size, hidden)]
    if form == "clamped":
        rest += [1.7, 0.6]
    expected = experts_in_torch(x, ids, weights, gate_up, down, *rest)
    actual = moe_triton.experts(x, ids, weights, gate_up, down, *rest)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
