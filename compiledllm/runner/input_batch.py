"""The input tensors of one step, gathered from the scheduler's output and the request rows.

`StepLayout` lives on the host: numpy arrays that say which tokens of which rows the step computes,
packed into one array for a single copy to the device. `InputBatch` holds the tensors that the
device derives from the packed array.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compiledllm.graphs.buckets import StepShape
from compiledllm.kernels.backend import AttentionMetadata, make_row_bound
from compiledllm.kernels.step_inputs import (
    decode_inputs,
    last_token_metadata,
    mixed_inputs,
    with_empty_row,
)
from compiledllm.models.decoder import SampledTokens
from compiledllm.runner.request_table import RequestTable
from compiledllm.types import SchedulerOutput


@dataclass(frozen=True, slots=True)
class StepLayout:
    """A step as numpy arrays, one element per request of the step."""

    request_ids: list[str]
    rows: np.ndarray  # int64, request rows
    computed: np.ndarray  # int64, number of tokens whose KV is cached before the step
    counts: np.ndarray  # int64, number of tokens that the step computes
    samples: np.ndarray  # bool, whether the step draws the request's next token
    # For each snapshot that the step takes while it computes: index of the request in the step,
    # number of the request's tokens in the step before the snapshot, and the snapshot's row in the
    # tensors of `StateCaches`.
    kept_states: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(cls, step: SchedulerOutput, table: RequestTable, first_slot: int = 0) -> StepLayout:
        """The layout of a step. first_slot: the row of the first snapshot in `StateCaches`."""
        request_ids, computed, counts, _, samples = zip(*step.scheduled, strict=True)
        kept_states = tuple(
            (request_ids.index(request_id), count, first_slot + slot)
            for request_id, slot, count in step.kept_states
        )
        return cls(
            request_ids=list(request_ids),
            rows=table.rows_of(request_ids),
            computed=np.array(computed),
            counts=np.array(counts),
            samples=np.array(samples),
            kept_states=kept_states,
        )

    @classmethod
    def empty(cls) -> StepLayout:
        none = np.empty(0, np.int64)
        return cls([], none, none, none, np.empty(0, bool))

    @property
    def max_row_tokens(self) -> int:
        """1 if every request computes one token, its last one, and draws the next; otherwise 0."""
        return int(bool(self.samples.all()) and int(self.counts.max()) == 1)

    @property
    def shape(self) -> StepShape:
        """The step's size, without padding."""
        return StepShape(int(self.counts.sum()), len(self.rows), self.max_row_tokens)

    @property
    def sample_rows(self) -> np.ndarray:
        rows: np.ndarray = self.rows[self.samples]
        return rows

    @property
    def sample_positions(self) -> np.ndarray:
        """int64 [samples]: positions of the drawn tokens in their sequences."""
        positions: np.ndarray = (self.computed + self.counts)[self.samples]
        return positions

    @property
    def sample_request_ids(self) -> list[str]:
        if self.samples.all():
            return self.request_ids
        return list(itertools.compress(self.request_ids, self.samples))

    def inputs(self, table: RequestTable, shape: StepShape) -> np.ndarray:
        """The int64 array that `InputBatch.of` reads for a step of this shape.

        Padding is harmless. A decode step needs the request rows only.
        """
        if not shape.is_decode:
            return self.pack(table, shape)
        rows = np.full(shape.num_rows, table.padding_row, np.int64)
        rows[: len(self.rows)] = self.rows
        return rows

    def pack(self, table: RequestTable, shape: StepShape) -> np.ndarray:
        """The array that `InputBatch.unpack` reads, int64 [packed_size(shape)].

        Three lines of [tokens]: request row, position, token id (-1: on the device only). Then
        eight lines of [rows]: request row, tokens computed after the step, end of the row's tokens;
        index, row and position of the samples; tokens before the snapshot to keep, snapshot's row.
        Padding tokens belong to the padding row. Padding samples draw a token for the padding row
        at position 1, so that their query has one position, 0, to attend to.
        """
        row_ends, total = np.cumsum(self.counts), int(self.counts.sum())
        first_positions = self.computed - row_ends + self.counts
        positions = np.arange(total) + np.repeat(first_positions, self.counts)
        packed = np.zeros(packed_size(shape), np.int64)
        tokens = packed[: 3 * shape.num_tokens].reshape(3, -1)
        tokens[0] = table.padding_row
        tokens[:, :total] = (
            np.repeat(self.rows, self.counts),
            positions,
            _known_tokens(table, self.rows, self.computed, self.counts),
        )
        per_row = packed[3 * shape.num_tokens :].reshape(8, -1)
        per_row[0], per_row[2] = table.padding_row, total
        per_row[4], per_row[5] = table.padding_row, 1
        per_row[:3, : len(self.rows)] = self.rows, self.computed + self.counts, row_ends
        sample_rows = self.sample_rows
        per_row[3:6, : len(sample_rows)] = (
            row_ends[self.samples] - 1,
            sample_rows,
            self.sample_positions,
        )
        for index, count, row in self.kept_states:
            per_row[6:, index] = count, row
        return packed


def packed_size(shape: StepShape) -> int:
    return 3 * shape.num_tokens + 8 * shape.num_rows


@dataclass(frozen=True, slots=True)
class InputBatch:
    """A step's inputs, ragged: the tokens of all requests lie one request after the other.

    The metadata ends with an empty row, because torch.compile would specialise on a single row. No
    group's tensor is a view of another group's tensor, since torch.compile would specialise on
    shared storage, too.
    """

    input_ids: Tensor  # int64 [tokens]
    positions: Tensor  # int64 [tokens]
    attn: list[AttentionMetadata]  # one per group of layers
    rows: Tensor  # int64 [rows], request rows
    num_computed_tokens: Tensor  # int64 [rows], counts after this step
    logits_indices: Tensor  # int64 [samples], indices of the tokens whose logits are needed
    sample_rows: Tensor  # int64 [samples], request rows that draw a token
    sample_positions: Tensor  # int64 [samples], positions of the drawn tokens
    snapshots: Tensor | None = None  # int64 [2, rows], see `StateCaches.metadata`

    @classmethod
    def of(
        cls,
        shape: StepShape,
        inputs: Tensor,
        num_samples: int,
        table: RequestTable,
        block_sizes: Sequence[int],
    ) -> InputBatch:
        """Build the batch from the array of `StepLayout.inputs`, on the device.

        block_sizes: per group of layers, the tokens of a block. No host code depends on the
        array's values, so that a captured step serves all values.
        """
        if shape.is_decode:
            return cls.decode(inputs, table, block_sizes)
        return cls.unpack(inputs, shape, num_samples, table, block_sizes)

    @classmethod
    def unpack(
        cls,
        packed: Tensor,
        shape: StepShape,
        num_samples: int,
        table: RequestTable,
        block_sizes: Sequence[int],
    ) -> InputBatch:
        """Build the batch from the array of `StepLayout.pack`; no host code reads its values."""
        split = 3 * shape.num_tokens
        tokens, per_row = packed[:split].view(3, -1), packed[split:].view(8, -1)
        rows, lengths, _, indices, sample_rows, sample_positions = per_row[:6]
        input_ids, positions, attn = mixed_inputs(
            tokens, per_row[:3], table.last_token_ids, table.block_tables, block_sizes
        )
        return cls(
            input_ids=input_ids,
            positions=positions,
            attn=attn,
            rows=rows,
            num_computed_tokens=lengths,
            logits_indices=indices[:num_samples],
            sample_rows=sample_rows[:num_samples],
            sample_positions=sample_positions[:num_samples],
            snapshots=per_row[6:],
        )

    @classmethod
    def decode(cls, rows: Tensor, table: RequestTable, block_sizes: Sequence[int]) -> InputBatch:
        """Build a decode step of `rows`, int64 [rows], from the state of the request rows alone."""
        input_ids, positions, lengths, indices, attn = decode_inputs(
            rows, table.last_token_ids, table.num_computed_tokens, table.block_tables, block_sizes
        )
        return cls(
            input_ids=input_ids,
            positions=positions,
            attn=attn,
            rows=rows,
            num_computed_tokens=lengths,
            logits_indices=indices,
            sample_rows=rows,
            sample_positions=lengths,
        )

    def sampled_tokens(
        self, table: RequestTable, groups: Sequence[int], block_sizes: Sequence[int]
    ) -> SampledTokens:
        """The sampled tokens, with attention metadata for layers of these groups."""
        rows, positions = self.sample_rows, self.sample_positions
        attn = {
            group: last_token_metadata(
                rows, positions, table.block_tables[group], block_sizes[group]
            )
            for group in set(groups)
        }
        return SampledTokens(self.logits_indices, [attn[group] for group in groups])

    @classmethod
    def dummy(cls, num_tokens: int, table: RequestTable, num_samples: int = 1) -> InputBatch:
        """A batch of `num_tokens` padding tokens, which touch nothing but the null block.

        All `num_samples` draws are for the padding row.
        """
        zeros = torch.zeros(num_tokens, dtype=torch.int64, device=table.device)
        row = zeros[:1] + table.padding_row
        seq_lens = torch.tensor([1, 0], dtype=torch.int32, device=table.device)
        starts = torch.tensor([0, 1, 1], dtype=torch.int32, device=table.device)
        attn = [
            AttentionMetadata(
                zeros - 1,
                with_empty_row(group_table[row]),
                seq_lens,
                starts,
                make_row_bound(0, table.device),
            )
            for group_table in table.block_tables
        ]
        # A copy, because Dynamo would guard on both arguments being the same tensor.
        positions = zeros.clone()
        one, samples = zeros[:1] + 1, zeros.new_zeros(num_samples)
        sample_rows = samples + table.padding_row
        return cls(zeros, positions, attn, row, one, samples, sample_rows, samples + 1)


def _known_tokens(
    table: RequestTable, rows: np.ndarray, computed: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """int64 [tokens]: token ids; -1 for a token that is stored only on the device."""
    if len(rows) == 0:
        return rows
    if np.all(counts == 1) and all(
        computed[i] >= len(table.token_ids[row]) for i, row in enumerate(rows)
    ):
        return np.full(len(rows), -1)
    pieces = []
    for row, start, count in zip(rows, computed, counts, strict=True):
        piece = table.token_ids[row][start : start + count]
        pieces.append(piece if len(piece) == count else np.append(piece, -1))
    return np.concatenate(pieces)
