"""Quantised experts that a checkpoint stores in one tensor for all, taken apart expert by expert.

Tools name the tensors of such a matrix "X.experts.gate_up_proj" with "X.experts.gate_up_proj_scale"
(FBGEMM), "..._scale_inv" (transformers' FP8), "..._weight_scale" and "..._weight_scale_2"
(ModelOpt), or with a dot instead of the underscore. Here each expert's part gets the name that it
has in checkpoints with a tensor for each expert: "X.experts.3.gate_up_proj.weight_scale".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from torch import Tensor

from compiledllm.models.formats.stored import Scheme
from compiledllm.models.spec import ModelSpec, MoeSpec

_STACKED = re.compile(r"(.+\.experts)\.((?:gate_up|gate|up|down)_proj)(?:[._](\w+))?")
# Suffix of a stacked tensor's name -> suffix of the name of an expert's tensor.
_LEAVES: dict[str | None, str] = {
    None: "weight",
    "scale": "weight_scale",
    "scale_inv": "weight_scale_inv",
    "activation_scale": "input_scale",
    **{
        leaf: leaf
        for leaf in ("weight", "weight_packed", "weight_scale", "weight_scale_inv")
        + ("weight_scale_2", "weight_global_scale", "input_scale", "input_global_scale")
    },
}
_CODES = ("weight", "weight_packed")


class StackedExperts:
    """Takes apart the stacked tensors of quantised experts in one checkpoint.

    names: names of all tensors of the checkpoint. spec: the spec of the whole model. shape_of: name
    of a tensor -> its shape; not needed for the method `names`.
    """

    def __init__(
        self,
        names: Collection[str],
        scheme: Scheme,
        spec: ModelSpec,
        shape_of: Callable[[str], Sequence[int]] | None = None,
    ) -> None:
        self._scheme, self._hidden_size, self._shape_of = scheme, spec.hidden_size, shape_of
        mlps = (mlp for layer in spec.layers for mlp in (layer.mlp, layer.experts))
        self._experts = next((mlp for mlp in mlps if isinstance(mlp, MoeSpec)), None)
        found = [m for name in names if (m := _STACKED.fullmatch(name)) and m[3] in _LEAVES]
        self._scaled = {(m[1], m[2]) for m in found if _LEAVES[m[3]].startswith("weight_scale")}
        self._of_codes = [m for m in found if _LEAVES[m[3]] in _CODES]
        self._turned = {m[1] for m in found if m[3] == "scale"}  # FBGEMM's order
        self._orders: dict[str, bool] = {}

    def names(self, names: Iterable[str]) -> list[str]:
        """The names of all tensors after stacks have been taken apart."""
        return [part for name in names for part in self._names_of(name) or (name,)]

    def one_by_one(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the parts of a stack expert by expert, outputs first; other tensors unchanged."""
        for name, tensor in tensors:
            if names := self._names_of(name):
                yield from zip(names, self._parts(name, tensor), strict=True)
            else:
                yield name, tensor

    def _names_of(self, name: str) -> list[str]:
        """The names of a stack's parts; [] for a tensor that is not a quantised stack."""
        match = _STACKED.fullmatch(name)
        if match is None or (match[1], match[2]) not in self._scaled or self._experts is None:
            return []
        if match[3] not in _LEAVES or self._scheme.stored(f"{match[1]}.0.{match[2]}") is None:
            return []
        experts = range(self._experts.num_experts)
        return [f"{match[1]}.{index}.{match[2]}.{_LEAVES[match[3]]}" for index in experts]

    def _parts(self, name: str, stack: Tensor) -> list[Tensor]:
        match, moe = _STACKED.fullmatch(name), self._experts
        assert match is not None and moe is not None
        if stack.numel() == 1 or len(stack) != moe.num_experts:  # one number, or a damaged file
            return [stack] * moe.num_experts
        stored = self._scheme.stored(f"{match[1]}.0.{match[2]}")
        assert stored is not None
        num_outputs, is_turned = self._num_outputs(match[2]), self._are_inputs_first(match[1])
        if _LEAVES[match[3]] in _CODES:
            return [_outputs_first(part, num_outputs, is_turned) for part in stack]
        return [_scales(part, num_outputs, stored.spec.rows, is_turned) for part in stack]

    def _num_outputs(self, matrix: str) -> int:
        assert self._experts is not None
        size = self._experts.intermediate_size
        return {"gate_up_proj": 2 * size, "down_proj": self._hidden_size}.get(matrix, size)

    def _are_inputs_first(self, prefix: str) -> bool:
        """Whether the stacks of a layer are [experts, inputs, outputs].

        A square stack does not show its order; then the layer's other stack decides.
        """
        if prefix not in self._orders:
            assert self._shape_of is not None
            stacks = (m for m in self._of_codes if m[1] == prefix)
            shapes = ((self._num_outputs(m[2]), self._shape_of(m[0])) for m in stacks)
            told = (n != s[1] for n, s in shapes if len(s) == 3 and s[1] != s[2] and n in s[1:])
            self._orders[prefix] = next(told, prefix in self._turned)
        return self._orders[prefix]


def _outputs_first(part: Tensor, num_rows: int, is_turned: bool) -> Tensor:
    """One expert's tensor, outputs first. is_turned: whether a square tensor has inputs first."""
    if part.dim() != 2 or part.shape[0] == part.shape[1]:
        return part.t() if is_turned and part.dim() == 2 else part
    return part.t() if part.shape[0] != num_rows == part.shape[1] else part


def _scales(part: Tensor, num_outputs: int, rows: int, is_turned: bool) -> Tensor:
    """One expert's scales, outputs first. rows: number of outputs that share a scale."""
    if rows == 1 and part.shape == (2, 1):  # one for the gate, and one for up
        return part.repeat_interleave(num_outputs // 2, dim=0)
    return _outputs_first(part, -(-num_outputs // rows), is_turned)
