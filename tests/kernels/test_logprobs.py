"""Log probabilities against a float64 log-softmax, by torch and by Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compiledllm.kernels import logprobs, logprobs_triton
from compiledllm.kernels.logprobs import Logprobs, token_logprobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_IDS = torch.empty(3, 0, dtype=torch.int64)


def with_triton(patch: pytest.MonkeyPatch) -> None:
    """Triton's kernels take the place of torch's, in the interpreter where there is no GPU."""

    def best_logits(logits: Tensor, chosen: Tensor, num_best: int) -> tuple[Tensor, ...]:
        rows = torch.arange(len(logits), device=logits.device)
        return logprobs_triton.best_logits(logits, rows, chosen, num_best)

    patch.setattr(logprobs, "_best_logits", best_logits)


@pytest.fixture(params=["torch", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "triton":
        with_triton(monkeypatch)


def compute(logits: Tensor, rows: Tensor, chosen: Tensor, num_best: int, asked: Tensor) -> Logprobs:
    tensors = (x.to(DEVICE) for x in (logits, rows, chosen, asked))
    logits, rows, chosen, asked = tensors
    return Logprobs(*(x.cpu() for x in token_logprobs(logits, rows, chosen, num_best, asked)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("vocab", "num_best"), [(11, 3), (5000, 0), (9000, 5), (4096, 20)])
def test_they_are_those_of_a_float64_softmax(vocab: int, num_best: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab)
    logits = (torch.randn(6, vocab) * 3).to(dtype)
    rows, chosen = torch.tensor([4, 0, 2]), torch.randint(vocab, (3,))
    asked = torch.randint(vocab, (3, 2))
    found = compute(logits, rows, chosen, num_best, asked)
    exact = logits[rows].double().log_softmax(-1)
    assert found.token_ids[:, 0].tolist() == chosen.tolist()
    assert found.token_ids[:, 1 + num_best :].tolist() == asked.tolist()
    torch.testing.assert_close(
        found.values.double(), exact.gather(1, found.token_ids), atol=1e-4, rtol=0
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
    for some, all_at_once in zip(compute(logits, rows, chosen, 4, none), whole, strict=True):
        torch.testing.assert_close(some, all_at_once)
