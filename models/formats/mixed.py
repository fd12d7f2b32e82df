"""The format of a fused matrix whose parts differ in format: one product for each run of parts.

llama.cpp stores the projections of some layers' values with more bits than those of queries and
keys, and a list of modules that are not quantised may name one part only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compiledllm.models.formats.plain import Plain
from compiledllm.models.formats.quantized import Quantized
from compiledllm.models.formats.weight_format import MatrixFormat, Params, Slot, WeightFormat
from compiledllm.models.matrices import MixedSpec


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring parts of a fused matrix that have one format."""

    parts: tuple[str, ...]
    num_outputs: int
    format: MatrixFormat

    @property
    def loaded_as(self) -> WeightFormat:
        """The format until `finish`."""
        assert isinstance(self.format, Plain | Quantized)
        return self.format

    def sizes(self, parts: Mapping[str, int]) -> dict[str, int]:
        return {part: parts[part] for part in self.parts}


@dataclass(frozen=True, slots=True)
class Mixed:
    """A fused matrix of several runs. params: the tensors of the runs' formats, run after run."""

    runs: tuple[Run, ...]

    @property
    def num_params(self) -> int:
        return sum(run.format.num_params for run in self.runs)

    @property
    def products(self) -> str:
        return "; ".join(sorted({run.format.products for run in self.runs} - {""}))

    def parameters(
        self, parts: Mapping[str, int], in_features: int, lead: tuple[int, ...] = ()
    ) -> dict[str, nn.Parameter | None]:
        found: dict[str, nn.Parameter | None] = {}
        for index, run in enumerate(self.runs):
            own = run.loaded_as.parameters(run.sizes(parts), in_features, lead)
            found |= {_name(index, i): parameter for i, parameter in enumerate(own.values())}
        return found

    def slots(self, parts: Mapping[str, int], in_features: int, params: Params) -> dict[str, Slot]:
        found: dict[str, Slot] = {}
        for run, own in self._split(params):
            found |= run.loaded_as.slots(run.sizes(parts), in_features, own)
        return found

    def randomize(self, params: Params, spread: float, generator: torch.Generator) -> None:
        for run, own in self._split(params):
            run.loaded_as.randomize(own, spread, generator)

    def finish(
        self, params: Params, in_features: int
    ) -> tuple[MatrixFormat, dict[str, Tensor | None]]:
        runs: list[Run] = []
        tensors: dict[str, Tensor | None] = {}
        for index, (run, own) in enumerate(self._split(params)):
            finished = run.loaded_as.finish(own, in_features)
            format, kept = (run.format, own) if finished is None else _values(finished)
            runs.append(replace(run, format=format))
            tensors |= {_name(index, i): tensor for i, tensor in enumerate(kept)}
        return Mixed(tuple(runs)), tensors

    def product(
        self,
        x: Tensor,
        params: Params,
        bias: Tensor | None,
        first_row: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        y = torch.cat(self._products(x, params, bias, first_row), dim=-1)
        return y if out is None else out.copy_(y)

    def by_part(
        self, x: Tensor, params: Params, bias: Tensor | None, parts: Mapping[str, int]
    ) -> list[Tensor]:
        """x [rows, inputs] -> [rows, outputs] of each part, without joining the products."""
        found: list[Tensor] = []
        for run, product in zip(self.runs, self._products(x, params, bias), strict=True):
            found += torch.split(product, list(run.sizes(parts).values()), dim=-1)
        return found

    def _products(
        self, x: Tensor, params: Params, bias: Tensor | None, first_row: int = 0
    ) -> list[Tensor]:
        """The product of each run that has outputs from `first_row` on."""
        products, row = [], 0
        for run, own in self._split(params):
            first, row = max(first_row - row, 0), row + run.num_outputs
            if first < run.num_outputs:
                end = row - first_row
                run_bias = None if bias is None else bias[end - run.num_outputs + first : end]
                products.append(run.format.product(x, own, run_bias, first))
        return products

    def rows(self, ids: Tensor, params: Params, in_features: int, dtype: torch.dtype) -> Tensor:
        raise AssertionError("an embedding is one part")

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
        raise AssertionError("gate and up of experts have one format")

    def _split(self, params: Params) -> list[tuple[Run, Params]]:
        """Each run with its tensors."""
        found: list[tuple[Run, Params]] = []
        start = 0
        for run in self.runs:
            end = start + run.format.num_params
            found.append((run, params[start:end]))
            start = end
        return found


def mixed(spec: MixedSpec, multiply: Callable[..., Tensor]) -> Mixed:
    """The format of a MixedSpec. multiply: the kernel of unquantised parts."""
    runs = (
        Run(parts, size, Plain(multiply) if format is None else Quantized(format))
        for parts, size, format in spec.runs
    )
    return Mixed(tuple(runs))


def _name(run: int, index: int) -> str:
    return f"run_{run}_{index}"


def _values(finished: tuple[MatrixFormat, dict[str, Tensor | None]]) -> tuple[MatrixFormat, Params]:
    return finished[0], [*finished[1].values()]
