"""Log probabilities of chosen, most likely and named tokens, without a full [rows, vocab] table.

On a GPU, two Triton kernels find up to MAX_IN_TRITON most likely tokens and read the logits once.
On other devices, and for more tokens, plain torch computes a few rows at a time, so that its
workspace is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORKSPACE_BYTES = 128 * 2**20
MAX_IN_TRITON = 32  # maximum number of most likely tokens


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Columns: the chosen token, the most likely tokens in order, the tokens named by id.

    packed: int32 [rows, 2 * columns + 1]: token ids, the bits of their float32 log probabilities,
    and the chosen token's rank. A single tensor needs only one copy to the host.
    """

    packed: Tensor

    @property
    def num_columns(self) -> int:
        return self.packed.shape[1] // 2

    @property
    def token_ids(self) -> Tensor:
        """int32 [rows, columns]."""
        return self.packed[:, : self.num_columns]

    @property
    def values(self) -> Tensor:
        """float32 [rows, columns]."""
        return self.packed[:, self.num_columns : -1].view(torch.float32)

    @property
    def ranks(self) -> Tensor:
        """int32 [rows]: the chosen token's rank; 1 is the most likely token."""
        return self.packed[:, -1]


def token_logprobs(
    logits: Tensor, rows: Tensor, chosen: Tensor, num_best: int, named_ids: Tensor
) -> Logprobs:
    """Log probabilities for `rows` of the logits.

    logits: [at least rows, vocab], any float dtype. rows, chosen: int64 [rows], row indices of the
    logits, and the chosen tokens (a negative token counts as 0). num_best: number of most likely
    tokens to add. named_ids: int64 [rows, named], further token ids.
    """
    pack, num_best = _pack, min(num_best, logits.shape[-1])
    if logits.is_cuda and num_best <= MAX_IN_TRITON:
        from compiledllm.kernels.logprobs_triton import pack
    return Logprobs(pack(logits, rows, chosen, num_best, named_ids))


def _pack(logits: Tensor, rows: Tensor, chosen: Tensor, num_best: int, named_ids: Tensor) -> Tensor:
    chosen = chosen.clamp(min=0)
    chunk_size = max(1, WORKSPACE_BYTES // (12 * logits.shape[-1]))
    starts = range(0, len(rows), chunk_size)
    chunks = [slice(start, start + chunk_size) for start in starts]
    parts = [_best_logits(logits[rows[s]].float(), chosen[s], num_best) for s in chunks]
    best, best_ids, total, ranks = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    named = torch.cat((chosen[:, None], named_ids), dim=1)
    named_values = logits[rows[:, None], named].float()
    token_ids = torch.cat((named[:, :1], best_ids, named[:, 1:]), dim=1)
    values = torch.cat((named_values[:, :1], best, named_values[:, 1:]), dim=1) - total[:, None]
    return torch.cat((token_ids.int(), values.view(torch.int32), ranks.int()[:, None]), dim=1)


def _best_logits(logits: Tensor, chosen: Tensor, num_best: int) -> tuple[Tensor, ...]:
    """Best logits and ids [rows, num_best], logsumexp [rows] and ranks of `chosen` [rows]."""
    best = logits.topk(num_best, dim=-1)
    own = logits.gather(1, chosen[:, None])
    ranks = (logits > own).sum(-1) + 1
    return best.values, best.indices, logits.logsumexp(-1), ranks
