"""The weight format in which quantised checkpoints are loaded: the layout of `kernels.quantized`.

Each part of a fused matrix arrives as a `QuantizedMatrix`, whatever the checkpoint's format, and a
`MatrixSlot` copies it into its rows. After the last part, `finish` repacks the whole matrix to a
`PackedFormat` if the device has kernels for it; otherwise `kernels.quantized` multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compiledllm.kernels.quantized import (
    BLOCK_ROWS,
    INT4_ZERO,
    pack_codes,
    quantized_experts,
    quantized_linear,
    quantized_rows,
)
from compiledllm.models.formats.codes import (
    CODES,
    QuantizedMatrix,
    one_level,
    with_row_scales,
)
from compiledllm.models.formats.online import quantize
from compiledllm.models.formats.packed import for_device
from compiledllm.models.formats.weight_format import (
    MatrixFormat,
    Params,
    Slot,
    empty_parameter,
    in_input_order,
    slot_name,
)
from compiledllm.models.matrices import QuantSpec

_UNSET = -1  # fills a permutation until the first part sets it
# Zero of a symmetric part of a fused matrix in which other parts are asymmetric.
_ANY_ZERO = {"int4": INT4_ZERO, "int8": 0}

# Standard deviations of the values that uniformly random codes stand for.
_SPREADS = {"fp8": 0.6, "int8": 74.0, "int6": 18.5, "int4": 4.6, "fp4": 2.9}


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantised matrix.

    params: codes, scales, zeros, permutation, minima and factors; all but the first two may be
    None.
    """

    spec: QuantSpec
    num_params = 6

    @property
    def products(self) -> str:
        return f"{self.spec.code}: dequantised at each product"

    def parameters(
        self, parts: Mapping[str, int], in_features: int, lead: tuple[int, ...] = ()
    ) -> dict[str, nn.Parameter | None]:
        spec, num_outputs = self.spec, sum(parts.values())
        num_inputs = spec.num_inputs_in_memory(in_features)
        rows = math.ceil(num_outputs / spec.rows_in_memory([*parts.values()]))
        shape = *lead, rows, num_inputs // spec.group_in_memory(in_features)
        width, dtype = num_inputs, CODES[spec.code]
        if spec.code == "int6":
            width = num_inputs * 3 // 4
        elif spec.is_packed:
            width, dtype = num_inputs // 8, torch.int32
        scales = torch.zeros(shape, dtype=getattr(torch, spec.scale_dtype))
        zeros = torch.zeros(shape, dtype=CODES[spec.code]) if spec.has_zeros else None
        minima = torch.zeros_like(scales) if spec.has_minima else None
        order = torch.full((*lead, in_features), _UNSET) if spec.is_permuted else None
        factors = None
        if factor_shape := spec.factor_shape(in_features):
            factors = torch.zeros(*lead, rows, *factor_shape, dtype=spec.factor_dtype)
        return {
            "weight": empty_parameter(*lead, num_outputs, width, dtype=dtype),
            "weight_scale": _frozen(scales),
            "weight_zero": _frozen(zeros),
            "permutation": _frozen(order),
            "weight_minimum": _frozen(minima),
            "weight_factor": _frozen(factors),
        }

    def slots(self, parts: Mapping[str, int], in_features: int, params: Params) -> dict[str, Slot]:
        codes, scales, zeros, order, minima, factors = params
        assert codes is not None and scales is not None
        rows, start = self.spec.rows_in_memory([*parts.values()]), 0
        found: dict[str, Slot] = {}
        for part, size in parts.items():
            end = start + size
            part_rows = slice(start // rows, -(-end // rows))
            found[slot_name("weight", part)] = MatrixSlot(
                self.spec,
                in_features,
                codes[start:end],
                scales[part_rows],
                None if zeros is None else zeros[part_rows],
                None if minima is None else minima[part_rows],
                None if factors is None else factors[part_rows],
                order,
            )
            start = end
        return found

    def randomize(self, params: Params, spread: float, generator: torch.Generator) -> None:
        """Random codes, with the scale that makes them deviate from zero by about `spread`."""
        codes, scales, zeros, order, minima, factors = params
        assert codes is not None and scales is not None
        codes.view(torch.uint8).random_(0, 256, generator=generator)
        if self.spec.code == "fp8":
            codes.view(torch.uint8).bitwise_and_(0xBF)  # magnitudes below 2, and no NaN
        scale, zero = spread / _SPREADS[self.spec.code], _ANY_ZERO.get(self.spec.code, 0)
        if factors is not None:
            factors.fill_(scale)
            scale = 1
        scales.fill_(scale)
        if zeros is not None:
            zeros.fill_(zero)
        if minima is not None:
            minima.fill_(-zero * scale)
        if order is not None:
            order.copy_(torch.arange(order.shape[-1], device=order.device).expand_as(order))

    def finish(
        self, params: Params, in_features: int
    ) -> tuple[MatrixFormat, dict[str, Tensor | None]] | None:
        return for_device(self.spec, params, in_features)

    def product(
        self,
        x: Tensor,
        params: Params,
        bias: Tensor | None,
        first_row: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        codes, scales, zeros, order, minima, factors = params
        assert codes is not None and scales is not None
        if order is not None:
            x = x.index_select(1, order)
        if first_row:
            first = first_row // (1 if len(scales) == len(codes) else BLOCK_ROWS)
            codes, scales = codes[first_row:], scales[first:]
            others = (None if p is None else p[first:] for p in (zeros, minima, factors))
            zeros, minima, factors = others
        y = quantized_linear(x, codes, scales, zeros, bias, self.spec.code, minima, factors)
        return y if out is None else out.copy_(y)

    def rows(self, ids: Tensor, params: Params, in_features: int, dtype: torch.dtype) -> Tensor:
        codes, scales, zeros, order, minima, factors = params
        assert codes is not None and scales is not None
        name = str(dtype).removeprefix("torch.")
        parts = codes, scales, zeros, self.spec.code, in_features, name, minima, factors
        found = quantized_rows(ids, *parts)
        return in_input_order(found, order)

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
        # Experts have no permutation and no minima.
        up_codes, up_scales, up_zeros, _, _, up_factors = gate_up
        down_codes, down_scales, down_zeros, _, _, down_factors = down
        assert up_codes is not None and up_scales is not None
        assert down_codes is not None and down_scales is not None
        up, down = (up_codes, up_scales, up_zeros), (down_codes, down_scales, down_zeros)
        tensors = x, expert_ids, *up, *down, *biases
        factors = up_factors, down_factors
        return quantized_experts(*tensors, alpha, limit, self.spec.code, activation, *factors)


@dataclass(frozen=True, slots=True)
class MatrixSlot:
    """The rows of a quantised layer that one matrix of a checkpoint fills."""

    spec: QuantSpec
    num_inputs: int
    codes: Tensor  # packed
    scales: Tensor
    zeros: Tensor | None
    minima: Tensor | None
    factors: Tensor | None
    permutation: Tensor | None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.codes.shape[0], self.num_inputs))

    def before_division(self, stored: Any, dim: int) -> Any:
        """The content of which a rank takes its rows (dim 0) or columns (dim 1).

        If a scale may span several ranks, a tensor is quantised before it is divided, so that the
        codes are the same for any number of ranks.
        """
        return self.prepared(stored) if dim == 1 or self.spec.rows > 1 else stored

    def prepared(self, stored: Any) -> QuantizedMatrix:
        """`stored`, or the quantised matrix if `stored` is a tensor to be quantised while loading.

        Raises ValueError for a tensor that should be quantised in the checkpoint, and for a matrix
        whose inputs are reordered although the spec's are not.
        """
        if isinstance(stored, Tensor):
            if not self.spec.online:
                dtype = str(stored.dtype).removeprefix("torch.")
                raise ValueError(
                    f"it is not quantised but {dtype}; name it in the quantization_config's list "
                    "of modules that are not converted"
                )
            stored = quantize(stored.to(self.codes.device), self.spec.online)
        assert isinstance(stored, QuantizedMatrix)
        if stored.permutation is not None and self.permutation is None:
            raise ValueError(
                "g_idx reorders the inputs, which is supported neither for experts nor without "
                "desc_act (act order) in the config; use a checkpoint without desc_act"
            )
        return stored

    def put(self, stored: Any) -> None:
        """Pack a QuantizedMatrix, or quantise a tensor and pack the result.

        Raises ValueError if the matrix does not have the codes, zeros and permutation of the spec.
        """
        stored = self.prepared(stored)
        stored = stored if self.factors is not None else one_level(stored)
        self._check(stored)
        has_row_scales = self.scales.shape[0] == self.codes.shape[0]
        if stored.block and has_row_scales:
            stored = with_row_scales(stored)
        if self.spec.rows > 1 and not stored.block and not has_row_scales:
            raise ValueError(
                f"its outputs, or a rank's part of them, are not whole blocks of {BLOCK_ROWS} that "
                "share scales; use another checkpoint, or a smaller tensor_parallel_size"
            )
        self.codes.copy_(pack_codes(self.spec.code, stored.codes))
        self._spread(stored.scales, stored, self.scales)
        if self.zeros is not None and stored.zeros is None:
            self.zeros.fill_(_ANY_ZERO[self.spec.code])
        elif self.zeros is not None and stored.zeros is not None:
            self._spread(stored.zeros, stored, self.zeros)
        if self.minima is not None and stored.minima is not None:
            self._spread(stored.minima, stored, self.minima)
        if self.factors is not None:
            self._set_factors(stored, self.factors)
        self._set_order(stored.permutation)

    def _check(self, stored: QuantizedMatrix) -> None:
        if stored.code != self.spec.code:
            raise ValueError(f"its codes are {stored.code}, the config asks for {self.spec.code}")
        if stored.zeros is not None and self.zeros is None:
            raise ValueError("it has zero points, the config says that it is symmetric")
        if (stored.minima is None) != (self.minima is None):
            raise ValueError("some of its parts have minima beside their scales, others have none")

    def _spread(self, part: Tensor, stored: QuantizedMatrix, into: Tensor) -> None:
        """Copy scales or zeros, repeated if groups are smaller in memory than in the file."""
        times = stored.group // self.spec.group_in_memory(self.num_inputs)
        if times > 1:
            part = part.unsqueeze(-1).expand(*part.shape, times).flatten(-2)
        part = part[:, : into.shape[1]]
        target = into[:, : part.shape[1]]
        target.copy_(part)
        if part.dtype != into.dtype and not torch.equal(target.float().cpu(), part.float().cpu()):
            names = (str(dtype).removeprefix("torch.") for dtype in (part.dtype, into.dtype))
            raise ValueError("its scales have dtype {}, others {}".format(*names))

    def _set_factors(self, stored: QuantizedMatrix, into: Tensor) -> None:
        found = stored.super_scales, stored.super_minima
        for which, factors in enumerate(found):
            if factors is not None:
                into[..., which].copy_(factors)

    def _set_order(self, order: Tensor | None) -> None:
        if self.permutation is None:
            return
        if order is None:
            order = torch.arange(len(self.permutation), device=self.permutation.device)
        if self.permutation[0] == _UNSET:
            self.permutation.copy_(order)
        elif not torch.equal(self.permutation, order.to(self.permutation.device)):
            raise ValueError(
                "g_idx orders the inputs otherwise than in the other parts of the fused matrix; "
                "use a checkpoint without desc_act"
            )


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
