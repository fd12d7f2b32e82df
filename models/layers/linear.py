"""Linear layers. Several matrices of a checkpoint may be fused into one product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compiledllm.kernels.linear import linear
from compiledllm.models.formats.mixed import Mixed
from compiledllm.models.formats.plain import Plain
from compiledllm.models.formats.weight_format import (
    MatrixFormat,
    Params,
    ShardSlot,
    Slot,
    TensorSlot,
    WeightFormat,
    ZeroSlot,
    empty_parameter,
    slot_name,
    slots_by_part,
)
from compiledllm.models.shards import Ranks, Shard


@dataclass(frozen=True, slots=True)
class Division:
    """How a matrix is divided among ranks: by outputs, by inputs, or not at all.

    outputs: part -> the rank's shard of the part's outputs. inputs: the rank's shard of the inputs;
    the products of all ranks then add up to the whole product, and only the first rank adds the
    bias.
    """

    ranks: Ranks = Ranks()
    outputs: Mapping[str, Shard] = field(default_factory=dict)
    inputs: Shard | None = None

    def of_weight(self, part: str, slot: Slot) -> Slot:
        if part in self.outputs:
            return ShardSlot(slot, self.outputs[part], 0)
        return slot if self.inputs is None else ShardSlot(slot, self.inputs, 1)

    def of_bias(self, part: str, slot: Slot) -> Slot:
        if part in self.outputs:
            return ShardSlot(slot, self.outputs[part], 0)
        is_summand = self.inputs is not None and self.ranks.index > 0
        return ZeroSlot(slot) if is_summand and isinstance(slot, TensorSlot) else slot


WHOLE = Division()


class Matrix(nn.Module):
    """One or several equally shaped matrices in a WeightFormat, with biases.

    parts: number of output rows of each fused matrix, by the part name in the family's NAMES; an
    unfused layer has one part named "". params: the format's tensors. division: the rank's share of
    the checkpoint's matrices; `parts` and `in_features` are the sizes of this share.
    """

    def __init__(
        self,
        in_features: int,
        parts: dict[str, int],
        format: WeightFormat,
        params: Mapping[str, nn.Parameter | None],
        bias: nn.Parameter | None,
        division: Division = WHOLE,
    ) -> None:
        super().__init__()
        self._division = division
        self.in_features = in_features
        self.parts = parts
        self.format: MatrixFormat = format
        self._loaded_as: WeightFormat | None = format  # until `finish`
        self._names: tuple[str, ...] = ()
        self._register(params)
        self.bias = bias

    @property
    def params(self) -> Params:
        return [getattr(self, name) for name in self._names]

    @property
    def named_params(self) -> dict[str, nn.Parameter | None]:
        return {name: getattr(self, name) for name in self._names}

    def slots(self) -> dict[str, Slot]:
        """Every slot that a checkpoint fills, by its name below the layer: "weight:q", "bias"."""
        return self._slots_of(self.params, self.bias)

    def finish(self) -> None:
        """Let the format repack the tensors. To be called once, after all slots are filled."""
        assert self._loaded_as is not None, "finished twice"
        finished = self._loaded_as.finish(self.params, self.in_features)
        self._loaded_as = None
        if finished is not None:
            self.format, params = finished
            frozen = {
                name: None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                for name, tensor in params.items()
            }
            self._register(frozen)

    def _register(self, params: Mapping[str, nn.Parameter | None]) -> None:
        """Replace the format's tensors."""
        for name in self._names:
            del self._parameters[name]
        self._names = tuple(params)
        for name, parameter in params.items():
            self.register_parameter(name, parameter)

    def _slots_of(self, params: Params, bias: Tensor | None) -> dict[str, Slot]:
        assert self._loaded_as is not None, "the matrix is finished"
        slots = self._loaded_as.slots(self.parts, self.in_features, params)
        biases = {} if bias is None else slots_by_part("bias", self.parts, bias)
        for part in self.parts if self._division is not WHOLE else ():
            weight, name = slot_name("weight", part), slot_name("bias", part)
            slots[weight] = self._division.of_weight(part, slots[weight])
            if name in biases:
                biases[name] = self._division.of_bias(part, biases[name])
        return slots | biases


class Linear(Matrix):
    """y = x W^T + b with W [sum(parts), in_features]. params: existing tensors; None: new ones."""

    def __init__(
        self,
        in_features: int,
        parts: dict[str, int],
        bias: bool,
        format: WeightFormat,
        params: Mapping[str, nn.Parameter | None] | None = None,
        division: Division = WHOLE,
    ) -> None:
        params = format.parameters(parts, in_features) if params is None else params
        biases = empty_parameter(sum(parts.values())) if bias else None
        super().__init__(in_features, parts, format, params, biases, division)

    def forward(self, x: Tensor, first_row: int = 0) -> Tensor:
        """x [rows, inputs] -> [rows, outputs from first_row on]."""
        bias = self.bias[first_row:] if self.bias is not None and first_row else self.bias
        return self.format.product(x, self.params, bias, first_row)

    def sums(self, x: Tensor) -> Tensor:
        """x [rows, inputs] -> [rows, outputs], float32, for a layer of one output or so.

        The compiler fuses the sums of an unquantised matrix with the operation that makes x, where
        a product would be a launch of its own.
        """
        if isinstance(self.format, Plain) and self.format.multiply is linear:
            (weight,) = self.params
            assert weight is not None and self.bias is None
            return (x.unsqueeze(1).float() * weight.float()).sum(-1)
        product: Tensor = self(x)
        return product.float()

    def by_part(self, x: Tensor) -> list[Tensor]:
        """x [rows, inputs] -> [rows, outputs] of each part, views of one product where possible."""
        if isinstance(self.format, Mixed):
            return self.format.by_part(x, self.params, self.bias, self.parts)
        return list(torch.split(self(x), list(self.parts.values()), dim=-1))


class ExpertLinear(Matrix):
    """The matrices of all experts, [experts, sum(parts), in_features].

    Biases are [experts, sum(parts)]. num_unnamed: number of further experts at the end, which
    `slots` leaves out (see `SharedExpert`).
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        parts: dict[str, int],
        bias: bool,
        format: WeightFormat,
        num_unnamed: int = 0,
        division: Division = WHOLE,
    ) -> None:
        total = num_experts + num_unnamed
        params = format.parameters(parts, in_features, (total,))
        biases = empty_parameter(total, sum(parts.values())) if bias else None
        super().__init__(in_features, parts, format, params, biases, division)
        self.num_experts = num_experts

    def slots(self) -> dict[str, Slot]:
        """As `Matrix.slots`, each name prefixed by the expert's index: "3.weight:gate"."""
        found: dict[str, Slot] = {}
        for expert in range(self.num_experts):
            slots = self.slots_of_expert(expert)
            found |= {f"{expert}.{name}": slot for name, slot in slots.items()}
        return found

    def slots_of_expert(self, expert: int) -> dict[str, Slot]:
        params = [None if p is None else p[expert] for p in self.params]
        return self._slots_of(params, None if self.bias is None else self.bias[expert])


class SharedExpert(nn.Module):
    """The slots of a shared expert that is the last expert of ExpertLinear layers.

    Slots have names like "gate_up.weight:gate". The module owns no tensors.
    """

    def __init__(self, **matrices: ExpertLinear) -> None:
        super().__init__()
        self._matrices = tuple(matrices.items())  # a tuple, so that torch registers no submodules

    def slots(self) -> dict[str, Slot]:
        return {
            f"{name}.{slot}": tensors
            for name, matrix in self._matrices
            for slot, tensors in matrix.slots_of_expert(matrix.num_experts).items()
        }


class Embedding(Matrix):
    """A table [num_rows, width] of which a step looks up a row for each token.

    dtype: the dtype of the result; the table may be quantised.
    """

    def __init__(
        self, num_rows: int, width: int, format: WeightFormat, division: Division = WHOLE
    ) -> None:
        parts = {"": num_rows}
        super().__init__(width, parts, format, format.parameters(parts, width), None, division)
        self.dtype = torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, ids: Tensor) -> Tensor:
        """ids [tokens], int64 -> [tokens, width]."""
        return self.format.rows(ids, self.params, self.in_features, self.dtype)

    def slots(self) -> dict[str, Slot]:
        """The table's slot has the module's own name."""
        return {"": super().slots()["weight"]}


class Head(Linear):
    """The output head. A tied head multiplies by the embedding and owns no matrix.

    The bias is added separately, after the product has been rounded to the model's dtype.
    """

    def __init__(
        self,
        in_features: int,
        vocab_size: int,
        bias: bool,
        format: WeightFormat,
        embedding: Embedding | None = None,
        division: Division = WHOLE,
    ) -> None:
        params = None if embedding is None else embedding.named_params
        super().__init__(in_features, {"": vocab_size}, bias, format, params, division)
        # A tuple, so that torch does not register the embedding as a submodule.
        self._tied_to = () if embedding is None else (embedding,)

    @property
    def is_tied(self) -> bool:
        return bool(self._tied_to)

    def finish(self) -> None:
        """Take the embedding's tensors if tied; to be called after the embedding's `finish`."""
        if not self._tied_to:
            super().finish()
        for embedding in self._tied_to:
            self.format = embedding.format
            self._register(embedding.named_params)

    def into(self, out: Tensor | None, hidden: Tensor) -> Tensor:
        """hidden [rows, inputs] -> [rows, vocab], written to `out` if given."""
        logits = self.format.product(hidden, self.params, None, out=out)
        return logits if self.bias is None else logits.add_(self.bias)

    def slots(self) -> dict[str, Slot]:
        slots = super().slots()
        return {n: s for n, s in slots.items() if n == "bias"} if self.is_tied else slots
