"""Triton's draw of tokens against the torch one: the same tokens, not just the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compiledllm.kernels import sampling, sampling_triton
from compiledllm.kernels.sampling import INVALID, SamplingRows

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"  # there in Triton's interpreter, which gets fewer rows


def sampling_rows(count: int, **values: Tensor | float) -> SamplingRows:
    rows = SamplingRows.zeros(count, "cpu")
    rows.temperature[:] = 1
    rows.top_p[:] = 1
    rows.seeds[:] = torch.arange(count) * 7 - 3
    for name, value in values.items():
        getattr(rows, name)[:] = value
    return rows


def draw(logits: Tensor, rows: Tensor, positions: Tensor, params: SamplingRows) -> list[int]:
    arguments = (x.to(DEVICE) for x in (logits, rows, positions))
    there = SamplingRows(*(values.to(DEVICE) for values in params))
    drawn: list[int] = sampling_triton.draw_tokens(*arguments, there).tolist()
    return drawn


def both(logits: Tensor, params: SamplingRows, rows: Tensor | None = None) -> None:
    rows = torch.arange(len(logits)) if rows is None else rows
    positions = torch.arange(len(logits)) * 1001 % 131
    expected = sampling.draw_tokens(logits, rows, positions, params)
    assert draw(logits, rows, positions, params) == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [5, 4096, 4097, 9000])
def test_draws_are_those_of_torch(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab)
    params = sampling_rows(
        6,
        temperature=torch.tensor([0.0, 1.0, 0.3, 0.0, 7.0, 1.5]),
        seeds=torch.tensor([0, 1, -5, 2**62, -(2**63), 77]),
    )
    both(torch.randn(6, vocab).to(dtype), params)
    both(torch.randn(4, vocab).to(dtype), params, rows=torch.tensor([5, 1, 1, 0]))


FILTERS = {
    "top_k": {"top_k": torch.tensor([1, 2, 7, 50, 400, 10**6])},
    "top_p": {"top_p": torch.tensor([1e-9, 0.1, 0.5, 0.9, 0.99, 1.0])},
    "min_p": {"min_p": torch.tensor([0.0, 0.01, 0.1, 0.3, 0.9, 1.0])},
    "top_k, top_p": {
        "top_k": torch.tensor([3, 50, 0, 50, 400, 20]),
        "top_p": torch.tensor([0.9, 0.5, 0.7, 0.2, 0.95, 0.8]),
    },
    "all, by temperature": {
        "top_k": torch.tensor([0, 50, 20, 5, 400, 20]),
        "top_p": torch.tensor([0.9, 0.5, 0.7, 0.2, 0.95, 1.0]),
        "min_p": torch.tensor([0.01, 0.1, 0.05, 0.3, 0.001, 0.1]),
        "temperature": torch.tensor([0.5, 2.0, 1.0, 0.7, 1.3, 0.0]),
    },
}


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [700, 5000])
@pytest.mark.parametrize("filters", FILTERS)
def test_filtered_draws_are_those_of_torch(filters: str, vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab)
    for spread in (0.1, 2.0):  # flat, where a token is seldom accepted, and peaked
        logits = (torch.randn(6, vocab) * spread - 1).to(dtype)
        for seed in range(3 if CUDA else 1):
            both(logits, sampling_rows(6, seeds=torch.arange(6) + 100 * seed, **FILTERS[filters]))


def test_filtered_draws_of_a_vocabulary_as_large_as_models_have() -> None:
    torch.manual_seed(1)
    logits = (torch.randn(6, 151_936) * 2).to(torch.bfloat16)
    for name in FILTERS if CUDA else ("top_k", "all, by temperature"):
        both(logits, sampling_rows(6, **FILTERS[name]))


def test_a_top_p_that_is_zero_in_float32_leaves_the_best_token() -> None:
    logits = torch.randn(6, 700)
    for k in (0, 20):
        drawn = draw(
            logits, torch.arange(6), torch.arange(6), sampling_rows(6, top_p=1e-60, top_k=k)
        )
        assert drawn == logits.argmax(1).tolist()


def test_of_equal_logits_the_first_is_the_greedy_one() -> None:
    logits = torch.zeros(3, 9000)
    logits[1, [4100, 8200]] = 2.0
    logits[2, 8999] = 1.0
    zeros = torch.zeros(3, dtype=torch.int64)
    assert draw(logits, zeros, zeros, sampling_rows(1, temperature=0.0)) == [0, 4100, 8999]


def test_banned_tokens_are_never_drawn_and_logits_may_be_strided() -> None:
    torch.manual_seed(0)
    count = 40 if CUDA else 12
    wide = torch.randn(count, 2, 300)
    wide[:, 1, 3:] = -math.inf
    params = sampling_rows(count, temperature=torch.linspace(0, 3, count), top_k=5)
    both(wide[:, 1], params)
    rows = torch.arange(count)
    assert set(draw(wide[:, 1], rows, rows * 7, params)) == {0, 1, 2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}], ids=str)
def test_a_row_that_no_token_can_be_drawn_from_says_so(
    filters: dict[str, float], temperature: float
) -> None:
    logits = torch.randn(6, 5000)
    logits[0, 4500] = math.nan
    logits[1, 17] = math.inf
    logits[2] = -math.inf
    logits[3] = math.nan
    logits[4, 17] = -math.inf
    params = sampling_rows(6, temperature=temperature, **filters)
    both(logits, params)
    rows = torch.arange(6)
    drawn = draw(logits, rows, rows, params)
    assert drawn[:4] == [INVALID] * 4 and min(drawn[4:]) >= 0
