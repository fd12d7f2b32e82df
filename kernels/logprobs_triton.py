"""`logprobs` in Triton, for few most likely tokens. The kernels read the logits once."""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compiledllm.kernels.logprobs import MAX_IN_TRITON

_CHUNK = 4096  # tokens of the vocabulary per program
_NAMED = 128  # named tokens looked up together
# Triton must not compile a variant of a kernel for a number that a request asks for, or for the
# alignment of a slice: such a variant would be compiled after the start.
_ONE_VARIANT = {
    "do_not_specialize": ["num_best", "num_named"],
    "do_not_specialize_on_alignment": ["rows", "chosen", "peaks", "masses"],
}


@triton.jit(**_ONE_VARIANT)
def _chunk_kernel(
    logits, rows, chosen, best, best_ids, peaks, masses, counts, vocab, row_stride, num_chunks,
    num_best, CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk of a row: best tokens, mass, and number of tokens above the chosen token.

    The mass is the sum of exp(logit - highest logit of the chunk).
    """
    index, chunk = tl.program_id(0), tl.program_id(1)
    row_start = logits + tl.load(rows + index) * row_stride
    lane = tl.arange(0, CHUNK)
    token = chunk * CHUNK + lane
    x = tl.load(row_start + token, token < vocab, other=float("-inf")).to(tl.float32)
    own = tl.load(row_start + tl.maximum(tl.load(chosen + index), 0)).to(tl.float32)
    at = index * num_chunks + chunk
    peak = tl.max(x, 0)
    tl.store(counts + at, tl.sum((x > own).to(tl.int32), 0))
    tl.store(peaks + at, peak)
    tl.store(masses + at, tl.sum(tl.where(x > float("-inf"), tl.exp(x - peak), 0.0), 0))
    for place in range(num_best):
        value, where = tl.max(x, 0, return_indices=True)
        tl.store(best + at * num_best + place, value)
        tl.store(best_ids + at * num_best + place, chunk * CHUNK + where)
        x = tl.where(lane == where, float("-inf"), x)


@triton.jit(**_ONE_VARIANT)
def _row_kernel(
    logits, rows, chosen, named_ids, best, best_ids, peaks, masses, counts, packed, row_stride,
    num_chunks, num_best, num_named, NAMED: tl.constexpr, CHUNKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Merge a row's chunks, look up the named tokens, and write `Logprobs.packed` of the row."""
    index, chunk = tl.program_id(0), tl.arange(0, CHUNKS)
    num_columns = 1 + num_best + num_named
    ids = packed + index * (2 * num_columns + 1)
    values = ids + num_columns
    at, inside = index * num_chunks + chunk, chunk < num_chunks
    tl.store(values + num_columns, 1 + tl.sum(tl.load(counts + at, inside, other=0), 0))
    peak = tl.load(peaks + at, inside, other=float("-inf"))
    highest = tl.max(peak, 0)
    share = tl.where(peak > float("-inf"), tl.exp(peak - highest), 0.0)
    mass = tl.sum(tl.load(masses + at, inside, other=0.0) * share, 0)
    total = highest + tl.log(mass)

    row_start = logits + tl.load(rows + index) * row_stride
    token = tl.maximum(tl.load(chosen + index), 0)
    value = tl.load(row_start + token).to(tl.float32) - total
    tl.store(ids, token.to(tl.int32))
    tl.store(values, value.to(tl.int32, bitcast=True))
    lane = tl.arange(0, CANDIDATES)
    start = index * num_chunks * num_best
    x = tl.load(best + start + lane, lane < num_chunks * num_best, other=float("-inf"))
    for place in range(num_best):
        highest_left, where = tl.max(x, 0, return_indices=True)
        value = highest_left - total
        tl.store(ids + 1 + place, tl.load(best_ids + start + where))
        tl.store(values + 1 + place, value.to(tl.int32, bitcast=True))
        x = tl.where(lane == where, float("-inf"), x)
    for first in range(0, num_named, NAMED):
        name = first + tl.arange(0, NAMED)
        is_named = name < num_named
        tokens = tl.load(named_ids + index * num_named + name, is_named, other=0)
        named = tl.load(row_start + tokens, is_named, other=0.0).to(tl.float32) - total
        tl.store(ids + 1 + num_best + name, tokens.to(tl.int32), is_named)
        tl.store(values + 1 + num_best + name, named.to(tl.int32, bitcast=True), is_named)


def pack(logits: Tensor, rows: Tensor, chosen: Tensor, num_best: int, named_ids: Tensor) -> Tensor:
    """See `logprobs.token_logprobs`. Returns `Logprobs.packed`, int32 [rows, 2 * columns + 1]."""
    (count, num_named), vocab = named_ids.shape, logits.shape[-1]
    num_chunks = triton.cdiv(vocab, _CHUNK)
    peaks, masses = logits.new_empty((2, count, num_chunks), dtype=torch.float32)
    best = logits.new_empty((count, num_chunks, num_best), dtype=torch.float32)
    counts = logits.new_empty((count, num_chunks), dtype=torch.int32)
    best_ids = counts.new_empty((count, num_chunks, num_best))
    packed = counts.new_empty((count, 2 * (1 + num_best + num_named) + 1))
    assert logits.stride(1) == 1
    assert rows.is_contiguous() and chosen.is_contiguous() and named_ids.is_contiguous()
    _chunk_kernel[(count, num_chunks)](
        logits, rows, chosen, best, best_ids, peaks, masses, counts, vocab, logits.stride(0),
        num_chunks, num_best, CHUNK=_CHUNK,
    )  # fmt: skip
    _row_kernel[(count,)](
        logits, rows, chosen, named_ids, best, best_ids, peaks, masses, counts, packed,
        logits.stride(0), num_chunks, num_best, num_named, NAMED=_NAMED,
        CHUNKS=triton.next_power_of_2(num_chunks),
        CANDIDATES=triton.next_power_of_2(num_chunks * MAX_IN_TRITON),
    )  # fmt: skip
    return packed
