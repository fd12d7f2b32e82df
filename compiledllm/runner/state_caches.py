"""The tensors of layers that keep a state of fixed size for each request.

A request's state lies at its row of the `RequestTable`; padding has the row behind all requests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.backend import AttentionMetadata, StateMetadata
from compiledllm.runner.kv_cache import lazy_zeros
from compiledllm.runner.kv_layout import KVLayout


class StateCaches:
    """tensors: for each layer with a state, its tensors, [rows, ...]."""

    def __init__(self, layout: KVLayout, max_num_seqs: int, device: torch.device) -> None:
        self._padding_row = max_num_seqs
        num_rows = max_num_seqs + 1
        self.tensors: list[list[Tensor]] = [
            [lazy_zeros((num_rows, *shape), dtype, device) for shape, dtype in state.parts]
            for state in layout.states.values()
        ]

    def metadata(self, rows: Tensor, attn: AttentionMetadata) -> list[StateMetadata]:
        """What each layer must know of a step, given the metadata of any attention layer.

        rows: int64 [rows], request rows. The metadata ends with an empty row, as attention's does.
        """
        if not self.tensors:
            return []
        rows = F.pad(rows, (0, 1), value=self._padding_row)
        metadata = StateMetadata(rows, attn.query_start_loc, attn.seq_lens, attn.row_bound)
        return [metadata] * len(self.tensors)
