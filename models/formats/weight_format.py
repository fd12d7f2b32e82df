"""The interface of a weight format: how a matrix is stored, loaded, repacked and multiplied.

`Linear`, `ExpertLinear` and the output head hold one format each and know nothing else about their
matrix. A format is an immutable value without tensors, so that layers with equal formats share a
compiled block; the layer holds the tensors ("params") that `parameters` made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compiledllm.models.formats.slicing import dequantize_into, take
from compiledllm.models.shards import Shard

Params = Sequence[Tensor | None]


def empty_parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised weight of this shape; the loader fills each weight exactly once."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Slot(Protocol):
    """A place in the model that one matrix or vector of a checkpoint fills."""

    @property
    def shape(self) -> torch.Size:
        """The shape that the checkpoint must have: [outputs, inputs] for a matrix."""

    def put(self, stored: Any) -> None:
        """Convert the checkpoint's tensor or `QuantizedMatrix` and copy it to this place."""


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """A slot for a floating-point tensor; quantised matrices of the checkpoint are dequantised."""

    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def put(self, stored: Any) -> None:
        if isinstance(stored, Tensor):
            self.tensor.copy_(stored)
        else:
            dequantize_into(stored, self.tensor)


@dataclass(frozen=True, slots=True)
class ShardSlot:
    """The part of a slot that a rank holds. dim: the divided dimension, 0 or 1."""

    slot: Slot
    shard: Shard
    dim: int

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole tensor, as in the checkpoint."""
        shape = list(self.slot.shape)
        shape[self.dim] = self.shard.size
        return torch.Size(shape)

    def put(self, stored: Any) -> None:
        prepare = getattr(self.slot, "before_division", None)
        stored = stored if prepare is None else prepare(stored, self.dim)
        self.slot.put(take(stored, self.shard, self.dim))


@dataclass(frozen=True, slots=True)
class ZeroSlot:
    """A bias that only the first rank adds: on other ranks, the slot is filled with zeros."""

    slot: TensorSlot

    @property
    def shape(self) -> torch.Size:
        return self.slot.shape

    def put(self, stored: Any) -> None:
        self.slot.tensor.zero_()


class MatrixFormat(Protocol):
    """How a matrix [outputs, inputs] is kept in memory and multiplied. params: its tensors."""

    @property
    def num_params(self) -> int:
        """Number of `params`, including those that are None."""

    @property
    def products(self) -> str:
        """For reports: the kernels used for each number of rows; "" for unquantised matrices."""

    def product(
        self,
        x: Tensor,
        params: Params,
        bias: Tensor | None,
        first_row: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        """x [rows, inputs] -> [rows, outputs from first_row on]; written to `out` if given.

        bias: the bias of the same outputs. `out` must be None in compiled code or with a bias.
        """

    def rows(self, ids: Tensor, params: Params, in_features: int, dtype: torch.dtype) -> Tensor:
        """The matrix's rows `ids` [tokens], for an embedding: [tokens, inputs] in `dtype`."""

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
        """The gated MLPs of the experts; see `kernels.moe.moe_experts`.

        down_format: the format of `down`; `gate_up` has the format `self`. biases: the biases of
        gate_up and of down.
        """


class WeightFormat(MatrixFormat, Protocol):
    """A format into which a checkpoint's matrix, fused of one or several parts, is loaded.

    parts: number of outputs of each part, by the part's name in the family's NAMES. params: the
    tensors of `parameters`, in that order.
    """

    def parameters(
        self, parts: Mapping[str, int], in_features: int, lead: tuple[int, ...] = ()
    ) -> dict[str, nn.Parameter | None]:
        """Uninitialised tensors on torch's default device. lead: (experts,) or ()."""

    def slots(self, parts: Mapping[str, int], in_features: int, params: Params) -> dict[str, Slot]:
        """Where each part's matrix goes: {"weight:part": slot}; "weight" for a part named ""."""

    def randomize(self, params: Params, spread: float, generator: torch.Generator) -> None:
        """Fill with random weights that deviate from zero by about `spread`."""

    def finish(
        self, params: Params, in_features: int
    ) -> tuple[MatrixFormat, dict[str, Tensor | None]] | None:
        """Called once all slots have been filled. Returns a new format and its tensors, or None.

        None keeps the format. A new format suits kernels that read a layout into which the parts
        cannot be copied one by one.
        """


def in_input_order(columns: Tensor, order: Tensor | None) -> Tensor:
    """Undo a permutation of columns [rows, inputs]. order: int64 [inputs], or None."""
    return columns if order is None else torch.empty_like(columns).index_copy_(1, order, columns)


def slots_by_part(leaf: str, parts: Mapping[str, int], tensor: Tensor) -> dict[str, Slot]:
    """{"leaf:part": the rows of this part}; a layer that is not fused has one part, named ""."""
    pieces = torch.split(tensor, list(parts.values()))
    return {slot_name(leaf, part): TensorSlot(p) for part, p in zip(parts, pieces, strict=True)}


def slot_name(leaf: str, part: str) -> str:
    return f"{leaf}:{part}" if part else leaf
