"""How single-token rows are split over programs of the Triton attention, and put together again."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import triton
import triton.language as tl

from compiledllm.kernels import counters
from compiledllm.kernels import decode_attention_triton as kernels
from compiledllm.kernels import paged_attention_torch as oracle
from compiledllm.kernels.backend import AttentionMetadata, ScoreOptions, make_row_bound
from compiledllm.kernels.paged_attention_triton import paged_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
KEYS = 64
TOO_MANY = 1000 if DEVICE == "cuda" else 24  # programs: more than there are tiles


@triton.jit
def _list_kernel(  # type: ignore[no-untyped-def]
    found, seq_lens, query_start_loc, num_rows, max_extra, even_extra, min_tiles, window,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, HAS_WINDOW: tl.constexpr, MAX_ROWS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    row, num_splits, split = kernels._work_item(
        item, seq_lens, query_start_loc, num_rows, max_extra, even_extra, min_tiles, window, TOKENS,
        KEYS, HAS_WINDOW, False, MAX_ROWS,
    )  # fmt: skip
    tl.store(found + item * 3, row)
    tl.store(found + item * 3 + 1, num_splits)
    tl.store(found + item * 3 + 2, split)


def work_items(
    rows: list[tuple[int, int]],
    max_extra: int,
    window: int = 0,
    even_extra: int | None = None,
    min_tiles: int = 1,
) -> list[tuple[int, int, int]]:
    """(row, number of splits, split) of every program that has work. rows: tokens, context.

    A program may be given a row that has not one token: it has nothing to do.
    """
    counts, lengths = zip(*rows, strict=True)
    starts = torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    num_items = len(rows) + max_extra
    found = torch.full((num_items, 3), -1, dtype=torch.int32, device=DEVICE)
    _list_kernel[(num_items,)](
        found, seq_lens, starts, len(rows), max_extra, even_extra or max_extra, min_tiles, window,
        TOKENS=1, KEYS=KEYS, HAS_WINDOW=window > 0, MAX_ROWS=triton.next_power_of_2(len(rows)),
    )  # fmt: skip
    items = [(int(row), int(total), int(split)) for row, total, split in found.tolist()]
    num_real = sum(row < len(rows) for row, _, _ in items)
    assert all(row < len(rows) for row, _, _ in items[:num_real])
    return [item for item in items[:num_real] if counts[item[0]] == 1]


def num_tiles(context: int, window: int) -> int:
    return -(-context // KEYS) - (max(context - window, 0) // KEYS if window else 0)


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("max_extra", [1, 16, 66])
def test_every_row_with_one_token_is_covered_once(max_extra: int, window: int) -> None:
    rng = random.Random(max_extra + window)
    for _ in range(2):
        rows = [(rng.choice([0, 1, 1, 1, 5]), rng.choice([1, 64, 65, 700, 5000])) for _ in range(9)]
        items = work_items([*rows, (0, 0)], max_extra, window)
        single = [row for row, (count, _) in enumerate(rows) if count == 1]
        expected = []
        for row in single:
            splits = {total for r, total, _ in items if r == row}
            assert len(splits) == 1, row
            assert splits.pop() <= num_tiles(rows[row][1], window)
            expected += [(row, split) for split in range(len([i for i in items if i[0] == row]))]
        assert [(row, split) for row, _, split in items] == expected
        assert all(split < total for _, total, split in items)


def test_rows_are_split_by_their_length() -> None:
    many = work_items([(1, 1000)] * 32, max_extra=16)
    assert [total for _, total, _ in many] == [1] * 32
    few = work_items([(1, 1000)] * 4, max_extra=16)
    assert {total for _, total, _ in few} == {4}
    unequal = work_items([(1, 100)] * 31 + [(1, 4000)], max_extra=16)
    assert [total for row, total, _ in unequal if row < 31] == [1] * 31
    assert {total for row, total, _ in unequal if row == 31} == {10}
    nearly = work_items([(1, 1000)] * 15 + [(1, 1300)], max_extra=16)
    assert [total for _, total, _ in nearly] == [1] * 16
    assert len(work_items([(1, 640)], max_extra=16)) == 10  # a tile each


def test_rows_of_similar_length_have_fewer_splits() -> None:
    similar = work_items([(1, 1000), (1, 900), (1, 1100), (0, 0)], max_extra=24, even_extra=6)
    assert {total for _, total, _ in similar} == {2}
    unequal = work_items([(1, 1000), (1, 100), (1, 2800)], max_extra=24, even_extra=6)
    assert [total for row, total, _ in unequal if row == 2] == [15] * 15


def test_short_rows_stay_whole_if_there_are_many() -> None:
    """A split of one tile is not worth merging once the rows keep the GPU busy."""
    rows = [(1, 160)] * 32
    assert {total for _, total, _ in work_items(rows, max_extra=66)} == {3}
    assert {total for _, total, _ in work_items(rows, max_extra=66, min_tiles=2)} == {1}
    assert {total for _, total, _ in work_items([(1, 960)] * 32, 66, min_tiles=2)} == {2}


def test_padding_takes_nothing_from_the_others() -> None:
    alone = work_items([(1, 1000), (1, 3000)], max_extra=16)
    padded = work_items([(1, 1000), (1, 3000)] + [(1, 1)] * 40 + [(0, 0)], max_extra=16)
    assert padded[: len(alone)] == alone


@pytest.mark.parametrize("window", [0, 200])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("counts", [[1] * 5, [3, 4, 1, 0, 1]], ids=["single", "few"])
def test_a_long_row_among_short_ones(counts: list[int], has_sinks: bool, window: int) -> None:
    torch.manual_seed(0)
    lengths = [20, 1500 if DEVICE == "cuda" else 700, 3, 90, 1]
    num_heads, num_kv_heads, head_dim, block_size = 4, 2, 64, 16
    width = -(-max(lengths) // block_size)
    kv_cache = torch.randn(2, len(lengths) * width + 1, block_size, num_kv_heads, head_dim)
    tables = torch.arange(len(lengths) * width, dtype=torch.int32).view(len(lengths), width) + 1
    query = torch.randn(sum(counts), num_heads, head_dim)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    sinks = torch.randn(num_heads) if has_sinks else None
    slots = torch.full((sum(counts),), -1)
    attn = AttentionMetadata(slots, tables, seq_lens, starts, make_row_bound(max(counts)))
    expected = oracle.paged_attention(query, kv_cache, attn, ScoreOptions(0.1, window, 0.0, sinks))
    options = ScoreOptions(0.1, window, 0.0, None if sinks is None else sinks.to(DEVICE))
    there = AttentionMetadata(*(x.to(DEVICE) for x in attn))
    on_device = query.to(DEVICE), kv_cache.to(DEVICE), there, options
    for max_split_programs in (1, 8, TOO_MANY):
        out = paged_attention(*on_device, max_split_programs=max_split_programs)
        torch.testing.assert_close(out.cpu(), expected, atol=2e-5, rtol=2e-5)
        if DEVICE == "cuda":  # in the interpreter one program runs after the other
            again = paged_attention(*on_device, max_split_programs=max_split_programs)
            assert torch.equal(out, again)
    assert not counters.of_rows(1, query.to(DEVICE).device).any()


def test_counters_of_rows_grow_seldom() -> None:
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    made = {counters.of_rows(rows, device).data_ptr() for rows in range(2**21, 2**21 + 5000, 500)}
    assert len(made) <= 2
    assert len(counters.of_rows(1, device)) >= 2**21 + 4500  # none smaller comes back
