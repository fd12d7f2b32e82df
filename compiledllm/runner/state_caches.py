"""The tensors of layers that keep a state of fixed size for each request.

A request's state lies at its row of the `RequestTable`; padding has the row behind all requests.
Snapshots lie behind the rows, so that they are copied within a tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.backend import AttentionMetadata, StateMetadata
from compiledllm.runner.device import to_device
from compiledllm.runner.kv_cache import lazy_zeros
from compiledllm.runner.kv_layout import KVLayout


class StateCaches:
    """tensors: for each layer with a state, its tensors, [rows and slots of snapshots, ...]."""

    def __init__(
        self, layout: KVLayout, max_num_seqs: int, device: torch.device, num_snapshots: int = 0
    ) -> None:
        self._device = device
        self._padding_row = max_num_seqs
        self._first_slot = max_num_seqs + 1
        size = self._first_slot + num_snapshots
        self.tensors: list[list[Tensor]] = [
            [lazy_zeros((size, *shape), dtype, device) for shape, dtype in state.parts]
            for state in layout.states.values()
        ]

    def save(self, rows: np.ndarray, slots: Sequence[int]) -> None:
        """Copy the states of request rows, int64 [slots], to slots of snapshots."""
        self._copy(rows, np.array(slots) + self._first_slot)

    def restore(self, rows: np.ndarray, slots: Sequence[int]) -> None:
        """Copy snapshots to request rows, int64 [slots]."""
        self._copy(np.array(slots) + self._first_slot, rows)

    def _copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        index = to_device(np.stack((sources, targets)), self._device)
        for part in itertools.chain.from_iterable(self.tensors):
            part.index_copy_(0, index[1], part.index_select(0, index[0]))

    def metadata(self, rows: Tensor, attn: AttentionMetadata) -> list[StateMetadata]:
        """What each layer must know of a step, given the metadata of any attention layer.

        rows: int64 [rows], request rows. Further rows of `attn`, which are empty, are padding's.
        """
        if not self.tensors:
            return []
        num_empty = len(attn.seq_lens) - len(rows)
        rows = F.pad(rows, (0, num_empty), value=self._padding_row)
        metadata = StateMetadata(rows, attn.query_start_loc, attn.seq_lens, attn.row_bound)
        return [metadata] * len(self.tensors)
