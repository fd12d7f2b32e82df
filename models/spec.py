"""A model's architecture as data: frozen specs that a family file makes from a checkpoint's config.

Equal `LayerSpec`s share one compiled block. The weights' matrices and their bytes, and what each
layer keeps per token (`LayerCache`), follow from a spec without building the model.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch

from compiledllm.models.layer_cache import LayerCache, PagedKV, SharedKV, State
from compiledllm.models.matrices import Formats, MatrixSpec, Weights
from compiledllm.models.mlp_specs import MlpSpec, MoeSpec, OpaqueSpec, RouterSpec
from compiledllm.models.state_specs import StateSpec

# All that the spec of a decoder with attention takes; `state_specs` has the other mixers.
__all__ = [
    "EXPERTS",
    "NORMS_BEFORE",
    "NORMS_BEHIND",
    "AttentionSpec",
    "LayerSpec",
    "MlpSpec",
    "ModelSpec",
    "MoeSpec",
    "NormSpec",
    "OpaqueSpec",
    "RopeSpec",
    "RouterSpec",
    "TOKEN_PROJECTION",
]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding of the first `rotary_dim` dimensions of a head.

    inverse_frequencies: one per pair of dimensions, exact float32 values; () disables the rotation.
    scale: multiplies cosines and sines. interleaved: pairs are neighbouring dimensions, otherwise
    dimensions that lie rotary_dim / 2 apart. growth: (factor, length), by which queries at position
    p grow to 1 + factor * log(1 + floor(p / length)) times themselves, as temperatures of long
    contexts; only where all dimensions are rotated; None: they do not grow.
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    growth: tuple[float, int] | None = None

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inverse_frequencies)

    def __hash__(self) -> int:  # cheap, as lookups are frequent; the last frequency differs enough
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
    sliding_window: number of latest positions a token sees, itself included; 0: all.
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

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def q_rows(self) -> int:
        """Number of the projection's rows that make queries, and gates if there are any."""
        return self.q_size * (1 + self.has_gate)

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_parts(self) -> dict[str, int]:
        """Parts of the projection, with their rows."""
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
        """What the layer keeps of each token. kv_dtype: of keys and values."""
        return self.kv(kv_dtype) if self.kv_layer is None else SharedKV(self.kv_layer)

    def kv(self, dtype: torch.dtype) -> PagedKV:
        """What the layer reads of each token: its own keys and values, or those of `kv_layer`."""
        return PagedKV(self.num_kv_heads, self.head_dim, self.sliding_window, dtype)

    def weights(self, hidden_size: int) -> Weights:
        num_qkv = sum(self.qkv_parts.values())
        qkv = MatrixSpec("attn.qkv", num_qkv, hidden_size)
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


EXPERTS = "experts.moe"  # path of the experts beside a dense MLP, within a block
TOKEN_PROJECTION = "token_inputs.projection"  # path within a model

_VOCAB_MULTIPLE = 8  # rows of a rank's head, so that its logits begin on borders of 16 bytes

# Kinds of residual connection, with the number of norms before and after attention and MLP.
# pre: x += f(norm(x)). post: x += norm(f(x)). sandwich: x += norm(f(norm(x))). sums:
# x = norm(x + f(x)). parallel: attention and MLP read the same normalised input; parallel_2: each
# has a norm of its own.
NORMS_BEFORE = {"pre": 2, "post": 0, "sandwich": 2, "parallel": 1, "parallel_2": 2, "sums": 2}
NORMS_BEHIND = {"pre": 0, "post": 2, "sandwich": 2, "parallel": 0, "parallel_2": 0, "sums": 0}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder block.

    mixer: the spec of the part that mixes tokens. residual: a key of NORMS_BEFORE. residual_scale:
    multiplies the outputs of mixer and MLP before they are added to x. experts: experts beside a
    dense MLP, with four more norms: x += norm(norm(mlp) + norm(experts)). token_size: width of an
    input of the layer's own for each token, which a gate of x lets in behind the MLP; 0: none.
    has_scalar: a learned number multiplies the block's output. formats: the formats of the
    quantised matrices. num_ranks: number of processes whose outputs of mixer and MLP add up to the
    layer's, each with sizes as given here (`sharded_spec`).
    """

    hidden_size: int
    mixer: AttentionSpec | StateSpec
    mlp: MlpSpec | MoeSpec | OpaqueSpec
    norm: NormSpec
    residual: str = "pre"
    residual_scale: float = 1.0
    experts: MoeSpec | None = None
    token_size: int = 0
    has_scalar: bool = False
    formats: Formats = ()
    num_ranks: int = 1

    @property
    def weights(self) -> Weights:
        parts = [self.mlp.weights(self.hidden_size)]
        if self.experts is not None:
            parts.append(self.experts.weights(self.hidden_size, EXPERTS))
        return self._with_others(*parts)

    @property
    def weights_used(self) -> Weights:
        """The weights that one token uses."""
        parts = [self.mlp.weights_used(self.hidden_size)]
        if self.experts is not None:
            parts.append(self.experts.weights_used(self.hidden_size, EXPERTS))
        return self._with_others(*parts)

    def _with_others(self, *mlps: Weights) -> Weights:
        hidden, size = self.hidden_size, self.token_size
        num_norms = NORMS_BEFORE[self.residual] + NORMS_BEHIND[self.residual]
        num_norms += 4 * (self.experts is not None) + (size > 0)
        others = num_norms * self.norm.num_parameters(hidden) + self.has_scalar
        gate = MatrixSpec("token_input.gate", size, hidden)
        inputs = (gate, MatrixSpec("token_input.out", hidden, size)) if size else ()
        found = self.mixer.weights(hidden).plus(Weights(inputs, others), *mlps)
        return found.stored_in(self.formats)

    @property
    def num_parameters(self) -> int:
        return self.weights.num_parameters


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only language model.

    num_learned_positions: rows of a position table that is added to the embedding; position 0 is
    row `first_position`; 0: no table. embedding_scale, logit_scale: multipliers. logit_soft_cap: 0
    is none. embedding_size: width of embedding and head in models that project between them and
    the blocks; 0: hidden_size. token_vocab_size: rows of the table of the layers' own inputs (see
    `LayerSpec.token_size`). implementation: "compiledllm", or "transformers" for models that run
    as transformers' modules, with num_other_parameters that the other fields do not describe.
    formats: the formats of the quantised matrices outside the blocks. quantization: name of the
    quantisation in reports; "": none.

    dtype: the dtype of weights and activations, a name in torch: the checkpoint's until
    `with_dtypes` sets the engine's. kv_dtype: the dtype of keys and values; "": as `dtype`.
    state_dtype: the dtype of the states of Gated DeltaNet. num_ranks: number of processes that hold
    a part of this size each; vocab_size is of the whole model. part_of: the spec of the whole
    model; None: this one.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    tie_word_embeddings: bool
    max_position: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    initializer_range: float = 0.02
    num_learned_positions: int = 0
    first_position: int = 0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float = 0.0
    lm_head_bias: bool = False
    embedding_size: int = 0
    token_vocab_size: int = 0
    implementation: str = "compiledllm"
    num_other_parameters: int = 0
    formats: Formats = ()
    quantization: str = ""
    kv_dtype: str = ""
    state_dtype: str = "float32"
    num_ranks: int = 1
    part_of: ModelSpec | None = None

    def with_dtypes(
        self, dtype: str, kv_dtype: str = "", state_dtype: str = "float32"
    ) -> ModelSpec:
        """The spec of the model as it runs: in these dtypes, which determine its sizes in bytes."""
        return replace(self, dtype=dtype, kv_dtype=kv_dtype, state_dtype=state_dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def torch_kv_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.kv_dtype or self.dtype)
        return dtype

    @property
    def whole(self) -> ModelSpec:
        """The spec of the whole model, of which a rank holds a part."""
        return self.part_of or self

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and of the head in a process, with padding if they are divided."""
        if self.num_ranks == 1:
            return self.vocab_size
        return -(-self.vocab_size // (self.num_ranks * _VOCAB_MULTIPLE)) * _VOCAB_MULTIPLE

    @property
    def embedding_width(self) -> int:
        return self.embedding_size or self.hidden_size

    @property
    def distinct_layers(self) -> Counter[LayerSpec]:
        return Counter(self.layers)

    @property
    def is_quantized(self) -> bool:
        return bool(self.formats) or any(layer.formats for layer in self.layers)

    # -- weights -------------------------------------------------------------------------------

    @property
    def weights(self) -> Weights:
        """All weights. A tied output head is the embedding and does not count again."""
        matrices = [MatrixSpec("embedding", self.vocab_rows, self.embedding_width)]
        if not self.tie_word_embeddings:
            matrices.append(self._head)
        if size := self.embedding_size:
            matrices.append(MatrixSpec("project_in", self.hidden_size, size))
            matrices.append(MatrixSpec("project_out", size, self.hidden_size))
        if width := self.token_size * len(self.layers):
            matrices.append(MatrixSpec("token_inputs.table", self.token_vocab_size, width))
            matrices.append(MatrixSpec(TOKEN_PROJECTION, width, self.hidden_size))
        positions = self.num_learned_positions * self.hidden_size + self.token_size
        norm = self.final_norm.num_parameters(self.hidden_size)
        bias = self.lm_head_bias * self.vocab_rows
        ends = Weights(tuple(matrices), positions + norm + bias + self.num_other_parameters)
        return ends.stored_in(self.formats).plus(*(layer.weights for layer in self.layers))

    @property
    def weights_read(self) -> Weights:
        """The fewest weights a step reads: all blocks, the final norm and the output head.

        Of a mixture of experts only the experts of one token count, as all tokens may share them.
        """
        width = self.token_size * len(self.layers)
        inputs = (MatrixSpec(TOKEN_PROJECTION, width, self.hidden_size),) if width else ()
        ends = Weights((self._head, *inputs), self.hidden_size).stored_in(self.formats)
        return ends.plus(*(layer.weights_used for layer in self.layers))

    @property
    def _head(self) -> MatrixSpec:
        return MatrixSpec("lm_head", self.vocab_rows, self.embedding_width)

    @property
    def num_parameters(self) -> int:
        return self.weights.num_parameters

    def num_bytes(self, weights: Weights) -> int:
        """Bytes that weights of this model take in memory, each matrix in its storage format."""
        size = self.torch_dtype.itemsize
        return sum(m.num_bytes(size) for m in weights.matrices) + weights.num_others * size

    @property
    def sparsity(self) -> int:
        """The blocks' parameters divided by those that one token uses, as a power of two."""
        used = sum(layer.weights_used.num_parameters for layer in self.layers)
        return 1 << round(math.log2(sum(layer.num_parameters for layer in self.layers) / used))

    @property
    def layer_caches(self) -> tuple[LayerCache, ...]:
        """What each layer keeps of the tokens that it has seen."""
        return tuple(layer.mixer.cache(*self._cache_dtypes) for layer in self.layers)

    @property
    def _cache_dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        return self.torch_dtype, self.torch_kv_dtype, getattr(torch, self.state_dtype)

    def kv_of(self, attention: AttentionSpec) -> PagedKV:
        """What an attention layer reads of each token."""
        return attention.kv(self.torch_kv_dtype)

    @property
    def token_size(self) -> int:
        """Width of each layer's own input of a token; 0: there are none."""
        return self.layers[0].token_size

    @property
    def bytes_per_request(self) -> int:
        """Bytes that a request takes whatever its length."""
        kept = self.layer_caches
        return sum(cache.bytes_per_request for cache in kept if isinstance(cache, State))

    @property
    def attentions(self) -> tuple[AttentionSpec, ...]:
        """Of the layers that attend, in their order."""
        mixers = (layer.mixer for layer in self.layers)
        return tuple(mixer for mixer in mixers if isinstance(mixer, AttentionSpec))

    @property
    def flops_of_states(self) -> int:
        """FLOPs per token of the mixing in layers with a state; their matrices do not count."""
        mixers = (layer.mixer for layer in self.layers)
        return sum(m.flops_per_token() for m in mixers if not isinstance(m, AttentionSpec))
