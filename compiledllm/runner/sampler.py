"""Draws the next token of each row: what a request asks for beyond a temperature happens here.

Temperature and noise are `kernels.sampling`'s; this restricts the logits first (min_tokens, top-k,
top-p), for the rows that ask for it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compiledllm.kernels.sampling import draw_tokens
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
        device = logits.device
        self._ban_early_stops(logits, table, rows, positions)
        chosen = np.flatnonzero(table.filters[rows])
        temperature = table.temperature[rows]
        if len(chosen):
            index = to_device(chosen, device)
            logits = logits.float()
            heat = to_device(temperature[chosen], device, torch.float32)
            logits[index] = filter_top_k_top_p(
                logits[index] / heat[:, None],
                to_device(table.top_k[rows[chosen]], device),
                to_device(table.top_p[rows[chosen]], device, torch.float32),
            )
            temperature[chosen] = 1.0  # applied already
        return draw_tokens(
            logits,
            to_device(temperature, device, torch.float32),
            to_device(table.seed[rows], device),
            to_device(positions, device),
        )

    def asks(self, table: RequestTable, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """bool [rows]: which of them ask for more than a temperature."""
        asking: np.ndarray = table.filters[rows] | (positions < table.first_stop_position[rows])
        return asking

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
