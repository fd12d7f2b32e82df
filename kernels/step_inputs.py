"""What a step reads from the request rows before the model runs, and writes to them after it.

On a GPU one Triton kernel for each, as a captured decode step pays for every launch. Elsewhere
plain torch does the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.attention import AttentionMetadata


class DecodeInputs(NamedTuple):
    """Of a step in which every row has one token, the one that was drawn last."""

    input_ids: Tensor  # int64 [rows]
    positions: Tensor  # int64 [rows]
    lengths: Tensor  # int64 [rows], of the contexts with these tokens
    indices: Tensor  # int64 [rows], 0, 1, 2, ...
    attn: list[AttentionMetadata]  # of each group of layers, with an empty row at the end


def decode_inputs(
    rows: Tensor,
    last_token_ids: Tensor,
    num_computed_tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
) -> DecodeInputs:
    """Of some request rows, int64 [rows], from the state of all of them.

    last_token_ids, num_computed_tokens: int64 [request rows]. block_tables: int32 [groups, request
    rows, max_blocks]. Each group's slots and table are tensors of their own.
    """
    if rows.is_cuda:
        from compiledllm.kernels.step_inputs_triton import gather

        found: DecodeInputs = gather(
            rows, last_token_ids, num_computed_tokens, block_tables, block_size
        )
        return found
    positions = num_computed_tokens[rows]
    seq_lens = F.pad(positions + 1, (0, 1)).int()
    starts = one_token_each(rows)
    attn = []
    for of_group in block_tables:
        tables = with_empty_row(of_group[rows])
        blocks = tables[:-1].gather(1, (positions // block_size)[:, None]).squeeze(1)
        slots = slots_in(blocks, positions, block_size)
        attn.append(AttentionMetadata(slots, tables, seq_lens, starts))
    indices = starts[: len(rows)].long()
    return DecodeInputs(last_token_ids[rows], positions, positions + 1, indices, attn)


def advance(
    rows: Tensor,
    lengths: Tensor,
    sample_rows: Tensor,
    drawn: Tensor,
    last_token_ids: Tensor,
    num_computed_tokens: Tensor,
) -> None:
    """Write a step's results to the request rows, of which the last is for padding.

    rows, lengths: int64 [rows], how many tokens of which row are in the cache now; those of the
    padding row stay 0, or it would outgrow its block table. sample_rows, drawn: int64 [rows], a
    row's next token, 0 for a negative one. No row but that of padding appears twice.
    """
    if rows.is_cuda:
        from compiledllm.kernels.step_inputs_triton import scatter

        scatter(rows, lengths, sample_rows, drawn, last_token_ids, num_computed_tokens)
        return
    last_token_ids[sample_rows] = drawn.clamp(min=0)
    num_computed_tokens[rows] = lengths
    num_computed_tokens[-1:].zero_()


def one_token_each(rows: Tensor) -> Tensor:
    """The `query_start_loc` of rows with one token each, and the empty row."""
    starts = torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device)
    return torch.cat((starts, starts[-1:]))


def slots_in(blocks: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """int64 [tokens]: where in the cache each token lies. blocks: its own."""
    return blocks.long() * block_size + positions % block_size


def with_empty_row(block_tables: Tensor) -> Tensor:
    return F.pad(block_tables, (0, 0, 0, 1))
