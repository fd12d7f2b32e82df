"""Code that the paged attention kernels share: a step of online softmax, FP8, and `Tiling`."""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tile of one program. rows: query tokens times heads. keys: KV tokens per iteration.

    max_registers: registers per thread, limited so that more programs fit on a multiprocessor;
    None: no limit.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@triton.jit
def first_seen(position, window, IN_CHUNKS: tl.constexpr):
    """The first position that the token at `position` sees: of its window, or of its chunk."""
    if IN_CHUNKS:
        return position // window * window
    return tl.maximum(position - window + 1, 0)


@triton.jit
def attend_keys(
    q, best, total, acc, kv_cache, table, tokens, in_context, seen, head_offset, scale, soft_cap,
    value_offset,
    TOKEN_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr, PADDED_DIM: tl.constexpr, ALL_SEEN: tl.constexpr,
):  # fmt: skip
    """One step of online softmax, in base 2, over the keys at `tokens`.

    best, total, acc: highest logit [queries], sum of weights [queries] and sum of weighted values
    [queries, PADDED_DIM] so far. in_context: bool [keys], whether any query of the program may see
    the token; other keys are not loaded. seen: bool, broadcast to [queries, keys], whether a query
    sees a key. With ALL_SEEN every query sees every key, and both masks are ignored.
    """
    # `best` holds logits in base 2: query-key products times scale and log2(e).
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
    k, v = k.to(q.dtype), v.to(q.dtype)  # exact for FP8; nothing to do for other caches
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
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # no key seen so far
    weights = tl.exp2(logits * to_base_2 - shift[:, None])
    decay = tl.exp2(best - shift)
    acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return higher, total * decay + tl.sum(weights, 1), acc


@triton.jit
def to_fp8(x, scale):
    """x / scale as FP8 (e4m3), clamped, because an overflow would become NaN. NaN stays NaN."""
    x = tl.div_rn(x.to(tl.float32), scale.to(tl.float32))
    x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(tl.float8e4nv)


@triton.jit
def after_sinks(addresses, exists):
    """Initial `best` and `total` (see `attend_keys`) of queries whose heads have sinks."""
    logits = tl.load(addresses, exists, other=0.0).to(tl.float32)
    return logits * 1.4426950408889634, tl.full(logits.shape, 1.0, tl.float32)
