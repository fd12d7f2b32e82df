"""The tensors of one step, gathered from the scheduler's lines and the request rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.attention import AttentionMetadata
from compiledllm.runner.request_table import RequestTable, to_device
from compiledllm.types import SchedulerOutput


@dataclass(frozen=True, slots=True)
class InputBatch:
    """A step's inputs. Tokens of all requests lie flat, one request after the other.

    The metadata has one empty row more than there are requests: then a step has fewer tokens than
    rows exactly if every request has one, which is how the kernels know a decode step, and there
    are never fewer than two rows, on which torch.compile would specialise.
    """

    input_ids: Tensor  # int64 [tokens]
    positions: Tensor  # int64 [tokens]
    attn: AttentionMetadata
    rows: Tensor  # int64 [rows], without padding
    logits_indices: Tensor  # int64 [samples], the tokens whose next token is drawn
    sample_rows: np.ndarray  # int64 [samples], their request rows
    sample_positions: np.ndarray  # int64 [samples], where the drawn tokens will stand
    sample_request_ids: list[str]

    @classmethod
    def gather(cls, step: SchedulerOutput, table: RequestTable, block_size: int) -> InputBatch:
        lines = step.scheduled
        rows = np.array([table.row_of(line.request_id) for line in lines])
        computed = np.array([line.num_computed_tokens for line in lines])
        counts = np.array([line.num_scheduled_tokens for line in lines])
        samples = np.array([line.samples for line in lines])
        ends = np.cumsum(counts)

        row_of_token = np.repeat(rows, counts)
        positions = np.arange(ends[-1]) + np.repeat(computed - ends + counts, counts)
        known = _known_tokens(table, rows, computed, counts)

        device = table.device
        rows_t = to_device(rows, device)
        row_of_token_t = to_device(row_of_token, device)
        positions_t = to_device(positions, device)
        known_t = to_device(known, device)
        blocks = table.block_tables[row_of_token_t, positions_t // block_size]
        attn = AttentionMetadata(
            slot_mapping=blocks.long() * block_size + positions_t % block_size,
            block_tables=_with_empty_row(table.block_tables[rows_t]),
            seq_lens=to_device(np.append(computed + counts, 0), device, torch.int32),
            query_start_loc=to_device(np.concatenate(([0], ends, ends[-1:])), device, torch.int32),
        )
        return cls(
            input_ids=torch.where(known_t < 0, table.last_token_ids[row_of_token_t], known_t),
            positions=positions_t,
            attn=attn,
            rows=rows_t,
            logits_indices=to_device(ends[samples] - 1, device),
            sample_rows=rows[samples],
            sample_positions=(computed + counts)[samples],
            sample_request_ids=[line.request_id for line in lines if line.samples],
        )

    @classmethod
    def decode(cls, rows: Tensor, table: RequestTable, block_size: int) -> InputBatch:
        """A decode step of `rows` (int64 [rows]) from device state alone, so it can be captured."""
        positions = table.num_computed_tokens[rows]
        block_tables = _with_empty_row(table.block_tables[rows])
        blocks = block_tables[:-1].gather(1, positions[:, None] // block_size).squeeze(1)
        starts = torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device)
        attn = AttentionMetadata(
            slot_mapping=blocks.long() * block_size + positions % block_size,
            block_tables=block_tables,
            seq_lens=F.pad(positions + 1, (0, 1)).int(),
            query_start_loc=torch.cat((starts, starts[-1:])),
        )
        none = np.empty(0, np.int64)
        return cls(table.last_token_ids[rows], positions, attn, rows, rows, none, none, [])

    @classmethod
    def dummy(cls, num_tokens: int, max_blocks: int, device: torch.device) -> InputBatch:
        """Padding only: `num_tokens` tokens that belong to a row of the null block."""
        zeros = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        tables = torch.zeros(2, max_blocks, dtype=torch.int32, device=device)
        lengths = torch.tensor([1, 0], dtype=torch.int32, device=device)
        starts = torch.tensor([0, 1, 1], dtype=torch.int32, device=device)
        attn = AttentionMetadata(zeros - 1, tables, lengths, starts)
        none = np.empty(0, np.int64)
        return cls(zeros, zeros, attn, zeros[:0], zeros[:1], none, none, [])


def _known_tokens(
    table: RequestTable, rows: np.ndarray, computed: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Token ids the host has; -1 where the token was sampled and lives in the row on the device."""
    if np.all(counts == 1) and all(
        computed[i] >= len(table.token_ids[row]) for i, row in enumerate(rows)
    ):
        return np.full(len(rows), -1)
    pieces = []
    for row, start, count in zip(rows, computed, counts, strict=True):
        piece = table.token_ids[row][start : start + count]
        pieces.append(piece if len(piece) == count else np.append(piece, -1))
    return np.concatenate(pieces)


def _with_empty_row(block_tables: Tensor) -> Tensor:
    return F.pad(block_tables, (0, 0, 0, 1))
