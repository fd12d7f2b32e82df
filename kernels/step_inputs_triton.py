"""`step_inputs` in Triton: the kernels before and after the model in a step.

The parts of a step's packed inputs begin at arbitrary addresses, and the number of tokens differs
from step to step. The kernels therefore do not specialise on addresses or counts: Triton would
compile a variant for each alignment, and for counts of 1 and multiples of 16.
"""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from compiledllm.kernels.backend import AttentionMetadata, make_row_bound
from compiledllm.kernels.step_inputs import DecodeInputs, MixedInputs

_CHUNK = 1024  # block table entries per program
_ROWS = 128  # rows per program
_TOKENS = 128  # tokens per program


@triton.jit
def _write_row(
    index, chunk, row, length, start, group_table, block_tables, seq_lens, query_start_loc,
    num_rows, max_blocks, BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write a chunk of a row's block table, with 0 for blocks past the context.

    Chunk 0 also writes the row's length and start. index: the row of the step; row: its request
    row; start: index of its first token in the step. Row `num_rows` is the empty row: its length is
    0, and it ends where it starts.
    """
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = column < max_blocks
    is_used = inside & (column * BLOCK_SIZE < length)
    blocks = tl.load(group_table + row * max_blocks + column, is_used, other=0)
    tl.store(block_tables + index * max_blocks + column, blocks, inside)
    if chunk == 0:
        tl.store(seq_lens + index, length.to(tl.int32))
        tl.store(query_start_loc + index, start.to(tl.int32))
        if index == num_rows:
            tl.store(query_start_loc + index + 1, start.to(tl.int32))


@triton.jit
def _slots(group_table, row, position, exists, max_blocks, BLOCK_SIZE: tl.constexpr):
    """The cache slots of tokens, given their rows and positions; see `step_inputs.slots_in`."""
    block = tl.load(group_table + row * max_blocks + position // BLOCK_SIZE, exists, other=0)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    return tl.where(block > 0, slot, -1)


@triton.jit(do_not_specialize=["num_rows"])
def _gather_kernel(
    rows, last_token_ids, num_computed_tokens, group_table, input_ids, positions, lengths, indices,
    seq_lens, query_start_loc, slot_mapping, block_tables, num_rows, max_blocks,
    BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program writes a chunk of a row's block table; chunk 0 also writes the other inputs."""
    index, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    exists = index < num_rows
    row = tl.load(rows + index, exists, other=0)
    position = tl.load(num_computed_tokens + row, exists, other=-1)
    _write_row(
        index, chunk, row, position + 1, index, group_table, block_tables, seq_lens,
        query_start_loc, num_rows, max_blocks, BLOCK_SIZE, CHUNK,
    )  # fmt: skip
    exists = exists & (chunk == 0)
    tl.store(input_ids + index, tl.load(last_token_ids + row, exists, other=0), exists)
    tl.store(positions + index, position, exists)
    tl.store(lengths + index, position + 1, exists)
    tl.store(indices + index, index, exists)
    slot = _slots(group_table, row, position, exists, max_blocks, BLOCK_SIZE)
    tl.store(slot_mapping + index, slot, exists)


def gather(
    rows: Tensor,
    last_token_ids: Tensor,
    num_computed_tokens: Tensor,
    block_tables: Sequence[Tensor],
    block_sizes: Sequence[int],
) -> DecodeInputs:
    """See `step_inputs.decode_inputs`. The launches of all groups write the same token tensors."""
    num_rows = len(rows)
    assert all(x.is_contiguous() for x in (rows, *block_tables))
    input_ids, positions, lengths, indices = (torch.empty_like(rows) for _ in range(4))
    seq_lens, starts = (rows.new_empty(num_rows + n, dtype=torch.int32) for n in (1, 2))
    attn = []
    for group_table, block_size in zip(block_tables, block_sizes, strict=True):
        max_blocks = group_table.shape[-1]
        chunk, num_chunks = _chunks(max_blocks)
        slots, tables = torch.empty_like(rows), group_table.new_empty((num_rows + 1, max_blocks))
        _gather_kernel[(num_rows + 1, num_chunks)](
            rows, last_token_ids, num_computed_tokens, group_table, input_ids, positions, lengths,
            indices, seq_lens, starts, slots, tables, num_rows, max_blocks, BLOCK_SIZE=block_size,
            CHUNK=chunk,
        )  # fmt: skip
        bound = make_row_bound(1, rows.device)
        attn.append(AttentionMetadata(slots, tables, seq_lens, starts, bound))
    return DecodeInputs(input_ids, positions, lengths, indices, attn)


@triton.jit
def _write_tokens(
    index, tokens, last_token_ids, group_table, input_ids, positions, slot_mapping, num_tokens,
    max_blocks, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    exists = index < num_tokens
    row = tl.load(tokens + index, exists, other=0)
    position = tl.load(tokens + num_tokens + index, exists, other=0)
    known = tl.load(tokens + 2 * num_tokens + index, exists, other=0)
    drawn = tl.load(last_token_ids + row, exists & (known < 0), other=0)
    tl.store(input_ids + index, tl.where(known < 0, drawn, known), exists)
    tl.store(positions + index, position, exists)
    slots = _slots(group_table, row, position, exists, max_blocks, BLOCK_SIZE)
    tl.store(slot_mapping + index, slots, exists)


@triton.jit(do_not_specialize=["tokens", "rows", "num_tokens", "num_rows"])
def _unpack_kernel(
    tokens, rows, last_token_ids, group_table, input_ids, positions, seq_lens, query_start_loc,
    slot_mapping, block_tables, num_tokens, num_rows, max_blocks,
    BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A program writes a chunk of a row's block table. Programs after all rows write tokens."""
    index, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if index <= num_rows:
        exists = index < num_rows
        row = tl.load(rows + index, exists, other=0)
        length = tl.load(rows + num_rows + index, exists, other=0)
        start = tl.load(rows + 2 * num_rows + index - 1, index > 0, other=0)
        _write_row(
            index, chunk, row, length, start, group_table, block_tables, seq_lens, query_start_loc,
            num_rows, max_blocks, BLOCK_SIZE, CHUNK,
        )  # fmt: skip
    elif chunk == 0:
        _write_tokens(
            (index - num_rows - 1) * TOKENS + tl.arange(0, TOKENS), tokens, last_token_ids,
            group_table, input_ids, positions, slot_mapping, num_tokens, max_blocks, BLOCK_SIZE,
        )  # fmt: skip


def unpack(
    tokens: Tensor,
    rows: Tensor,
    last_token_ids: Tensor,
    block_tables: Sequence[Tensor],
    block_sizes: Sequence[int],
) -> MixedInputs:
    """See `step_inputs.mixed_inputs`. The launches of all groups write the same token tensors."""
    num_tokens, num_rows = tokens.shape[1], rows.shape[1]
    assert all(x.is_contiguous() for x in (tokens, rows, *block_tables))
    input_ids, positions = (tokens.new_empty(num_tokens) for _ in range(2))
    seq_lens, starts = (rows.new_empty(num_rows + n, dtype=torch.int32) for n in (1, 2))
    attn = []
    for group_table, block_size in zip(block_tables, block_sizes, strict=True):
        max_blocks = group_table.shape[-1]
        chunk, num_chunks = _chunks(max_blocks)
        slots = torch.empty_like(positions)
        tables = group_table.new_empty((num_rows + 1, max_blocks))
        _unpack_kernel[(num_rows + 1 + triton.cdiv(num_tokens, _TOKENS), num_chunks)](
            tokens, rows, last_token_ids, group_table, input_ids, positions, seq_lens, starts,
            slots, tables, num_tokens, num_rows, max_blocks, BLOCK_SIZE=block_size, CHUNK=chunk,
            TOKENS=_TOKENS,
        )  # fmt: skip
        bound = make_row_bound(0, rows.device)
        attn.append(AttentionMetadata(slots, tables, seq_lens, starts, bound))
    return MixedInputs(input_ids, positions, attn)


@triton.jit(do_not_specialize=["rows", "lengths", "num_rows"])
def _last_tokens_kernel(
    rows, lengths, group_table, seq_lens, query_start_loc, slot_mapping, block_tables, num_rows,
    max_blocks, BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program writes a chunk of a row's block table; chunk 0 also writes the other inputs."""
    index, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    exists = index < num_rows
    row = tl.load(rows + index, exists, other=0)
    length = tl.load(lengths + index, exists, other=0)
    _write_row(
        index, chunk, row, length, index, group_table, block_tables, seq_lens, query_start_loc,
        num_rows, max_blocks, BLOCK_SIZE, CHUNK,
    )  # fmt: skip
    tl.store(slot_mapping + index, -1, exists & (chunk == 0))


def gather_last_tokens(
    rows: Tensor, lengths: Tensor, group_table: Tensor, block_size: int
) -> AttentionMetadata:
    """See `step_inputs.last_token_metadata`."""
    num_rows, max_blocks = len(rows), group_table.shape[-1]
    assert all(x.is_contiguous() for x in (rows, lengths, group_table))
    seq_lens, starts = (rows.new_empty(num_rows + n, dtype=torch.int32) for n in (1, 2))
    slots, tables = torch.empty_like(rows), group_table.new_empty((num_rows + 1, max_blocks))
    chunk, num_chunks = _chunks(max_blocks)
    _last_tokens_kernel[(num_rows + 1, num_chunks)](
        rows, lengths, group_table, seq_lens, starts, slots, tables, num_rows, max_blocks,
        BLOCK_SIZE=block_size, CHUNK=chunk,
    )  # fmt: skip
    return AttentionMetadata(slots, tables, seq_lens, starts, make_row_bound(1, rows.device))


def _chunks(max_blocks: int) -> tuple[int, int]:
    """The size and number of chunks into which programs divide a block table."""
    chunk = min(_CHUNK, triton.next_power_of_2(max_blocks))
    return chunk, triton.cdiv(max_blocks, chunk)


@triton.jit(
    do_not_specialize=[
        "rows", "lengths", "sample_rows", "drawn", "num_rows", "num_samples", "padding_row",
    ]
)  # fmt: skip
def _scatter_kernel(
    rows, lengths, sample_rows, drawn, last_token_ids, num_computed_tokens, num_rows, num_samples,
    padding_row, ROWS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = index < num_rows
    row = tl.load(rows + index, exists, other=0)
    length = tl.load(lengths + index, exists, other=0)
    tl.store(num_computed_tokens + row, tl.where(row == padding_row, 0, length), exists)
    exists = index < num_samples
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
    num_rows, num_samples = len(rows), len(sample_rows)
    assert len(lengths) == num_rows and len(drawn) == num_samples
    assert all(x.is_contiguous() for x in (rows, lengths, sample_rows, drawn))
    _scatter_kernel[(triton.cdiv(max(num_rows, num_samples), _ROWS),)](
        rows, lengths, sample_rows, drawn, last_token_ids, num_computed_tokens, num_rows,
        num_samples, len(num_computed_tokens) - 1, ROWS=_ROWS,
    )  # fmt: skip
