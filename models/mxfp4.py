"""MXFP4, a format of 4-bit weights: blocks of 32 with one power of two for each block.

Knows the numbers' layout, no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127  # of the scales' exponents


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [*shape, num_blocks, 16], uint8 [*shape, num_blocks] -> [*shape, num_blocks * 32].

    A byte holds two numbers, the first in its lower half. Scales are exponents of two, plus 127.
    Exact in bfloat16 and float32, but for scales at the very edge of their range.
    """
    values = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], device=blocks.device)
    pairs = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2)  # [..., num_blocks, 32]
    exponents = scales.to(torch.int32).unsqueeze(-1) - _BIAS
    return torch.ldexp(values.to(torch.float32)[pairs.int()], exponents).to(dtype).flatten(-2)
