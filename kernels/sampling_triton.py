"""`sampling.draw_tokens` in Triton: one pass over the logits, noise only for rows that sample."""

# Triton functions are typed by what they are called with.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 4096  # of the vocabulary, for one program


@triton.jit
def _mix(x):
    """See sampling._mix."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _chunk_kernel(
    logits, temperature, seeds, positions, best_scores, best_ids, vocab, row_stride, num_chunks,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The best token of a chunk of one row."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    row_start = logits + row.to(tl.int64) * row_stride
    score = tl.load(row_start + token, token < vocab, other=float("-inf")).to(tl.float32)
    heat = tl.load(temperature + row)
    if heat > 0:
        key = _mix(tl.load(seeds + row) ^ _mix(tl.load(positions + row) + 1))
        bits = _mix(key + (token.to(tl.int64) + 1) * -7046029254386353131)
        uniform = (((bits >> 12) & ((1 << 52) - 1)).to(tl.float64) + 0.5) * 2.220446049250313e-16
        score = score / heat + (-tl.log(-tl.log(uniform))).to(tl.float32)
    best, index = tl.max(score, 0, return_indices=True)
    tl.store(best_scores + row * num_chunks + chunk, best)
    tl.store(best_ids + row * num_chunks + chunk, chunk * CHUNK + index)


@triton.jit
def _row_kernel(best_scores, best_ids, out, num_chunks, PADDED: tl.constexpr):
    """The best of a row's chunks; of equal ones the first."""
    row, chunk = tl.program_id(0), tl.arange(0, PADDED)
    inside = chunk < num_chunks
    score = tl.load(best_scores + row * num_chunks + chunk, inside, other=float("-inf"))
    _, index = tl.max(score, 0, return_indices=True)
    tl.store(out + row, tl.load(best_ids + row * num_chunks + index).to(tl.int64))


def draw_tokens(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """See `sampling.draw_tokens`."""
    num_rows, vocab = logits.shape
    num_chunks = triton.cdiv(vocab, _CHUNK)
    best_scores = logits.new_empty((num_rows, num_chunks), dtype=torch.float32)
    best_ids = logits.new_empty((num_rows, num_chunks), dtype=torch.int32)
    out = logits.new_empty(num_rows, dtype=torch.int64)
    _chunk_kernel[(num_rows, num_chunks)](
        logits, temperature, seeds, positions, best_scores, best_ids, vocab, logits.stride(0),
        num_chunks, CHUNK=_CHUNK,
    )  # fmt: skip
    _row_kernel[(num_rows,)](
        best_scores, best_ids, out, num_chunks, PADDED=triton.next_power_of_2(num_chunks)
    )
    return out
