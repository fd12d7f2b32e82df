"""The format of quantised weights that a GPU's kernels read: a `kernels.packed.Packed` matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compiledllm.kernels.packed import (
    Layout,
    Packed,
    can_pack,
    fp8_linear,
    pack,
    packed_experts,
    packed_linear,
    packed_linear_into,
    packed_rows,
    products_of,
    takes_fp8_inputs,
)
from compiledllm.kernels.quantized import unpack_codes
from compiledllm.kernels.records import TILE
from compiledllm.models.formats.weight_format import MatrixFormat, Params, in_input_order
from compiledllm.models.matrices import QuantSpec

_DTYPES = (torch.bfloat16, torch.float16)  # dtypes of x that the kernels support


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """A `kernels.packed.Packed` matrix. params: codes, scales, zeros, permutation, row scales.

    `Quantized.finish` changes to this format once all parts of a matrix have been loaded.
    """

    spec: QuantSpec
    layout: Layout
    num_outputs: int
    num_params = 5

    @property
    def products(self) -> str:
        return f"{self.layout.code}: {products_of(self.layout)}"

    def product(
        self,
        x: Tensor,
        params: Params,
        bias: Tensor | None,
        first_row: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        codes, scales, zeros, order, row_scales = params
        assert codes is not None and row_scales is not None
        if order is not None:
            x = x.index_select(1, order)
        num_outputs = self.num_outputs - first_row
        if first_row:
            codes, scales, zeros = self._from(first_row, codes, scales, zeros)
            row_scales = row_scales[first_row:]
        if takes_fp8_inputs(x, self.layout, num_outputs):
            y = fp8_linear(x, codes, scales, row_scales, bias)
            return y if out is None else out.copy_(y)
        parts = codes, scales, zeros, row_scales, bias
        if out is None:
            return packed_linear(x, *parts, str(self.layout), num_outputs)
        return packed_linear_into(out, x, *parts, self.layout)

    def rows(self, ids: Tensor, params: Params, in_features: int, dtype: torch.dtype) -> Tensor:
        codes, scales, zeros, order, row_scales = params
        assert codes is not None and row_scales is not None
        parts = codes, scales, zeros, row_scales, str(self.layout), in_features
        found = packed_rows(ids, *parts, str(dtype).removeprefix("torch."))
        return in_input_order(found, order)

    def _from(
        self, first_row: int, codes: Tensor, scales: Tensor | None, zeros: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Codes, scales and zeros of the rows from `first_row` on.

        For codes in records (4 and 6 bits), `first_row` must be a multiple of TILE, which it is, as
        callers skip whole query heads.
        """
        first = first_row // self.layout.block_rows
        scales = None if scales is None else scales[first:]
        zeros = None if zeros is None else zeros[first:]
        if codes.dtype != torch.uint8:
            return codes[first_row:], scales, zeros
        assert first_row % TILE == 0, first_row
        return codes[first_row // TILE :], scales, zeros

    def experts(
        self,
        x: Tensor,
        expert_ids: Tensor,
        gate_up: Params,
        down: Params,
        down_format: MatrixFormat,
        biases: tuple[Tensor | None, Tensor | None],
        alpha: float,
        limit: float,
        activation: str,
    ) -> Tensor:
        up_codes, up_scales, up_zeros, _, up_rows = gate_up  # experts have no permutation
        down_codes, down_scales, down_zeros, _, down_rows = down
        assert up_codes is not None and up_rows is not None
        assert down_codes is not None and down_rows is not None
        assert isinstance(down_format, PackedFormat)
        up = up_codes, up_scales, up_zeros, up_rows, str(self.layout)
        last = down_codes, down_scales, down_zeros, down_rows, str(down_format.layout)
        return packed_experts(x, expert_ids, *up, *last, *biases, alpha, limit, activation)


def for_device(
    spec: QuantSpec, params: Params, in_features: int
) -> tuple[MatrixFormat, dict[str, Tensor | None]] | None:
    """Pack the tensors of a `Quantized` matrix. None if no kernels of the device can read it.

    The kernels' inputs have the model's dtype, which is torch's default dtype while a model loads.
    """
    codes, scales, zeros, order, minima, factors = params
    assert codes is not None and scales is not None
    if not can_pack(codes.device) or torch.get_default_dtype() not in _DTYPES:
        return None
    has_experts = codes.dim() == 3
    matrices = []
    for expert in range(len(codes) if has_experts else 1):
        all_parts = codes, scales, zeros, minima, factors
        parts = [p[expert] if has_experts and p is not None else p for p in all_parts]
        packed = _packed(spec, in_features, *parts)
        if packed is None:
            return None
        matrices.append(packed)
    first = matrices[0]
    together: Any = _stacked if has_experts else lambda tensors: tensors[0]
    format = PackedFormat(spec, first.layout, len(first.row_scales))
    return format, {
        "weight": together([m.codes for m in matrices]),
        "weight_scale": together([m.scales for m in matrices]),
        "weight_zero": together([m.zeros for m in matrices]),
        "permutation": order,
        "row_scale": together([m.row_scales for m in matrices]),
    }


def _packed(
    spec: QuantSpec,
    in_features: int,
    codes: Any,
    scales: Any,
    zeros: Any,
    minima: Any,
    factors: Any,
) -> Packed | None:
    codes = unpack_codes(spec.code, codes)
    return pack(spec.code, codes, scales, zeros, in_features, minima, factors)


def _stacked(tensors: list[Tensor | None]) -> Tensor | None:
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(found) if found else None
