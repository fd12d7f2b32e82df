"""`logprobs` in Triton, for a few of the most likely tokens: the logits are read once."""

# Triton functions are typed by what they are called with.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 4096  # of the vocabulary, for one program


@triton.jit
def _chunk_kernel(
    logits, rows, chosen, best, best_ids, peaks, masses, counts, vocab, row_stride, num_chunks,
    NUM_BEST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of a chunk of a row: its best, its mass, and how many tokens are ahead of the chosen one."""
    index, chunk = tl.program_id(0), tl.program_id(1)
    row_start = logits + tl.load(rows + index) * row_stride
    lane = tl.arange(0, CHUNK)
    token = chunk * CHUNK + lane
    x = tl.load(row_start + token, token < vocab, other=float("-inf")).to(tl.float32)
    own = tl.load(row_start + tl.load(chosen + index)).to(tl.float32)
    at = index * num_chunks + chunk
    peak = tl.max(x, 0)
    tl.store(counts + at, tl.sum((x > own).to(tl.int32), 0))
    tl.store(peaks + at, peak)
    tl.store(masses + at, tl.sum(tl.where(x > float("-inf"), tl.exp(x - peak), 0.0), 0))
    for place in tl.static_range(NUM_BEST):
        value, where = tl.max(x, 0, return_indices=True)
        tl.store(best + at * NUM_BEST + place, value)
        tl.store(best_ids + at * NUM_BEST + place, chunk * CHUNK + where)
        x = tl.where(lane == where, float("-inf"), x)


@triton.jit
def _row_kernel(
    best, best_ids, peaks, masses, counts, row_best, row_best_ids, totals, ranks, num_chunks,
    NUM_BEST: tl.constexpr, CHUNKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The chunks of a row together."""
    index, chunk = tl.program_id(0), tl.arange(0, CHUNKS)
    at, inside = index * num_chunks + chunk, chunk < num_chunks
    peak = tl.load(peaks + at, inside, other=float("-inf"))
    highest = tl.max(peak, 0)
    share = tl.where(peak > float("-inf"), tl.exp(peak - highest), 0.0)
    mass = tl.sum(tl.load(masses + at, inside, other=0.0) * share, 0)
    tl.store(totals + index, highest + tl.log(mass))
    tl.store(ranks + index, 1 + tl.sum(tl.load(counts + at, inside, other=0), 0).to(tl.int64))
    lane = tl.arange(0, CANDIDATES)
    start = index * num_chunks * NUM_BEST
    x = tl.load(best + start + lane, lane < num_chunks * NUM_BEST, other=float("-inf"))
    for place in tl.static_range(NUM_BEST):
        value, where = tl.max(x, 0, return_indices=True)
        tl.store(row_best + index * NUM_BEST + place, value)
        token = tl.load(best_ids + start + where)
        tl.store(row_best_ids + index * NUM_BEST + place, token.to(tl.int64))
        x = tl.where(lane == where, float("-inf"), x)


def best_logits(
    logits: Tensor, rows: Tensor, chosen: Tensor, num_best: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `logprobs._best_logits`; of `rows` of the logits."""
    count, vocab = len(rows), logits.shape[-1]
    num_chunks = triton.cdiv(vocab, _CHUNK)
    peaks, masses = logits.new_empty((2, count, num_chunks), dtype=torch.float32)
    counts = logits.new_empty((count, num_chunks), dtype=torch.int32)
    best = logits.new_empty((count, num_chunks, num_best), dtype=torch.float32)
    best_ids = logits.new_empty((count, num_chunks, num_best), dtype=torch.int32)
    row_best = logits.new_empty((count, num_best), dtype=torch.float32)
    row_best_ids = row_best.new_empty((count, num_best), dtype=torch.int64)
    totals = row_best.new_empty(count)
    ranks = row_best.new_empty(count, dtype=torch.int64)
    assert logits.stride(1) == 1 and rows.is_contiguous() and chosen.is_contiguous()
    _chunk_kernel[(count, num_chunks)](
        logits, rows, chosen, best, best_ids, peaks, masses, counts, vocab, logits.stride(0),
        num_chunks, NUM_BEST=num_best, CHUNK=_CHUNK,
    )  # fmt: skip
    _row_kernel[(count,)](
        best, best_ids, peaks, masses, counts, row_best, row_best_ids, totals, ranks, num_chunks,
        NUM_BEST=num_best, CHUNKS=triton.next_power_of_2(num_chunks),
        CANDIDATES=triton.next_power_of_2(max(num_chunks * num_best, 1)),
    )  # fmt: skip
    return row_best, row_best_ids, totals, ranks
