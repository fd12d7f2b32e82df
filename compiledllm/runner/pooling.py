"""Pools hidden states of request rows into one vector per prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compiledllm.pooling_params import PoolingKind
from compiledllm.runner.device import to_device

if TYPE_CHECKING:
    from compiledllm.runner.input_batch import StepLayout

_LAST, _MEAN = 1, 2
_CODES = {None: 0, "last": _LAST, "mean": _MEAN}


class PoolingRows:
    """Which request rows pool, and how. On the host, except for the running sums of means.

    are_used: whether any row pools. means: bool [rows], the rows that need the hidden states of
    all their tokens.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._codes = np.zeros(num_rows, np.int8)
        self._num_used = 0
        self._sums: Tensor | None = None  # float32 [rows, hidden], made for the first mean
        self._device = device
        self.means = np.zeros(num_rows, bool)

    @property
    def are_used(self) -> bool:
        return self._num_used > 0

    def fill(self, row: int, kind: PoolingKind | None) -> None:
        self._codes[row] = _CODES[kind]
        self.means[row] = kind == "mean"
        self._num_used += kind is not None

    def release(self, row: int) -> None:
        self._num_used -= bool(self._codes[row])
        self._codes[row], self.means[row] = 0, False

    def of(self, rows: np.ndarray) -> np.ndarray:
        """bool [rows]: whether each of these rows pools."""
        found: np.ndarray = self._codes[rows] > 0
        return found

    def add_to_sums(self, layout: StepLayout, hidden: Tensor) -> None:
        """Add a step's hidden states, [tokens, hidden], to the sums of rows that want a mean."""
        if self._sums is None:
            shape = len(self._codes), hidden.shape[1]
            self._sums = torch.zeros(shape, dtype=torch.float32, device=self._device)
        row_ends = np.cumsum(layout.counts)
        for index in np.flatnonzero(self.means[layout.rows]):
            row, end = int(layout.rows[index]), int(row_ends[index])
            added = hidden[end - int(layout.counts[index]) : end].sum(0, dtype=torch.float32)
            if layout.computed[index] > 0:
                self._sums[row] += added
            else:
                self._sums[row] = added

    def pool(self, layout: StepLayout, sampled: Tensor) -> tuple[list[str], Tensor]:
        """The vectors of prompts that end in this step: request ids, and float32 [ids, hidden].

        sampled: [samples, hidden], hidden states of the last tokens.
        """
        rows, ids = layout.sample_rows, layout.sample_request_ids
        index = np.flatnonzero(self._codes[rows])
        vectors = sampled[to_device(index, self._device)].float()
        means = np.flatnonzero(self.means[rows[index]])
        if len(means):
            assert self._sums is not None
            lengths = layout.sample_positions[index[means]]
            packed = to_device(np.array([means, rows[index[means]], lengths]), self._device)
            vectors[packed[0]] = self._sums[packed[1]] / packed[2, :, None]
        return [ids[i] for i in index], vectors
