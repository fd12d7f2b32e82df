"""What a model is, as data: frozen specs that a family file makes from a checkpoint's config.

Equal `LayerSpec`s share one compiled block. Everything countable about a model (parameters, bytes,
KV bytes per token) follows from here, without building it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched. kind: "linear" or "llama3" (the last three fields)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding of a head's first `rotary_dim` dimensions, halves rotated."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class NormSpec:
    """RMSNorm."""

    eps: float


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention. `scale` multiplies the logits.

    qk_norm: RMSNorm of each head of the queries and keys, before they are rotated.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: NormSpec | None = None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """Gated MLP: down(act(gate(x)) * up(x)), act = silu."""

    intermediate_size: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder block, pre-norm residual: x += attn(norm(x)); x += mlp(norm(x))."""

    hidden_size: int
    attn: AttentionSpec
    mlp: MlpSpec
    norm: NormSpec

    @property
    def num_parameters(self) -> int:
        h, a, m = self.hidden_size, self.attn, self.mlp
        qkv = (a.q_size + 2 * a.kv_size) * (h + a.qkv_bias)
        out = h * (a.q_size + a.output_bias)
        norms = 2 * h + (2 * a.head_dim if a.qk_norm else 0)
        gate_up = 2 * m.intermediate_size * (h + m.bias)
        down = h * (m.intermediate_size + m.bias)
        return qkv + out + gate_up + down + norms


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only language model."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    tie_word_embeddings: bool
    max_position: int
    dtype: str  # of the checkpoint: float32, float16 or bfloat16
    eos_token_ids: tuple[int, ...]
    initializer_range: float = 0.02

    @property
    def num_parameters(self) -> int:
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + sum(layer.num_parameters for layer in self.layers) + self.hidden_size

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """KV-cache bytes a token takes over all layers, for elements of `itemsize` bytes."""
        return sum(2 * layer.attn.kv_size * itemsize for layer in self.layers)

    @property
    def distinct_layers(self) -> Counter[LayerSpec]:
        return Counter(self.layers)
