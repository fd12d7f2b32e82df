"""Draws a token from each row of logits: greedily, or by Gumbel-max sampling at a temperature.

The noise is a hash of (seed, position, token id), so a draw does not depend on other rows, the
batch size, or whether a graph was replayed. top_k, top_p and min_p each keep the tokens above some
logit, so together they are one threshold. All tokens that tie with the threshold are kept.

On a GPU, two Triton kernels read the logits once; greedy rows skip the noise, and unfiltered rows
skip the filters. On other devices plain torch does the same arithmetic.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

INVALID = -1  # result for a row of logits from which no token can be drawn
# top_p sorts only this many of the most likely tokens first, and all tokens if they do not suffice.
_CANDIDATES = 1024


class SamplingRows(NamedTuple):
    """Sampling parameters of the request rows: one element per row."""

    temperature: Tensor  # float32, 0: greedy
    seeds: Tensor  # int64
    top_k: Tensor  # int32, 0: all
    top_p: Tensor  # float32, 1: all
    min_p: Tensor  # float32, 0: all

    @classmethod
    def zeros(cls, num_rows: int, device: torch.device | str) -> SamplingRows:
        """Parameters of greedy rows."""
        dtypes = (torch.float32, torch.int64, torch.int32, torch.float32, torch.float32)
        return cls(*(torch.zeros(num_rows, dtype=dtype, device=device) for dtype in dtypes))

    def take(self, rows: Tensor) -> SamplingRows:
        return SamplingRows(*(values[rows] for values in self))


def draw_tokens(logits: Tensor, rows: Tensor, positions: Tensor, params: SamplingRows) -> Tensor:
    """Draw token ids int64 [draws]; INVALID for a row with a NaN or +inf, or with -inf only.

    logits: [draws, vocab], any float dtype, -inf for a token that must not be drawn. rows: int64
    [draws], request rows, which index `params`. positions: int64 [draws], positions of the drawn
    tokens.
    """
    if logits.is_cuda:
        from compiledllm.kernels.sampling_triton import draw_tokens as draw

        drawn: Tensor = draw(logits, rows, positions, params)
        return drawn
    params = params.take(rows)
    best, token_ids = logits.max(dim=-1)  # `best` is NaN for a row with a NaN
    sampling = (params.temperature > 0).nonzero().flatten()
    if len(sampling):
        chosen = params.take(sampling)
        scores = logits[sampling].float()
        scores = scores.masked_fill(scores < threshold(scores, chosen)[:, None], -math.inf)
        noise = gumbel_noise(chosen.seeds, positions[sampling], scores.shape[-1])
        token_ids[sampling] = noise.add_(scores / chosen.temperature[:, None]).argmax(dim=-1)
    return token_ids.masked_fill_(~best.isfinite(), INVALID)


def threshold(logits: Tensor, params: SamplingRows) -> Tensor:
    """float32 [rows]: the lowest logit that top_k, top_p and min_p keep; -inf keeps all.

    logits: float32 [rows, vocab]. params: of the same rows, with temperatures above 0.
    """
    min_kept = torch.full_like(params.temperature, -math.inf)
    top_k = params.top_k.long()
    if bool(top_k.any()):
        k = torch.where(top_k > 0, top_k, logits.shape[-1]).clamp(max=logits.shape[-1])
        best = logits.topk(int(torch.where(top_k > 0, k, 1).max()), dim=-1).values
        kth = best.gather(-1, (k - 1).clamp(max=best.shape[-1] - 1)[:, None]).squeeze(-1)
        min_kept = torch.where(top_k > 0, kth, min_kept)
    if bool((params.top_p < 1).any()):
        border = _top_p_border(logits, min_kept, params)
        min_kept = torch.where(params.top_p < 1, torch.maximum(min_kept, border), min_kept)
    if bool((params.min_p > 0).any()):
        min_kept = torch.maximum(
            min_kept, logits.amax(-1) + params.temperature * params.min_p.log()
        )
    return min_kept


def _top_p_border(logits: Tensor, min_kept: Tensor, params: SamplingRows) -> Tensor:
    """float32 [rows]: lowest logit in the smallest set of tokens whose mass reaches top_p.

    Only tokens with logits of at least `min_kept`, float32 [rows], count.
    """
    temperature = params.temperature[:, None]
    kept = logits.masked_fill(logits < min_kept[:, None], -math.inf)
    total = (kept / temperature).logsumexp(-1, keepdim=True)
    for count in (min(_CANDIDATES, logits.shape[-1]), logits.shape[-1]):
        best = kept.topk(count, dim=-1).values
        mass = (best / temperature - total).exp().cumsum(-1)
        short = mass < params.top_p[:, None]  # the tokens up to this one do not reach top_p
        if not bool(short.all(dim=-1).any()):
            break
    last = short.sum(-1).clamp(max=best.shape[-1] - 1)
    return best.gather(-1, last[:, None]).squeeze(-1)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise, float32 [rows, vocab]: a function of (seed, position, token id).

    The noise is -log of an exponential variable, which is precise for small values of the variable:
    small values give the large noise that decides the draw.
    """
    keys = _mix64(seeds ^ _mix64(positions + 1))[:, None]
    token_ids = torch.arange(vocab, device=seeds.device)
    bits = _mix32(_mix32(token_ids ^ (keys & _LOW)) ^ ((keys >> 32) & _LOW))
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)  # in (0, 1)
    return uniform.neg_().log1p_().neg_().log_().neg_()


_LOW = 0xFFFFFFFF


def _mix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser on wrapping int64: every output bit depends on every input bit."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _mix32(x: Tensor) -> Tensor:
    """A 32-bit mixing function on int64 (Wellons's "lowbias32")."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)
