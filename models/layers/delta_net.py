"""Gated DeltaNet: linear attention over a state of fixed size for each request."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compiledllm.kernels.backend import StateMetadata
from compiledllm.kernels.delta_rule import gated_delta_rule
from compiledllm.kernels.gated_norm import gated_rms_norm
from compiledllm.kernels.short_convolution import short_convolution
from compiledllm.models.formats.weight_format import empty_parameter
from compiledllm.models.layers.factory import Factory
from compiledllm.models.state_specs import DeltaNetSpec


class DeltaNet(nn.Module):
    """Project, convolve, update and read the states, normalise and gate each head, project.

    The decay rate and the bias of the time step stay float32, because the decay is an exponential
    of an exponential, which would amplify their rounding errors.
    """

    def __init__(self, hidden_size: int, spec: DeltaNetSpec, make: Factory) -> None:
        super().__init__()
        self.spec = spec
        heads = spec.num_value_heads
        qkv = spec.key_size, spec.key_size, spec.value_size
        division = make.by_outputs(spec.input_parts, sections={"qkv": qkv})
        self.qkvzba = make.linear("qkvzba", hidden_size, spec.input_parts, division=division)
        self.convolution = empty_parameter(spec.qkv_size, 1, spec.kernel_size)
        self.log_decay_rate = empty_parameter(heads, dtype=torch.float32)
        self.step_bias = empty_parameter(heads, dtype=torch.float32)
        self.norm = empty_parameter(spec.value_dim)
        self.shards = dict.fromkeys(("log_decay_rate", "step_bias"), make.ranks.shard(heads))
        self.shards["convolution"] = make.ranks.shard(*qkv)
        division = make.by_inputs(spec.value_size)
        self.out = make.linear("out", spec.value_size, {"": hidden_size}, division=division)

    def forward(
        self, x: Tensor, _cos: Tensor, _sin: Tensor, states: list[Tensor], metadata: StateMetadata
    ) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]. states: see `DeltaNetSpec.cache`; mutated."""
        spec, (columns, heads) = self.spec, states
        qkv, z, b, a = self._project(x)
        weight = self.convolution.squeeze(1)
        others = metadata.row_bound, metadata.snapshots
        qkv = short_convolution(qkv, weight, None, columns, *metadata[:3], "silu", *others)
        q, k, v = torch.split(qkv, [spec.key_size, spec.key_size, spec.value_size], dim=-1)
        q, k, v = _heads(q, spec.key_dim), _heads(k, spec.key_dim), _heads(v, spec.value_dim)
        gates = a, b, self.log_decay_rate, self.step_bias
        out = gated_delta_rule(q, k, v, *gates, heads, *metadata)
        gated = gated_rms_norm(out, z, self.norm, spec.eps)
        projected: Tensor = self.out(gated.flatten(1))
        return projected

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """qkv [tokens, qkv_size], z [tokens, heads, value_dim], and b and a [tokens, heads]."""
        spec, products = self.spec, self.qkvzba.by_part(x)
        if not spec.is_grouped:
            qkv, z, b, a = products
            return qkv, _heads(z, spec.value_dim), b, a
        qkvz, ba = products
        values = spec.value_size // spec.num_key_heads  # size of the value heads of one key head
        parts = [spec.key_dim, spec.key_dim, values, values]
        q, k, v, z = torch.split(_heads(qkvz, sum(parts)), parts, dim=-1)
        b, a = _heads(ba, 2 * spec.num_value_heads // spec.num_key_heads).chunk(2, dim=-1)
        qkv = torch.cat([part.flatten(1) for part in (q, k, v)], dim=-1)
        return qkv, _heads(z.flatten(1), spec.value_dim), b.flatten(1), a.flatten(1)


def _heads(x: Tensor, size: int) -> Tensor:
    """[tokens, heads * size] -> [tokens, heads, size]."""
    return x.view(x.shape[0], -1, size)
