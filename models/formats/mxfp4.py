"""MXFP4 of gpt-oss: experts as blocks of 32 E2M1 numbers that share a power of two."""

from __future__ import annotations

import torch
from torch import Tensor

from compiledllm.models.formats.codes import QuantizedMatrix, expect_dtype, expect_shape
from compiledllm.models.formats.packing import unpack_nibble_bytes

_NAN = 255  # the byte that means NaN in E8M0


def from_mxfp4_blocks(blocks: Tensor, scales: Tensor) -> QuantizedMatrix:
    """w = e2m1 * 2^(scale - 127), the same bits as in transformers.

    blocks: uint8 [E, N, K / 32, 16], two numbers a byte, the low nibble first (`*_blocks`).
    scales: uint8 [E, N, K / 32] (`*_scales`). The result is a batch of E matrices [N, K].
    """
    expect_dtype("blocks", blocks, torch.uint8)
    if blocks.ndim < 3 or blocks.shape[-1] != 16 or not blocks.numel():
        found = list(blocks.shape)
        raise ValueError(f"blocks has shape {found}, expected [experts, N, K / 32, 16]")
    expect_shape("scales", scales, tuple(blocks.shape[:-1]))
    codes = unpack_nibble_bytes(blocks.flatten(-2))
    return QuantizedMatrix("fp4", codes, e8m0_scales("scales", scales))


def e8m0_scales(field: str, exponents: Tensor) -> Tensor:
    """uint8 exponents of two plus 127 -> float8_e8m0fnu, the same bytes.

    Raises ValueError for 255, which is NaN in E8M0 and 2^128 in gpt-oss's code.
    """
    expect_dtype(field, exponents, torch.uint8, torch.float8_e8m0fnu)
    exponents = exponents.contiguous().view(torch.uint8)
    if bool((exponents == _NAN).any()):
        raise ValueError(f"{field} holds 255, which is no scale; the file is damaged")
    return exponents.view(torch.float8_e8m0fnu)
