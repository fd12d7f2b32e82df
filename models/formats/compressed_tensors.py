"""The formats of the compressed-tensors library (llm-compressor), as of its version 0.19.

The library dequantises in the dtype of the scales: it subtracts the zero and multiplies by the
scale in this dtype. `dequantize` computes the same product exactly in float32, so the library's
result is `dequantize(matrix).to(scale.dtype)`.
"""

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
from compiledllm.models.formats.fp8 import (
    channel_scales,
    expect_e4m3,
    expect_scales,
    from_fp8,
)
from compiledllm.models.formats.mxfp4 import e8m0_scales
from compiledllm.models.formats.packing import (
    input_order,
    num_words,
    signed,
    unpack_bits,
    unpack_nibble_bytes,
)

NVFP4_GROUP = 16
_LARGEST_E4M3 = 0x7E  # bits of 448; larger bytes are negative, or a NaN
MXFP4_GROUP = 32


def from_pack_quantized(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_shape: Tensor,
    *,
    num_bits: int,
    group_size: int | None = None,
    weight_zero_point: Tensor | None = None,
    weight_g_idx: Tensor | None = None,
    is_symmetric: bool = False,
) -> QuantizedMatrix:
    """`pack-quantized`: integers of 1 to 8 bits, as one stream of bits per row.

    weight_packed: int32 [N, ceil(K * num_bits / 32)], value + 2^(num_bits - 1). weight_scale:
    [N, K / group_size], or [N, 1] or [1] without a group size. weight_shape: int64 [2], N and K.
    weight_zero_point: int32 [ceil(N * num_bits / 32), groups], packed along N with the same offset;
    None if symmetric. weight_g_idx: int32 [K], the group of each input, in old files with act
    order. is_symmetric: zero points, if there are any, must be neutral. Integers of up to 4 bits
    become int4, others int8.
    """
    if not 1 <= num_bits <= 8:
        raise ValueError(f"num_bits is {num_bits}, expected 1 to 8")
    expect_matrix("weight_packed", weight_packed, torch.int32)
    n, k = _shape(weight_shape)
    expect_shape("weight_packed", weight_packed, (n, num_words(k, num_bits)))
    scales = _group_scales(weight_scale, n, k, group_size)
    codes = unpack_bits(weight_packed, num_bits, k)
    zeros = None
    if is_symmetric and weight_zero_point is not None:
        middle = sum(2 ** (num_bits - 1) << shift for shift in range(0, 32, num_bits))
        is_packed = num_bits in (2, 4, 8) and weight_zero_point.dtype == torch.int32
        _expect_neutral(weight_zero_point, middle if is_packed else 0)
        weight_zero_point = None
    if weight_zero_point is not None:
        expect_dtype("weight_zero_point", weight_zero_point, torch.int32)
        shape = num_words(n, num_bits), scales.shape[1]
        expect_shape("weight_zero_point", weight_zero_point, shape)
        zeros = unpack_bits(weight_zero_point.T, num_bits, n).T.contiguous()
    order = None
    if weight_g_idx is not None and group_size is not None:
        order = input_order("weight_g_idx", weight_g_idx, k, group_size)
        codes = codes if order is None else codes[:, order]
    code, codes, zeros = _from_offset(codes, zeros, num_bits)
    return QuantizedMatrix(code, codes, scales, zeros, permutation=order)


def from_int_quantized(
    weight: Tensor,
    weight_scale: Tensor,
    *,
    group_size: int | None = None,
    weight_zero_point: Tensor | None = None,
    is_symmetric: bool = False,
) -> QuantizedMatrix:
    """`int-quantized` (W8A8): w = (weight - zero) * scale.

    weight: int8 [N, K]. weight_scale, and weight_zero_point (int8) unless symmetric:
    [N, K / group_size], or [N, 1] or [1] without a group size.
    """
    expect_matrix("weight", weight, torch.int8)
    n, k = weight.shape
    scales = _group_scales(weight_scale, n, k, group_size)
    zeros = weight_zero_point
    if is_symmetric and zeros is not None:
        _expect_neutral(zeros, 0)
        zeros = None
    if zeros is not None:
        expect_dtype("weight_zero_point", zeros, torch.int8)
        expect_shape("weight_zero_point", zeros, tuple(weight_scale.shape))
        zeros = zeros.reshape(-1, scales.shape[1]).expand_as(scales).contiguous()
    return QuantizedMatrix("int8", weight.contiguous(), scales, zeros)


def from_float_quantized(
    weight: Tensor,
    weight_scale: Tensor,
    *,
    block_structure: tuple[int, int] | None = None,
    group_size: int | None = None,
) -> QuantizedMatrix:
    """`float-quantized` (FP8): float8_e4m3fn [N, K] with scales of any floating-point dtype.

    weight_scale: [1] (strategy tensor), [N, 1] (channel), [ceil(N / 128), ceil(K / 128)] (block) or
    [N, K / group_size] (group).
    """
    if group_size is None:
        return from_fp8(weight, weight_scale, block_structure)
    expect_e4m3("weight", weight)
    n, k = weight.shape
    scales = _group_scales(weight_scale, n, k, group_size)
    expect_scales("weight_scale", scales)
    return QuantizedMatrix("fp8", weight.contiguous(), scales)


def from_nvfp4_pack_quantized(
    weight_packed: Tensor, weight_scale: Tensor, weight_global_scale: Tensor
) -> QuantizedMatrix:
    """`nvfp4-pack-quantized`: w = e2m1 * (weight_scale / weight_global_scale).

    weight_packed: uint8 [N, K / 2], low nibble first. weight_scale: float8_e4m3fn [N, K / 16].
    weight_global_scale: float32 [1]. The library rounds the quotient to float32 before the product
    with the code. `super_scales` is the reciprocal in float64: its product with a scale's four bits
    errs by less than 2^-51, and no quotient of a scale and a float32 lies so near to the middle of
    two float32 numbers (the nearest is 2^-49 away), so that both round to the same number.
    """
    global_scale = one_number("weight_global_scale", weight_global_scale)
    return nvfp4_matrix("weight_packed", weight_packed, weight_scale, 1 / global_scale.double())


def from_mxfp4_pack_quantized(weight_packed: Tensor, weight_scale: Tensor) -> QuantizedMatrix:
    """`mxfp4-pack-quantized`: w = e2m1 * 2^(weight_scale - 127).

    weight_packed: uint8 [N, K / 2], low nibble first. weight_scale: uint8 [N, K / 32].
    """
    expect_matrix("weight_packed", weight_packed, torch.uint8)
    n, k = weight_packed.shape[0], weight_packed.shape[1] * 2
    _expect_groups("weight_packed", k, MXFP4_GROUP)
    expect_shape("weight_scale", weight_scale, (n, k // MXFP4_GROUP))
    scales = e8m0_scales("weight_scale", weight_scale)
    return QuantizedMatrix("fp4", unpack_nibble_bytes(weight_packed), scales)


def nvfp4_matrix(
    field: str, packed: Tensor, weight_scale: Tensor, factor: Tensor
) -> QuantizedMatrix:
    """A matrix from uint8 [N, K / 2], float8_e4m3fn [N, K / 16] and a factor for all scales.

    field: the name of `packed` in errors. Raises ValueError for tensors that do not fit.
    """
    expect_matrix(field, packed, torch.uint8)
    n, k = packed.shape[0], packed.shape[1] * 2
    _expect_groups(field, k, NVFP4_GROUP)
    expect_dtype("weight_scale", weight_scale, torch.float8_e4m3fn)
    expect_shape("weight_scale", weight_scale, (n, k // NVFP4_GROUP))
    expect_finite("weight_scale", weight_scale)
    if bool((weight_scale.view(torch.uint8) > _LARGEST_E4M3).any()):
        raise ValueError("weight_scale holds a negative number; the file is damaged")
    return QuantizedMatrix(
        "fp4",
        unpack_nibble_bytes(packed),
        weight_scale.contiguous(),
        super_scales=factor.reshape(1, 1).expand(n, 1).contiguous(),
    )


def one_number(field: str, tensor: Tensor) -> Tensor:
    """A tensor [] or [1] as a scalar. Raises ValueError unless it is positive, finite float32."""
    expect_dtype(field, tensor, torch.float32)
    expect_shape(field, tensor, (1,), ())
    expect_finite(field, tensor)
    if not bool((tensor > 0).all()):
        raise ValueError(f"{field} is {tensor.item():g}, expected more than 0; the file is damaged")
    return tensor.reshape(())


def _expect_neutral(zero_point: Tensor, neutral: int) -> None:
    """Raise ValueError unless the zero points of a symmetric matrix are `neutral` or 0.

    neutral: the neutral zero point as an unsigned integer of 32 bits.
    """
    zeros = zero_point.long() & 0xFFFFFFFF
    if bool(((zeros != neutral) & (zeros != 0)).any()):
        raise ValueError("weight_zero_point is not neutral, the config says 'symmetric'")


def _shape(weight_shape: Tensor) -> tuple[int, int]:
    expect_dtype("weight_shape", weight_shape, torch.int64, torch.int32)
    expect_shape("weight_shape", weight_shape, (2,))
    n, k = weight_shape.tolist()
    if n < 1 or k < 1:
        raise ValueError(f"weight_shape is [{n}, {k}], expected numbers of outputs and inputs")
    return n, k


def _group_scales(scale: Tensor, n: int, k: int, group_size: int | None) -> Tensor:
    """Scales [N, K / group_size], or [N, 1] if there is no group size."""
    expect_dtype("weight_scale", scale, *SCALE_DTYPES)
    expect_finite("weight_scale", scale)
    if group_size is None or group_size < 0:
        return channel_scales("weight_scale", scale, n)
    _expect_groups("weight_shape", k, group_size)
    expect_shape("weight_scale", scale, (n, k // group_size))
    return scale.contiguous()


def _expect_groups(field: str, k: int, group_size: int) -> None:
    if k % group_size:
        raise ValueError(f"{field} has {k} inputs, which are not whole groups of {group_size}")


def _from_offset(
    codes: Tensor, zeros: Tensor | None, num_bits: int
) -> tuple[str, Tensor, Tensor | None]:
    """Numbers stored with the offset 2^(num_bits - 1) -> code, codes and zeros of the matrix."""
    offset = 2 ** (num_bits - 1)
    if num_bits > 4:
        return "int8", signed(codes, offset), None if zeros is None else signed(zeros, offset)
    if zeros is None:
        codes = codes + (INT4_ZERO - offset)
    return "int4", codes, zeros
