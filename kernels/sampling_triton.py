"""`sampling.draw_tokens` in Triton: noise only for rows that sample, no sort for any.

`_chunk_kernel` reads the logits once, over the whole GPU, and finds each row's token as if nothing
were filtered. `_row_kernel` is done with that, except for rows with a top_k, top_p or min_p: it
counts the tokens above the one found, and their mass. If they say that it is filtered out, then so
is every token below it, and the best of those above is next. What is accepted in the end is the
best of all that the filter leaves, since the noise is the same throughout.
"""

# Triton functions are typed by what they are called with.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compiledllm.kernels.sampling import SamplingRows

_CHUNK = 4096  # of the vocabulary, for one program
_TILE = 4096  # of the vocabulary, read at once by a row's program
_KEY_BITS = {torch.bfloat16: 16, torch.float16: 24, torch.float32: 32}  # as wide as they differ


@triton.jit
def _mix64(x):
    """See sampling._mix64."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _mix32(x):
    """See sampling._mix32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise(seeds, positions, row, index, token):
    """See sampling.gumbel_noise."""
    key = _mix64(tl.load(seeds + row) ^ _mix64(tl.load(positions + index) + 1))
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    bits = _mix32(_mix32(token.to(tl.uint32) ^ low) ^ high)
    uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = 1.0 - tl.minimum(uniform, 0.9999999403953552)
    # log1p(-uniform), exact where 1 - uniform is not
    log = tl.where(rest == 1.0, -uniform, tl.log(rest) * (uniform / (1.0 - rest)))
    return -tl.log(-log)


@triton.jit
def _chunk_kernel(
    logits, rows, positions, temperature, seeds, best_scores, best_ids, peaks, masses,
    vocab, row_stride, num_chunks, CHUNK: tl.constexpr,
):  # fmt: skip
    """The best token of a chunk of one row, its highest logit and its mass.

    The highest is inf if any logit is that or NaN.
    """
    index, chunk = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + index)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(
        logits + index.to(tl.int64) * row_stride + token, token < vocab, other=float("-inf")
    ).to(tl.float32)
    is_nan = tl.max((x != x).to(tl.int32), 0) > 0
    peak = tl.where(is_nan, float("inf"), tl.max(x, 0))
    score = x
    heat = tl.load(temperature + row)
    at = index * num_chunks + chunk
    if heat > 0:
        mass = tl.sum(tl.where(x > float("-inf"), tl.exp((x - peak) / heat), 0.0), 0)
        tl.store(masses + at, mass)
        score = x / heat + _noise(seeds, positions, row, index, token)
    best, where = tl.max(score, 0, return_indices=True)
    tl.store(peaks + at, peak)
    tl.store(best_scores + at, best)
    tl.store(best_ids + at, chunk * CHUNK + where)


@triton.jit
def _row_kernel(
    logits, rows, positions, temperature, seeds, top_k, top_p, min_p, best_scores, best_ids, peaks,
    masses, out, vocab, row_stride, num_chunks,
    PADDED: tl.constexpr, TILE: tl.constexpr, KEY_BITS: tl.constexpr,
):  # fmt: skip
    """The best of a row's chunks, of equal ones the first; with a filter, the best it leaves."""
    index, chunk = tl.program_id(0), tl.arange(0, PADDED)
    row = tl.load(rows + index)
    at, inside = index * num_chunks + chunk, chunk < num_chunks
    chunk_peaks = tl.load(peaks + at, inside, other=float("-inf"))
    peak = tl.max(chunk_peaks, 0)
    is_valid = (peak > float("-inf")) & (peak < float("inf"))
    scores = tl.load(best_scores + at, inside, other=float("-inf"))
    _best, best = tl.max(scores, 0, return_indices=True)
    token = tl.load(best_ids + index * num_chunks + best)
    heat = tl.load(temperature + row)
    k, p, least_p = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    if is_valid & (heat > 0) & ((k > 0) | (p < 1) | (least_p > 0)):
        row_start = logits + index.to(tl.int64) * row_stride
        floor = tl.where(least_p > 0, peak + heat * tl.log(least_p), float("-inf"))
        share = tl.where(chunk_peaks > float("-inf"), tl.exp((chunk_peaks - peak) / heat), 0.0)
        total = tl.sum(tl.load(masses + at, inside, other=0.0) * share, 0)
        if (k > 0) & (p < 1):
            kth = _kth_largest(row_start, vocab, k, TILE, KEY_BITS)
            _count, total = _above(row_start, vocab, kth, True, peak, heat, TILE)
        searching = is_valid
        while searching:
            x = tl.load(row_start + token).to(tl.float32)
            count, mass = _above(row_start, vocab, x, False, peak, heat, TILE)
            searching = (x < floor) | ((k > 0) & (count >= k)) | ((p < 1) & (mass >= p * total))
            if searching:
                token = _best_above(
                    row_start, vocab, x, heat, seeds, positions, row, index, TILE
                )  # fmt: skip
    tl.store(out + index, tl.where(is_valid, token, -1).to(tl.int64))


@triton.jit
def _above(row_start, vocab, least, INCLUSIVE: tl.constexpr, peak, heat, TILE: tl.constexpr):
    """How many tokens have logits above `least` (or equal, if inclusive), and their mass."""
    counts, masses = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.float32)
    for start in range(0, vocab, TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(row_start + token, token < vocab, other=float("-inf")).to(tl.float32)
        is_above = (x >= least) if INCLUSIVE else (x > least)
        counts += is_above.to(tl.int32)
        masses += tl.where(is_above, tl.exp((x - peak) / heat), 0.0)
    return tl.sum(counts, 0), tl.sum(masses, 0)


@triton.jit
def _best_above(row_start, vocab, least, heat, seeds, positions, row, index, TILE: tl.constexpr):
    """The token with the best score of those with logits above `least`."""
    best_score, best_token = tl.full([], float("-inf"), tl.float32), tl.full([], 0, tl.int32)
    for start in range(0, vocab, TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(row_start + token, token < vocab, other=float("-inf")).to(tl.float32)
        if tl.max(x, 0) > least:
            score = x / heat + _noise(seeds, positions, row, index, token)
            score = tl.where(x > least, score, float("-inf"))
            best, where = tl.max(score, 0, return_indices=True)
            if best > best_score:
                best_score, best_token = best, start + where
    return best_token


@triton.jit
def _kth_largest(row_start, vocab, k, TILE: tl.constexpr, KEY_BITS: tl.constexpr):
    """The k-th largest logit of a row; the least if there are not so many. Radix selection."""
    digit = tl.arange(0, 256)
    found = tl.zeros([1], tl.uint64)  # the digits of its key, from the top
    missing = tl.minimum(k, vocab)
    for done in tl.static_range(0, KEY_BITS, 8):
        shift = 24 - done
        counts = tl.zeros([256], tl.int32)
        for start in range(0, vocab, TILE):
            token = start + tl.arange(0, TILE)
            x = tl.load(row_start + token, token < vocab, other=0.0).to(tl.float32)
            key = _ordered_key(x)
            matches = (token < vocab) & ((key >> (shift + 8)) == (found >> (shift + 8)))
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=matches)
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
        is_digit = (above < missing) & (above + counts >= missing)
        missing -= tl.sum(tl.where(is_digit, above, 0), 0)
        found |= tl.sum(tl.where(is_digit, digit, 0), 0).to(tl.uint64) << shift
    is_negative = found < 0x80000000
    bits = tl.where(
        is_negative, (found | ((1 << (32 - KEY_BITS)) - 1)) ^ 0xFFFFFFFF, found ^ 0x80000000
    )
    return tl.max(bits.to(tl.uint32).to(tl.float32, bitcast=True), 0)


@triton.jit
def _ordered_key(x):
    """uint64 in the order of the float32 numbers, below 2^32."""
    bits = x.to(tl.uint32, bitcast=True).to(tl.uint64)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


def draw_tokens(logits: Tensor, rows: Tensor, positions: Tensor, asked: SamplingRows) -> Tensor:
    """See `sampling.draw_tokens`."""
    num_draws, vocab = logits.shape
    num_chunks = triton.cdiv(vocab, _CHUNK)
    scratch = logits.new_empty((3, num_draws, num_chunks), dtype=torch.float32)
    best_scores, peaks, masses = scratch
    best_ids = logits.new_empty((num_draws, num_chunks), dtype=torch.int32)
    out = logits.new_empty(num_draws, dtype=torch.int64)
    assert positions.is_contiguous() and rows.is_contiguous() and logits.stride(1) == 1
    _chunk_kernel[(num_draws, num_chunks)](
        logits, rows, positions, asked.temperature, asked.seeds, best_scores, best_ids, peaks,
        masses, vocab, logits.stride(0), num_chunks, CHUNK=_CHUNK,
    )  # fmt: skip
    _row_kernel[(num_draws,)](
        logits, rows, positions, *asked, best_scores, best_ids, peaks, masses, out, vocab,
        logits.stride(0), num_chunks, PADDED=triton.next_power_of_2(num_chunks), TILE=_TILE,
        KEY_BITS=_KEY_BITS[logits.dtype], num_warps=8,
    )  # fmt: skip
    return out
