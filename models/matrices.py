"""The weights of a model by matrix, as counted from its spec without building the model.

A storage format applies to a matrix; all other parameters have the model's dtype.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from compiledllm.kernels.quantized import K_MULTIPLE, PACKED_BITS


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How a quantised matrix is kept in memory, before CUDA kernels pack it.

    code: "fp8" (E4M3), "int8", "int6", "int4" or "fp4" (E2M1). group: number of inputs that share
    a scale; 0: all. rows: number of outputs that share a scale, 1 or 128. has_zeros: codes have
    zero points. is_permuted: the inputs are reordered (GPTQ's act order). scale_dtype: a name in
    torch. online: the method by which 16-bit weights are quantised while loading; "": the
    checkpoint stores codes. has_minima: each group has a minimum beside its scale, in the same
    dtype. span: number of inputs (a super-block of GGUF's k-quants) that share two float16 factors,
    which multiply the int8 scales and minima; 0: there are none. has_row_factor: each output has a
    float64 factor, which multiplies its float8_e4m3fn scales (NVFP4).
    """

    code: str
    group: int = 0
    rows: int = 1
    has_zeros: bool = False
    is_permuted: bool = False
    scale_dtype: str = "float32"
    online: str = ""
    has_minima: bool = False
    span: int = 0
    has_row_factor: bool = False

    @property
    def title(self) -> str:
        """In messages and reports: "int4 in groups of 128, asymmetric"."""
        group = f" in groups of {self.group}" if self.group and self.rows == 1 else ""
        blocks = f" in blocks of {self.rows}x{self.group}" if self.rows > 1 else ""
        return f"{self.code}{group}{blocks}{', asymmetric' if self.has_zeros else ''}"

    @property
    def is_packed(self) -> bool:
        """Whether codes have less than 8 bits; inputs are padded to K_MULTIPLE in memory."""
        return self.code in PACKED_BITS

    def num_inputs_in_memory(self, num_inputs: int) -> int:
        """The number of inputs with padding."""
        return num_inputs + -num_inputs % (K_MULTIPLE if self.is_packed else 1)

    def group_in_memory(self, num_inputs: int) -> int:
        """Number of inputs that share a scale, always a divisor of `num_inputs_in_memory`.

        A group that does not divide the (padded) inputs is kept as several smaller ones.
        """
        group = math.gcd(num_inputs, self.group or num_inputs)
        if self.is_packed and self.num_inputs_in_memory(num_inputs) % group:
            group = math.gcd(group, K_MULTIPLE)
        return group

    def factor_shape(self, num_inputs: int) -> tuple[int, int] | None:
        """Shape of an output's factors, (spans, factors per span); None: there are none."""
        if self.has_row_factor:
            return 1, 1
        return (self.num_inputs_in_memory(num_inputs) // self.span, 2) if self.span else None

    @property
    def factor_dtype(self) -> torch.dtype:
        return torch.float64 if self.has_row_factor else torch.float16

    def rows_in_memory(self, parts: Sequence[int]) -> int:
        """Number of outputs that share a scale in a matrix fused of parts with these outputs.

        It is 1 if a part before the last is not whole blocks of `rows` outputs.
        """
        return 1 if any(size % self.rows for size in parts[:-1]) else self.rows

    def num_bytes(self, num_outputs: int, num_inputs: int, parts: Sequence[int] = ()) -> int:
        """Bytes of a matrix in memory, with its scales, zeros, minima, factors and permutation.

        parts: number of outputs of each part of a fused matrix.
        """
        width, rows = self.num_inputs_in_memory(num_inputs), self.rows_in_memory(parts)
        num_groups = -(-num_outputs // rows) * width // self.group_in_memory(num_inputs)
        scale_dtype: torch.dtype = getattr(torch, self.scale_dtype)
        group_bytes = scale_dtype.itemsize * (1 + self.has_minima) + self.has_zeros
        codes = num_outputs * width * PACKED_BITS.get(self.code, 8) // 8
        shape = self.factor_shape(num_inputs)
        factors = num_outputs * math.prod(shape) * self.factor_dtype.itemsize if shape else 0
        return codes + num_groups * group_bytes + factors + self.is_permuted * 8 * num_inputs


@dataclass(frozen=True, slots=True)
class MixedSpec:
    """How a fused matrix is kept if its parts have different formats.

    runs: for each run of neighbouring parts with one format: the parts' names, the run's number of
    outputs, and the format; None: the model's dtype.
    """

    runs: tuple[tuple[tuple[str, ...], int, QuantSpec | None], ...]


# Formats by the matrix's path within a block ("attn.qkv") or within the model ("lm_head").
# Matrices that are not named have the model's dtype.
Formats = tuple[tuple[str, QuantSpec | MixedSpec], ...]


class MatrixSpec(NamedTuple):
    """A weight matrix, or the `num_experts` matrices of the same shape in a layer.

    name: the module's path within a block ("attn.qkv") or within the model ("lm_head"). format:
    None: the model's dtype, or float32 if `is_float32`. parts: number of outputs of each part of a
    fused matrix; empty: it is one part.
    """

    name: str
    num_outputs: int
    num_inputs: int
    num_experts: int = 1
    format: QuantSpec | MixedSpec | None = None
    is_float32: bool = False
    parts: tuple[int, ...] = ()

    @property
    def num_parameters(self) -> int:
        return self.num_experts * self.num_outputs * self.num_inputs

    def num_bytes(self, element_bytes: int) -> int:
        """Bytes in memory. element_bytes: bytes per value in the model's dtype."""
        if self.format is None:
            return self.num_parameters * (4 if self.is_float32 else element_bytes)
        if isinstance(self.format, MixedSpec):
            return sum(run.num_bytes(element_bytes) for run in self._runs(self.format))
        shape = self.num_outputs, self.num_inputs
        return self.num_experts * self.format.num_bytes(*shape, self.parts)

    @property
    def num_in_8_bits(self) -> int:
        """Number of parameters that are kept as FP8 or int8."""
        if isinstance(self.format, MixedSpec):
            return sum(run.num_in_8_bits for run in self._runs(self.format))
        is_8_bit = self.format is not None and self.format.code in ("fp8", "int8")
        return self.num_parameters if is_8_bit else 0

    def _runs(self, format: MixedSpec) -> Iterator[MatrixSpec]:
        """The matrix of each run of parts that have one format."""
        sizes = iter(self.parts)
        for names, num_outputs, of_run in format.runs:
            parts = tuple(itertools.islice(sizes, len(names)))
            yield self._replace(num_outputs=num_outputs, format=of_run, parts=parts)


class Weights(NamedTuple):
    """The weights of a part of a model. num_others: number of parameters that are in no matrix."""

    matrices: tuple[MatrixSpec, ...] = ()
    num_others: int = 0

    @property
    def num_parameters(self) -> int:
        return sum(matrix.num_parameters for matrix in self.matrices) + self.num_others

    def plus(self, *parts: Weights) -> Weights:
        matrices = (matrix for part in (self, *parts) for matrix in part.matrices)
        return Weights(tuple(matrices), sum(part.num_others for part in (self, *parts)))

    def stored_in(self, formats: Formats) -> Weights:
        """The same weights, with the matrices that `formats` names in these formats."""
        if not formats:
            return self
        by_name = dict(formats)
        matrices = (m._replace(format=by_name.get(m.name)) for m in self.matrices)
        return Weights(tuple(matrices), self.num_others)
