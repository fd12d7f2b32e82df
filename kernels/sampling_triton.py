"""`sampling.draw_tokens` in Triton: noise for sampled rows only, and no sorting.

`_chunk_kernel` reads the logits once, spread over the whole GPU. For a row without top_k it finds
each chunk's winning token before filters; for a row with top_k it finds the peak (highest logit) of
each group of 64 tokens instead. `_row_kernel` merges the chunks of a row, and then applies the
filters if the row has any.

top_k: at least k tokens reach the k-th highest peak, and all of them are in the few groups whose
peaks reach it. All further work reads these groups only.

top_p: the candidate token is kept if the tokens with higher logits have less than top_p of the
mass. If the candidate is filtered out, so is every token with a lower logit, and the winner among
the tokens with higher logits becomes the next candidate. Since each token's noise stays the same,
the first candidate that is kept is the winner among all tokens that the filter keeps.
"""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compiledllm.kernels.sampling import SamplingRows

_CHUNK = 4096  # tokens of the vocabulary per program
_GROUP = 64  # tokens per group, which has one peak
_GROUPS = 256  # groups that a row's program reads per iteration
# Number of leading bits in which the keys of a dtype can differ.
_KEY_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}
# Slices of larger tensors. Triton must not specialise on their alignment: a variant for another
# alignment would be compiled after the start.
_SLICES = ["rows", "positions", "best_scores", "peaks", "masses"]


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
def _inverse_exponential(seeds, positions, row, index, token):
    """1 / -log(1 - u), u in (0, 1) per token. The largest product with the token's weight wins.

    The logarithm of the result is the token's Gumbel noise, see sampling.gumbel_noise. log(1 - u)
    is computed from the exponent of 1 - u and a polynomial in f = (1 - u) / 2^exponent - 1,
    |f| <= 1/3, fitted to a relative error of 3e-7. If the exponent is 0, f is -u itself,
    which is exact.
    """
    key = _mix64(tl.load(seeds + row) ^ _mix64(tl.load(positions + index) + 1))
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    bits = _mix32(_mix32(token.to(tl.uint32) ^ low) ^ high)
    u = bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    u = tl.minimum(u, 0.9999999403953552)
    rest = (1.0 - u).to(tl.int32, bitcast=True)
    exponent = (rest - 0x3F2AAAAB) & -8388608
    f = (rest - exponent).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(exponent == 0, -u, f)
    series = 0.16964908 + f * -0.15177204
    series = 0.19822499 + f * (-0.16462457 + f * series)
    series = -0.5 + f * (0.33336565 + f * (-0.25004664 + f * series))
    root = tl.rsqrt(exponent.to(tl.float32) * -8.2629587e-08 - (f + f * f * series))
    return root * root


@triton.jit
def _weight(x, peak, temperature):
    """exp((x - peak) / temperature)."""
    return tl.exp2((x - peak) * (1.4426950408889634 / temperature))


@triton.jit
def _key(x):
    """Map float32 to uint32 with the same order."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 and 0.0 get the same key
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize_on_alignment=_SLICES)
def _chunk_kernel(
    logits, rows, positions, temperatures, seeds, top_k, best_scores, best_ids, peaks, masses,
    group_peaks, vocab, row_stride, num_chunks, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The winning token of one chunk of a row, the chunk's peak and mass; or its groups' peaks.

    The peak is inf if any logit is inf or NaN.
    """
    index, chunk = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + index)
    temperature, k = tl.load(temperatures + row), tl.load(top_k + row)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(
        logits + index.to(tl.int64) * row_stride + token, token < vocab, other=float("-inf")
    ).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    at = index * num_chunks + chunk
    if temperature <= 0:
        peak, where = tl.max(x, 0, return_indices=True)
        tl.store(peaks + at, peak)
        tl.store(best_scores + at, peak)
        tl.store(best_ids + at, chunk * CHUNK + where)
    elif k > 0:
        per_group = tl.max(tl.reshape(x, [CHUNK // GROUP, GROUP]), 1)
        group = tl.arange(0, CHUNK // GROUP)
        tl.store(group_peaks + at * (CHUNK // GROUP) + group, per_group)
        tl.store(peaks + at, tl.max(per_group, 0))
    else:
        peak = tl.max(x, 0)
        weight = _weight(x, tl.where(peak > float("-inf"), peak, 0.0), temperature)
        ratio = weight * _inverse_exponential(seeds, positions, row, index, token)
        best = tl.max(ratio, 0)
        tl.store(peaks + at, peak)
        tl.store(masses + at, tl.sum(weight, 0))
        tl.store(best_scores + at, tl.log(best) + peak / temperature)
        tl.store(best_ids + at, tl.min(tl.where(ratio == best, token, vocab), 0))


@triton.jit(do_not_specialize_on_alignment=_SLICES)
def _row_kernel(
    logits, rows, positions, temperatures, seeds, top_k, top_p, min_p, best_scores, best_ids, peaks,
    masses, group_peaks, groups, out, vocab, row_stride, num_chunks,
    CHUNKS: tl.constexpr, PER_CHUNK: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    KEY_BITS: tl.constexpr,
):  # fmt: skip
    """The winner among a row's chunks, ties to the first; with a filter, among the kept tokens."""
    index, chunk = tl.program_id(0), tl.arange(0, CHUNKS)
    row = tl.load(rows + index)
    at, inside = index * num_chunks + chunk, chunk < num_chunks
    chunk_peaks = tl.load(peaks + at, inside, other=float("-inf"))
    peak = tl.max(chunk_peaks, 0)
    is_valid = (peak > float("-inf")) & (peak < float("inf"))
    temperature = tl.load(temperatures + row)
    k, p, row_min_p = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    token = tl.full([], -1, tl.int32)
    if is_valid & ((temperature <= 0) | (k <= 0)):
        scores = tl.load(best_scores + at, inside, other=float("-inf"))
        _best, where = tl.max(scores, 0, return_indices=True)
        token = tl.load(best_ids + index * num_chunks + where)
    if is_valid & (temperature > 0) & ((k > 0) | (p < 1) | (row_min_p > 0)):
        row_start = logits + index.to(tl.int64) * row_stride
        num_groups = num_chunks * PER_CHUNK
        row_groups = groups + index * num_groups
        floor = peak + temperature * tl.log(tl.maximum(row_min_p, 1e-37))
        min_key = _key(tl.where(row_min_p > 0, floor, float("-inf")))
        if k > 0:
            row_peaks = group_peaks + index * num_groups
            num_groups = _list_groups(
                row_peaks, row_groups, num_groups, k, CHUNKS * PER_CHUNK, KEY_BITS
            )  # fmt: skip
            kth = _kth_key(row_start, row_groups, num_groups, vocab, k, GROUPS, GROUP, KEY_BITS)
            total = _mass(
                row_start, row_groups, num_groups, k, vocab, kth, peak, temperature, GROUPS, GROUP
            )
            min_key = tl.maximum(min_key, kth)
            is_kept = peak > float("inf")  # False: there is no candidate yet
        else:
            share = _weight(chunk_peaks, peak, temperature)
            total = tl.sum(tl.load(masses + at, inside, other=0.0) * share, 0)
            is_kept = _key(tl.load(row_start + token).to(tl.float32)) >= min_key
        searching = True
        while searching:
            if not is_kept:
                token = _best_token(
                    row_start, row_groups, num_groups, k, vocab, min_key, peak, temperature, seeds,
                    positions, row, index, GROUPS, GROUP,
                )  # fmt: skip
            searching = p < 1
            if searching:
                min_key = _key(tl.load(row_start + token).to(tl.float32)) + 1
                mass = _mass(
                    row_start, row_groups, num_groups, k, vocab, min_key, peak, temperature,
                    GROUPS, GROUP,
                )  # fmt: skip
                searching = (mass >= p * total) & (mass > 0)
            is_kept = peak > float("inf")
    tl.store(out + index, token.to(tl.int64))


@triton.jit
def _list_groups(peaks, groups, num_groups, k, ALL: tl.constexpr, KEY_BITS: tl.constexpr):
    """Store the indices of groups whose peaks reach the k-th highest peak. Returns their number."""
    group = tl.arange(0, ALL)
    inside = group < num_groups
    keys = _key(tl.load(peaks + group, inside, other=float("-inf")))
    kth = tl.full([], 0, tl.uint32)
    for step in tl.static_range(KEY_BITS):
        higher = kth | (tl.full([], 1, tl.uint32) << (31 - step))
        kth = tl.where(tl.sum((keys >= higher).to(tl.int32), 0) >= k, higher, kth)
    reaches = inside & (keys >= kth)
    place = tl.cumsum(reaches.to(tl.int32), 0) - 1
    tl.store(groups + place, group, reaches)
    tl.debug_barrier()  # other threads of the program read the indices
    return tl.sum(reaches.to(tl.int32), 0)


@triton.jit
def _tile(
    row_start, groups, first, num_groups, k, vocab, GROUPS: tl.constexpr, GROUP: tl.constexpr
):
    """Token ids [GROUPS, GROUP] of the groups from `first` on, and logits, -inf past the end.

    With a top_k, only the groups listed in `groups` count.
    """
    slot = first + tl.arange(0, GROUPS)
    inside = slot < num_groups
    group = tl.load(groups + slot, inside & (k > 0), other=0)
    group = tl.where(k > 0, group, slot)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = inside[:, None] & (token < vocab)
    return token, tl.load(row_start + token, inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _kth_key(
    row_start, groups, num_groups, vocab, k,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, KEY_BITS: tl.constexpr,
):  # fmt: skip
    """The key of the k-th highest logit: the highest key that k tokens reach, found bit by bit."""
    kth = tl.full([], 0, tl.uint32)
    for step in range(KEY_BITS):
        higher = kth | (tl.full([], 1, tl.uint32) << (31 - step))
        counts = tl.zeros([GROUPS, GROUP], tl.int32)
        for first in range(0, num_groups, GROUPS):
            _token, x = _tile(row_start, groups, first, num_groups, k, vocab, GROUPS, GROUP)
            counts += (_key(x) >= higher).to(tl.int32)
        kth = tl.where(tl.sum(tl.sum(counts, 1), 0) >= k, higher, kth)
    return kth


@triton.jit
def _mass(
    row_start, groups, num_groups, k, vocab, min_key, peak, temperature,
    GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The sum of exp((logit - peak) / temperature) over the tokens whose keys reach `min_key`."""
    masses = tl.zeros([GROUPS, GROUP], tl.float32)
    for first in range(0, num_groups, GROUPS):
        _token, x = _tile(row_start, groups, first, num_groups, k, vocab, GROUPS, GROUP)
        masses += tl.where(_key(x) >= min_key, _weight(x, peak, temperature), 0.0)
    return tl.sum(tl.sum(masses, 1), 0)


@triton.jit
def _best_token(
    row_start, groups, num_groups, k, vocab, min_key, peak, temperature, seeds, positions, row,
    index, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The winner among the tokens whose keys reach `min_key`, ties to the first.

    Two reductions instead of one with an index: Triton may reorder a reshaped tensor whose only use
    is a reduction, even if the reduction returns an index.
    """
    best_ratio, best_token = tl.full([], -1.0, tl.float32), tl.full([], 0, tl.int32)
    for first in range(0, num_groups, GROUPS):
        token, x = _tile(row_start, groups, first, num_groups, k, vocab, GROUPS, GROUP)
        noise = _inverse_exponential(seeds, positions, row, index, token)
        ratio = tl.where(_key(x) >= min_key, _weight(x, peak, temperature) * noise, -1.0)
        best = tl.max(tl.max(ratio, 1), 0)
        if best > best_ratio:
            best_tokens = tl.where(ratio == best, token, vocab)
            best_ratio, best_token = best, tl.min(tl.min(best_tokens, 1), 0)
    return best_token


def draw_tokens(logits: Tensor, rows: Tensor, positions: Tensor, params: SamplingRows) -> Tensor:
    """See `sampling.draw_tokens`."""
    num_draws, vocab = logits.shape
    num_chunks = triton.cdiv(vocab, _CHUNK)
    chunks, per_chunk = triton.next_power_of_2(num_chunks), _CHUNK // _GROUP
    best_scores, peaks, masses = logits.new_empty((3, num_draws, num_chunks), dtype=torch.float32)
    best_ids = logits.new_empty((num_draws, num_chunks), dtype=torch.int32)
    group_peaks = logits.new_empty((num_draws, num_chunks * per_chunk), dtype=torch.float32)
    groups = torch.empty_like(group_peaks, dtype=torch.int32)
    out = logits.new_empty(num_draws, dtype=torch.int64)
    assert positions.is_contiguous() and rows.is_contiguous() and logits.stride(1) == 1
    _chunk_kernel[(num_draws, num_chunks)](
        logits, rows, positions, params.temperature, params.seeds, params.top_k, best_scores,
        best_ids, peaks, masses, group_peaks, vocab, logits.stride(0), num_chunks,
        CHUNK=_CHUNK, GROUP=_GROUP,
    )  # fmt: skip
    _row_kernel[(num_draws,)](
        logits, rows, positions, *params, best_scores, best_ids, peaks, masses, group_peaks, groups,
        out, vocab, logits.stride(0), num_chunks, CHUNKS=chunks, PER_CHUNK=per_chunk,
        GROUPS=min(_GROUPS, chunks * per_chunk), GROUP=_GROUP, KEY_BITS=_KEY_BITS[logits.dtype],
        num_warps=16,
    )  # fmt: skip
    return out
