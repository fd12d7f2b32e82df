"""The macros that tell the kernels of `cuda/` how a matrix's codes are laid out."""

from __future__ import annotations

import torch

from compiledllm.kernels.packed import Layout

# Values of the enums `Code` and `ScaleType` in `cuda/codes.cuh`.
_CODES = {"fp8": 0, "int8": 1, "int4": 2, "fp4": 3, "int6": 4}
_SCALES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e8m0fnu: 3,
    torch.uint8: 3,  # the bits of float8_e8m0fnu
    torch.float8_e4m3fn: 4,
    torch.int8: 5,
}


def options_of(layout: Layout) -> dict[str, int]:
    """The macros of `cuda/codes.cuh` for a layout."""
    scale = getattr(torch, layout.scale_dtype)
    return {
        "CODE": _CODES[layout.code],
        "GROUPS": layout.groups,
        "SCALE": _SCALES[scale] if layout.groups else 0,
        "HAS_ZEROS": layout.has_zeros,
        "HAS_MINIMA": layout.has_minima,
        "HAS_FACTORS": layout.has_factors,
    }
