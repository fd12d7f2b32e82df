"""Triton's draw of tokens against the torch one: the same tokens, not just the distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compiledllm.kernels import sampling, sampling_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter


def both(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> None:
    arguments = [x.to(DEVICE) for x in (logits, temperature, seeds, positions)]
    expected = sampling.draw_tokens(logits, temperature, seeds, positions)
    assert sampling_triton.draw_tokens(*arguments).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [5, 4096, 4097, 9000])
def test_draws_are_those_of_torch(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab)
    temperature = torch.tensor([0.0, 1.0, 0.3, 0.0, 7.0, 1.5])
    seeds = torch.tensor([0, 1, -5, 2**62, -(2**63), 77])
    positions = torch.tensor([0, 3, 100_000, 5, 1, 3])
    both(torch.randn(6, vocab).to(dtype), temperature, seeds, positions)


def test_of_equal_logits_the_first_is_the_greedy_one() -> None:
    logits = torch.zeros(3, 9000)
    logits[1, [4100, 8200]] = 2.0
    logits[2, 8999] = 1.0
    zeros = torch.zeros(3, dtype=torch.int64)
    drawn = sampling_triton.draw_tokens(
        logits.to(DEVICE), torch.zeros(3).to(DEVICE), zeros.to(DEVICE), zeros.to(DEVICE)
    )
    assert drawn.tolist() == [0, 4100, 8999]


def test_banned_tokens_are_never_drawn_and_rows_may_be_strided() -> None:
    torch.manual_seed(0)
    wide = torch.randn(40, 2, 300)
    wide[:, 1, 3:] = float("-inf")
    temperature = torch.linspace(0, 3, 40)
    seeds, positions = torch.arange(40), torch.arange(40) * 7
    both(wide[:, 1], temperature, seeds, positions)
    arguments = (x.to(DEVICE) for x in (wide[:, 1], temperature, seeds, positions))
    assert set(sampling_triton.draw_tokens(*arguments).tolist()) == {0, 1, 2}
