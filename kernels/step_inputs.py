"""Gathers a step's inputs from the request rows, and writes the step's results back to the rows.

A request row is the index of a running request in the device's tensors of all running requests:
last token, number of computed tokens, block tables. A row of a step is one request of the step.

On a GPU, one Triton kernel per cache group gathers the inputs and one kernel writes the results,
because every launch costs time even in a captured step. On other devices plain torch does the same.

All metadata ends with an empty row: with a single row, torch.compile would specialise on size 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.backend import AttentionMetadata, make_row_bound


class DecodeInputs(NamedTuple):
    """Inputs of a step in which every row has one token, the row's last drawn token."""

    input_ids: Tensor  # int64 [rows]
    positions: Tensor  # int64 [rows]
    lengths: Tensor  # int64 [rows], context lengths including these tokens
    indices: Tensor  # int64 [rows], 0, 1, 2, ...: index of each row's only token in the step
    attn: list[AttentionMetadata]  # for each cache group, with an empty row at the end


class MixedInputs(NamedTuple):
    """Inputs of a step in which rows have any number of tokens."""

    input_ids: Tensor  # int64 [tokens]
    positions: Tensor  # int64 [tokens]
    attn: list[AttentionMetadata]  # for each cache group, with an empty row at the end


def decode_inputs(
    rows: Tensor,
    last_token_ids: Tensor,
    num_computed_tokens: Tensor,
    block_tables: Sequence[Tensor],
    block_sizes: Sequence[int],
) -> DecodeInputs:
    """Gather the inputs of a decode step from the request rows.

    rows: int64 [rows], the request row of each row of the step. last_token_ids,
    num_computed_tokens: int64 [request rows]. block_tables, block_sizes: for each cache group,
    int32 [request rows, max_blocks] and the number of tokens per block. In the result, the slots
    and block tables of different groups do not share storage, since torch.compile would specialise
    on shared storage.
    """
    if rows.is_cuda:
        from compiledllm.kernels.step_inputs_triton import gather

        found: DecodeInputs = gather(
            rows, last_token_ids, num_computed_tokens, block_tables, block_sizes
        )
        return found
    positions = num_computed_tokens[rows]
    seq_lens = F.pad(positions + 1, (0, 1)).int()
    starts = one_token_each(rows)
    attn = []
    for group_table, block_size in zip(block_tables, block_sizes, strict=True):
        tables = with_empty_row(group_table[rows])
        blocks = tables[:-1].gather(1, (positions // block_size)[:, None]).squeeze(1)
        slots = slots_in(blocks, positions, block_size)
        bound = make_row_bound(1, rows.device)
        attn.append(AttentionMetadata(slots, tables, seq_lens, starts, bound))
    indices = starts[: len(rows)].long()
    return DecodeInputs(last_token_ids[rows], positions, positions + 1, indices, attn)


def mixed_inputs(
    tokens: Tensor,
    rows: Tensor,
    last_token_ids: Tensor,
    block_tables: Sequence[Tensor],
    block_sizes: Sequence[int],
) -> MixedInputs:
    """Gather the inputs of a ragged step, in which the tokens of each row are contiguous.

    tokens: int64 [3, tokens]: request row, position and token id; a negative id stands for the
    row's last drawn token. rows: int64 [3, rows]: request row, context length including the step's
    tokens, and end of the row's tokens in the step. Other parameters as in `decode_inputs`.
    """
    if rows.is_cuda:
        from compiledllm.kernels.step_inputs_triton import unpack

        found: MixedInputs = unpack(tokens, rows, last_token_ids, block_tables, block_sizes)
        return found
    row_of_token, positions, ids = tokens
    table_rows, lengths, ends = rows
    seq_lens = F.pad(lengths, (0, 1)).int()
    starts = torch.cat((F.pad(ends, (1, 0)), ends[-1:])).int()
    attn = []
    for group_table, block_size in zip(block_tables, block_sizes, strict=True):
        slots = slots_in(group_table[row_of_token, positions // block_size], positions, block_size)
        tables = with_empty_row(group_table[table_rows])
        bound = make_row_bound(0, rows.device)
        attn.append(AttentionMetadata(slots, tables, seq_lens, starts, bound))
    input_ids = torch.where(ids < 0, last_token_ids[row_of_token], ids)
    return MixedInputs(input_ids, positions, attn)


def last_token_metadata(
    rows: Tensor, lengths: Tensor, group_table: Tensor, block_size: int
) -> AttentionMetadata:
    """Attention metadata of one token per row: the last token of a context whose KV is stored.

    No token is stored again, so all slots are -1.

    rows, lengths: int64 [rows], request rows and their context lengths, at least 1. group_table:
    int32 [request rows, max_blocks], the block table of a cache group.
    """
    if rows.is_cuda:
        from compiledllm.kernels.step_inputs_triton import gather_last_tokens

        found: AttentionMetadata = gather_last_tokens(rows, lengths, group_table, block_size)
        return found
    return AttentionMetadata(
        slot_mapping=torch.full_like(rows, -1),
        block_tables=with_empty_row(group_table[rows]),
        seq_lens=F.pad(lengths, (0, 1)).int(),
        query_start_loc=one_token_each(rows),
        row_bound=make_row_bound(1, rows.device),
    )


def advance(
    rows: Tensor,
    lengths: Tensor,
    sample_rows: Tensor,
    drawn: Tensor,
    last_token_ids: Tensor,
    num_computed_tokens: Tensor,
) -> None:
    """Write a step's results to the request rows. The last request row is for padding.

    rows, lengths: int64 [rows], request rows and their numbers of computed tokens after the step.
    The padding row's number stays 0; otherwise the row would outgrow its block table. sample_rows,
    drawn: int64 [samples], request rows and their drawn tokens; a negative token is written as 0.
    Only the padding row may appear more than once. last_token_ids, num_computed_tokens: int64
    [request rows], mutated.
    """
    if rows.is_cuda:
        from compiledllm.kernels.step_inputs_triton import scatter

        scatter(rows, lengths, sample_rows, drawn, last_token_ids, num_computed_tokens)
        return
    last_token_ids[sample_rows] = drawn.clamp(min=0)
    num_computed_tokens[rows] = lengths
    num_computed_tokens[-1:].zero_()


def one_token_each(rows: Tensor) -> Tensor:
    """The `query_start_loc` of rows with one token each, followed by the empty row."""
    starts = torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device)
    return torch.cat((starts, starts[-1:]))


def slots_in(blocks: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """The slot of each token, int64 [tokens]. blocks: [tokens], the id of each token's block.

    Padding, whose block is the null block, has slot -1 and is not stored: its keys may be NaN, and
    masked positions read the null block.
    """
    slots = blocks.long() * block_size + positions % block_size
    return slots.where(blocks > 0, -1)


def with_empty_row(block_tables: Tensor) -> Tensor:
    return F.pad(block_tables, (0, 0, 0, 1))
