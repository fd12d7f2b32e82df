"""The tensors of layers that keep a state of fixed size for each request.

A request's state lies at its row of the `RequestTable`; padding has the row behind all requests.
Snapshots lie behind the rows, so that they are copied within a tensor.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.backend import AttentionMetadata, StateMetadata
from compiledllm.models.layer_cache import State
from compiledllm.runner.kv_cache import lazy_zeros
from compiledllm.runner.kv_layout import KVLayout


class StateCaches:
    """tensors: for each layer with a state, its tensors, [rows and slots of snapshots, ...].

    Equal tensors of all layers lie in one buffer, [layers, rows and slots, ...], so that a state is
    copied by one kernel for each kind of tensor.
    """

    def __init__(
        self, layout: KVLayout, max_num_seqs: int, device: torch.device, num_snapshots: int = 0
    ) -> None:
        self._padding_row = max_num_seqs
        self._first_slot = max_num_seqs + 1
        size = self._first_slot + num_snapshots
        kinds = Counter(part for state in layout.states.values() for part in _kinds(state))
        self._buffers = {
            kind: lazy_zeros((count, size, *kind.shape), kind.dtype, device)
            for kind, count in kinds.items()
        }
        layers = {kind: iter(buffer) for kind, buffer in self._buffers.items()}
        self.tensors: list[list[Tensor]] = [
            [next(layers[kind]) for kind in _kinds(state)] for state in layout.states.values()
        ]

    def save(self, row: int, slot: int) -> None:
        """Copy the state of a request row to the slot of a snapshot."""
        self._copy(row, self._first_slot + slot)

    def restore(self, row: int, slot: int) -> None:
        """Copy a snapshot to a request row."""
        self._copy(self._first_slot + slot, row)

    def _copy(self, source: int, target: int) -> None:
        for buffer in self._buffers.values():
            buffer[:, target].copy_(buffer[:, source])

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


class _Kind(NamedTuple):
    part: int  # of a layer's state, as two of its tensors must not share storage
    shape: tuple[int, ...]
    dtype: torch.dtype


def _kinds(state: State) -> list[_Kind]:
    return [_Kind(index, *part) for index, part in enumerate(state.parts)]
