"""Paged attention of rows with several new tokens. A program computes a block of query tokens."""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compiledllm.kernels.launch import launch_options, max_shared_memory, num_multiprocessors
from compiledllm.kernels.online_softmax_triton import Tiling, after_sinks, attend_keys, first_seen
from compiledllm.kernels.ragged_triton import row_of_piece


def prefill_tiling(head_dim: int, group: int, dtype: torch.dtype, num_queries: int) -> Tiling:
    """The tile sizes for a step.

    group: query heads per KV head, all in one program. num_queries: query tokens times heads. These
    tilings are the fastest of 10 on an H100 (bfloat16, 16 prompts of 1024 tokens). Two programs on
    a multiprocessor hide each other's softmax, and more rows per program mean fewer reads of the
    keys. For head_dim 128 the kernel reaches 351 TFLOP/s, and 254 TFLOP/s without the register
    limit. Few queries get smaller programs, because the longest program determines the kernel's
    time.
    """
    min_rows = triton.next_power_of_2(group)
    if head_dim > 256:
        return tiling_of_wide_heads(min_rows, dtype, max_shared_memory())
    if dtype == torch.float32:
        return Tiling(max(32, min_rows), 32, 4, 2)
    if head_dim > 128:
        return Tiling(max(64, min_rows), 32, 4, 1)
    if head_dim > 64 and num_queries >= 3 * 128 * num_multiprocessors():
        return Tiling(max(128, min_rows), 64, 8, 2, max_registers=128)
    return Tiling(max(64, min_rows), 64, 4, 2)


def tiling_of_wide_heads(min_rows: int, dtype: torch.dtype, max_shared: int) -> Tiling:
    """For head_dim 257 to 512: the largest tile of queries, keys and values that fits on a GPU.

    Eight warps hold the float32 sums of 64 rows in 128 registers per thread. min_rows: query heads
    per KV head, rounded up to a power of two. max_shared: the GPU's bytes of shared memory per
    program.
    """
    row_bytes = 512 * dtype.itemsize
    for rows, keys in ((64, 64), (64, 32), (32, 32)):
        rows = max(rows, min_rows)
        if (rows + 2 * keys) * row_bytes <= max_shared:
            return Tiling(rows, keys, 8, 1)
    return Tiling(max(16, min_rows), 16, 4, 1)


@triton.jit(do_not_specialize=["num_rows"])
def _prefill_kernel(
    query, kv_cache, block_tables, seq_lens, query_start_loc, sinks, kv_scales, out,
    scale, window, soft_cap, query_stride, table_stride, value_offset, num_rows,
    GROUP: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, HAS_WINDOW: tl.constexpr, IN_CHUNKS: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_KV_SCALES: tl.constexpr, PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, FIXED_ORDER: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attention of ROWS // GROUP tokens of a row in all query heads of one KV head."""
    if OVERLAP:
        gdc_launch_dependents()
    TOKENS: tl.constexpr = ROWS // GROUP  # query tokens per program
    # A window needs masks from the first key on. With FIXED_ORDER all tiles of keys are masked, so
    # that a key is treated alike wherever a chunk of the prompt begins.
    ALL_MASKED: tl.constexpr = HAS_WINDOW or FIXED_ORDER
    NUM_KV_HEADS: tl.constexpr = NUM_HEADS // GROUP
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest programs start first
    index, kv_head = program // NUM_KV_HEADS, program % NUM_KV_HEADS
    row, first_piece = row_of_piece(index, query_start_loc, num_rows, TOKENS)
    start = tl.load(query_start_loc + row)
    count = tl.load(query_start_loc + row + 1) - start
    first_query = (index - first_piece) * TOKENS
    is_done = first_query >= count
    if not FIXED_ORDER:
        is_done = is_done | (count == 1)  # _decode_kernel computes this row
    # As in _decode_kernel, lengths are read before this wait. Programs without work must wait, too.
    if OVERLAP:
        gdc_wait()
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
        best, total = after_sinks(sinks + kv_head * GROUP + head, lane < TOKENS * GROUP)
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    if HAS_KV_SCALES:
        scale *= tl.load(kv_scales).to(tl.float32)
    table = block_tables + row.to(tl.int64) * table_stride
    first = first_seen(context + first_query, window, IN_CHUNKS) if HAS_WINDOW else 0
    end = tl.minimum(context + first_query + TOKENS, length)
    # All queries see all keys before the first query. Only the diagonal and a window need masks.
    diagonal = first // KEYS if ALL_MASKED else (context + first_query + 1) // KEYS
    for tile in range(0, 0 if ALL_MASKED else diagonal):
        tokens = tile * KEYS + tl.arange(0, KEYS)
        best, total, acc = attend_keys(
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
            seen = seen & (tokens[None, :] >= first_seen(position, window, IN_CHUNKS))
        best, total, acc = attend_keys(
            q, best, total, acc, kv_cache, table, tokens, in_context, seen, kv_head * HEAD_DIM,
            scale, soft_cap, value_offset,
            TOKEN_STRIDE, BLOCK_SIZE, HEAD_DIM, HAS_SOFT_CAP, PADDED_DIM, ALL_SEEN=False,
        )  # fmt: skip
    result = acc / total[:, None]
    if HAS_KV_SCALES:
        result *= tl.load(kv_scales + 1).to(tl.float32)
    result = result.to(out.dtype.element_ty)
    tl.store(out + token_index * NUM_HEADS * HEAD_DIM + head_dims, result, inside)


def attend_prompts(
    tensors: tuple[Tensor, ...],
    scalars: tuple[float, ...],
    constants: dict[str, Any],
    fixed_order: bool,
) -> None:
    """Launch `_prefill_kernel` for rows with several tokens.

    tensors, scalars, constants: as in `decode_attention_triton.attend_few_tokens`. fixed_order:
    compute rows with one token, too, and sum over keys in an order that does not depend on other
    rows. The tiling then must not depend on the number of tokens in the step.
    """
    query, kv_cache, block_tables = tensors[:3]
    (num_tokens, num_heads, head_dim), num_rows = query.shape, len(block_tables)
    group, num_queries = constants["GROUP"], 0 if fixed_order else num_tokens * num_heads
    tiling = prefill_tiling(head_dim, group, query.dtype, num_queries)
    num_programs = num_tokens // (tiling.rows // group) + num_rows
    _prefill_kernel[(kv_cache.shape[3] * num_programs,)](
        *tensors, *scalars, num_rows,
        ROWS=tiling.rows, KEYS=tiling.keys, FIXED_ORDER=fixed_order, num_warps=tiling.num_warps,
        num_stages=tiling.num_stages, maxnreg=tiling.max_registers, **launch_options(), **constants,
    )  # fmt: skip
