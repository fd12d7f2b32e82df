"""Draws the next token of each row: greedy, or Gumbel-max after temperature, top-k and top-p.

The noise is a hash of (seed, position, token id): a request's draw depends on nothing else, so it
is the same alone, in a crowd, after a preemption and on every device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compiledllm.runner.request_table import RequestTable, to_device


class Sampler:
    """Vectorised over rows; rows that ask for nothing special cost nothing special."""

    def sample(
        self, logits: Tensor, table: RequestTable, rows: np.ndarray, positions: np.ndarray
    ) -> Tensor:
        """Token ids int64 [rows].

        logits: [rows, vocab], overwritten. rows: request rows. positions: where the drawn tokens
        will stand in their sequences.
        """
        self._ban_early_stops(logits, table, rows, positions)
        temperature = table.temperature[rows]
        if not temperature.any():
            return logits.argmax(dim=-1)
        device = logits.device
        scale = to_device(np.where(temperature > 0, temperature, 1.0), device, torch.float32)
        scores = logits.float() / scale[:, None]
        filtered = (temperature > 0) & ((table.top_k[rows] > 0) | (table.top_p[rows] < 1))
        if filtered.any():
            chosen = np.flatnonzero(filtered)
            index = to_device(chosen, device)
            scores[index] = filter_top_k_top_p(
                scores[index],
                to_device(table.top_k[rows[chosen]], device),
                to_device(table.top_p[rows[chosen]], device, torch.float32),
            )
        seeds = to_device(table.seed[rows], device)
        noise = gumbel_noise(seeds, to_device(positions, device), scores.shape[-1])
        greedy = to_device(temperature == 0, device, torch.bool)
        return torch.where(greedy[:, None], scores, scores + noise).argmax(dim=-1)

    def _ban_early_stops(
        self, logits: Tensor, table: RequestTable, rows: np.ndarray, positions: np.ndarray
    ) -> None:
        """No stop token before `min_tokens` tokens are out."""
        for index in np.flatnonzero(positions < table.first_stop_position[rows]):
            logits[index, table.stop_token_ids[rows[index]]] = float("-inf")


def filter_top_k_top_p(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set all but the top-k, then all but the smallest set reaching top_p, to -inf.

    scores: float32 [rows, vocab]; top_k: [rows], 0 for all; top_p: [rows] in (0, 1]. The most
    likely token always stays. Ties at the k-th place all stay, as in transformers.
    """
    vocab = scores.shape[-1]
    ordered, order = scores.sort(dim=-1, descending=True)
    k = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab)
    kth = ordered.gather(-1, (k - 1)[:, None])
    ordered = ordered.masked_fill(ordered < kth, float("-inf"))
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the more likely tokens
    drop = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    drop[:, 0] = False
    ordered = ordered.masked_fill(drop, float("-inf"))
    return torch.empty_like(scores).scatter_(-1, order, ordered)


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
