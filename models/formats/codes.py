"""The canonical form of a quantised matrix, into which every file format is converted.

`dequantize` defines what a matrix means; tests compare it with each format's reference library. The
module knows no file format and no packed layout of a kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from compiledllm.kernels.quantized import INT4_ZERO, INT6_ZERO, e2m1_values

# Code -> dtype of `QuantizedMatrix.codes`.
CODES = {
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int6": torch.uint8,
    "int4": torch.uint8,
    "fp4": torch.uint8,
}
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedMatrix:
    """A matrix [N outputs, K inputs] as codes, with a scale for each group of K or each block.

    w[n, k] = (code[n, k] - zero) * scale + minimum, with the zero, scale and minimum at
    [n // rows, k // group]. All tensors may have the same leading dimensions (experts).

    codes: "fp8": float8_e4m3fn; "int8": int8, offsets removed; "int6": uint8 0..63, with a zero of
    32; "int4": uint8 0..15, the file's offset kept; "fp4": uint8 0..15, an E2M1 number (sign, two
    exponent bits, one mantissa bit).
    scales: [N / rows, K / group], rounded up for blocks; float32, or bfloat16, float16 or
    float8_e8m0fnu where the file has these and they are exact.
    zeros: None, or the codes' integer dtype, of the shape of `scales`. None means 8 for int4
    without minima, 32 for int6, otherwise 0.
    minima: None, or float32 or float16 of the shape of `scales` (GGUF: w = code * scale + minimum).
    super_scales: None, or floating-point [N, S], a second level of scales (NVFP4, GGUF's K types).
    `scales` are then float8_e4m3fn or int8. The scale of a group is the product, rounded to
    float32, of its entry in `scales` and the super-scale of the K / S columns that contain it.
    `super_minima` is the same for minima. `one_level` multiplies both levels.
    permutation: None, or int64 [K]: column k of the codes belongs to input permutation[k], so the
    product is `x[:, permutation] @ w.T` (GPTQ's act order).
    block: None, or the side of square blocks that share one scale (128). The last blocks may be
    partial.
    """

    code: str
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    minima: Tensor | None = None
    super_scales: Tensor | None = None
    super_minima: Tensor | None = None
    permutation: Tensor | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        assert self.codes.dtype == CODES[self.code], self.codes.dtype
        *batch, n, k = self.codes.shape
        num_groups = math.ceil(k / self.group)
        rows = math.ceil(n / self.rows)
        assert self.scales.shape == (*batch, rows, num_groups), (
            self.codes.shape,
            self.scales.shape,
        )
        assert self.block or k == num_groups * self.group, "groups of equal size"
        for part in (self.zeros, self.minima):
            assert part is None or part.shape == self.scales.shape
        for factors in (self.super_scales, self.super_minima):
            assert factors is None or factors.shape[:-1] == (*batch, n)
            assert factors is None or num_groups % factors.shape[-1] == 0
        assert self.permutation is None or self.permutation.shape == (k,)

    @property
    def rows(self) -> int:
        """Number of rows that share a scale."""
        return self.block or 1

    @property
    def group(self) -> int:
        """Number of columns that share a scale."""
        return self.block or max(self.codes.shape[-1] // self.scales.shape[-1], 1)


def dequantize(matrix: QuantizedMatrix) -> Tensor:
    """The matrix as float32 [N, K], columns in the order of the inputs.

    The zero is subtracted, the scale multiplied and the minimum added in float32. Where a reference
    library computes in the scale's 16-bit dtype, the library's result is the float32 result rounded
    once to that dtype, because the difference of two codes is exact in 16 bits and the product of
    the difference and a 16-bit scale is exact in float32.
    """
    matrix = one_level(matrix)
    n, k = matrix.codes.shape[-2:]
    values = _code_values(matrix)
    if matrix.block:  # the last block may be partial
        values = F.pad(values, (0, -k % matrix.block))
    values = values.view(*values.shape[:-1], -1, matrix.group)  # [N, K / group, group]

    def spread(part: Tensor) -> Tensor:  # [N / rows, K / group] -> [N, K / group, 1]
        return _repeat_rows(part.float(), matrix.rows)[..., :n, :].unsqueeze(-1)

    if matrix.zeros is not None:
        values -= spread(matrix.zeros)
    values *= spread(matrix.scales)
    if matrix.minima is not None:
        values += spread(matrix.minima)
    values = values.flatten(-2)[..., :k]
    if matrix.permutation is None:
        return values
    return torch.empty_like(values).index_copy_(-1, matrix.permutation, values)


def one_level(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The same matrix without `super_scales`: if it has any, scales and minima become float32."""
    if matrix.super_scales is None:
        return matrix
    return replace(
        matrix,
        scales=_product(matrix.scales, matrix.super_scales),
        minima=None if matrix.minima is None else _product(matrix.minima, matrix.super_minima),
        super_scales=None,
        super_minima=None,
    )


def _product(part: Tensor, factors: Tensor | None) -> Tensor:
    """Scales or minima [N, groups], times the factor [N, S] of the span that contains the group.

    The products are rounded to float32 once.
    """
    assert factors is not None
    spans = part.to(torch.float64).view(*factors.shape, -1)  # [N, S, groups / S]
    return (spans * factors.to(torch.float64).unsqueeze(-1)).to(torch.float32).flatten(-2)


def with_row_scales(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The same matrix with scales for each row instead of each block.

    Used for a part of a fused matrix whose rows are not whole blocks. If the last block of columns
    is partial, groups become smaller (`even_groups`).
    """
    if matrix.block is None:
        return matrix
    n, k = matrix.codes.shape[-2:]
    scales = _repeat_rows(matrix.scales, matrix.block)[..., :n, :]
    return replace(matrix, scales=even_groups(scales, k, matrix.block), block=None)


def even_groups(part: Tensor, k: int, group: int) -> Tensor:
    """Scales or zeros [..., ceil(K / group)] -> [..., K / g] for groups of g = gcd(K, group).

    If the last group is partial, all groups are split into equal smaller ones with the same scale.
    """
    size = math.gcd(k, group)
    repeated = part.unsqueeze(-1).expand(*part.shape, group // size).flatten(-2)
    return repeated[..., : k // size].contiguous()


def _repeat_rows(part: Tensor, times: int) -> Tensor:
    """[..., rows, columns] -> [..., rows * times, columns], of every dtype."""
    *batch, rows, columns = part.shape
    return part.unsqueeze(-2).expand(*batch, rows, times, columns).flatten(-3, -2)


def _code_values(matrix: QuantizedMatrix) -> Tensor:
    """The codes' values as a new float32 tensor [N, K], before zeros and scales."""
    if matrix.code == "fp4":
        return e2m1_values(matrix.codes)
    values = matrix.codes.to(torch.float32)
    if matrix.code == "int4" and matrix.zeros is None and matrix.minima is None:
        values -= INT4_ZERO
    if matrix.code == "int6":
        values -= INT6_ZERO
    return values


# Checks of the tensors in a file


def expect_dtype(field: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError naming the field unless the tensor's dtype is one of `dtypes`."""
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{field} has dtype {found}, expected {expected}")


def expect_shape(field: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise ValueError naming the field unless the tensor's shape is one of `shapes`."""
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{field} has shape {list(tensor.shape)}, expected {expected}")


def expect_matrix(field: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError naming the field unless the tensor is a non-empty matrix in `dtypes`."""
    expect_dtype(field, tensor, *dtypes)
    if tensor.ndim != 2 or not tensor.numel():
        raise ValueError(f"{field} has shape {list(tensor.shape)}, expected a matrix [N, K]")


def expect_finite(field: str, tensor: Tensor) -> None:
    """Raise ValueError naming the field if the tensor holds an infinity or NaN."""
    if not bool(tensor.float().isfinite().all()):
        raise ValueError(f"{field} holds an infinity or NaN; the file is damaged")
