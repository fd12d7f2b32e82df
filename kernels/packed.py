"""Quantised matrices in the layouts of the CUDA kernels, and products with these matrices.

`pack` rearranges a matrix from the layout of `kernels.quantized`, in which checkpoints are loaded,
into a `Packed` matrix. Products are ops that are opaque to torch.compile, except for `fp8_linear`:
the compiler traces `fp8_linear` and fuses the quantisation of the inputs with the preceding
operation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.backend import MAX_FP8
from compiledllm.kernels.moe import experts_fake
from compiledllm.kernels.ops import define
from compiledllm.kernels.quantized import BLOCK_ROWS, PACKED_BITS
from compiledllm.kernels.records import TILE, UNIT, pack_bytes, pack_records, with_minima

# With more rows of x, bfloat16 inputs of FP8 matrices are quantised to FP8 (`takes_fp8_inputs`).
MAX_ROWS_OF_16_BITS = 16
MAX_FEW_ROWS = 64  # the most rows of x that `cuda/linear.cu` multiplies


@dataclass(frozen=True, slots=True)
class Layout:
    """How a `Packed` matrix is stored.

    code: the type of the codes: "fp8", "int8", "int6", "int4" or "fp4". groups: number of scales
    that an output has per 128 inputs; 0: `Packed.row_scales` are the only scales. scale_dtype:
    dtype of the groups' scales, a name in torch. has_zeros: each group has a zero point beside its
    scale. block_rows: number of outputs that share the groups' scales, 1 or 128. has_minima: each
    group has a minimum beside its scale. has_factors: scales and minima are int8 and multiplied by
    float16 factors.
    """

    code: str
    groups: int
    scale_dtype: str
    has_zeros: bool
    block_rows: int = 1
    has_minima: bool = False
    has_factors: bool = False

    def __str__(self) -> str:
        flags = "".join(str(int(f)) for f in (self.has_zeros, self.has_minima, self.has_factors))
        return f"{self.code} {self.groups} {self.scale_dtype} {flags} {self.block_rows}"

    @staticmethod
    @functools.cache
    def parse(text: str) -> Layout:
        """The inverse of `str`. An op's arguments cannot be dataclasses, so ops take a string."""
        code, groups, scale_dtype, flags, rows = text.split()
        zeros, minima, factors = (flag == "1" for flag in flags)
        return Layout(code, int(groups), scale_dtype, zeros, int(rows), minima, factors)


def record_bytes(layout: Layout) -> int:
    """Bytes of a record of a layout whose codes are in records, see `kernels.records`."""
    numbers = layout.groups * (1 + layout.has_minima) + 4 * layout.has_factors
    scale_bytes = getattr(torch, layout.scale_dtype).itemsize if layout.groups else 0
    code_bytes = UNIT * PACKED_BITS[layout.code] // 8
    return TILE * (code_bytes + numbers * scale_bytes + layout.groups * layout.has_zeros)


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix [N outputs, K inputs] in the layout of the CUDA kernels.

    w = (code - zero) * scale * row_scale + minimum

    zero, scale and minimum belong to the weight's group, row_scale to the weight's output.

    codes: [N, K] for fp8; [N, K rounded up to 128] for int8, in the order of `pack_bytes`; uint8
    records, which include scales and zeros, for other codes (`pack_records`).
    scales, zeros: [ceil(N / block_rows), groups * ceil(K / 128)]; None if the layout has none, and
    for codes in records. With minima or factors, `scales` also contains the minima and factors, as
    arranged by `records.with_minima`.
    row_scales: float32 [N]. If the layout has groups, these are ones, or the factors of NVFP4.
    """

    layout: Layout
    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    row_scales: Tensor


def can_pack(device: torch.device) -> bool:
    """Whether the device can run the kernels, whose bulk copies need compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def pack(
    code: str,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    num_inputs: int,
    minima: Tensor | None = None,
    factors: Tensor | None = None,
) -> Packed | None:
    """Pack a matrix; None if the kernels support neither its groups nor its number of inputs.

    code: see `Layout`. codes: [N, K], one code per element (`quantized.unpack_codes`). K:
    num_inputs, perhaps padded to a multiple of 128. scales, zeros, minima: [N or ceil(N / 128),
    K / group]. factors: float16 [N, S, 2] for S super-blocks, float64 [N, 1, 1], or None.
    """
    num_outputs = codes.shape[0]
    block_rows = 1 if len(scales) == num_outputs else BLOCK_ROWS
    group = codes.shape[1] // scales.shape[1]
    ones = torch.ones(num_outputs, dtype=torch.float32, device=codes.device)
    if codes.shape[1] % 16 or num_inputs % 8:  # 16 bytes of codes, and of x, are loaded at once
        return None
    if factors is not None and factors.dtype == torch.float64:  # of NVFP4, one per output
        ones, factors = factors[:, 0, 0].float(), None
    has_minima, has_factors = minima is not None, factors is not None
    is_plain = zeros is None and not has_minima and not has_factors
    if scales.shape[1] == 1 and block_rows == 1 and is_plain:
        layout = Layout(code, 0, "float32", False)
        return Packed(layout, _in_order(code, codes, None, None), None, None, scales[:, 0].float())
    if not _has_groups(code, group, has_minima):
        return None
    if block_rows > 1:
        scales = scales.float()  # the persistent kernel copies four bytes at a time
    groups, times = max(UNIT // group, 1), max(group // UNIT, 1)
    num_units = -(-num_inputs // UNIT)
    if factors is not None and (groups < 4 or num_units % factors.shape[1]):
        return None  # the kernels read whole words of scales, and factors of whole units
    num_groups = num_units * groups
    scales = _spread(scales, times, num_groups)
    zeros = None if zeros is None else _spread(zeros, times, num_groups)
    minima = None if minima is None else _spread(minima, times, num_groups)
    dtype = str(scales.dtype).removeprefix("torch.")
    layout = Layout(code, groups, dtype, zeros is not None, block_rows, has_minima, has_factors)
    if has_minima or has_factors:
        scales = with_minima(scales, minima, factors, num_units)
    packed = _in_order(code, codes, scales, zeros)
    is_record = code in PACKED_BITS
    return Packed(layout, packed, None if is_record else scales, None if is_record else zeros, ones)


def _has_groups(code: str, group: int, has_minima: bool) -> bool:
    """Whether the kernels support groups of this many inputs."""
    if code == "int6":
        return group == 16
    if group in (32, 64):
        return code != "fp8"
    if group == 16:
        return code == "fp4" or (code == "int8" and not has_minima)
    return group % UNIT == 0


def _in_order(code: str, codes: Tensor, scales: Tensor | None, zeros: Tensor | None) -> Tensor:
    if code in PACKED_BITS:
        return pack_records(codes, scales, zeros, code)
    return pack_bytes(codes) if code == "int8" else codes


def _spread(part: Tensor, times: int, num_groups: int) -> Tensor:
    """Repeat each column `times` times and pad with zeros to `num_groups` columns.

    Works on bytes, because torch cannot repeat or pad tensors of every FP8 dtype.
    """
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
    """Multiply x [rows, K] by a matrix given as `Packed`'s tensors: [rows, num_outputs].

    x is bfloat16 or float16, and so are bias and result. layout: `str` of a `Layout`.
    """
    from compiledllm.kernels.quantized_cuda import quantized_product

    parts = codes, scales, zeros, row_scales
    return quantized_product(x, *parts, bias, Layout.parse(layout), num_outputs)


def packed_linear_into(
    out: Tensor,
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    row_scales: Tensor,
    bias: Tensor | None,
    layout: Layout,
) -> Tensor:
    """`packed_linear` into `out`, contiguous [rows, N], for code that is not compiled."""
    from compiledllm.kernels.quantized_cuda import quantized_product

    parts = codes, scales, zeros, row_scales
    return quantized_product(x, *parts, bias, layout, out.shape[1], out=out)


def _rows_fake(
    ids: Tensor, _codes: Tensor, _scales: Tensor | None, _zeros: Tensor | None,
    _row_scales: Tensor, _layout: str, num_inputs: int, dtype: str,
) -> Tensor:  # fmt: skip
    return ids.new_empty((ids.shape[0], num_inputs), dtype=getattr(torch, dtype))


@define("packed_rows", fake=_rows_fake)
def packed_rows(
    ids: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    row_scales: Tensor,
    layout: str,
    num_inputs: int,
    dtype: str,
) -> Tensor:
    """Dequantise the rows `ids`, int64 [tokens], of a matrix: [tokens, num_inputs].

    dtype: "bfloat16" or "float16". Each weight is computed in float32 and rounded once.
    """
    from compiledllm.kernels.quantized_cuda import dequantized

    parts = codes, scales, zeros, row_scales, Layout.parse(layout)
    return dequantized(*parts, len(ids), num_inputs, getattr(torch, dtype), ids=ids)


@define("packed_experts", fake=experts_fake)
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
    activation: str = "silu",
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
    return experts(x, expert_ids, up, last, alpha, limit, activation)


# -- FP8 inputs ------------------------------------------------------------------------------------


def products_of(layout: Layout) -> str:
    """A phrase for the start's report: which kernels multiply, depending on the number of rows."""
    if _may_take_fp8_inputs(layout):
        return f"our kernel up to {MAX_ROWS_OF_16_BITS} rows, FP8 inputs for more in bfloat16"
    from compiledllm.kernels import warpgroup_linear_cuda

    if warpgroup_linear_cuda.can_read(layout):
        most = warpgroup_linear_cuda.MAX_ROWS
        return f"our kernels up to {most} rows, dequantised for more"
    return f"our kernel up to {MAX_FEW_ROWS} rows, dequantised for more"


def _may_take_fp8_inputs(layout: Layout) -> bool:
    return layout.code == "fp8" and (layout.groups == 0 or layout.block_rows == BLOCK_ROWS)


def takes_fp8_inputs(x: Tensor, layout: Layout, num_outputs: int) -> bool:
    """Whether to multiply with `fp8_linear` instead of `packed_linear`.

    Reads dtypes and shapes only. In compiled code the answer is therefore known while tracing, and
    a variant for a range of row counts contains one of the two products.
    """
    if not _may_take_fp8_inputs(layout) or x.dtype != torch.bfloat16:
        return False
    multiple = 16 if layout.groups == 0 else BLOCK_ROWS
    fits = num_outputs % multiple == 0 and x.shape[1] % multiple == 0
    return fits and x.shape[0] > MAX_ROWS_OF_16_BITS


def fp8_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    row_scales: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Quantise x, bfloat16 [rows, K], to FP8 and multiply: bfloat16 [rows, N].

    codes: float8_e4m3fn [N, K]. scales: float32 [N / 128, K / 128], or None. x gets a scale per row
    and 128 inputs if there are `scales`, otherwise a scale per row. row_scales: float32 [N], used
    only without `scales`. The compiler traces this function.
    """
    if scales is not None:
        groups, scale = _to_fp8(x.view(x.shape[0], -1, BLOCK_ROWS))
        y = fp8_block_product(groups.view(x.shape), scale.squeeze(-1), codes, scales)
        return y if bias is None else y + bias
    quantized, scale = _to_fp8(x)
    y = fp8_product(quantized, codes).float() * scale * row_scales
    return (y if bias is None else y + bias).to(x.dtype)


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise with a scale for each vector of the last dimension: float8_e4m3fn, float32."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / MAX_FP8
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def _product_fake(x: Tensor, codes: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=torch.bfloat16)


@define("fp8_product", fake=_product_fake)
def fp8_product(x: Tensor, codes: Tensor) -> Tensor:
    """Multiply x [rows, K] by codes [N, K], both float8_e4m3fn: bfloat16 [rows, N], unscaled."""
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
    """Multiply x [rows, K] by codes [N, K], both float8_e4m3fn with scales: bfloat16 [rows, N].

    x_scales: float32 [rows, K / 128]. scales: float32 [N / 128, K / 128].
    """
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
