"""Quantised matrices in the layout in which they are loaded, and products with them in torch.

The ops run on every device and dequantise the whole matrix before each product. `kernels.packed`
has a second layout, which is faster but needs CUDA kernels.

    w[n, k] = (code[n, k] - zero) * scale + minimum

zero, scale and minimum belong to the weight's group and have the index [n // rows, k // group],
where `rows` is 1 or 128.

codes: fp8, int8: [N outputs, K inputs]. int4, fp4: int32 [N, K / 8] with eight codes per word,
where K is the number of inputs padded to a multiple of 128; padding codes and their scales are 0.
int6: uint8 [N, K * 3 / 4] with the same padding: first K / 2 bytes with the lower four bits of two
codes each, then K / 4 bytes with the upper two bits of four codes each.
scales: [ceil(N / rows), K / group] in any floating-point dtype. zeros: the same shape; None: all
are 8 for int4 without minima, 32 for int6, otherwise 0. minima: shape and dtype of the scales;
None: all are 0.
factors: a second level of scales, which two formats have. GGUF's k-quants, whose scales and minima
are int8: float16 [N, S, 2] for S super-blocks of K / S inputs; factors[..., 0] multiplies the
scales of a super-block and factors[..., 1] its minima. NVFP4, whose scales are float8_e4m3fn:
float64 [N, 1, 1]; the product of a scale and the factor is rounded to float32. Ops derive the group
size from the shapes, as all groups have the same number of (padded) inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.moe import experts_fake, experts_in_torch
from compiledllm.kernels.ops import define

NIBBLES = ("int4", "fp4")  # codes of four bits
# Bits per code of the packed codes, whose number of inputs is padded to a multiple of K_MULTIPLE.
PACKED_BITS = {"int4": 4, "fp4": 4, "int6": 6}
K_MULTIPLE = 128
BLOCK_ROWS = 128  # outputs that share scales, if scales are not per output
INT4_ZERO = 8  # without zeros, codes 0..15 stand for -8..7
INT6_ZERO = 32  # codes 0..63 stand for -32..31


def pack_codes(code: str, codes: Tensor) -> Tensor:
    """Codes [..., K] in the layout of the module's docstring; `unpack_codes` is the inverse."""
    if code not in PACKED_BITS:
        return codes
    return pack_sixes(codes) if code == "int6" else pack_nibbles(codes)


def unpack_codes(code: str, packed: Tensor) -> Tensor:
    """One code per element, [..., K]: uint8 if the codes were packed. The padding stays."""
    if code not in PACKED_BITS:
        return packed
    return unpack_sixes(packed) if code == "int6" else unpack_nibbles(packed)


def pack_sixes(codes: Tensor) -> Tensor:
    """uint8 [..., K], values 0..63 -> uint8 [..., K * 3 / 4]; K is padded with zeros."""
    low = pack_nibbles(codes & 15).view(torch.uint8)
    high = F.pad(codes >> 4, (0, -codes.shape[-1] % K_MULTIPLE))
    fours = high[..., 0::4] | high[..., 1::4] << 2 | high[..., 2::4] << 4 | high[..., 3::4] << 6
    return torch.cat((low, fours), dim=-1)


def unpack_sixes(packed: Tensor) -> Tensor:
    """uint8 [..., K * 3 / 4] -> uint8 [..., K], the inverse of `pack_sixes`."""
    middle = packed.shape[-1] // 3 * 2
    low, fours = packed[..., :middle], packed[..., middle:]
    high = torch.stack([fours >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)
    return unpack_nibbles(low) | high << 4


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., K], values 0..15 -> int32 [..., K / 8]; K is padded with zeros."""
    codes = F.pad(codes, (0, -codes.shape[-1] % K_MULTIPLE))
    pairs = codes[..., 0::2] | codes[..., 1::2] << 4
    return pairs.contiguous().view(torch.int32)


def unpack_nibbles(words: Tensor) -> Tensor:
    """int32 [..., K / 8] -> uint8 [..., K], the inverse of `pack_nibbles`. The padding stays."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 0x0F, pairs >> 4), dim=-1).flatten(-2)


def dequantize_packed(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    code: str,
    num_inputs: int,
    minima: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """The matrix as float32 [N, num_inputs], without padding."""
    values = unpack_codes(code, codes)
    values = e2m1_values(values) if code == "fp4" else values.float()
    if code == "int4" and zeros is None and minima is None:
        values = values - INT4_ZERO
    if code == "int6":
        values = values - INT6_ZERO
    num_outputs, num_padded = values.shape
    groups = values.view(num_outputs, scales.shape[1], -1)  # [N, K / group, group]
    if zeros is not None:
        groups = groups - _for_each_output(zeros.float(), num_outputs)
    groups = groups * _for_each_output(_multiplied(scales, factors, 0), num_outputs)
    if minima is not None:
        groups = groups + _for_each_output(_multiplied(minima, factors, 1), num_outputs)
    return groups.view(num_outputs, num_padded)[:, :num_inputs]


def _multiplied(part: Tensor, factors: Tensor | None, which: int) -> Tensor:
    """Scales or minima [N, groups] in float32, multiplied by `factors[..., which]`, [N, S]."""
    if factors is None:
        return part.float()
    dtype = torch.promote_types(factors.dtype, torch.float32)
    spans = part.to(dtype).view(*factors.shape[:2], -1)
    return (spans * factors[..., which].to(dtype).unsqueeze(-1)).flatten(1).float()


def _for_each_output(part: Tensor, num_outputs: int) -> Tensor:
    """[N / rows, K / group] -> [N, K / group, 1]."""
    if part.shape[0] != num_outputs:
        part = part.repeat_interleave(BLOCK_ROWS, 0)[:num_outputs]
    return part.unsqueeze(-1)


def e2m1_values(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 -> their float32 values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and the negatives.

    The three low bits are moved to the lowest exponent bits and the highest mantissa bit of a
    float16, whose exponent's bias is 14 larger.
    """
    bits = codes.short()
    halves = ((bits & 7) << 9 | (bits & 8) << 12).view(torch.float16)
    values: Tensor = halves.float() * 2.0**14
    return values


def _linear_fake(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


@define("quantized_linear", fake=_linear_fake)
def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    code: str,
    minima: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """x [tokens, K] -> x @ W.T + bias, [tokens, N] in x's dtype.

    code: "fp8", "int8", "int6", "int4" or "fp4". The module's docstring describes the matrix's
    tensors.
    """
    weight = dequantize_packed(codes, scales, zeros, code, x.shape[1], minima, factors)
    weight = weight.to(x.dtype)
    return F.linear(x, weight, bias)


def _rows_fake(
    ids: Tensor, _codes: Tensor, _scales: Tensor, _zeros: Tensor | None, _code: str,
    num_inputs: int, dtype: str, *_: object,
) -> Tensor:  # fmt: skip
    return ids.new_empty((ids.shape[0], num_inputs), dtype=getattr(torch, dtype))


@define("quantized_rows", fake=_rows_fake)
def quantized_rows(
    ids: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    code: str,
    num_inputs: int,
    dtype: str,
    minima: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """Dequantise the rows `ids`, int64 [tokens], of a matrix: [tokens, num_inputs] in `dtype`.

    dtype: a name in torch. Each weight is computed in float32 and rounded once.
    """
    has_blocks = scales.shape[0] != codes.shape[0]
    of_scales = ids // BLOCK_ROWS if has_blocks else ids
    row_zeros, row_minima, row_factors = (
        None if part is None else _rows(part, of_scales) for part in (zeros, minima, factors)
    )
    matrix = _rows(codes, ids), _rows(scales, of_scales), row_zeros
    rows = dequantize_packed(*matrix, code, num_inputs, row_minima, row_factors)
    return rows.to(getattr(torch, dtype))


def _rows(part: Tensor, ids: Tensor) -> Tensor:
    """The rows of a tensor of any dtype; torch cannot index all FP8 dtypes."""
    if part.dtype.itemsize > 1:
        return part[ids]
    return part.view(torch.uint8)[ids].view(part.dtype)


@define("quantized_experts", fake=experts_fake)
def quantized_experts(
    x: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    gate_up_zeros: Tensor | None,
    down: Tensor,
    down_scales: Tensor,
    down_zeros: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    alpha: float,
    limit: float,
    code: str,
    activation: str = "silu",
    gate_up_factors: Tensor | None = None,
    down_factors: Tensor | None = None,
) -> Tensor:
    """`moe.moe_experts` with quantised matrices, which have no minima.

    Each tensor of the matrices has a further first dimension, the experts.
    """
    num_rows, hidden = gate_up.shape[1], x.shape[1]
    up = gate_up, gate_up_scales, gate_up_zeros, gate_up_factors
    last = down, down_scales, down_zeros, down_factors
    matrices = (
        _Dequantized(*up, code, hidden, x.dtype),
        _Dequantized(*last, code, num_rows // 2, x.dtype),
    )
    biases = gate_up_bias, down_bias
    return experts_in_torch(x, expert_ids, *matrices, *biases, alpha, limit, activation)


class _Dequantized:
    """Quantised matrices of experts; indexing dequantises the matrix of one expert."""

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        factors: Tensor | None,
        code: str,
        num_inputs: int,
        dtype: torch.dtype,
    ) -> None:
        self._codes, self._scales, self._zeros, self._factors = codes, scales, zeros, factors
        self._code, self._num_inputs, self._dtype = code, num_inputs, dtype

    def __getitem__(self, expert: int) -> Tensor:
        zeros, factors = (None if p is None else p[expert] for p in (self._zeros, self._factors))
        matrix = self._codes[expert], self._scales[expert], zeros, self._code, self._num_inputs
        return dequantize_packed(*matrix, factors=factors).to(self._dtype)
