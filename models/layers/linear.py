"""Linear layers. Several matrices of a checkpoint may be fused into one product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

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

    outputs: the rank's shard of each part. inputs: the rank's shard of the inputs; the products of
    all ranks add up to the whole, and only the first rank adds a bias.
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
    unfused layer has one part named "". params: the format's tensors. division: which part of the
    checkpoint's matrices they are; `parts` and `in_features` are sizes of that part.
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
        self._names = tuple(params)
        for name, parameter in params.items():
            self.register_parameter(name, parameter)
        self.bias = bias

    @property
    def params(self) -> Params:
        return [getattr(self, name) for name in self._names]

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
            self._names = tuple(params)
            for name, tensor in params.items():
                frozen = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                self.register_parameter(name, frozen)

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


class ExpertLinear(Matrix):
    """The matrices of all experts, [experts, sum(parts), in_features]; biases without the last.

    num_unnamed: further experts behind the others, whose slots have names elsewhere.
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
    """The slots of the expert behind the named ones, "gate_up.weight:gate". It owns no tensors."""

    def __init__(self, **matrices: ExpertLinear) -> None:
        super().__init__()
        self._matrices = tuple(matrices.items())  # which are not modules of this module

    def slots(self) -> dict[str, Slot]:
        return {
            f"{name}.{slot}": tensors
            for name, matrix in self._matrices
            for slot, tensors in matrix.slots_of_expert(matrix.num_experts).items()
        }


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
        embedding: nn.Parameter | None = None,
        division: Division = WHOLE,
    ) -> None:
        params = None if embedding is None else {"weight": embedding}
        super().__init__(in_features, {"": vocab_size}, bias, format, params, division)
        self.is_tied = embedding is not None

    def into(self, out: Tensor | None, hidden: Tensor) -> Tensor:
        """hidden [rows, inputs] -> [rows, vocab], written to `out` if given."""
        logits = self.format.product(hidden, self.params, None, out=out)
        return logits if self.bias is None else logits.add_(self.bias)

    def slots(self) -> dict[str, Slot]:
        slots = super().slots()
        return {n: s for n, s in slots.items() if n == "bias"} if self.is_tied else slots
