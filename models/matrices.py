"""The weights of a model by matrix, as counted from its spec without building the model.

A storage format applies to a matrix; all other parameters have the model's dtype.
"""

from __future__ import annotations

from typing import NamedTuple


class Matrix(NamedTuple):
    """A weight matrix, or the `num_experts` matrices of the same shape in a layer.

    name: the module's path within a block ("attn.qkv") or within the model ("lm_head").
    """

    name: str
    num_outputs: int
    num_inputs: int
    num_experts: int = 1

    @property
    def num_parameters(self) -> int:
        return self.num_experts * self.num_outputs * self.num_inputs


class Weights(NamedTuple):
    """The weights of a part of a model. num_others: parameters of norms, biases and the like."""

    matrices: tuple[Matrix, ...] = ()
    num_others: int = 0

    @property
    def num_parameters(self) -> int:
        return sum(matrix.num_parameters for matrix in self.matrices) + self.num_others

    def plus(self, *parts: Weights) -> Weights:
        matrices = (matrix for part in (self, *parts) for matrix in part.matrices)
        return Weights(tuple(matrices), sum(part.num_others for part in (self, *parts)))
