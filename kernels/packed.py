"""Quantised matrices in the layouts of the GPU kernels, and products with them.

`pack` turns a matrix as it was loaded into a `Packed` one, if there are kernels for it. Products
are ops that the compiler sees as a whole; only FP8 products of many rows are traced, so that the
compiler fuses the quantisation of their inputs with the operation before.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.ops import define
from compiledllm.kernels.records import UNIT, pack_bytes, pack_records

NIBBLES = ("int4", "fp4")
MAX_ROWS_OF_16_BITS = 16  # from here on FP8 weights multiply FP8 inputs
MAX_FEW_ROWS = 64  # from here on other weights are dequantised
MAX_FP8 = 448.0
_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Layout:
    """How a matrix is stored. groups: scales of an output per 128 inputs; 0: one for all inputs.

    scale_dtype: of groups, a name in torch. block_rows: outputs that share the scales of groups.
    """

    code: str
    groups: int
    scale_dtype: str
    has_zeros: bool
    block_rows: int = 1

    def __str__(self) -> str:
        zeros = int(self.has_zeros)
        return f"{self.code} {self.groups} {self.scale_dtype} {zeros} {self.block_rows}"

    @staticmethod
    @functools.cache
    def parse(text: str) -> Layout:
        """The inverse of `str`: ops take no objects."""
        code, groups, scale_dtype, zeros, rows = text.split()
        return Layout(code, int(groups), scale_dtype, zeros == "1", int(rows))


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix [N, K] for the kernels.

    codes: fp8, int8: [N, K], int8 in the order of `pack_bytes`; int4, fp4: `pack_records`. scales,
    zeros: of groups, [N / block_rows, groups of K]; None in records. row_scales: float32 [N].
    """

    layout: Layout
    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    row_scales: Tensor


def can_pack(device: torch.device) -> bool:
    """Whether the device has the kernels: they use copies that came with compute capability 9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def pack(
    code: str, codes: Tensor, scales: Tensor, zeros: Tensor | None, num_inputs: int
) -> Packed | None:
    """Pack a matrix; None if there are no kernels for its groups.

    codes: [N, K], uint8 0..15 for int4 and fp4. scales, zeros: [N or N / 128, groups of K], where K
    may have been padded to a multiple of 128.
    """
    num_outputs = codes.shape[0]
    block_rows = 1 if len(scales) == num_outputs else _BLOCK
    group = codes.shape[1] // scales.shape[1]
    ones = torch.ones(num_outputs, dtype=torch.float32, device=codes.device)
    if codes.shape[1] % 16 or num_inputs % 8:  # 16 bytes of codes, and of x, are loaded at once
        return None
    if scales.shape[1] == 1 and zeros is None and block_rows == 1:
        layout = Layout(code, 0, "float32", False)
        return Packed(layout, _in_order(code, codes, None, None), None, None, scales[:, 0].float())
    if group % UNIT == 0:
        groups, times = 1, group // UNIT
    elif group in (32, 64) and code != "fp8" or (group, code) == (16, "fp4"):
        groups, times = UNIT // group, 1
    else:
        return None
    num_groups = -(-num_inputs // UNIT) * groups
    scales = _spread(scales, times, num_groups)
    zeros = None if zeros is None else _spread(zeros, times, num_groups)
    dtype = str(scales.dtype).removeprefix("torch.")
    layout = Layout(code, groups, dtype, zeros is not None, block_rows)
    packed = _in_order(code, codes, scales, zeros)
    is_record = code in NIBBLES
    return Packed(layout, packed, None if is_record else scales, None if is_record else zeros, ones)


def _in_order(code: str, codes: Tensor, scales: Tensor | None, zeros: Tensor | None) -> Tensor:
    if code in NIBBLES:
        return pack_records(codes, scales, zeros)
    return pack_bytes(codes) if code == "int8" else codes


def _spread(part: Tensor, times: int, num_groups: int) -> Tensor:
    """Repeat each column, and pad with zeros to so many columns. Of every dtype."""
    bits = part.view(torch.uint8).view(*part.shape, -1).repeat_interleave(times, 1)[:, :num_groups]
    bits = F.pad(bits, (0, 0, 0, num_groups - bits.shape[1])).contiguous()
    return bits.flatten(1).view(part.dtype)


# -- products --------------------------------------------------------------------------------------


def _linear_fake(
    x: Tensor, _codes: Tensor, _scales: Tensor | None, _zeros: Tensor | None,
    _row_scales: Tensor, _bias: Tensor | None, _layout: str, num_outputs: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], num_outputs))


@define("packed_linear", fake=_linear_fake)
def packed_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    row_scales: Tensor,
    bias: Tensor | None,
    layout: str,
    num_outputs: int,
) -> Tensor:
    """x [rows, K] -> [rows, num_outputs] in x's dtype, by a matrix of `Packed`'s tensors."""
    from compiledllm.kernels.quantized_cuda import quantized_product

    parts = codes, scales, zeros, row_scales
    return quantized_product(x, *parts, bias, Layout.parse(layout), num_outputs)


def _experts_fake(x: Tensor, expert_ids: Tensor, *_: object) -> Tensor:
    return x.new_empty((*expert_ids.shape, x.shape[1]), dtype=torch.float32)


@define("packed_experts", fake=_experts_fake)
def packed_experts(
    x: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_zeros: Tensor | None,
    gate_up_row_scales: Tensor,
    gate_up_layout: str,
    down: Tensor,
    down_scales: Tensor | None,
    down_zeros: Tensor | None,
    down_row_scales: Tensor,
    down_layout: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    alpha: float,
    limit: float,
) -> Tensor:
    """`moe.moe_experts` with `Packed` matrices, each tensor with a first dimension of experts."""
    from compiledllm.kernels.quantized_experts_cuda import ExpertMatrix, experts

    up = ExpertMatrix(
        gate_up, gate_up_scales, gate_up_zeros, gate_up_row_scales, gate_up_bias,
        Layout.parse(gate_up_layout),
    )  # fmt: skip
    last = ExpertMatrix(
        down, down_scales, down_zeros, down_row_scales, down_bias, Layout.parse(down_layout)
    )
    return experts(x, expert_ids, up, last, alpha, limit)


# -- FP8 inputs ------------------------------------------------------------------------------------


def products_of(layout: Layout) -> str:
    """Which kernels multiply which numbers of rows."""
    if _may_take_fp8_inputs(layout):
        return f"our kernel up to {MAX_ROWS_OF_16_BITS} rows, FP8 inputs for more in bfloat16"
    return f"our kernel up to {MAX_FEW_ROWS} rows, dequantised for more"


def _may_take_fp8_inputs(layout: Layout) -> bool:
    return layout.code == "fp8" and (layout.groups == 0 or layout.block_rows == _BLOCK)


def takes_fp8_inputs(x: Tensor, layout: Layout, num_outputs: int) -> bool:
    """Whether the product should be `fp8_linear`'s. In compiled code, known when it is traced."""
    if not _may_take_fp8_inputs(layout) or x.dtype != torch.bfloat16:
        return False
    multiple = 16 if layout.groups == 0 else _BLOCK
    fits = num_outputs % multiple == 0 and x.shape[1] % multiple == 0
    return fits and x.shape[0] > MAX_ROWS_OF_16_BITS


def fp8_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    row_scales: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """x bfloat16 [rows, K], quantised per row, or per row and 128 inputs if there are scales.

    codes: float8_e4m3fn [N, K]. scales: float32 [N / 128, K / 128]. Traced by the compiler.
    """
    if scales is not None:
        groups = x.view(x.shape[0], -1, _BLOCK)
        scale = groups.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / MAX_FP8
        quantized = (groups.float() / scale).to(torch.float8_e4m3fn).view(x.shape)
        y = fp8_block_product(quantized, scale.squeeze(-1), codes, scales)
        return y if bias is None else y + bias
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / MAX_FP8
    product = fp8_product((x.float() / scale).to(torch.float8_e4m3fn), codes)
    y = product.float() * scale * row_scales
    return (y if bias is None else y + bias).to(x.dtype)


def _product_fake(x: Tensor, codes: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=torch.bfloat16)


@define("fp8_product", fake=_product_fake)
def fp8_product(x: Tensor, codes: Tensor) -> Tensor:
    """x, codes: float8_e4m3fn [rows, K], [N, K] -> bfloat16 [rows, N], without scales."""
    one = _one(x.device)
    return torch._scaled_mm(
        x, codes.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.float32, device=device)


def _block_product_fake(x: Tensor, _x_scales: Tensor, codes: Tensor, _scales: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=torch.bfloat16)


@define("fp8_block_product", fake=_block_product_fake)
def fp8_block_product(x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """The same with scales: x_scales [rows, K / 128], scales [N / 128, K / 128]."""
    num_rows = x.shape[0]
    padding = -num_rows % 4  # a column of x_scales must be a multiple of 16 bytes
    if padding:
        x = F.pad(x.view(torch.uint8), (0, 0, 0, padding)).view(x.dtype)
        x_scales = F.pad(x_scales, (0, 0, 0, padding))
    by_column = x_scales.t().contiguous().t()
    y = torch._scaled_mm(
        x, codes.t(), scale_a=by_column, scale_b=scales.t(), out_dtype=torch.bfloat16
    )
    return y[:num_rows]
