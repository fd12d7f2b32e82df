"""The spec of attention with its rotation and norms: the mixer of most decoder blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from compiledllm.models.layer_cache import PagedKV, SharedKV
from compiledllm.models.matrices import MatrixSpec, Weights


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding of the first `rotary_dim` dimensions of a head.

    inverse_frequencies: transformers' `inv_freq`, in radians per token: one per pair of dimensions,
    exact float32 values; () disables the rotation. scale: multiplies cosines and sines.
    interleaved: pairs are neighbouring dimensions, otherwise dimensions that lie rotary_dim / 2
    apart. growth: (factor, length): queries at position p are multiplied by 1 + factor * log(1 +
    floor(p / length)), the temperature tuning of Llama 4 for long contexts; None: they are not.
    With `growth`, all dimensions of a head must be rotated, perhaps by frequencies of zero.
    first_position: the p of the first token. short_frequencies: the inverse_frequencies of engines
    for contexts of up to `original_length` tokens; (): the same for all contexts.
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    growth: tuple[float, int] | None = None
    first_position: int = 0
    short_frequencies: tuple[float, ...] = ()
    original_length: int = 0

    def for_context(self, length: int) -> RopeSpec:
        """The rotation for contexts of up to `length` tokens."""
        if not self.short_frequencies or length > self.original_length:
            return self
        return replace(self, inverse_frequencies=self.short_frequencies, short_frequencies=())

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inverse_frequencies)

    def __hash__(self) -> int:
        # Specs are hashed often, so hash one frequency only: different specs rarely share it.
        return hash((self.inverse_frequencies[-1:], self.rotary_dim, self.scale))


@dataclass(frozen=True, slots=True)
class NormSpec:
    """A normalisation layer.

    kind: "rms"; "rms_plus_one", an RMSNorm whose weight is stored minus one; "rms_unscaled", an
    RMSNorm without a weight; "layer", a LayerNorm, with a bias if `bias`; "none", the identity.
    """

    eps: float
    kind: str = "rms"
    bias: bool = False

    def num_parameters(self, size: int) -> int:
        return 0 if self.kind in ("none", "rms_unscaled") else size * (1 + self.bias)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention. `scale` multiplies the logits.

    qk_norm: normalises queries and keys before the rotation, or after the rotation if
    `norms_rotated`. qk_norm_over: "head", each head by itself with one shared weight; "heads", each
    head with its own weight; "whole", all heads together, before the rotation only.
    sliding_window: number of latest positions a token sees, itself included; 0: all. in_chunks: the
    context consists of chunks of `sliding_window` positions, and a token sees those of its own
    chunk, up to itself.
    soft_cap: limit of the logits' tanh soft cap; 0: none. has_sinks: each head has a learned logit
    that takes part in the softmax's denominator only. has_gate: the sigmoid of a projection
    multiplies each head's output; the projection's rows follow the rows of the head's query.
    v_norm: normalises each head of the values. keys_are_values: values are the projected keys, as
    they are before norm and rotation. kv_layer: the earlier layer, with the same heads and window,
    whose keys and values the layer reads, storing none; None: it stores its own. kv_replicas:
    number of ranks that hold the same key and value heads, in a tensor-parallel model.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: NormSpec | None = None
    qk_norm_over: str = "head"
    norms_rotated: bool = False
    sliding_window: int = 0
    soft_cap: float = 0.0
    has_sinks: bool = False
    has_gate: bool = False
    v_norm: NormSpec | None = None
    keys_are_values: bool = False
    kv_layer: int | None = None
    kv_replicas: int = 1
    in_chunks: bool = False

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def q_rows(self) -> int:
        """Number of the projection's rows for queries, and for gates if there are any."""
        return self.q_size * (1 + self.has_gate)

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_parts(self) -> dict[str, int]:
        """Parts of the projection -> their numbers of rows."""
        if self.kv_layer is not None:
            return {"q": self.q_rows}
        parts = {"q": self.q_rows, "k": self.kv_size}
        return parts if self.keys_are_values else parts | {"v": self.kv_size}

    def num_seen(self, num_tokens: int) -> int:
        """Number of positions that the last of `num_tokens` tokens sees, itself included."""
        return min(num_tokens, self.sliding_window or num_tokens)

    def qk_norm_shape(self, num_heads: int) -> tuple[int, ...]:
        """Shape of the weight of a qk_norm over `num_heads` heads."""
        shapes = {
            "head": (self.head_dim,),
            "heads": (num_heads, self.head_dim),
            "whole": (num_heads * self.head_dim,),
        }
        return shapes[self.qk_norm_over]

    def cache(
        self, _dtype: torch.dtype, kv_dtype: torch.dtype, _state_dtype: torch.dtype
    ) -> PagedKV | SharedKV:
        """What the layer keeps of each token. kv_dtype: dtype of keys and values."""
        return self.kv(kv_dtype) if self.kv_layer is None else SharedKV(self.kv_layer)

    def kv(self, dtype: torch.dtype) -> PagedKV:
        """What the layer reads of each token: its own keys and values, or those of `kv_layer`."""
        return PagedKV(self.num_kv_heads, self.head_dim, self.sliding_window, dtype)

    def weights(self, hidden_size: int) -> Weights:
        parts = tuple(self.qkv_parts.values())
        num_qkv = sum(parts)
        qkv = MatrixSpec("attn.qkv", num_qkv, hidden_size, parts=parts)
        out = MatrixSpec("attn.out", hidden_size, self.q_size)
        biases = self.qkv_bias * num_qkv + self.output_bias * hidden_size
        sinks = self.has_sinks * self.num_heads
        return Weights((qkv, out), biases + sinks + self._num_parameters_of_norms)

    @property
    def _num_parameters_of_norms(self) -> int:
        if self.qk_norm is None:
            return 0
        heads = (self.num_heads, self.num_kv_heads)[: 2 if self.kv_layer is None else 1]
        shapes = map(self.qk_norm_shape, heads)
        return sum(self.qk_norm.num_parameters(math.prod(shape)) for shape in shapes)
