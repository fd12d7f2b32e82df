"""A model's architecture as data: frozen specs that a family file makes from a checkpoint's config.

Equal `LayerSpec`s share one compiled block. Parameter counts, bytes and KV bytes per token follow
from a spec without building the model.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding of the first `rotary_dim` dimensions of a head.

    inverse_frequencies: one per pair of dimensions, exact float32 values; () disables the rotation.
    scale: multiplies cosines and sines. interleaved: pairs are neighbouring dimensions, otherwise
    dimensions that lie rotary_dim / 2 apart.
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inverse_frequencies)

    def __hash__(self) -> int:  # cheap, as lookups are frequent; the last frequency differs enough
        return hash((self.inverse_frequencies[-1:], self.rotary_dim, self.scale))


@dataclass(frozen=True, slots=True)
class NormSpec:
    """A normalisation layer.

    kind: "rms"; "rms_plus_one", an RMSNorm whose weight is stored minus one; "layer", a LayerNorm,
    with a bias if `bias`; "none", the identity.
    """

    eps: float
    kind: str = "rms"
    bias: bool = False

    def num_parameters(self, size: int) -> int:
        return 0 if self.kind == "none" else size * (1 + self.bias)


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How a quantised matrix is kept in memory.

    code: "fp8" (E4M3), "int8", "int4" or "fp4" (E2M1). group: inputs that share a scale; 0: all.
    rows: outputs that share a scale, 1 or 128. has_zeros: codes have zero points. is_permuted: the
    inputs are reordered. scale_dtype: a name in torch. online: the method by which 16-bit weights
    are quantised while loading, "" if the checkpoint stores codes.
    """

    code: str
    group: int = 0
    rows: int = 1
    has_zeros: bool = False
    is_permuted: bool = False
    scale_dtype: str = "float32"
    online: str = ""


# Formats by the matrix's path within a block ("attn.qkv") or within the model ("lm_head").
# Matrices that are not named have the model's dtype.
Formats = tuple[tuple[str, QuantSpec], ...]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention. `scale` multiplies the logits.

    qk_norm: normalises queries and keys before the rotation. qk_norm_over: "head", each head by
    itself with one shared weight; "heads", each head with its own weight; "whole", all heads
    together. sliding_window: number of latest positions a token sees, itself included; 0: all.
    soft_cap: limit of the logits' tanh soft cap; 0: none. has_sinks: each head has a learned logit
    that takes part in the softmax's denominator only.
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
    sliding_window: int = 0
    soft_cap: float = 0.0
    has_sinks: bool = False

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

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

    @property
    def num_parameters_of_norms(self) -> int:
        if self.qk_norm is None:
            return 0
        shapes = map(self.qk_norm_shape, (self.num_heads, self.num_kv_heads))
        return sum(self.qk_norm.num_parameters(math.prod(shape)) for shape in shapes)


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """down(act(gate(x)) * up(x)), or ungated down(act(up(x))). activation: a key of ACTIVATIONS."""

    intermediate_size: int
    bias: bool = False
    activation: str = "silu"
    gated: bool = True

    def num_parameters(self, hidden_size: int) -> int:
        up = (1 + self.gated) * self.intermediate_size * (hidden_size + self.bias)
        return up + hidden_size * (self.intermediate_size + self.bias)

    num_parameters_used = num_parameters


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """Mixture of experts: each token goes through `top_k` gated MLPs, weighted by a softmax.

    intermediate_size: of one expert. renormalize: the weights of the chosen experts sum to one.
    shared_size: intermediate size of a shared expert that every token uses, weighted by a sigmoid
    gate; 0: none. bias: experts and router have biases. alpha, limit: parameters of clamped
    experts, which `kernels.moe` explains.
    """

    intermediate_size: int
    num_experts: int
    top_k: int
    renormalize: bool = True
    shared_size: int = 0
    bias: bool = False
    alpha: float = 1.0
    limit: float = 0.0

    def num_parameters(self, hidden_size: int) -> int:
        return self._num_parameters(hidden_size, self.num_experts)

    def num_parameters_used(self, hidden_size: int) -> int:
        """By one token."""
        return self._num_parameters(hidden_size, self.top_k)

    def _num_parameters(self, hidden_size: int, num_experts: int) -> int:
        shared = hidden_size * (3 * self.shared_size + 1) if self.shared_size else 0
        size = self.intermediate_size
        expert = 3 * hidden_size * size + self.bias * (2 * size + hidden_size)
        router = self.num_experts * (hidden_size + self.bias)
        return router + num_experts * expert + shared


@dataclass(frozen=True, slots=True)
class OpaqueSpec:
    """The part beside attention of a block that transformers runs: counted, not described.

    total, used: all parameters, and the parameters that one token uses. intermediate_size: 0 if
    unknown.
    """

    total: int
    used: int
    intermediate_size: int = 0

    def num_parameters(self, _hidden_size: int) -> int:
        return self.total

    def num_parameters_used(self, _hidden_size: int) -> int:
        return self.used


# Kinds of residual connection, with the number of norms before and after attention and MLP.
# pre: x += f(norm(x)). post: x += norm(f(x)). sandwich: x += norm(f(norm(x))). sums:
# x = norm(x + f(x)). parallel: attention and MLP read the same normalised input; parallel_2: each
# has a norm of its own.
NORMS_BEFORE = {"pre": 2, "post": 0, "sandwich": 2, "parallel": 1, "parallel_2": 2, "sums": 2}
NORMS_BEHIND = {"pre": 0, "post": 2, "sandwich": 2, "parallel": 0, "parallel_2": 0, "sums": 0}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder block.

    residual: a key of NORMS_BEFORE. residual_scale: multiplies what attention and MLP add to x.
    formats: of the quantised matrices.
    """

    hidden_size: int
    attn: AttentionSpec
    mlp: MlpSpec | MoeSpec | OpaqueSpec
    norm: NormSpec
    residual: str = "pre"
    residual_scale: float = 1.0
    formats: Formats = ()

    @property
    def num_parameters(self) -> int:
        return self._num_parameters_beside_mlp + self.mlp.num_parameters(self.hidden_size)

    @property
    def num_parameters_used(self) -> int:
        """By one token."""
        return self._num_parameters_beside_mlp + self.mlp.num_parameters_used(self.hidden_size)

    @property
    def _num_parameters_beside_mlp(self) -> int:
        h, a = self.hidden_size, self.attn
        qkv = (a.q_size + 2 * a.kv_size) * (h + a.qkv_bias)
        out = h * (a.q_size + a.output_bias) + a.has_sinks * a.num_heads
        num_norms = NORMS_BEFORE[self.residual] + NORMS_BEHIND[self.residual]
        return qkv + out + num_norms * self.norm.num_parameters(h) + a.num_parameters_of_norms


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only language model.

    num_learned_positions: rows of a position table that is added to the embedding; position 0 is
    row `first_position`; 0: no table. embedding_scale, logit_scale: multipliers. logit_soft_cap: 0
    is none. embedding_size: width of embedding and head in models that project between them and
    the blocks; 0: hidden_size. implementation: "compiledllm", or "transformers" for models that run
    as transformers' modules, whose num_other_parameters the other fields do not describe. formats:
    of quantised matrices beside the blocks. quantization: what the weights are quantised to, for
    reports; "": nothing.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    tie_word_embeddings: bool
    max_position: int
    dtype: str  # the checkpoint's: float32, float16 or bfloat16
    eos_token_ids: tuple[int, ...]
    initializer_range: float = 0.02
    num_learned_positions: int = 0
    first_position: int = 0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float = 0.0
    lm_head_bias: bool = False
    embedding_size: int = 0
    implementation: str = "compiledllm"
    num_other_parameters: int = 0
    formats: Formats = ()
    quantization: str = ""

    @property
    def num_parameters(self) -> int:
        num_ends = 1 if self.tie_word_embeddings else 2
        tables = num_ends * self.vocab_size * self.embedding_width
        projections = 2 * self.embedding_size * self.hidden_size
        positions = self.num_learned_positions * self.hidden_size
        blocks = sum(layer.num_parameters for layer in self.layers)
        norm = self.final_norm.num_parameters(self.hidden_size)
        bias = self.lm_head_bias * self.vocab_size
        return tables + projections + positions + blocks + norm + bias + self.num_other_parameters

    @property
    def sparsity(self) -> int:
        """The blocks' parameters per parameter that a token uses, rounded to a power of two."""
        used = sum(layer.num_parameters_used for layer in self.layers)
        return 1 << round(math.log2(sum(layer.num_parameters for layer in self.layers) / used))

    @property
    def embedding_width(self) -> int:
        return self.embedding_size or self.hidden_size

    @property
    def has_windows(self) -> bool:
        return any(layer.attn.sliding_window for layer in self.layers)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """KV cache bytes of a token over all layers, for elements of `itemsize` bytes."""
        return sum(2 * layer.attn.kv_size * itemsize for layer in self.layers)

    def kv_bytes_seen(self, num_tokens: int, itemsize: int) -> int:
        """KV cache bytes that the last of `num_tokens` tokens reads, sliding windows considered."""
        return sum(
            2 * layer.attn.kv_size * itemsize * layer.attn.num_seen(num_tokens)
            for layer in self.layers
        )

    @property
    def distinct_layers(self) -> Counter[LayerSpec]:
        return Counter(self.layers)
