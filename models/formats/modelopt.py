"""The formats of NVIDIA's ModelOpt (TensorRT Model Optimizer)."""

from __future__ import annotations

from torch import Tensor

from compiledllm.models.formats.codes import QuantizedMatrix
from compiledllm.models.formats.compressed_tensors import nvfp4_matrix, one_number
from compiledllm.models.formats.fp8 import BLOCK, from_fp8


def from_modelopt_fp8_blocks(weight: Tensor, weight_scale: Tensor) -> QuantizedMatrix:
    """FP8 in blocks of 128x128 (FP8_PB_WO): w = weight * weight_scale in float32.

    weight: float8_e4m3fn [N, K]. weight_scale: [N / 128, 1, K / 128, 1], rounded up, or [] for a
    matrix of a single block.
    """
    if weight_scale.ndim == 4 and weight_scale.shape[1] == weight_scale.shape[3] == 1:
        weight_scale = weight_scale[:, 0, :, 0].contiguous()
    elif weight_scale.ndim == 0:
        weight_scale = weight_scale.reshape(1, 1)
    return from_fp8(weight, weight_scale, (BLOCK, BLOCK))


def from_modelopt_nvfp4(
    weight: Tensor, weight_scale: Tensor, weight_scale_2: Tensor
) -> QuantizedMatrix:
    """NVFP4: w = e2m1 * (weight_scale * weight_scale_2), where compressed-tensors divides.

    weight: uint8 [N, K / 2], low nibble first. weight_scale: float8_e4m3fn [N, K / 16].
    weight_scale_2: float32 [] or [1]. As in ModelOpt's `NVFP4QTensor.dequantize`, the scales'
    product is rounded to float32 before it multiplies the codes.
    """
    factor = one_number("weight_scale_2", weight_scale_2)
    return nvfp4_matrix("weight", weight, weight_scale, factor)
