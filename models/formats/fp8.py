"""FP8 weights (E4M3) of DeepSeek, Qwen and Mistral, and of tools that write the same layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compiledllm.models.formats.codes import (
    SCALE_DTYPES,
    QuantizedMatrix,
    expect_dtype,
    expect_finite,
    expect_matrix,
    expect_shape,
)

BLOCK = 128
_NAN = 0x7F  # bits of a NaN, without the sign bit


def from_fp8(
    weight: Tensor,
    scale: Tensor,
    block: tuple[int, int] | None = None,
    *,
    scale_field: str = "weight_scale",
) -> QuantizedMatrix:
    """w = weight * scale in float32, as in the code of the tools that write these files.

    weight: float8_e4m3fn [N, K]. scale: float32, bfloat16, float16 or (E8M0) float8_e8m0fnu:
    without `block` [] or [1] or [1, 1] for the tensor, or [N] or [N, 1] for each channel; with
    `block`, which is `weight_block_size` and must be (128, 128), [ceil(N / 128), ceil(K / 128)].
    The scale of a block is multiplied too, although files call it `weight_scale_inv`. A scale for
    the tensor is expanded to the channels, so that parts of a fused matrix keep their own.
    Raises ValueError for other shapes and dtypes, among them AMD's float8_e4m3fnuz.
    """
    expect_e4m3("weight", weight)
    expect_dtype(scale_field, scale, *SCALE_DTYPES, torch.float8_e8m0fnu)
    expect_scales(scale_field, scale)
    n, k = weight.shape
    if block is None:
        return QuantizedMatrix("fp8", weight.contiguous(), channel_scales(scale_field, scale, n))
    if tuple(block) != (BLOCK, BLOCK):
        raise ValueError(f"weight_block_size is {list(block)}, supported: [{BLOCK}, {BLOCK}]")
    expect_shape(scale_field, scale, (math.ceil(n / BLOCK), math.ceil(k / BLOCK)))
    return QuantizedMatrix("fp8", weight.contiguous(), scale.contiguous(), block=BLOCK)


def expect_e4m3(field: str, tensor: Tensor) -> None:
    """Raise ValueError naming the field unless the tensor is a float8_e4m3fn matrix."""
    if tensor.dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        found = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"{field} has dtype {found}, the variant of AMD's MI300, whose values differ; "
            "use a checkpoint in float8_e4m3fn"
        )
    expect_matrix(field, tensor, torch.float8_e4m3fn)
    if bool((tensor.view(torch.uint8).bitwise_and(_NAN) == _NAN).any()):
        raise ValueError(f"{field} holds a NaN; the file is damaged")


def expect_scales(field: str, scale: Tensor) -> None:
    """Raise ValueError naming the field for scales that are infinite, NaN or negative.

    A single check finds all three, because each check of a tensor on a GPU waits for the GPU.
    """
    values = scale.float()
    if not bool((values.isfinite() & (values >= 0)).all()):
        expect_finite(field, scale)
        raise ValueError(f"{field} holds a negative number; the file is damaged")


def channel_scales(field: str, scale: Tensor, n: int) -> Tensor:
    """Scales of a tensor ([], [1], [1, 1]) or of channels ([N], [N, 1]) -> [N, 1]."""
    expect_shape(field, scale, (n, 1), (n,), (1, 1), (1,), ())
    return scale.reshape(-1, 1).expand(n, 1).contiguous()
