"""A model's architecture as data: frozen specs that a family file makes from a checkpoint's config.

Equal `LayerSpec`s share one compiled block. The weights' matrices and their bytes, and what each
layer keeps per token (`LayerCache`), follow from a spec without building the model.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch

from compiledllm.models.attention_spec import AttentionSpec, NormSpec, RopeSpec
from compiledllm.models.layer_cache import LayerCache, PagedKV, State
from compiledllm.models.matrices import Formats, MatrixSpec, Weights
from compiledllm.models.mlp_specs import MlpSpec, MoeSpec, OpaqueSpec, RouterSpec
from compiledllm.models.state_specs import StateSpec

# Everything for the spec of a decoder with attention; `state_specs` has the other mixers.
__all__ = [
    "EMBEDDING",
    "EXPERTS",
    "NORMS_BEFORE",
    "NORMS_AFTER",
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
    "TOKEN_TABLE",
]

EXPERTS = "experts.moe"  # path of the experts beside a dense MLP, within a block
# Paths within a model.
EMBEDDING = "embedding"
TOKEN_TABLE = "token_inputs.table"
TOKEN_PROJECTION = "token_inputs.projection"

_VOCAB_MULTIPLE = 8  # a rank's head has a multiple of this, so that its logits are 16-byte aligned

# Kinds of residual connection -> number of norms before, and after, attention and MLP.
# pre: x += f(norm(x)). post: x += norm(f(x)). sandwich: x += norm(f(norm(x))). sums:
# x = norm(x + f(x)). parallel: attention and MLP read the same normalised input; parallel_2: each
# has a norm of its own.
NORMS_BEFORE = {"pre": 2, "post": 0, "sandwich": 2, "parallel": 1, "parallel_2": 2, "sums": 2}
NORMS_AFTER = {"pre": 0, "post": 2, "sandwich": 2, "parallel": 0, "parallel_2": 0, "sums": 0}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder block.

    mixer: the spec of the part that mixes tokens. residual: a key of NORMS_BEFORE. residual_scale:
    multiplies the outputs of mixer and MLP before they are added to x. experts: experts beside a
    dense MLP, with four more norms: x += norm(norm(mlp) + norm(experts)). token_size: width of the
    layer's own input for each token (per-layer embeddings), which is gated by x and added after the
    MLP; 0: none. has_scalar: a learned number multiplies the block's output. num_streams: number of
    residual streams; mixer and MLP compute on the first, and a learned mix updates all of them
    (`layers.altup`). laurel_rank: rank of a low-rank map beside the mixer; 0: none. More than one
    stream and a laurel_rank occur only together, with residual "sandwich". formats: the formats of
    the quantised matrices. num_ranks: number of ranks, each with the sizes given here; the outputs
    of their mixers and MLPs are summed (`sharded_spec`). defers_sum: the block leaves the sum over
    ranks after its MLP to the next block's norm, so that sum and norm are one kernel.
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
    num_streams: int = 1
    laurel_rank: int = 0
    formats: Formats = ()
    num_ranks: int = 1
    defers_sum: bool = False

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
        num_norms = NORMS_BEFORE[self.residual] + NORMS_AFTER[self.residual]
        num_norms += 4 * (self.experts is not None) + (size > 0)
        others = num_norms * self.norm.num_parameters(hidden) + self.has_scalar
        gate = MatrixSpec("token_input.gate", size, hidden)
        inputs = (gate, MatrixSpec("token_input.out", hidden, size)) if size else ()
        parts = (Weights(inputs, others), self._of_streams, *mlps)
        found = self.mixer.weights(hidden).plus(*parts)
        return found.stored_in(self.formats)

    @property
    def _of_streams(self) -> Weights:
        hidden, count, rank = self.hidden_size, self.num_streams, self.laurel_rank
        if count == 1:
            return Weights()
        matrices = (
            MatrixSpec("altup.router", count, hidden),
            MatrixSpec("laurel.left", rank, hidden),
            MatrixSpec("laurel.right", hidden, rank),
        )
        num_norms = 2 * self.norm.num_parameters(hidden)
        return Weights(matrices, num_norms + count**3 + count**2 + hidden)

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
    as transformers' modules. num_other_parameters: number of parameters that the other fields do
    not describe, in models that transformers runs. formats: the formats of the quantised matrices
    outside the blocks. quantization: name of the quantisation in reports; "": none.

    dtype: the dtype of weights and activations, a name in torch: the checkpoint's until
    `with_dtypes` sets the engine's. kv_dtype: the dtype of keys and values; "": as `dtype`.
    state_dtype: the dtype of the head states of Gated DeltaNet and Mamba-2. num_ranks: number of
    ranks, each of which holds a part of this size; vocab_size is that of the whole model. part_of:
    the spec of the whole model; None: this spec is whole.
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

    def for_context(self, length: int) -> ModelSpec:
        """The spec of the model for contexts of up to `length` tokens."""
        layers = tuple(
            replace(layer, mixer=replace(mixer, rope=mixer.rope.for_context(length)))
            if isinstance(mixer := layer.mixer, AttentionSpec)
            else layer
            for layer in self.layers
        )
        return replace(self, layers=layers)

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
    def defers_sums(self) -> bool:
        """Whether the blocks leave the sums over ranks to the next norm. All blocks do, or none."""
        return self.layers[0].defers_sum

    @property
    def is_quantized(self) -> bool:
        return bool(self.formats) or any(layer.formats for layer in self.layers)

    # -- weights -------------------------------------------------------------------------------

    @property
    def weights(self) -> Weights:
        """All weights. A tied output head is the embedding and does not count again."""
        matrices = [MatrixSpec(EMBEDDING, self.vocab_rows, self.embedding_width)]
        if not self.tie_word_embeddings:
            matrices.append(self._head)
        if size := self.embedding_size:
            matrices.append(MatrixSpec("project_in", self.hidden_size, size))
            matrices.append(MatrixSpec("project_out", size, self.hidden_size))
        if width := self.token_size * len(self.layers):
            matrices.append(MatrixSpec(TOKEN_TABLE, self.token_vocab_size, width))
            matrices.append(MatrixSpec(TOKEN_PROJECTION, width, self.hidden_size))
        matrices += self._of_streams
        positions = self.num_learned_positions * self.hidden_size + self.token_size
        norm = self.final_norm.num_parameters(self.hidden_size)
        bias = self.lm_head_bias * self.vocab_rows
        ends = Weights(tuple(matrices), positions + norm + bias + self.num_other_parameters)
        return ends.stored_in(self.formats).plus(*(layer.weights for layer in self.layers))

    @property
    def weights_read(self) -> Weights:
        """The fewest weights that a step can read: all blocks, the final norm and the output head.

        Of a mixture of experts, only the experts of one token count, as all tokens of a step may
        have the same experts.
        """
        width = self.token_size * len(self.layers)
        inputs = (MatrixSpec(TOKEN_PROJECTION, width, self.hidden_size),) if width else ()
        read = (self._head, *inputs, *self._of_streams)
        ends = Weights(read, self.hidden_size).stored_in(self.formats)
        return ends.plus(*(layer.weights_used for layer in self.layers))

    @property
    def _of_streams(self) -> list[MatrixSpec]:
        """The matrices that split the embedding into residual streams and join the streams."""
        size, others = self.hidden_size, range(self.num_streams - 1)
        paths = (f"streams.{way}.{index}" for way in ("split", "join") for index in others)
        return [MatrixSpec(path, size, size) for path in paths]

    @property
    def _head(self) -> MatrixSpec:
        name = EMBEDDING if self.tie_word_embeddings else "lm_head"
        return MatrixSpec(name, self.vocab_rows, self.embedding_width)

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
    def num_streams(self) -> int:
        """Number of residual streams of every layer."""
        return self.layers[0].num_streams

    @property
    def bytes_per_request(self) -> int:
        """Bytes of a request's states, which do not depend on the request's length."""
        kept = self.layer_caches
        return sum(cache.bytes_per_request for cache in kept if isinstance(cache, State))

    @property
    def attentions(self) -> tuple[AttentionSpec, ...]:
        """The AttentionSpecs of the layers with attention, in the order of the layers."""
        mixers = (layer.mixer for layer in self.layers)
        return tuple(mixer for mixer in mixers if isinstance(mixer, AttentionSpec))

    @property
    def flops_of_states(self) -> int:
        """FLOPs per token of the mixing in layers with a state; their matrices do not count."""
        mixers = (layer.mixer for layer in self.layers)
        return sum(m.flops_per_token() for m in mixers if not isinstance(m, AttentionSpec))
