"""MXFP4, a 4-bit weight format: blocks of 32 values share one power-of-two scale."""

from __future__ import annotations

import torch
from torch import Tensor

# Absolute values of E2M1: two exponent bits and one mantissa bit, indexed by the low three bits.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127  # of the scales' exponents (E8M0)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [*shape, num_blocks, 16], uint8 [*shape, num_blocks] -> [*shape, num_blocks * 32].

    A byte of `blocks` holds two values, the first one in the low nibble. A byte of `scales` is an
    exponent of two plus 127. The result is exact in bfloat16 and float32, except for scales at the
    limits of their range.
    """
    values = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], device=blocks.device)
    pairs = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2)  # [..., num_blocks, 32]
    exponents = scales.to(torch.int32).unsqueeze(-1) - _BIAS
    return torch.ldexp(values.to(torch.float32)[pairs.int()], exponents).to(dtype).flatten(-2)
