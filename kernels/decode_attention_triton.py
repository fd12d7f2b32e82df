"""Paged attention of rows with one or a few new tokens.

A program computes all new tokens of a row for one KV head and all query heads of this KV head. The
program therefore reads each key and value once.

The keys of a long context are split over several programs (split-KV). Each program derives the
splits from the rows' lengths, which only the device knows. The last program of a row to finish
merges the partial results in a fixed order, so that equal inputs give equal bits.
"""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compiledllm.kernels import counters
from compiledllm.kernels.launch import launch_options, num_multiprocessors, stages_that_fit
from compiledllm.kernels.online_softmax_triton import Tiling, after_sinks, attend_keys, first_seen

MAX_TOGETHER = 8  # maximum number of new tokens per row
# Programs (rows times KV heads) per multiprocessor. At most _FEW leave most of the GPU idle, and at
# least _MANY keep it busy without splits.
_FEW_PROGRAMS_PER_SM = 0.25
_MANY_PROGRAMS_PER_SM = 8
_MAX_SPLITS_PER_SM = 8  # many small splits balance the load if rows have unequal lengths
_SPLITS_SUMMED_AT_ONCE = 8  # number of splits whose loads are in flight together


def decode_tiling(head_dim: int, group: int, dtype: torch.dtype, num_programs: int) -> Tiling:
    """The tile sizes for a step, within the GPU's shared memory; see `_tiling_rule`."""
    t = _tiling_rule(head_dim, group, dtype, num_programs)
    stage_bytes = 2 * t.keys * triton.next_power_of_2(head_dim) * dtype.itemsize
    return replace(t, num_stages=stages_that_fit(t.num_stages, stage_bytes))


def _tiling_rule(head_dim: int, group: int, dtype: torch.dtype, num_programs: int) -> Tiling:
    """The tile sizes for a step. A lane of a tile is one query head of one token.

    group: query heads per KV head, times tokens per row. num_programs: rows times KV heads. These
    tilings are the fastest of 12 to 26 tilings on an H200 (bfloat16, 1 to 60 rows of 128 to 32768
    tokens, 2 to 8 KV heads), and for most programs on an H100 (chats, up to 466 rows). A few
    programs need many loads in flight each; many programs hide each other's latency.
    """
    rows = max(16, triton.next_power_of_2(group))
    if dtype == torch.float32:
        return Tiling(rows, 32 if head_dim <= 256 else 16, 4, 2)
    if head_dim > 128:
        return Tiling(rows, 64 if head_dim <= 256 else 32, 8, 2)
    per_sm = num_programs / num_multiprocessors()
    if per_sm <= _FEW_PROGRAMS_PER_SM:
        return Tiling(rows, 128, 4, 2)
    num_warps = 2 if rows == 16 else 4
    if head_dim <= 64 and per_sm < _MANY_PROGRAMS_PER_SM / 2:
        return Tiling(rows, 128, num_warps, 3)
    return Tiling(rows, 64, num_warps, 4)


def _even_splits_per_sm(head_dim: int, num_programs: int) -> int:
    """Extra programs per multiprocessor for a step whose rows are long and of similar length.

    All programs of such a step should run at once: a second wave would wait for the first.
    """
    if head_dim > 128:
        return 2
    per_sm = num_programs / num_multiprocessors()
    if per_sm <= _FEW_PROGRAMS_PER_SM:
        return 3
    return 4 if per_sm < _MANY_PROGRAMS_PER_SM else _MAX_SPLITS_PER_SM


def _min_tiles(num_programs: int) -> int:
    """The minimum number of tiles of keys in a split of a row.

    Merging splits takes as long as one or two tiles, so small splits pay off only if they use
    multiprocessors that would be idle. num_programs: rows times KV heads.
    """
    return 1 if num_programs <= num_multiprocessors() else 2


@triton.jit
def _lanes(
    count, NUM_LANES: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The token and the query head (of its KV head) of each lane, and whether they exist."""
    lane = tl.arange(0, NUM_LANES)
    if TOKENS == 1:
        return lane * 0, lane, lane < GROUP
    return lane // GROUP, lane % GROUP, lane < count * GROUP


@triton.jit
def _work_item(
    item, seq_lens, query_start_loc, num_rows, max_extra, even_extra, min_tiles, window,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, HAS_WINDOW: tl.constexpr, IN_CHUNKS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
):  # fmt: skip
    """The item's row, the number of splits of this row, and the item's index among the splits.

    A row >= num_rows means that no work is left. Rows with no token or more than TOKENS are
    skipped. The others are split so that no split has much more than an even share of all tiles of
    keys: rows of similar length stay whole, and a long row among short rows is split. There are at
    most num_rows + max_extra items. If the lengths are even (the longest row has at most 1.5 times
    the mean number of tiles), there are at most num_rows + even_extra. A row without keys or with
    one tile of keys does not affect the splits. A share is at least min_tiles.
    """
    row = tl.arange(0, MAX_ROWS)
    exists = row < num_rows
    length = tl.load(seq_lens + row, exists, other=0)
    start = tl.load(query_start_loc + row, exists, other=0)
    count = tl.load(query_start_loc + row + 1, exists, other=0) - start
    is_ours = (count == 1) if TOKENS == 1 else (count >= 1) & (count <= TOKENS)
    tiles = tl.cdiv(length, KEYS)
    if HAS_WINDOW:
        oldest = length - (1 if TOKENS == 1 else count)
        tiles -= first_seen(oldest, window, IN_CHUNKS) // KEYS
    more_tiles = tl.where(is_ours, tl.maximum(tiles - 1, 0), 0)  # tiles after the first
    total, most = tl.sum(more_tiles, 0), tl.max(more_tiles, 0)
    is_even = 2 * most * tl.sum((more_tiles > 0).to(tl.int32), 0) <= 3 * total
    share = tl.maximum(tl.cdiv(total, tl.where(is_even, even_extra, max_extra)), min_tiles)
    slack = share // 2
    its_row, num_splits, split = item, 1, 0
    if most >= share + slack:
        splits = tl.where(is_ours, 1 + tl.maximum(more_tiles - slack, 0) // share, 0)
        ends = tl.cumsum(splits, 0)
        its_row = tl.sum((ends <= item).to(tl.int32), 0)
        is_its = row == its_row
        num_splits = tl.sum(tl.where(is_its, splits, 0), 0)
        split = item - tl.sum(tl.where(is_its, ends, 0), 0) + num_splits
    return its_row, num_splits, split


@triton.jit
def _sum_of_splits(
    partial_out, partial_stats, first_part, lane_part, is_lane, num_splits,
    SPLIT_PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_LANES: tl.constexpr,
    PADDED_DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Merge the splits of a row and KV head: float32 [NUM_LANES, PADDED_DIM].

    first_part: index of the first partial result of the first split. lane_part, is_lane:
    [NUM_LANES], index of each lane's partial result within a split, and whether the lane exists.
    SPLIT_PARTS: partial results per split.
    """
    dim = tl.arange(0, PADDED_DIM)
    best = tl.full([NUM_LANES], float("-inf"), tl.float32)
    total = tl.zeros([NUM_LANES], tl.float32)
    acc = tl.zeros([NUM_LANES, PADDED_DIM], tl.float32)
    for first in range(0, num_splits, AT_ONCE):
        for index in tl.static_range(AT_ONCE):  # unrolled, so that all loads are in flight at once
            part = first_part + (first + index) * SPLIT_PARTS + lane_part
            exists = (first + index < num_splits) & is_lane
            stats = partial_stats + part * 2
            its_best = tl.load(stats, exists, other=float("-inf"), cache_modifier=".cg")
            its_total = tl.load(stats + 1, exists, other=0.0, cache_modifier=".cg")
            address = partial_out + part[:, None] * HEAD_DIM + dim[None, :]
            inside = exists[:, None] & (dim < HEAD_DIM)[None, :]
            its_acc = tl.load(address, inside, other=0.0, cache_modifier=".cg")
            higher = tl.maximum(best, its_best)
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            decay, weight = tl.exp2(best - shift), tl.exp2(its_best - shift)
            acc = acc * decay[:, None] + its_acc * weight[:, None]
            best, total = higher, total * decay + its_total * weight
    return acc / total[:, None]


# Triton must not specialise on these counts: each would compile the kernel again for 1 and for
# multiples of 16.
_COUNTS = ["window", "table_stride", "num_rows", "max_extra", "even_extra", "min_tiles"]


@triton.jit(do_not_specialize=_COUNTS)
def _decode_kernel(
    query, kv_cache, block_tables, seq_lens, query_start_loc, sinks, kv_scales, out, partial_out,
    partial_stats, arrivals, scale, window, soft_cap, query_stride, table_stride, value_offset,
    num_rows, max_extra, even_extra, min_tiles, MAX_ROWS: tl.constexpr, TOKENS: tl.constexpr,
    GROUP: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, HAS_WINDOW: tl.constexpr, IN_CHUNKS: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_KV_SCALES: tl.constexpr, PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SUM_LANES: tl.constexpr, AT_ONCE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attention of rows with 1 to TOKENS tokens. A lane is a query head of a token.

    arrivals: int32 [rows, KV heads], zero before and after.

    The last split of a row to finish merges all splits of the row, in split order.
    """
    if OVERLAP:
        gdc_launch_dependents()
    kv_head, item = tl.program_id(0), tl.program_id(1)  # programs without work come last
    is_idle = item < 0
    # If no row from item - max_extra on has tokens, there are at most `item` items of work. Items
    # up to max_extra go on to the wait, without which the kernel could end before its predecessor.
    if item > max_extra:
        first_token = tl.load(query_start_loc + item - max_extra)
        is_idle = first_token == tl.load(query_start_loc + num_rows)
    if is_idle:  # most programs of a captured step with prompts, which has room for many rows
        return
    row, num_splits, split = _work_item(
        item, seq_lens, query_start_loc, num_rows, max_extra, even_extra, min_tiles, window,
        TOKENS, KEYS, HAS_WINDOW, IN_CHUNKS, MAX_ROWS,
    )  # fmt: skip
    # The kernel reads lengths before this wait. That is safe because a matmul runs between this
    # kernel and the kernel that writes lengths, and a matmul releases its successor after its own
    # wait.
    if OVERLAP:
        gdc_wait()
    if row >= num_rows:
        return
    start = tl.load(query_start_loc + row)
    count = tl.load(query_start_loc + row + 1) - start
    if (count < 1) | (count > TOKENS):
        return
    length = tl.load(seq_lens + row)
    first = first_seen(length - count, window, IN_CHUNKS) if HAS_WINDOW else 0
    first_tile, end_tile = first // KEYS, tl.cdiv(length, KEYS)
    share = tl.cdiv(end_tile - first_tile, num_splits)
    low = first_tile + split * share
    high = tl.minimum(low + share, end_tile)

    token, head, is_lane = _lanes(count, ROWS, TOKENS, GROUP)
    dim = tl.arange(0, PADDED_DIM)
    inside = is_lane[:, None] & (dim < HEAD_DIM)[None, :]
    query_dims = (token * query_stride + (kv_head * GROUP + head) * HEAD_DIM)[:, None] + dim[
        None, :
    ]
    q = tl.load(query + start.to(tl.int64) * query_stride + query_dims, inside, other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:  # noqa: SIM102  (a constant: without sinks Triton generates no code)
        if split == 0:  # a sink counts once per row
            best, total = after_sinks(sinks + kv_head * GROUP + head, is_lane)
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    if HAS_KV_SCALES:
        scale *= tl.load(kv_scales).to(tl.float32)
    for tile in range(low, high):
        tokens = tile * KEYS + tl.arange(0, KEYS)
        in_context = (tokens < length) & (tokens >= first)
        seen = in_context[None, :]
        if TOKENS > 1:
            position = (length - count + token)[:, None]
            seen = seen & (tokens[None, :] <= position)
            if HAS_WINDOW:
                seen = seen & (tokens[None, :] >= first_seen(position, window, IN_CHUNKS))
        best, total, acc = attend_keys(
            q, best, total, acc, kv_cache, block_tables + row.to(tl.int64) * table_stride, tokens,
            in_context, seen, kv_head * HEAD_DIM, scale, soft_cap, value_offset,
            TOKEN_STRIDE, BLOCK_SIZE, HEAD_DIM, HAS_SOFT_CAP, PADDED_DIM, ALL_SEEN=False,
        )  # fmt: skip
    target = out + start.to(tl.int64) * NUM_HEADS * HEAD_DIM
    lane_part = token * NUM_HEADS + kv_head * GROUP + head
    if num_splits == 1:
        result = acc / total[:, None]
        if HAS_KV_SCALES:
            result *= tl.load(kv_scales + 1).to(tl.float32)
        out_dims = lane_part[:, None] * HEAD_DIM + dim[None, :]
        tl.store(target + out_dims, result.to(out.dtype.element_ty), inside)
        return
    SPLIT_PARTS: tl.constexpr = TOKENS * NUM_HEADS
    part = item * SPLIT_PARTS + lane_part
    tl.store(partial_stats + part * 2, best, is_lane)
    tl.store(partial_stats + part * 2 + 1, total, is_lane)
    tl.store(partial_out + part[:, None] * HEAD_DIM + dim[None, :], acc, inside)
    tl.debug_barrier()  # all threads must have stored before the arrival is counted
    arrival = arrivals + row * (NUM_HEADS // GROUP) + kv_head
    if tl.atomic_add(arrival, 1, sem="acq_rel") < num_splits - 1:
        return
    tl.store(arrival, 0)
    token, head, is_lane = _lanes(count, SUM_LANES, TOKENS, GROUP)
    lane_part = token * NUM_HEADS + kv_head * GROUP + head
    result = _sum_of_splits(
        partial_out, partial_stats, (item - split) * SPLIT_PARTS, lane_part, is_lane, num_splits,
        SPLIT_PARTS, HEAD_DIM, SUM_LANES, PADDED_DIM, AT_ONCE,
    )  # fmt: skip
    if HAS_KV_SCALES:
        result *= tl.load(kv_scales + 1).to(tl.float32)
    inside = is_lane[:, None] & (dim < HEAD_DIM)[None, :]
    out_dims = lane_part[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target + out_dims, result.to(out.dtype.element_ty), inside)


def attend_few_tokens(
    tensors: tuple[Tensor, ...],
    scalars: tuple[float, ...],
    constants: dict[str, Any],
    max_row_tokens: int,
    max_split_programs: int | None,
) -> None:
    """Launch `_decode_kernel` for rows with 1 to `max_row_tokens` tokens; it skips other rows.

    tensors, scalars, constants: arguments that `_decode_kernel` shares with `_prefill_kernel`, in
    its order: tensors from `query` to `out`, scalars from `scale` to `value_offset`.
    max_split_programs: see `paged_attention_triton.paged_attention`.
    """
    query, kv_cache, block_tables = tensors[:3]
    num_tokens, num_heads, head_dim = query.shape
    num_rows, num_kv_heads = len(block_tables), kv_cache.shape[3]
    # A row with work has at least one token, and the last row is always empty (`step_inputs`).
    max_rows = min(num_rows, num_tokens)
    num_programs, num_lanes = max_rows * num_kv_heads, constants["GROUP"] * max_row_tokens
    tiling = decode_tiling(head_dim, num_lanes, query.dtype, num_programs)
    even_splits = _even_splits_per_sm(head_dim, num_programs) * num_multiprocessors()
    if max_split_programs is None:
        many = _MAX_SPLITS_PER_SM * num_multiprocessors()
        max_split_programs = many if max_rows > 1 else even_splits
    max_extra = max(max_split_programs // num_kv_heads, 1)
    even_extra = min(max(even_splits // num_kv_heads, 1), max_extra)
    num_items = max_rows + max_extra
    parts = num_items, max_row_tokens, num_heads
    partial_out = query.new_empty((*parts, head_dim), dtype=torch.float32)
    partial_stats = query.new_empty((*parts, 2), dtype=torch.float32)
    arrivals = counters.of_rows(num_rows * num_kv_heads, query.device)
    _decode_kernel[(num_kv_heads, num_items)](
        *tensors, partial_out, partial_stats, arrivals, *scalars, num_rows, max_extra, even_extra,
        _min_tiles(num_programs), MAX_ROWS=_padded_rows(num_rows), TOKENS=max_row_tokens,
        ROWS=tiling.rows, KEYS=tiling.keys, SUM_LANES=triton.next_power_of_2(num_lanes),
        AT_ONCE=_SPLITS_SUMMED_AT_ONCE,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **launch_options(), **constants,
    )  # fmt: skip


def _padded_rows(num_rows: int) -> int:
    """`num_rows` rounded up to one of a few sizes, since each size is compiled separately."""
    size = 64
    while size < num_rows:
        size *= 4
    return size
