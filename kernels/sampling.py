"""Drawing a token from each row of logits: the most likely one, or Gumbel-max at a temperature.

The noise is a hash of (seed, position, token id), so a draw depends on nothing else: not on the
other rows, the batch's size, or whether a graph was replayed. On a GPU one Triton kernel reads the
logits once; rows that are greedy pay for no noise. Elsewhere plain torch does the same arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_tokens(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Token ids int64 [rows].

    logits: [rows, vocab], any float dtype, -inf for a token that must not be drawn. temperature:
    float32 [rows], 0 for greedy. seeds, positions: int64 [rows]; where the token will stand.
    """
    if logits.is_cuda:
        from compiledllm.kernels.sampling_triton import draw_tokens as draw

        drawn: Tensor = draw(logits, temperature, seeds, positions)
        return drawn
    greedy = temperature == 0
    if bool(greedy.all()):
        return logits.argmax(dim=-1)
    scores = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    noise = gumbel_noise(seeds, positions, scores.shape[-1])
    return torch.where(greedy[:, None], scores, scores + noise).argmax(dim=-1)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise, float32 [rows, vocab]: a function of (seed, position, token id)."""
    keys = _mix(seeds ^ _mix(positions + 1))
    counters = torch.arange(1, vocab + 1, device=seeds.device)
    bits = _mix(keys[:, None] + counters * -7046029254386353131)  # odd: 2^64 / golden ratio
    uniform = ((bits >> 12) & ((1 << 52) - 1)).double().add_(0.5).mul_(2.0**-52)  # never 0 or 1
    return uniform.log_().neg_().log_().neg_().float()


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on wrapping int64: every output bit depends on every input bit."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
