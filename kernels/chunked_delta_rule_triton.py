"""The gated delta rule in Triton for rows with several tokens, in chunks of 64 tokens.

`_chunk_kernel` computes, for all chunks and heads at once, the parts that do not depend on the
state. `_scan_kernel` then goes through the chunks of a row in order, with some columns of one
head's state in registers. Both kernels together compute

    update = inverse @ (value - since * (key @ S)),  inverse = (I + L)^-1 diag(beta)
    output = since * (query @ S) + scores @ update
    S      = S * decay + (until * key)^T @ update

S is the state before the chunk. since and until, [tokens, 1], are the decays from the start of the
chunk to each token and from the token to the end of the chunk; decay is that of the whole chunk. L
(strictly lower triangular) has the products of keys with keys, times beta and the decay between the
two tokens; scores (lower triangular) has the products of queries with keys, times the decay between
the two tokens. Queries and keys are normalised. A chunk is a piece of `ragged_triton`.

The border of a row's snapshot (see `short_convolution`) divides its chunk into two sides: inverse
and scores are zero between tokens on different sides, and since, until and decay refer to the
token's side. The scan computes one side after the other and stores the snapshot between them.
"""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compiledllm.kernels.delta_rule import CHUNK
from compiledllm.kernels.launch import max_shared_memory
from compiledllm.kernels.ragged_triton import row_of_piece

# Per token: the factors of query @ S, of key @ S and of key^T @ update, which include the
# normalisation of the query or key, and the decay of the token's side of the chunk.
_NUM_FACTORS = 4
# Slices of packed inputs, which begin at any address: Triton must not specialise on alignment.
_SLICES = ["rows", "snapshots"]


@dataclass(frozen=True, slots=True)
class ChunkTiling:
    """The launch options of `_chunk_kernel`.

    precision: `input_precision` of the products that compute the inverse.
    """

    num_warps: int
    precision: str


@dataclass(frozen=True, slots=True)
class ScanTiling:
    """The tile of a program of `_scan_kernel`.

    columns: number of columns of the state, which are value dimensions.
    """

    columns: int
    num_warps: int
    num_stages: int


def chunk_tiling(dtype: torch.dtype) -> ChunkTiling:
    """TF32 suffices for 16-bit dtypes, since the inverse is rounded to the dtype before its use.

    A TF32 mantissa has as many bits as a float16 mantissa and three more than a bfloat16 mantissa.
    """
    return ChunkTiling(4, "tf32" if dtype.itemsize == 2 else "tf32x3")


def scan_tiling(dtype: torch.dtype, value_dim: int, shared_memory: int) -> ScanTiling:
    """The tiling of the scan. shared_memory: bytes of shared memory that a program may use.

    Three stages of 64 columns need 185 KiB. With two stages, the compiler would wait for a chunk
    right after it has issued the load. One stage and 32 columns are not possible for 16-bit dtypes:
    on a GPU with `wgmma`, Triton 3.6 would read past the end of the shared memory.
    """
    if dtype.itemsize == 2:
        return ScanTiling(min(64, value_dim), 4, 3 if shared_memory >= 200 * 1024 else 1)
    return ScanTiling(min(32, value_dim), 4, 1)


@triton.jit
def step_size(step, step_bias):
    """softplus(step + step_bias) in float32."""
    step = step.to(tl.float32) + step_bias
    above = tl.exp(tl.minimum(step, 20.0))
    total = 1 + above  # the quotient below corrects the logarithm for the rounding of this sum
    softplus = tl.where(total == 1, above, tl.log(total) * (above / (total - 1)))
    return tl.where(step > 20, step, softplus)


@triton.jit
def activated_gates(a, b, log_decay_rate, step_bias):
    """log_decay and beta of tokens in float32. See `delta_rule.gated_delta_rule`."""
    log_decay = -tl.exp(log_decay_rate) * step_size(a, step_bias)
    return log_decay, 1 / (1 + tl.exp(-b.to(tl.float32)))


@triton.jit
def product(x, y):
    """x @ y in float32; float32 inputs are not rounded to TF32."""
    return tl.dot(x, y, input_precision="tf32x3")


@triton.jit
def _merged(inverse, lower, row, column, LEVEL: tl.constexpr, PRECISION: tl.constexpr):
    """The inverses of the diagonal blocks of 2 ** (LEVEL + 1), from the inverses of their halves.

    If A and B are the halves on a block's diagonal and C is below A, the inverse of the block has
    -B^-1 C A^-1 in C's place.
    """
    in_block = (row >> (LEVEL + 1)) == (column >> (LEVEL + 1))
    below = tl.where(in_block & ((row >> LEVEL) != (column >> LEVEL)), lower, 0.0)
    halves = tl.dot(below, inverse, input_precision=PRECISION)
    return inverse - tl.dot(inverse, halves, input_precision=PRECISION)


@triton.jit
def _inverse(lower, PRECISION: tl.constexpr):
    """(I + lower)^-1 of a strictly lower [64, 64], by merging inverses of diagonal blocks.

    The four blocks of 16 are computed at once, a warp each.
    """
    block = tl.arange(0, 4)
    own = block[:, None, None, None] == block[None, None, :, None]
    diagonal = tl.sum(tl.where(own, tl.reshape(lower, [4, 16, 4, 16]), 0.0), 2)  # [4, 16, 16]
    row, column = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    small = tl.where(row == column, 1.0, 0.0) - tl.where(row // 2 == column // 2, diagonal, 0.0)
    small = _merged(small, diagonal, row, column, 1, PRECISION)
    small = _merged(small, diagonal, row, column, 2, PRECISION)
    small = _merged(small, diagonal, row, column, 3, PRECISION)
    inverse = tl.reshape(tl.where(own, small[:, :, None, :], 0.0), [64, 64])
    row, column = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    inverse = _merged(inverse, lower, row, column, 4, PRECISION)
    return _merged(inverse, lower, row, column, 5, PRECISION)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=_SLICES)
def _chunk_kernel(
    query, key, a, b, log_decay_rate, step_bias, query_start_loc, snapshots, inverses, scores,
    factors, query_stride, key_stride, a_stride, b_stride, num_rows,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, EPS: tl.constexpr,
    PRECISION: tl.constexpr, HAS_SNAPSHOTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head. PRECISION: see `ChunkTiling`."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    index, head = tl.program_id(0) // NUM_HEADS, tl.program_id(0) % NUM_HEADS
    row, first_piece = row_of_piece(index, query_start_loc, num_rows, 64)
    start = tl.load(query_start_loc + row)
    count = tl.load(query_start_loc + row + 1) - start
    first = (index - first_piece) * 64
    border = 0
    if HAS_SNAPSHOTS:
        border = tl.load(snapshots + row * 2).to(tl.int32)
    if (first >= count) | (count == 1):  # `_step_kernel` computes rows with one token
        return
    lane, dim = tl.arange(0, 64), tl.arange(0, KEY_DIM)
    is_token, token = first + lane < count, (start + first + lane).to(tl.int64)
    key_dims = head // GROUP * KEY_DIM + dim[None, :]
    k = tl.load(key + token[:, None] * key_stride + key_dims, is_token[:, None], other=0.0)
    q = tl.load(query + token[:, None] * query_stride + key_dims, is_token[:, None], other=0.0)
    log_decay, beta = activated_gates(
        tl.load(a + token * a_stride + head, is_token, other=0.0),
        tl.load(b + token * b_stride + head, is_token, other=0.0),
        tl.load(log_decay_rate + head), tl.load(step_bias + head),
    )  # fmt: skip
    log_decay, beta = tl.where(is_token, log_decay, 0.0), tl.where(is_token, beta, 0.0)
    wide = k.to(tl.float32)
    k_factor = tl.rsqrt(tl.sum(wide * wide, 1) + EPS)
    wide = q.to(tl.float32)
    q_factor = tl.rsqrt(tl.sum(wide * wide, 1) + EPS) * KEY_DIM**-0.5
    total = tl.cumsum(log_decay, 0)
    # Per token, the totals at the start and at the end of the token's side.
    start_total = tl.zeros_like(total)
    end_total = start_total + tl.sum(log_decay, 0)
    late, early = lane[:, None], lane[None, :]
    is_after = late >= early
    if HAS_SNAPSHOTS:
        border = border - first  # a border outside the chunk leaves one side
        until_border = tl.sum(tl.where(lane < border, log_decay, 0.0), 0)
        has_sides = (border > 0) & (border < 64)
        end_total = tl.where(has_sides & (lane < border), until_border, end_total)
        start_total = tl.where(has_sides & (lane >= border), until_border, start_total)
        is_after = is_after & ((late < border) == (early < border))
    item = tl.program_id(0).to(tl.int64)
    factor = factors + item * 256 + lane
    tl.store(factor, q_factor * tl.exp(total - start_total))
    tl.store(factor + 64, k_factor * tl.exp(total - start_total))
    tl.store(factor + 128, k_factor * tl.exp(end_total - total))
    tl.store(factor + 192, tl.exp(end_total - start_total))

    square = item * 4096 + late * 64 + early
    between = tl.where(is_after, total[:, None] - total[None, :], float("-inf"))
    decay = tl.exp(between) * k_factor[None, :]
    score = product(q, tl.trans(k)) * q_factor[:, None] * decay
    tl.store(scores + square, score.to(scores.dtype.element_ty))
    lower = product(k, tl.trans(k)) * (k_factor * beta)[:, None] * decay
    inverse = _inverse(tl.where(late > early, lower, 0.0), PRECISION) * beta[None, :]
    tl.store(inverses + square, inverse.to(inverses.dtype.element_ty))


@triton.jit(do_not_specialize_on_alignment=_SLICES)
def _scan_kernel(
    query, key, value, state, rows, query_start_loc, seq_lens, snapshots, inverses, scores,
    factors, out, query_stride, key_stride, value_stride, state_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr, HAS_SNAPSHOTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some columns of one head of a row, chunk after chunk."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(1)
    start = tl.load(query_start_loc + row)
    count = tl.load(query_start_loc + row + 1) - start
    if count <= 1:  # `_step_kernel` computes rows with one token
        return
    TILES: tl.constexpr = VALUE_DIM // COLUMNS
    head, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    dim, lane = tl.arange(0, KEY_DIM), tl.arange(0, 64)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    states = state + head * KEY_DIM * VALUE_DIM + dim[:, None] * VALUE_DIM + column[None, :]
    own = states + tl.load(rows + row).to(tl.int64) * state_stride
    s = tl.load(own, tl.load(seq_lens + row) > count, other=0.0).to(tl.float32)
    first_item = (start // 64 + row).to(tl.int64) * NUM_HEADS + head
    square = lane[:, None] * 64 + lane[None, :]
    start = start.to(tl.int64)
    dtype = query.dtype.element_ty
    border, num_parts = 0, 1
    if HAS_SNAPSHOTS:
        border = tl.load(snapshots + row * 2).to(tl.int32)
        num_parts = tl.where(border > 0, 2, 1)
    for part in range(num_parts):  # the tokens before the border, then the tokens after it
        low = tl.where(part == num_parts - 1, border, 0)
        high = tl.where(part == num_parts - 1, count, border)
        for first in range(low // 64 * 64, high, 64):
            token = first + lane
            is_token = ((token >= low) & (token < high))[:, None]
            place = (start + token)[:, None]
            item = first_item + first // 64 * NUM_HEADS
            # The compiler does not pipeline these two loads. They are issued early, so that they
            # are in flight during the first products.
            factor = factors + item * 256 + lane
            q_factor = tl.load(factor)
            decay = tl.load(factors + item * 256 + 192 + tl.maximum(low - first, 0))
            key_dims = head // GROUP * KEY_DIM + dim[None, :]
            columns = head * VALUE_DIM + column[None, :]
            k = tl.load(key + place * key_stride + key_dims, is_token, other=0.0)
            q = tl.load(query + place * query_stride + key_dims, is_token, other=0.0)
            v = tl.load(value + place * value_stride + columns, is_token, other=0.0)
            inverse = tl.load(inverses + item * 4096 + square)
            score = tl.load(scores + item * 4096 + square)
            before = s.to(dtype)
            known = product(k, before) * tl.load(factor + 64)[:, None]
            update = product(inverse, (v.to(tl.float32) - known).to(dtype))
            result = product(q, before) * q_factor[:, None]
            result += product(score, update.to(dtype))
            target = out + place * (NUM_HEADS * VALUE_DIM) + columns
            tl.store(target, result.to(out.dtype.element_ty), is_token)
            update *= tl.load(factor + 128)[:, None]
            s = s * decay + product(tl.trans(k), update.to(dtype))
        if HAS_SNAPSHOTS:  # noqa: SIM102  (known to the compiler, unlike the next condition)
            if part < num_parts - 1:
                slot = states + tl.load(snapshots + row * 2 + 1) * state_stride
                tl.store(slot, s.to(state.dtype.element_ty))
    tl.store(own, s.to(state.dtype.element_ty))


def compute_chunks(
    tensors: tuple[Tensor, ...],
    strides: tuple[int, ...],
    constants: dict[str, Any],
    snapshots: Tensor | None = None,
    chunk: ChunkTiling | None = None,
    scan: ScanTiling | None = None,
) -> None:
    """Compute the rows with several tokens: write their outputs to `out` and update their states.

    tensors: query, key, value, a, b, log_decay_rate, step_bias, state, rows, query_start_loc,
    seq_lens, out. strides: of a token in query, key and value, of a row in state, of a token in a
    and b. constants: NUM_HEADS, GROUP, KEY_DIM, EPS and `launch.launch_options`. snapshots: see
    `delta_rule.gated_delta_rule`. chunk, scan: None chooses the usual tiling.
    """
    query, key, value, *gates, state, rows, query_start_loc, seq_lens, out = tensors
    (num_tokens, num_heads, value_dim), num_rows = value.shape, len(rows)
    num_pieces = num_tokens // CHUNK + num_rows
    items = num_pieces, num_heads
    inverses, scores = (query.new_empty((*items, CHUNK, CHUNK)) for _ in range(2))
    factors = query.new_empty((*items, _NUM_FACTORS, CHUNK), dtype=torch.float32)
    sizes = {name: constants[name] for name in ("NUM_HEADS", "GROUP", "KEY_DIM")}
    launch = {name: constants[name] for name in ("OVERLAP", "launch_pdl")}
    launch["HAS_SNAPSHOTS"] = snapshots is not None
    snapshots_or_rows = rows if snapshots is None else snapshots  # without snapshots never read
    c = chunk or chunk_tiling(query.dtype)
    _chunk_kernel[(num_pieces * num_heads,)](
        query, key, *gates, query_start_loc, snapshots_or_rows, inverses, scores, factors,
        *strides[:2], *strides[4:], num_rows, EPS=constants["EPS"], PRECISION=c.precision,
        num_warps=c.num_warps, **sizes, **launch,
    )  # fmt: skip
    s = scan or scan_tiling(query.dtype, value_dim, max_shared_memory())
    _scan_kernel[(num_heads * (value_dim // s.columns), num_rows)](
        query, key, value, state, rows, query_start_loc, seq_lens, snapshots_or_rows, inverses,
        scores, factors, out, *strides[:4], VALUE_DIM=value_dim, COLUMNS=s.columns,
        num_warps=s.num_warps, num_stages=s.num_stages, **sizes, **launch,
    )  # fmt: skip
