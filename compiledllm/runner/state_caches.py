"""The tensors of layers that keep a state of fixed size for each request.

A request's state lies at the request's row of the `RequestTable`. The row after all requests is for
padding. The rows after that are the slots of snapshots, so a snapshot is a copy within a tensor.
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
    """The state tensors of all layers.

    tensors: for each layer with a state, its tensors, each [request rows + 1 + slots, ...]. Tensors
    of equal shape and dtype share one buffer, [layers, request rows + 1 + slots, ...], so that one
    kernel per buffer copies a request's state.
    """

    def __init__(
        self, layout: KVLayout, max_num_seqs: int, device: torch.device, num_snapshots: int = 0
    ) -> None:
        self._padding_row = max_num_seqs
        self.first_slot = max_num_seqs + 1  # the row of the first snapshot
        size = self.first_slot + num_snapshots
        kinds = Counter(part for state in layout.states.values() for part in _kinds(state))
        self._buffers = {
            kind: lazy_zeros((count, size, *kind.shape), kind.dtype, device)
            for kind, count in kinds.items()
        }
        layers = {kind: iter(buffer) for kind, buffer in self._buffers.items()}
        # Steps' tensors are inference tensors, and compiled code guards on that.
        with torch.inference_mode():
            self._no_snapshots = torch.zeros(size, 2, dtype=torch.int64, device=device)
        self.tensors: list[list[Tensor]] = [
            [next(layers[kind]) for kind in _kinds(state)] for state in layout.states.values()
        ]

    def save(self, row: int, slot: int) -> None:
        """Copy the state of a request row to the slot of a snapshot."""
        self._copy(row, self.first_slot + slot)

    def restore(self, row: int, slot: int) -> None:
        """Copy a snapshot to a request row."""
        self._copy(self.first_slot + slot, row)

    def _copy(self, source: int, target: int) -> None:
        for buffer in self._buffers.values():
            buffer[:, target].copy_(buffer[:, source])

    def metadata(
        self, rows: Tensor, attn: AttentionMetadata, snapshots: Tensor | None = None
    ) -> list[StateMetadata]:
        """The metadata of a step for each layer with a state.

        rows: int64 [rows], request rows. attn: the metadata of any attention layer in this step;
        its rows after the first `len(rows)` are empty. snapshots: int64 [2, rows]: for each row,
        the number of its tokens after which the state is stored as a snapshot (0: no snapshot), and
        the row of the tensors that receives the snapshot; None: the step stores no snapshots.
        """
        if not self.tensors:
            return []
        num_rows = len(attn.seq_lens)
        num_empty = num_rows - len(rows)
        rows = F.pad(rows, (0, num_empty), value=self._padding_row)
        per_row = self._no_snapshots[:num_rows]  # [rows, 2]
        if snapshots is not None:
            per_row = F.pad(snapshots.T, (0, 0, 0, num_empty)).contiguous()
        of_rows = attn.query_start_loc, attn.seq_lens, attn.row_bound
        return [StateMetadata(rows, *of_rows, per_row)] * len(self.tensors)


class _Kind(NamedTuple):
    part: int  # index in a layer's state: tensors of one layer must not share storage
    shape: tuple[int, ...]
    dtype: torch.dtype


def _kinds(state: State) -> list[_Kind]:
    return [_Kind(index, *part) for index, part in enumerate(state.parts)]
