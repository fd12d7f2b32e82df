"""Mamba-2: a state space model whose parameters depend on the token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiledllm.kernels.backend import StateMetadata
from compiledllm.kernels.short_convolution import short_convolution
from compiledllm.kernels.state_space import state_space
from compiledllm.models.formats.weight_format import empty_parameter
from compiledllm.models.layers.factory import Factory
from compiledllm.models.state_specs import Mamba2Spec


class Mamba2(nn.Module):
    """Project, convolve, update and read the states, gate and normalise, project.

    The parameters of step sizes and decays stay float32, because the decay is an exponential of an
    exponential, which would amplify their rounding errors.
    """

    def __init__(self, hidden_size: int, spec: Mamba2Spec, make: Factory) -> None:
        super().__init__()
        self.spec = spec
        heads = spec.num_heads
        self.zxbcdt = make.linear("zxbcdt", hidden_size, spec.input_parts, spec.bias)
        self.convolution = empty_parameter(spec.conv_size, 1, spec.kernel_size)
        self.convolution_bias = empty_parameter(spec.conv_size) if spec.conv_bias else None
        self.log_decay_rate = empty_parameter(heads, dtype=torch.float32)
        self.step_bias = empty_parameter(heads, dtype=torch.float32)
        self.skip = empty_parameter(heads, dtype=torch.float32)
        self.norm = empty_parameter(spec.inner_size)
        self.out = make.linear("out", spec.inner_size, {"": hidden_size}, spec.bias)

    def forward(
        self, x: Tensor, _cos: Tensor, _sin: Tensor, states: list[Tensor], metadata: StateMetadata
    ) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]. states: see `Mamba2Spec.cache`; mutated."""
        spec, (columns, heads) = self.spec, states
        zxbc, step = self.zxbcdt.by_part(x)
        z, xbc = torch.split(zxbc, [spec.inner_size, spec.conv_size], dim=-1)
        weights = self.convolution.squeeze(1), self.convolution_bias
        others = metadata.row_bound, metadata.snapshots
        xbc = short_convolution(xbc, *weights, columns, *metadata[:3], "silu", *others)
        size = spec.num_groups * spec.state_dim
        values, b, c = torch.split(xbc, [spec.inner_size, size, size], dim=-1)
        of_heads = self.log_decay_rate, self.step_bias, self.skip
        b, c = (y.view(len(x), spec.num_groups, spec.state_dim) for y in (b, c))
        values = values.view(len(x), spec.num_heads, spec.head_dim)
        out = state_space(values, b, c, step, *of_heads, heads, *metadata)
        projected: Tensor = self.out(self._gated_norm(out.flatten(1), z))
        return projected

    def _gated_norm(self, x: Tensor, z: Tensor) -> Tensor:
        """weight * rms_norm(x * silu(z)), where each group of channels has a norm of its own."""
        gated = x.float() * F.silu(z.float())
        groups = gated.view(len(x), self.spec.num_groups, -1)
        normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.spec.eps)
        weighted: Tensor = self.norm * normed.flatten(1).to(x.dtype)
        return weighted
