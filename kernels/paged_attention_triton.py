"""Paged attention in Triton: the GPU path.

Two kernels read the cache. `_decode_kernel` takes the rows with one new token: all query heads of a
KV head together, the context split over programs. `_prefill_kernel` takes the others, a block of
query tokens at a time. Grids follow from shapes alone and nothing is read back, so a captured call
serves every length. The order of reductions is fixed: equal inputs give equal bits.
"""

# Triton functions are typed by what they are called with.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compiledllm.kernels.launch import launch_options, num_multiprocessors

_LOG2_E = 1.4426950408889634
_PROGRAMS_PER_SM = 4  # that long rows are split over: enough to hide each other's latency
_FEW_PROGRAMS = 32  # up to which one tile of keys makes a split, as nothing else keeps the GPU busy
_SUMMED_AT_ONCE = 8  # splits
_USUAL_ARRIVALS = 2**16


@dataclass(frozen=True, slots=True)
class Tiling:
    """Shape of a program's work. rows: query tokens times heads; keys: KV tokens per iteration.

    max_registers: of a thread, so that a multiprocessor holds more programs; None: no limit.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def decode_tiling(head_dim: int, group: int, itemsize: int, num_programs: int) -> Tiling:
    """group: query heads of a KV head; num_programs: rows times KV heads.

    Of 6 shapes on an H100 (bfloat16, contexts of 192 and 1088 tokens and as of chats, 1 to 466
    rows, 3 to 8 KV heads) the fastest: few want much under way, many hide each other's latency.
    """
    rows = max(16, triton.next_power_of_2(group))
    if itemsize == 4 or head_dim > 128:
        return Tiling(rows, 32, 4, 2)
    if num_programs >= (256 if head_dim > 64 else 512):
        return Tiling(rows, 64, 2, 4)
    return Tiling(rows, 128, 4, 4 if head_dim <= 64 and num_programs >= 96 else 2)


def prefill_tiling(head_dim: int, group: int, itemsize: int, num_queries: int) -> Tiling:
    """num_queries: query tokens times heads. rows has room for a group at least.

    Of 10 shapes on an H100 (bfloat16, 16 prompts of 1024 tokens) the fastest: two programs on a
    multiprocessor hide each other's softmax, and many rows need fewer reads of the keys. For
    head_dim 128 that is 351 TFLOP/s against 254 without a limit of registers. Few queries take
    smaller programs, as the longest of them would decide.
    """
    least = triton.next_power_of_2(group)
    if itemsize == 4:
        return Tiling(max(32, least), 32, 4, 2)
    if head_dim > 128:
        return Tiling(max(64, least), 32, 4, 1)
    if head_dim > 64 and num_queries >= 3 * 128 * num_multiprocessors():
        return Tiling(max(128, least), 64, 8, 2, max_registers=128)
    return Tiling(max(64, least), 64, 4, 2)


# -- store -----------------------------------------------------------------------------------------


@triton.jit
def _store_kernel(
    key, value, kv_cache, slot_mapping, key_stride, value_stride, value_offset,
    WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    slot = tl.maximum(tl.load(slot_mapping + token), 0).to(tl.int64)
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    target = kv_cache + slot * WIDTH + column
    tl.store(target, tl.load(key + token * key_stride + column, inside), inside)
    value = tl.load(value + token * value_stride + column, inside)
    tl.store(target + value_offset, value, inside)


def store_kv(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """See `attention.store_kv`. Slot -1 is sent to slot 0, which belongs to the null block."""
    num_tokens, num_kv_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    width = num_kv_heads * head_dim
    key, value = (x if _is_packed(x) else x.contiguous() for x in (key, value))
    _store_kernel[(num_tokens,)](
        key, value, kv_cache, slot_mapping, key.stride(0), value.stride(0), kv_cache.stride(0),
        WIDTH=width, PADDED=triton.next_power_of_2(width),
    )  # fmt: skip


def _is_packed(x: Tensor) -> bool:
    """Whether a token's heads lie one after the other; tokens may be strided."""
    return x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]


# -- attend ----------------------------------------------------------------------------------------


@triton.jit
def _attend_keys(
    q, best, total, acc, kv_cache, table, tokens, in_context, seen, head_offset, scale, soft_cap,
    value_offset,
    TOKEN_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr, PADDED_DIM: tl.constexpr, ALL_SEEN: tl.constexpr,
):  # fmt: skip
    """One step of online softmax, in base 2, over the keys at `tokens`.

    best, total, acc: highest logit, sum of weights and weighted values so far. in_context [keys]:
    which tokens exist. seen: which of them each query sees, broadcast to [queries, keys]. With
    ALL_SEEN every query sees every key, and neither is looked at.
    """
    dim = tl.arange(0, PADDED_DIM)
    entry = table + tokens.to(tl.uint32) // BLOCK_SIZE
    block = (tl.load(entry) if ALL_SEEN else tl.load(entry, in_context, other=0)).to(tl.int64)
    inside_block = (tokens.to(tl.uint32) % BLOCK_SIZE).to(tl.int32) * TOKEN_STRIDE + head_offset
    address = kv_cache + inside_block[:, None] + dim[None, :]
    address += block[:, None] * (BLOCK_SIZE * TOKEN_STRIDE)
    if ALL_SEEN and HEAD_DIM == PADDED_DIM:
        k, v = tl.load(address), tl.load(address + value_offset)
    else:
        there = (dim < HEAD_DIM)[None, :]
        if not ALL_SEEN:
            there = there & in_context[:, None]
        k = tl.load(address, there, other=0.0)
        v = tl.load(address + value_offset, there, other=0.0)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    if HAS_SOFT_CAP:
        logits = 1 - 2 / (1 + tl.exp2(logits * (scale * 2 * 1.4426950408889634 / soft_cap)))  # tanh
        scale = soft_cap
    if not ALL_SEEN:
        logits = tl.where(seen, logits, float("-inf"))
    to_base_2 = scale * 1.4426950408889634
    higher = tl.maximum(best, tl.max(logits, 1) * to_base_2)
    shift = higher
    if not ALL_SEEN:
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # a query that sees none of them
    weights = tl.exp2(logits * to_base_2 - shift[:, None])
    decay = tl.exp2(best - shift)
    acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return higher, total * decay + tl.sum(weights, 1), acc


@triton.jit
def _after_sinks(addresses, exists):
    """best and total, see `_attend_keys`, of queries that have seen their head's sink alone."""
    logits = tl.load(addresses, exists, other=0.0).to(tl.float32)
    return logits * 1.4426950408889634, tl.full(logits.shape, 1.0, tl.float32)


@triton.jit
def _work_item(
    item, seq_lens, query_start_loc, num_rows, most_extra, window,
    least_tiles, KEYS: tl.constexpr, HAS_WINDOW: tl.constexpr, MAX_ROWS: tl.constexpr,
):  # fmt: skip
    """Row, its number of splits and which of them the item is.

    A row >= num_rows: no more work. One that has not one token: nothing to do. Those with one are
    split so that no split has much more than its share of all tiles of keys: where rows are many
    and alike each is in one piece, a long one among short ones in several. That makes num_rows +
    most_extra items at most. Padding has one tile and changes nothing.
    """
    row = tl.arange(0, MAX_ROWS)
    exists = row < num_rows
    length = tl.load(seq_lens + row, exists, other=0)
    start = tl.load(query_start_loc + row, exists, other=0)
    is_single = tl.load(query_start_loc + row + 1, exists, other=0) - start == 1
    tiles = tl.cdiv(length, KEYS)
    if HAS_WINDOW:
        tiles -= tl.maximum(length - window, 0) // KEYS
    more_tiles = tl.where(is_single, tl.maximum(tiles - 1, 0), 0)  # than one
    share = tl.maximum(tl.cdiv(tl.sum(more_tiles, 0), most_extra), least_tiles)
    slack = share // 2
    its_row, num_splits, split = item, 1, 0
    if tl.max(more_tiles, 0) >= share + slack:
        splits = tl.where(is_single, 1 + tl.maximum(more_tiles - slack, 0) // share, 0)
        ends = tl.cumsum(splits, 0)
        its_row = tl.sum((ends <= item).to(tl.int32), 0)
        is_its = row == its_row
        num_splits = tl.sum(tl.where(is_its, splits, 0), 0)
        split = item - tl.sum(tl.where(is_its, ends, 0), 0) + num_splits
    return its_row, num_splits, split


@triton.jit
def _sum_of_splits(
    partial_out, partial_stats, first_part, num_splits, NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_GROUP: tl.constexpr,
    PADDED_DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """[PADDED_GROUP, PADDED_DIM]: a KV head's results of a row. first_part: of its first head."""
    head, dim = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_DIM)
    best = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    acc = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
    for first in range(0, num_splits, AT_ONCE):
        for index in tl.static_range(AT_ONCE):  # all of their loads are under way at once
            part = first_part + (first + index) * NUM_HEADS + head
            exists = (first + index < num_splits) & (head < GROUP)
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


@triton.jit
def _decode_kernel(
    query, kv_cache, block_tables, seq_lens, query_start_loc, sinks, out, partial_out,
    partial_stats, arrivals, scale, window, soft_cap, query_stride, table_stride, value_offset,
    num_rows, most_extra, least_tiles, MAX_ROWS: tl.constexpr,
    GROUP: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PADDED_GROUP: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Rows with one token. arrivals: int32 [rows, KV heads], zeros, and zeros again afterwards.

    Of a row's splits the one that ends last adds them all up, in their order.
    """
    if OVERLAP:
        gdc_launch_dependents()
    kv_head, item = tl.program_id(0), tl.program_id(1)  # programs without work come last
    row, num_splits, split = _work_item(
        item, seq_lens, query_start_loc, num_rows, most_extra, window, least_tiles, KEYS,
        HAS_WINDOW, MAX_ROWS,
    )  # fmt: skip
    if OVERLAP:  # lengths were written kernels ago
        gdc_wait()
    if row >= num_rows:
        return
    start = tl.load(query_start_loc + row)
    if tl.load(query_start_loc + row + 1) - start != 1:
        return
    length = tl.load(seq_lens + row)
    first = tl.maximum(length - window, 0) if HAS_WINDOW else 0
    first_tile, end_tile = first // KEYS, tl.cdiv(length, KEYS)
    share = tl.cdiv(end_tile - first_tile, num_splits)
    low = first_tile + split * share
    high = tl.minimum(low + share, end_tile)

    head = tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED_DIM)
    inside = (head < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    head_dims = (kv_head * GROUP + head)[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(query + start.to(tl.int64) * query_stride + head_dims, inside, other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:  # noqa: SIM102  (known to the compiler: no code without sinks)
        if split == 0:  # it counts once
            best, total = _after_sinks(sinks + kv_head * GROUP + head, head < GROUP)
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for tile in range(low, high):
        tokens = tile * KEYS + tl.arange(0, KEYS)
        in_context = (tokens < length) & (tokens >= first)
        best, total, acc = _attend_keys(
            q, best, total, acc, kv_cache, block_tables + row.to(tl.int64) * table_stride, tokens,
            in_context, in_context[None, :], kv_head * HEAD_DIM, scale, soft_cap, value_offset,
            TOKEN_STRIDE, BLOCK_SIZE, HEAD_DIM, HAS_SOFT_CAP, PADDED_DIM, ALL_SEEN=False,
        )  # fmt: skip
    target = out + start.to(tl.int64) * NUM_HEADS * HEAD_DIM
    if num_splits == 1:
        result = acc / total[:, None]
        tl.store(target + head_dims, result.to(out.dtype.element_ty), inside)
        return
    part = item * NUM_HEADS + kv_head * GROUP + head
    tl.store(partial_stats + part * 2, best, head < GROUP)
    tl.store(partial_stats + part * 2 + 1, total, head < GROUP)
    tl.store(partial_out + part[:, None] * HEAD_DIM + dim[None, :], acc, inside)
    tl.debug_barrier()  # all of it is stored before this split counts as arrived
    arrival = arrivals + row * (NUM_HEADS // GROUP) + kv_head
    if tl.atomic_add(arrival, 1, sem="acq_rel") < num_splits - 1:
        return
    tl.store(arrival, 0)
    first_part = (item - split) * NUM_HEADS + kv_head * GROUP
    result = _sum_of_splits(
        partial_out, partial_stats, first_part, num_splits, NUM_HEADS, GROUP, HEAD_DIM,
        PADDED_GROUP, PADDED_DIM, AT_ONCE,
    )  # fmt: skip
    head = tl.arange(0, PADDED_GROUP)
    inside = (head < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    head_dims = (kv_head * GROUP + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target + head_dims, result.to(out.dtype.element_ty), inside)


@triton.jit
def _prefill_kernel(
    query, kv_cache, block_tables, seq_lens, query_start_loc, sinks, out,
    scale, window, soft_cap, query_stride, table_stride, value_offset, num_rows,
    GROUP: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    FIXED_ORDER: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // GROUP  # query tokens of a program
    ALL_MASKED: tl.constexpr = HAS_WINDOW or FIXED_ORDER
    NUM_KV_HEADS: tl.constexpr = NUM_HEADS // GROUP
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # what sees most keys begins first
    index, kv_head = program // NUM_KV_HEADS, program % NUM_KV_HEADS
    # Row r owns the programs from query_start_loc[r] // TOKENS + r on: enough for all its tokens.
    low, high = 0, num_rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // TOKENS + middle <= index:
            low = middle + 1
        else:
            high = middle
    row = low - 1
    start = tl.load(query_start_loc + row)
    count = tl.load(query_start_loc + row + 1) - start
    first_query = (index - (start // TOKENS + row)) * TOKENS
    is_done = first_query >= count
    if not FIXED_ORDER:
        is_done = is_done | (count == 1)  # by _decode_kernel
    if is_done:
        return
    length = tl.load(seq_lens + row)
    context = length - count

    lane = tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED_DIM)
    token, head = first_query + lane // GROUP, lane % GROUP
    inside = ((token < count) & (lane < TOKENS * GROUP))[:, None] & (dim < HEAD_DIM)[None, :]
    head_dims = (kv_head * GROUP + head)[:, None] * HEAD_DIM + dim[None, :]
    token_index = (start + token).to(tl.int64)[:, None]
    q = tl.load(query + token_index * query_stride + head_dims, inside, other=0.0)
    position = (context + token)[:, None]
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        best, total = _after_sinks(sinks + kv_head * GROUP + head, lane < TOKENS * GROUP)
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    table = block_tables + row.to(tl.int64) * table_stride
    first = tl.maximum(context + first_query - window + 1, 0) if HAS_WINDOW else 0
    end = tl.minimum(context + first_query + TOKENS, length)
    # Keys up to the first query are seen by all; the diagonal, and a window's edge, need masks.
    diagonal = first // KEYS if ALL_MASKED else (context + first_query + 1) // KEYS
    for tile in range(0, 0 if ALL_MASKED else diagonal):
        tokens = tile * KEYS + tl.arange(0, KEYS)
        best, total, acc = _attend_keys(
            q, best, total, acc, kv_cache, table, tokens, tokens, tokens, kv_head * HEAD_DIM,
            scale, soft_cap, value_offset,
            TOKEN_STRIDE, BLOCK_SIZE, HEAD_DIM, HAS_SOFT_CAP, PADDED_DIM, ALL_SEEN=True,
        )  # fmt: skip
    for tile in range(diagonal, tl.cdiv(end, KEYS)):
        tokens = tile * KEYS + tl.arange(0, KEYS)
        in_context = tokens < end
        seen = tokens[None, :] <= position
        if HAS_WINDOW:
            in_context = in_context & (tokens >= first)
            seen = seen & (tokens[None, :] > position - window)
        best, total, acc = _attend_keys(
            q, best, total, acc, kv_cache, table, tokens, in_context, seen, kv_head * HEAD_DIM,
            scale, soft_cap, value_offset,
            TOKEN_STRIDE, BLOCK_SIZE, HEAD_DIM, HAS_SOFT_CAP, PADDED_DIM, ALL_SEEN=False,
        )  # fmt: skip
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + token_index * NUM_HEADS * HEAD_DIM + head_dims, result, inside)


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    sinks: Tensor | None = None,
    most_programs: int | None = None,
    fixed_order: bool = False,
) -> Tensor:
    """See `attention.paged_attention`. most_programs: over which decode rows are split.

    fixed_order: every token's sums in one order, whatever else is in the step; slower.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    num_tokens, num_heads, head_dim = query.shape
    if num_tokens == 0:
        return out
    query = query if _is_packed(query) else query.contiguous()
    _, _, block_size, num_kv_heads, _ = kv_cache.shape
    some_tensor = query if sinks is None else sinks
    tensors = query, kv_cache, block_tables, seq_lens, query_start_loc, some_tensor, out
    scalars = (
        *(scale, sliding_window, soft_cap),
        *(query.stride(0), block_tables.stride(0), kv_cache.stride(0)),
    )
    constants = {
        "GROUP": num_heads // num_kv_heads, "NUM_HEADS": num_heads, "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size, "TOKEN_STRIDE": num_kv_heads * head_dim,
        "HAS_WINDOW": sliding_window > 0, "HAS_SOFT_CAP": soft_cap > 0,
        "HAS_SINKS": sinks is not None,
        "PADDED_DIM": max(16, triton.next_power_of_2(head_dim)),
    }  # fmt: skip
    if not fixed_order:
        _attend_single_tokens(tensors, scalars, constants, most_programs)
    if fixed_order or num_tokens >= len(block_tables):  # else no row has more than one token
        _attend_prompts(tensors, scalars, constants, fixed_order)
    return out


def _attend_single_tokens(
    tensors: tuple[Tensor, ...],
    scalars: tuple[float, ...],
    constants: dict[str, Any],
    most_programs: int | None,
) -> None:
    """Rows with one token, by `_decode_kernel`."""
    query, kv_cache, block_tables, _, _, _, _ = tensors
    num_tokens, num_heads, head_dim = query.shape
    num_rows, num_kv_heads = len(block_tables), kv_cache.shape[3]
    num_programs = min(num_rows, num_tokens) * num_kv_heads  # a decode step has one empty row
    tiling = decode_tiling(head_dim, constants["GROUP"], query.element_size(), num_programs)
    if most_programs is None:
        most_programs = _PROGRAMS_PER_SM * num_multiprocessors()
    most_extra = max(most_programs // num_kv_heads, 1)
    num_items = min(num_rows, num_tokens) + most_extra
    partial_out = query.new_empty((num_items, num_heads, head_dim), dtype=torch.float32)
    partial_stats = query.new_empty((num_items, num_heads, 2), dtype=torch.float32)
    arrivals = _arrivals(max(num_rows * num_kv_heads, _USUAL_ARRIVALS), query.device)
    least_tiles = 1 if num_programs <= _FEW_PROGRAMS else 2
    padded_group = triton.next_power_of_2(constants["GROUP"])
    _decode_kernel[(num_kv_heads, num_items)](
        *tensors, partial_out, partial_stats, arrivals, *scalars, num_rows, most_extra,
        least_tiles, MAX_ROWS=_padded_rows(num_rows),
        ROWS=tiling.rows, KEYS=tiling.keys, PADDED_GROUP=padded_group,
        AT_ONCE=_SUMMED_AT_ONCE,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **launch_options(), **constants,
    )  # fmt: skip


def _padded_rows(num_rows: int) -> int:
    """Few sizes: each is a compilation."""
    size = 32
    while size < num_rows:
        size *= 8
    return size


@functools.cache
def _arrivals(size: int, device: torch.device) -> Tensor:
    """Counters that every call leaves at zero; calls follow each other on one stream."""
    return torch.zeros(size, dtype=torch.int32, device=device)


def _attend_prompts(
    tensors: tuple[Tensor, ...],
    scalars: tuple[float, ...],
    constants: dict[str, Any],
    fixed_order: bool,
) -> None:
    """Rows with several tokens, or with any, by `_prefill_kernel`."""
    query, kv_cache, block_tables = tensors[:3]
    (num_tokens, num_heads, head_dim), num_rows = query.shape, len(block_tables)
    group, num_queries = constants["GROUP"], 0 if fixed_order else num_tokens * num_heads
    tiling = prefill_tiling(head_dim, group, query.element_size(), num_queries)
    num_programs = num_tokens // (tiling.rows // group) + num_rows
    _prefill_kernel[(kv_cache.shape[3] * num_programs,)](
        *tensors, *scalars, num_rows,
        ROWS=tiling.rows, KEYS=tiling.keys, FIXED_ORDER=fixed_order, num_warps=tiling.num_warps,
        num_stages=tiling.num_stages, maxnreg=tiling.max_registers, **constants,
    )  # fmt: skip
