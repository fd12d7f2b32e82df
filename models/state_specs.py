"""Specs of mixers that keep a state of fixed size for each request instead of keys and values.

Like `AttentionSpec`, each spec describes how a block mixes tokens, the mixer's weights, and what
the layer keeps of the tokens that it has seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compiledllm.models.layer_cache import State
from compiledllm.models.matrices import MatrixSpec, Weights


@dataclass(frozen=True, slots=True)
class DeltaNetSpec:
    """Gated DeltaNet: linear attention whose state the gated delta rule updates.

    Queries, keys and values go through a causal convolution over the last `kernel_size` tokens.
    Each of `num_value_heads` heads has a state [key_dim, value_dim]; consecutive value heads share
    a key head. eps: eps of the gated RMSNorm on each head's output. is_grouped: the rows of the
    projections are ordered by key head (Qwen3-Next), otherwise by part.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel_size: int
    eps: float
    is_grouped: bool = False

    @property
    def key_size(self) -> int:
        return self.num_key_heads * self.key_dim

    @property
    def value_size(self) -> int:
        return self.num_value_heads * self.value_dim

    @property
    def qkv_size(self) -> int:
        """Number of channels of the convolution."""
        return 2 * self.key_size + self.value_size

    @property
    def input_parts(self) -> dict[str, int]:
        """Parts of the projection: queries, keys and values; z, the output's gate; b and a.

        Beta follows from b, and the decay from a.
        """
        heads = self.num_value_heads
        if self.is_grouped:
            return {"qkvz": self.qkv_size + self.value_size, "ba": 2 * heads}
        return {"qkv": self.qkv_size, "z": self.value_size, "b": heads, "a": heads}

    def cache(self, dtype: torch.dtype, _kv_dtype: torch.dtype, state_dtype: torch.dtype) -> State:
        """What the layer keeps of a request: the convolution's last inputs, and the states."""
        heads = self.num_value_heads, self.key_dim, self.value_dim
        columns = self.qkv_size, self.kernel_size - 1
        return State(((columns, dtype), (heads, state_dtype)))

    def weights(self, hidden_size: int) -> Weights:
        parts = tuple(self.input_parts.values())
        matrices = (
            MatrixSpec("attn.qkvzba", sum(parts), hidden_size, parts=parts),
            MatrixSpec("attn.out", hidden_size, self.value_size),
        )
        num_convolution = self.qkv_size * self.kernel_size
        return Weights(matrices, num_convolution + 2 * self.num_value_heads + self.value_dim)

    def flops_per_token(self) -> int:
        """FLOPs of the delta rule: decay, prediction, update and output of each head's state."""
        return 8 * self.num_value_heads * self.key_dim * self.value_dim


@dataclass(frozen=True, slots=True)
class ConvSpec:
    """Gated short convolution (LFM2): out(c * convolution(b * x)); b, c and x are projections."""

    kernel_size: int
    width: int
    bias: bool = False

    def cache(self, dtype: torch.dtype, _kv_dtype: torch.dtype, _state_dtype: torch.dtype) -> State:
        """What the layer keeps of a request: the convolution's last inputs."""
        return State((((self.width, self.kernel_size - 1), dtype),))

    def weights(self, hidden_size: int) -> Weights:
        matrices = (
            MatrixSpec("attn.bcx", 3 * self.width, hidden_size),
            MatrixSpec("attn.out", hidden_size, self.width),
        )
        biases = 4 * self.width + hidden_size
        return Weights(matrices, self.width * self.kernel_size + self.bias * biases)

    def flops_per_token(self) -> int:
        """FLOPs of the convolution."""
        return 2 * self.width * self.kernel_size


@dataclass(frozen=True, slots=True)
class Mamba2Spec:
    """Mamba-2: a state space model whose step sizes, b and c depend on the token.

    Values, b and c go through a causal convolution over the last `kernel_size` tokens. Each of
    `num_heads` heads has a state [state_dim, head_dim]. The consecutive heads of a group share b
    and c. A gated RMSNorm with `eps` normalises the outputs over each group's channels. bias:
    whether the projections have biases.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_dim: int
    kernel_size: int
    eps: float
    conv_bias: bool = True
    bias: bool = False

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """Number of channels of the convolution."""
        return self.inner_size + 2 * self.num_groups * self.state_dim

    @property
    def input_parts(self) -> dict[str, int]:
        """Parts of the projection: z, the output's gate, values, b and c; and the step sizes."""
        return {"zxbc": self.inner_size + self.conv_size, "dt": self.num_heads}

    def cache(self, dtype: torch.dtype, _kv_dtype: torch.dtype, state_dtype: torch.dtype) -> State:
        """What the layer keeps of a request: the convolution's last inputs, and the states."""
        heads = self.num_heads, self.state_dim, self.head_dim
        return State((((self.conv_size, self.kernel_size - 1), dtype), (heads, state_dtype)))

    def weights(self, hidden_size: int) -> Weights:
        parts = tuple(self.input_parts.values())
        num_inputs = sum(parts)
        matrices = (
            MatrixSpec("attn.zxbcdt", num_inputs, hidden_size, parts=parts),
            MatrixSpec("attn.out", hidden_size, self.inner_size),
        )
        num_convolution = self.conv_size * (self.kernel_size + self.conv_bias)
        num_others = num_convolution + 3 * self.num_heads + self.inner_size
        return Weights(matrices, num_others + self.bias * (num_inputs + hidden_size))

    def flops_per_token(self) -> int:
        """FLOPs of the recurrence: decay, update and output of each head's state."""
        return 5 * self.inner_size * self.state_dim


StateSpec = DeltaNetSpec | ConvSpec | Mamba2Spec
