"""GPTQ, as written by AutoGPTQ, GPTQModel and tools that follow them."""

from __future__ import annotations

import torch
from torch import Tensor

from compiledllm.kernels.quantized import INT4_ZERO
from compiledllm.models.formats.codes import (
    SCALE_DTYPES,
    QuantizedMatrix,
    even_groups,
    expect_dtype,
    expect_finite,
    expect_matrix,
    expect_shape,
)
from compiledllm.models.formats.packing import input_order, num_words, signed, unpack_bits

# Bits per number -> the constant that version 1 subtracted from each word of zeros: a 1 at each
# number's lowest bit.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    is_symmetric: bool,
    version: int = 1,
) -> QuantizedMatrix:
    """w = scale * (code - zero), as GPTQModel's and AutoGPTQ's torch code computes it.

    qweight: int32 [K * bits / 32, N], packed along K, the lowest bits first. qzeros: int32
    [G, N * bits / 32] with G = ceil(K / group_size) groups; version 1 (`checkpoint_format` "gptq",
    or none) stores each zero minus one, version 2 ("gptq_v2") as it is. scales: float16, bfloat16
    or float32 [G, N]. g_idx: int32 [K], the group of each input. group_size: -1 for one group.

    If g_idx is not in order (`desc_act`), the columns are sorted by group, and `permutation` holds
    their order. If the last group is partial, the groups become smaller (`even_groups`). 2 and 4
    bits become int4, 8 bits int8. The library multiplies in the scale's dtype, so its result is
    `dequantize(matrix).to(scales.dtype)`.

    Raises ValueError for other shapes and dtypes, for 3 bits (the libraries disagree on the zeros
    of version 1), and for a symmetric matrix whose zeros are not all 2^(bits - 1).
    """
    if bits not in _ONES:
        raise ValueError(f"bits is {bits}, supported: {', '.join(map(str, _ONES))}")
    if version not in (1, 2):
        raise ValueError(f"GPTQ's checkpoint_format version is {version}, supported: 1, 2")
    expect_matrix("qweight", qweight, torch.int32)
    words, n = qweight.shape
    k = words * 32 // bits
    group = k if group_size == -1 else group_size
    if group < 1:
        raise ValueError(f"group_size is {group_size}, expected -1 or a positive number")
    num_groups = -(-k // group)
    expect_dtype("qzeros", qzeros, torch.int32)
    expect_shape("qzeros", qzeros, (num_groups, num_words(n, bits)))
    expect_dtype("scales", scales, *SCALE_DTYPES)
    expect_shape("scales", scales, (num_groups, n))
    expect_finite("scales", scales)
    order = None if g_idx is None else input_order("g_idx", g_idx, k, group)
    codes = unpack_bits(qweight.T, bits, k)
    codes = codes if order is None else codes[:, order]
    zeros = _zeros(qzeros, n, bits, is_symmetric, version)
    if bits == 8:  # codes and zeros are stored with an offset of 128
        codes = signed(codes, 128)
        zeros = None if zeros is None else signed(zeros, 128)
    elif zeros is None:
        codes = codes + (INT4_ZERO - 2 ** (bits - 1))
    zeros = None if zeros is None else even_groups(zeros, k, group)
    code = "int8" if bits == 8 else "int4"
    return QuantizedMatrix(code, codes, even_groups(scales.T, k, group), zeros, permutation=order)


def _zeros(qzeros: Tensor, n: int, bits: int, is_symmetric: bool, version: int) -> Tensor | None:
    """Zeros uint8 [N, G] without version 1's offset, or None for a symmetric matrix.

    The constant is added to whole words, with carries, because GPTQModel subtracts it from whole
    words: a zero of 0 borrows from its neighbour, and only an addition with carries restores both.
    """
    if version == 1:
        qzeros = qzeros + _ONES[bits]  # wraps around at 32 bits
    zeros = unpack_bits(qzeros, bits, n)
    if not is_symmetric:
        return zeros.T.contiguous()
    middle = 2 ** (bits - 1)
    if not bool((zeros == middle).all()):
        wrong = int(zeros[zeros != middle][0])
        raise ValueError(
            f"qzeros holds a zero of {wrong}, where a symmetric matrix of {bits} bits has {middle};"
            " check 'sym' and 'checkpoint_format' (gptq or gptq_v2) of the quantization config"
        )
    return None
