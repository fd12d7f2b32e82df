"""Repetition, frequency and presence penalties on logits, and the token counts they need."""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 2048  # tokens of the vocabulary per program


@triton.jit(do_not_specialize=["num_rows"])
def _penalize_kernel(
    logits, index, slots, amounts, counts, num_rows, vocab, IN_PROMPT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab
    repetition = tl.load(amounts + i)
    frequency, presence = tl.load(amounts + num_rows + i), tl.load(amounts + 2 * num_rows + i)
    seen = tl.load(counts + tl.load(slots + i) * vocab + token, inside, other=0)
    count = seen & (IN_PROMPT - 1)
    at = logits + tl.load(index + i) * vocab + token
    x = tl.load(at, inside, other=0.0)
    repeated = tl.where(x > 0, x / repetition, x * repetition)
    x = tl.where(seen > 0, repeated, x)
    x = x - frequency * count.to(tl.float32) - presence * (count > 0).to(tl.float32)
    tl.store(at, x, inside)


def penalize(
    logits: Tensor, index: Tensor, slots: Tensor, amounts: Tensor, counts: Tensor, in_prompt: int
) -> None:
    """Apply penalties to the rows `index` of the logits, in place.

    logits: float32 [batch, vocab], contiguous. index, slots: int64 [rows], rows of `logits` and of
    `counts`. amounts: float32 [3, rows]: repetition, frequency, presence. counts: int32 [slots,
    vocab], each token's count in the output, plus the flag bit `in_prompt` if the prompt has the
    token.
    """
    vocab = logits.shape[1]
    assert logits.is_contiguous() and counts.is_contiguous() and amounts.is_contiguous()
    _penalize_kernel[(len(index), triton.cdiv(vocab, _CHUNK))](
        logits, index, slots, amounts, counts, len(index), vocab, IN_PROMPT=in_prompt, CHUNK=_CHUNK
    )


@triton.jit
def _count_kernel(tokens, index, slots, counts, vocab):
    i = tl.program_id(0)
    token = tl.maximum(tl.load(tokens + tl.load(index + i)), 0)
    at = counts + tl.load(slots + i) * vocab + token
    tl.store(at, tl.load(at) + 1)


def count_tokens(tokens: Tensor, index: Tensor, slots: Tensor, counts: Tensor) -> None:
    """Count one more token in each slot. A negative token counts as token 0.

    tokens: int64 [batch]. index, slots: int64 [rows], indices into `tokens` and rows of `counts`.
    All slots must differ.
    """
    _count_kernel[(len(index),)](tokens, index, slots, counts, counts.shape[1], num_warps=1)
