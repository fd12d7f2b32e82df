"""Gated short convolution, the mixer of LFM2's layers without attention."""

from __future__ import annotations

from torch import Tensor, nn

from compiledllm.kernels.backend import StateMetadata
from compiledllm.kernels.short_convolution import short_convolution
from compiledllm.models.formats.weight_format import empty_parameter
from compiledllm.models.layers.factory import Factory
from compiledllm.models.state_specs import ConvSpec


class ShortConvolution(nn.Module):
    """out(c * convolution(b * x)), where b, c and x are projections of the input."""

    def __init__(self, hidden_size: int, spec: ConvSpec, make: Factory) -> None:
        super().__init__()
        self.spec = spec
        parts = {"": 3 * spec.width}
        division = make.by_outputs(parts, sections={"": (spec.width,) * 3})
        self.bcx = make.linear("bcx", hidden_size, parts, spec.bias, division)
        self.weight = empty_parameter(spec.width, 1, spec.kernel_size)
        self.bias = empty_parameter(spec.width) if spec.bias else None
        self.shards = dict.fromkeys(("weight", "bias"), make.ranks.shard(spec.width))
        division = make.by_inputs(spec.width)
        self.out = make.linear("out", spec.width, {"": hidden_size}, spec.bias, division)

    def forward(
        self, x: Tensor, _cos: Tensor, _sin: Tensor, states: list[Tensor], metadata: StateMetadata
    ) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]. states: see `ConvSpec.cache`; mutated."""
        (columns,) = states
        b, c, x = self.bcx(x).chunk(3, dim=-1)
        weight = self.weight.squeeze(1)
        weights, others = (weight, self.bias), (metadata.row_bound, metadata.snapshots)
        mixed = short_convolution(b * x, *weights, columns, *metadata[:3], "none", *others)
        out: Tensor = self.out(c * mixed)
        return out
