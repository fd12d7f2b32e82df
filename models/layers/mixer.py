"""Makes the part of a block that mixes tokens, as its spec says."""

from __future__ import annotations

from compiledllm.kernels.backend import AttentionBackend
from compiledllm.models.layers.attention import PagedAttention
from compiledllm.models.layers.delta_net import DeltaNet
from compiledllm.models.layers.factory import Factory
from compiledllm.models.layers.mamba2 import Mamba2
from compiledllm.models.layers.short_convolution import ShortConvolution
from compiledllm.models.spec import AttentionSpec
from compiledllm.models.state_specs import DeltaNetSpec, Mamba2Spec, StateSpec


def make_mixer(
    hidden_size: int, spec: AttentionSpec | StateSpec, backend: AttentionBackend, make: Factory
) -> PagedAttention | DeltaNet | Mamba2 | ShortConvolution:
    """A module (x, cos, sin, cache, metadata) -> [tokens, hidden]; x: [tokens, hidden]."""
    if isinstance(spec, AttentionSpec):
        return PagedAttention(hidden_size, spec, backend, make)
    if isinstance(spec, DeltaNetSpec):
        return DeltaNet(hidden_size, spec, make)
    if isinstance(spec, Mamba2Spec):
        return Mamba2(hidden_size, spec, make)
    return ShortConvolution(hidden_size, spec, make)
