"""`step_inputs` in Triton: the kernels around a captured decode step's model."""

# Triton functions are typed by what they are called with.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compiledllm.kernels.attention import AttentionMetadata
from compiledllm.kernels.step_inputs import DecodeInputs

_CHUNK = 1024  # entries of a block table, for one program
_ROWS = 128  # of one program


@triton.jit(do_not_specialize=["num_rows"])
def _gather_kernel(
    rows, last_token_ids, num_computed_tokens, of_group, input_ids, positions, lengths, indices,
    seq_lens, query_start_loc, slot_mapping, block_tables, num_rows, max_blocks,
    BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A chunk of a row's block table, 0 past its context; with the first one all else of the row.

    The row behind the last is the empty one.
    """
    index, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    exists = index < num_rows
    row = tl.load(rows + index, exists, other=0)
    position = tl.load(num_computed_tokens + row, exists, other=-1)
    table = of_group + row * max_blocks
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = column < max_blocks
    blocks = tl.load(table + column, inside & (column * BLOCK_SIZE <= position), other=0)
    tl.store(block_tables + index * max_blocks + column, blocks, inside)
    if chunk > 0:
        return
    tl.store(seq_lens + index, (position + 1).to(tl.int32))
    tl.store(query_start_loc + index, index.to(tl.int32))
    if not exists:
        tl.store(query_start_loc + index + 1, num_rows)
        return
    tl.store(input_ids + index, tl.load(last_token_ids + row))
    tl.store(positions + index, position)
    tl.store(lengths + index, position + 1)
    tl.store(indices + index, index)
    block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
    tl.store(slot_mapping + index, block * BLOCK_SIZE + position % BLOCK_SIZE)


def gather(
    rows: Tensor,
    last_token_ids: Tensor,
    num_computed_tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
) -> DecodeInputs:
    """See `step_inputs.decode_inputs`. A launch for each group, all writing the same tokens."""
    num_rows, max_blocks = len(rows), block_tables.shape[-1]
    assert rows.is_contiguous() and block_tables.is_contiguous()
    input_ids, positions, lengths, indices = (torch.empty_like(rows) for _ in range(4))
    seq_lens, starts = (rows.new_empty(num_rows + n, dtype=torch.int32) for n in (1, 2))
    chunk = min(_CHUNK, triton.next_power_of_2(max_blocks))
    attn = []
    for of_group in block_tables:
        slots, tables = torch.empty_like(rows), of_group.new_empty((num_rows + 1, max_blocks))
        _gather_kernel[(num_rows + 1, triton.cdiv(max_blocks, chunk))](
            rows, last_token_ids, num_computed_tokens, of_group, input_ids, positions, lengths,
            indices, seq_lens, starts, slots, tables, num_rows, max_blocks, BLOCK_SIZE=block_size,
            CHUNK=chunk,
        )  # fmt: skip
        attn.append(AttentionMetadata(slots, tables, seq_lens, starts))
    return DecodeInputs(input_ids, positions, lengths, indices, attn)


@triton.jit(do_not_specialize=["num_rows", "padding_row"])
def _scatter_kernel(
    rows, lengths, sample_rows, drawn, last_token_ids, num_computed_tokens, num_rows, padding_row,
    ROWS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = index < num_rows
    row = tl.load(rows + index, exists, other=0)
    length = tl.load(lengths + index, exists, other=0)
    tl.store(num_computed_tokens + row, tl.where(row == padding_row, 0, length), exists)
    row = tl.load(sample_rows + index, exists, other=0)
    token = tl.maximum(tl.load(drawn + index, exists, other=0), 0)
    tl.store(last_token_ids + row, token, exists & (row != padding_row))


def scatter(
    rows: Tensor,
    lengths: Tensor,
    sample_rows: Tensor,
    drawn: Tensor,
    last_token_ids: Tensor,
    num_computed_tokens: Tensor,
) -> None:
    """See `step_inputs.advance`."""
    num_rows = len(rows)
    assert all(x.is_contiguous() and len(x) == num_rows for x in (lengths, sample_rows, drawn))
    _scatter_kernel[(triton.cdiv(num_rows, _ROWS),)](
        rows, lengths, sample_rows, drawn, last_token_ids, num_computed_tokens, num_rows,
        len(num_computed_tokens) - 1, ROWS=_ROWS,
    )  # fmt: skip
