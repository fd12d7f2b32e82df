"""Log probabilities against a float64 log-softmax, by torch and by Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compiledllm.kernels import logprobs, logprobs_triton
from compiledllm.kernels.logprobs import Logprobs, token_logprobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_IDS = torch.empty(3, 0, dtype=torch.int64)


@pytest.fixture(params=["torch", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels take the place of torch's, in the interpreter where there is no GPU."""
    if request.param == "triton":
        monkeypatch.setattr(logprobs, "_pack", logprobs_triton.pack)
    elif DEVICE == "cuda":
        monkeypatch.setattr(logprobs_triton, "pack", logprobs._pack)


def compute(
    logits: Tensor, rows: Tensor, chosen: Tensor, num_best: int, named_ids: Tensor
) -> Logprobs:
    tensors = (x.to(DEVICE) for x in (logits, rows, chosen, named_ids))
    logits, rows, chosen, named_ids = tensors
    return Logprobs(token_logprobs(logits, rows, chosen, num_best, named_ids).packed.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("vocab", "num_best", "num_named"), [(11, 3, 2), (5000, 0, 0), (9000, 5, 1), (4096, 20, 130)]
)
def test_they_are_those_of_a_float64_softmax(
    vocab: int, num_best: int, num_named: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(vocab)
    logits = (torch.randn(6, vocab) * 3).to(dtype)
    rows, chosen = torch.tensor([4, 0, 2]), torch.randint(vocab, (3,))
    named_ids = torch.randint(vocab, (3, num_named))
    found = compute(logits, rows, chosen, num_best, named_ids)
    exact = logits[rows].double().log_softmax(-1)
    assert found.token_ids[:, 0].tolist() == chosen.tolist()
    assert found.token_ids[:, 1 + num_best :].tolist() == named_ids.tolist()
    torch.testing.assert_close(
        found.values.double(), exact.gather(1, found.token_ids.long()), atol=1e-4, rtol=0
    )
    best = exact.topk(num_best, dim=-1).values
    torch.testing.assert_close(found.values[:, 1 : 1 + num_best].double(), best, atol=1e-4, rtol=0)
    own = logits[rows].gather(1, chosen[:, None])
    assert found.ranks.tolist() == ((logits[rows] > own).sum(-1) + 1).tolist()


def test_the_best_are_different_tokens_also_if_they_tie() -> None:
    logits = torch.zeros(3, 5000)
    found = compute(logits, torch.arange(3), torch.zeros(3, dtype=torch.int64), 8, NO_IDS)
    for row in found.token_ids[:, 1:].tolist():
        assert len(set(row)) == 8
    assert found.ranks.tolist() == [1, 1, 1]


def test_a_banned_token_has_no_probability() -> None:
    logits = torch.randn(3, 4500)
    logits[:, 7] = float("-inf")
    chosen = torch.tensor([7, 8, 4400])
    found = compute(logits, torch.arange(3), chosen, 2, NO_IDS)
    assert found.values[0, 0] == float("-inf")
    assert found.values[1:].isfinite().all() and found.ranks[0] == 4500


def test_rows_are_done_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, rows = torch.randn(40, 50), torch.arange(40)
    chosen, none = rows, torch.empty(40, 0, dtype=torch.int64)
    whole = compute(logits, rows, chosen, 4, none)
    monkeypatch.setattr(logprobs, "WORKSPACE_BYTES", 12 * 50 * 7)
    parts = compute(logits, rows, chosen, 4, none)
    assert torch.equal(parts.token_ids, whole.token_ids) and torch.equal(parts.ranks, whole.ranks)
    torch.testing.assert_close(parts.values, whole.values)


def test_an_undrawn_token_counts_as_the_first() -> None:
    logits, rows = torch.randn(3, 70), torch.arange(3)
    found = compute(logits, rows, torch.tensor([-1, 0, -1]), 2, NO_IDS)
    assert found.token_ids[:, 0].tolist() == [0, 0, 0]
    torch.testing.assert_close(found.values[:, 0], logits.log_softmax(-1)[:, 0])
