"""AWQ's gemm layout, as written by AutoAWQ."""

from __future__ import annotations

import torch
from torch import Tensor

from compiledllm.kernels.quantized import INT4_ZERO
from compiledllm.models.formats.codes import (
    SCALE_DTYPES,
    QuantizedMatrix,
    expect_dtype,
    expect_finite,
    expect_matrix,
    expect_shape,
)
from compiledllm.models.formats.packing import unpack_bits

_PER_WORD = 8
# Nibble i of a word holds column [0, 2, 4, 6, 1, 3, 5, 7][i]. This is the inverse: by column, the
# nibble that holds it.
_NIBBLE_OF_COLUMN = [0, 4, 1, 5, 2, 6, 3, 7]


def from_awq(
    qweight: Tensor,
    qzeros: Tensor | None,
    scales: Tensor,
    *,
    is_symmetric: bool = False,
    bits: int = 4,
    group_size: int,
    version: str = "gemm",
) -> QuantizedMatrix:
    """w = (code - zero) * scale, as AutoAWQ's `dequantize_gemm` computes it.

    qweight: int32 [K, N / 8], packed along N in AWQ's order. qzeros: int32 [K / group_size, N / 8]
    in the same order and without GPTQ's minus one; None if all zeros are 8. scales: float16 (or
    bfloat16, float32) [K / group_size, N]. is_symmetric: the zeros must all be 8, or absent (0).
    group_size: -1 for one group of all inputs.

    AutoAWQ multiplies in the scale's dtype, so its result is `dequantize(matrix).to(scales.dtype)`,
    transposed. Raises ValueError for other shapes, dtypes, bits and layouts.
    """
    if version.lower() != "gemm":
        raise ValueError(
            f"AWQ's version is '{version}', a packing for another kernel; supported: gemm"
        )
    if bits != 4:
        raise ValueError(f"AWQ's bits is {bits}, supported: 4")
    expect_matrix("qweight", qweight, torch.int32)
    k, n = qweight.shape[0], qweight.shape[1] * _PER_WORD
    group = k if group_size == -1 else group_size
    if group < 1 or k % group:
        raise ValueError(f"qweight has {k} inputs, which are not whole groups of {group_size}")
    expect_dtype("scales", scales, *SCALE_DTYPES)
    expect_shape("scales", scales, (k // group, n))
    expect_finite("scales", scales)
    zeros = None
    if qzeros is not None:
        expect_dtype("qzeros", qzeros, torch.int32)
        expect_shape("qzeros", qzeros, (k // group, n // _PER_WORD))
        zeros = _unpack(qzeros)
    if is_symmetric and zeros is not None:
        if not bool((zeros == INT4_ZERO).all() | (zeros == 0).all()):
            raise ValueError("qzeros are not all 8, the config says 'zero_point' is false")
        zeros = None
    return QuantizedMatrix("int4", _unpack(qweight), scales.T.contiguous(), zeros)


def _unpack(words: Tensor) -> Tensor:
    """int32 [rows, N / 8] -> uint8 [N, rows]."""
    rows, num_words = words.shape
    nibbles = unpack_bits(words, 4, num_words * _PER_WORD).view(rows, num_words, _PER_WORD)
    columns: Tensor = nibbles[..., _NIBBLE_OF_COLUMN]
    return columns.flatten(-2).T.contiguous()
