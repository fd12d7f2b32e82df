"""Quantises 16-bit matrices while they are loaded: round-to-nearest, without calibration data.

Every function takes [N, K] in bfloat16, float16 or float32 and works through the rows in chunks, so
that the memory beside input and result stays small. ValueError for matrices with infinities or NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from compiledllm.kernels.backend import MAX_FP8
from compiledllm.kernels.quantized import INT4_ZERO
from compiledllm.models.formats.codes import (
    QuantizedMatrix,
    expect_matrix,
)
from compiledllm.models.formats.fp8 import BLOCK

INT4_GROUP = 128
_MIN_INT4_GROUP = 16
# Numbers of the matrix per chunk. About five float32 copies of a chunk exist at a time. Those of a
# CPU chunk fit into a CPU's cache, and a GPU chunk is large enough to keep a GPU busy.
_CPU_CHUNK, _GPU_CHUNK = 2**18, 2**24
# int4 tries these limits, as fractions of a group's largest absolute value. The scale is limit / 8
# and the codes are -8..7, so that the limit 8/7 clips neither sign. Three times as many limits make
# the squared error of normal and of heavy-tailed numbers 1 % smaller; without clipping the error is
# 33 % larger.
_CLIPS = (0.65, 0.72, 0.79, 0.86, 0.93, 1.0, 1.07, 8 / 7)


def quantize(weight: Tensor, method: str) -> QuantizedMatrix:
    """Quantise [N, K] by one of `METHODS`. Raises ValueError for other methods and bad matrices."""
    if method not in METHODS:
        raise ValueError(f"quantization '{method}' is unknown; known: {', '.join(METHODS)}")
    return METHODS[method](weight)


def quantize_fp8(weight: Tensor) -> QuantizedMatrix:
    """E4M3 with a float32 scale for each row, its largest absolute value / 448."""
    return _quantize_rows(weight, "fp8", MAX_FP8)


def quantize_int8(weight: Tensor) -> QuantizedMatrix:
    """Integers -127..127 with a float32 scale for each row, its largest absolute value / 127."""
    return _quantize_rows(weight, "int8", 127.0)


def quantize_fp8_block(weight: Tensor) -> QuantizedMatrix:
    """E4M3 with a float32 scale for each block of 128x128; blocks at the edges may be partial."""
    n, k = _shape(weight)
    codes = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=weight.device)
    num_blocks = math.ceil(k / BLOCK)
    scales = torch.empty(math.ceil(n / BLOCK), num_blocks, device=weight.device)
    for rows in _chunks(weight, BLOCK):
        chunk = weight[rows].float()
        size = chunk.shape[0]
        padded = F.pad(chunk, (0, -k % BLOCK, 0, -size % BLOCK))
        blocks = padded.view(-1, BLOCK, num_blocks, BLOCK)  # [row blocks, 128, column blocks, 128]
        scale = _scale(blocks.abs().amax((1, 3), keepdim=True), MAX_FP8)
        scaled = (blocks / scale).clamp_(-MAX_FP8, MAX_FP8).view_as(padded)
        codes[rows] = scaled[:size, :k].to(codes.dtype)
        first = rows.start // BLOCK
        scales[first : first + scale.shape[0]] = scale[:, 0, :, 0]
    return _checked(QuantizedMatrix("fp8", codes, scales, block=BLOCK))


def quantize_int4(weight: Tensor) -> QuantizedMatrix:
    """Integers -8..7 (stored + 8) in groups of 128 columns, with bfloat16 scales.

    Each group gets the scale with the least squared error among those of a few clipping limits. If
    K is not a multiple of 128, groups have gcd(K, 128) columns. Raises ValueError unless K is a
    multiple of 16.
    """
    n, k = _shape(weight)
    group = math.gcd(k, INT4_GROUP)
    if group < _MIN_INT4_GROUP:
        raise ValueError(
            f"int4 needs inputs in whole groups of {_MIN_INT4_GROUP}, got a matrix of {k} inputs; "
            "use quantization 'int8' or 'fp8'"
        )
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(n, k // group, dtype=torch.bfloat16, device=weight.device)
    for rows in _chunks(weight):
        groups = weight[rows].float().view(-1, k // group, group)
        scale = _best_int4_scale(groups)
        scales[rows] = scale.squeeze(-1).to(torch.bfloat16)
        codes[rows] = (_int4(groups, scale) + INT4_ZERO).to(torch.uint8).view(-1, k)
    return _checked(QuantizedMatrix("int4", codes, scales))


METHODS: dict[str, Callable[[Tensor], QuantizedMatrix]] = {
    "fp8": quantize_fp8,
    "fp8_block": quantize_fp8_block,
    "int8": quantize_int8,
    "int4": quantize_int4,
}


def _quantize_rows(weight: Tensor, code: str, limit: float) -> QuantizedMatrix:
    n, k = _shape(weight)
    dtype = torch.float8_e4m3fn if code == "fp8" else torch.int8
    codes = torch.empty(n, k, dtype=dtype, device=weight.device)
    scales = torch.empty(n, 1, device=weight.device)
    for rows in _chunks(weight):
        chunk = weight[rows].float()
        scales[rows] = scale = _scale(chunk.abs().amax(1, keepdim=True), limit)
        scaled = (chunk / scale).clamp_(-limit, limit)
        codes[rows] = (scaled if code == "fp8" else scaled.round_()).to(dtype)
    return _checked(QuantizedMatrix(code, codes, scales))


def _best_int4_scale(groups: Tensor) -> Tensor:
    """float32 [N, G, group] -> the scales [N, G, 1], exact in bfloat16, of least squared error."""
    limits = groups.abs().amax(-1, keepdim=True)
    best, min_error = limits, torch.full_like(limits, math.inf)
    for clip in _CLIPS:
        scale = _scale(limits * clip, 8.0).bfloat16().float()
        error = (_int4(groups, scale) * scale).sub_(groups).square_().sum(-1, keepdim=True)
        is_better = error < min_error
        best = torch.where(is_better, scale, best)
        min_error = torch.where(is_better, error, min_error)
    return best


def _int4(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / scale).round_().clamp_(-8, 7)


def _scale(limits: Tensor, largest_code: float) -> Tensor:
    """The scales that map `limits` to the largest code; 1 where the limit is zero."""
    scales = limits / largest_code
    smallest = torch.finfo(torch.float32).tiny  # smaller scales would round to zero somewhere
    return torch.where(limits == 0, 1.0, scales.clamp(min=smallest))


def _shape(weight: Tensor) -> tuple[int, int]:
    expect_matrix("weight", weight, torch.bfloat16, torch.float16, torch.float32)
    n, k = weight.shape
    return n, k


def _chunks(weight: Tensor, multiple: int = 1) -> Iterator[slice]:
    """Slices of rows, one chunk each. Slices start at multiples of `multiple`."""
    n, k = weight.shape
    numbers = _CPU_CHUNK if weight.device.type == "cpu" else _GPU_CHUNK
    size = max(numbers // k // multiple, 1) * multiple
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _checked(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The matrix. Raises ValueError for infinite or NaN scales, which come from such weights."""
    if not bool(matrix.scales.isfinite().all()):
        raise ValueError("weight holds an infinity or NaN, which cannot be quantised")
    return matrix
