"""Triton's penalties against those computed one token at a time."""

from __future__ import annotations

import pytest
import torch

from compiledllm.kernels.penalties_triton import count_tokens, penalize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
IN_PROMPT = 1 << 30


@pytest.mark.parametrize("vocab", [7, 2048, 5000])
def test_penalties_are_those_of_their_definition(vocab: int) -> None:
    torch.manual_seed(vocab)
    logits = 3 * torch.randn(4, vocab)
    counts = torch.randint(0, 3, (5, vocab), dtype=torch.int32)
    counts += IN_PROMPT * torch.randint(0, 2, (5, vocab), dtype=torch.int32)
    index, slots = torch.tensor([3, 0]), torch.tensor([1, 4])
    amounts = torch.tensor([[1.3, 0.8], [0.7, -0.3], [1.5, 0.0]])
    expected = logits.clone()
    for i, (row, slot) in enumerate(zip(index.tolist(), slots.tolist(), strict=True)):
        repetition, frequency, presence = amounts[:, i].tolist()
        for token, seen in enumerate(counts[slot].tolist()):
            value, times = expected[row, token].item(), seen % IN_PROMPT
            if seen:
                value = value / repetition if value > 0 else value * repetition
            expected[row, token] = value - frequency * times - presence * (times > 0)
    found = logits.to(DEVICE)
    arguments = (x.to(DEVICE) for x in (index, slots, amounts, counts))
    penalize(found, *arguments, IN_PROMPT)
    torch.testing.assert_close(found.cpu(), expected)


def test_drawn_tokens_are_counted() -> None:
    counts = torch.zeros(3, 9, dtype=torch.int32)
    counts[2, 4] = IN_PROMPT + 6
    tokens, index, slots = (
        torch.tensor([4, 8, -1]),
        torch.tensor([0, 2, 1]),
        torch.tensor([2, 0, 1]),
    )
    expected = counts.clone()
    expected[2, 4] += 1
    expected[0, 0] += 1  # a row without a token: it ends, and its counts with it
    expected[1, 8] += 1
    found = counts.to(DEVICE)
    count_tokens(*(x.to(DEVICE) for x in (tokens, index, slots)), found)
    assert torch.equal(found.cpu(), expected)
