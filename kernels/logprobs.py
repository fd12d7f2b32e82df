"""Log probabilities of chosen tokens and of the most likely ones, without a table of all of them.

On a GPU a few of them come from two Triton kernels that read the logits once. Elsewhere, and for
many, plain torch does it a few rows at a time, so that what it needs beside the logits is bounded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE_BYTES = 128 * 2**20
MOST_IN_TRITON = 32  # of the most likely tokens


class Logprobs(NamedTuple):
    """Columns: the chosen token, the most likely ones in order, those asked for by id."""

    token_ids: Tensor  # int64 [rows, columns]
    values: Tensor  # float32 [rows, columns]
    ranks: Tensor  # int64 [rows], of the chosen token: 1 is the most likely


def token_logprobs(
    logits: Tensor, rows: Tensor, chosen: Tensor, num_best: int, asked_for: Tensor
) -> Logprobs:
    """Of `rows` of the logits.

    logits: [any, vocab], any float dtype. rows, chosen: int64 [rows], which logits and which token.
    num_best: of the most likely tokens. asked_for: int64 [rows, any], further token ids.
    """
    num_best = min(num_best, logits.shape[-1])
    if logits.is_cuda and num_best <= MOST_IN_TRITON:
        from compiledllm.kernels.logprobs_triton import best_logits

        best, best_ids, total, ranks = best_logits(logits, rows, chosen, num_best)
    else:
        at_once = max(1, WORKSPACE_BYTES // (12 * logits.shape[-1]))
        starts = range(0, len(rows), at_once)
        some = [slice(start, start + at_once) for start in starts]
        parts = [_best_logits(logits[rows[s]].float(), chosen[s], num_best) for s in some]
        best, best_ids, total, ranks = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    named = torch.cat((chosen[:, None], asked_for), dim=1)
    values = logits[rows[:, None], named].float()
    token_ids = torch.cat((named[:, :1], best_ids, named[:, 1:]), dim=1)
    values = torch.cat((values[:, :1], best, values[:, 1:]), dim=1)
    return Logprobs(token_ids, values - total[:, None], ranks)


def _best_logits(logits: Tensor, chosen: Tensor, num_best: int) -> tuple[Tensor, ...]:
    """Values and ids [rows, num_best] of the best, the logarithm of the mass, the chosen's rank."""
    best = logits.topk(num_best, dim=-1)
    own = logits.gather(1, chosen[:, None])
    ranks = (logits > own).sum(-1) + 1
    return best.values, best.indices, logits.logsumexp(-1), ranks
