"""The decoder of all families: embedding, blocks, final norm and logits, built from a ModelSpec.

A block returns the residual stream `x` and `update`, the output of its last branch. The next block
adds `update` to `x`, so that the addition fuses with its norm inside the compiled block. The module
knows nothing of requests or scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiledllm.kernels.backend import AttentionBackend, AttentionMetadata, StateMetadata
from compiledllm.kernels.collectives import all_gather, all_reduce
from compiledllm.models.formats.weight_format import empty_parameter
from compiledllm.models.layer_cache import SharedKV
from compiledllm.models.layers.attention import PagedAttention
from compiledllm.models.layers.factory import Factory, Products
from compiledllm.models.layers.linear import Head
from compiledllm.models.layers.mixer import make_mixer
from compiledllm.models.layers.moe import ExpertsBesideMlp, make_mlp
from compiledllm.models.layers.rope import RotaryTable
from compiledllm.models.layers.token_input import TokenInputGate, TokenInputs
from compiledllm.models.shards import Ranks
from compiledllm.models.spec import (
    NORMS_BEFORE,
    NORMS_BEHIND,
    AttentionSpec,
    LayerSpec,
    ModelSpec,
)

BlockForward = Callable[..., tuple[Tensor, Tensor]]
# Of a layer: its KV cache with attention's metadata, or the tensors of its states with theirs.
Cache = Tensor | list[Tensor]
Metadata = AttentionMetadata | StateMetadata
Tables = list[tuple[Tensor, Tensor]]  # cos and sin of each rotary table
BlockInputs = tuple[Tensor, Tensor, Tables, Tensor | None]
# A layer, the index of its rotary table, its own input of the tokens, its cache and metadata.
LayerStep = tuple[nn.Module, int, Tensor | None, Cache, Metadata]


class SampledTokens(NamedTuple):
    """The tokens of a step whose hidden states are needed, normally the sampled tokens.

    attn: metadata for each of the last `Decoder.num_sampled_layers` layers, with one row per needed
    token over the token's whole context. The slots are padding, because the keys and values of all
    tokens are stored separately.
    """

    indices: Tensor  # int64 [samples], into the step's tokens
    attn: Sequence[AttentionMetadata]


class DecoderBlock(nn.Module):
    """x += update; x += mix(norm(x)); returns x and the next block's update = mlp(norm(x))."""

    def __init__(self, spec: LayerSpec, backend: AttentionBackend, make: Factory) -> None:
        super().__init__()
        self.spec = spec
        make = replace(make, formats=spec.formats)

        def norm(exists: bool) -> nn.Module | None:
            return make.norm(spec.norm, spec.hidden_size) if exists else None

        self.attn_norm = norm(NORMS_BEFORE[spec.residual] >= 1)
        self.attn = make_mixer(spec.hidden_size, spec.mixer, backend, make.within("attn"))
        self.attn_out_norm = norm(NORMS_BEHIND[spec.residual] >= 1)
        self.mlp_norm = norm(NORMS_BEFORE[spec.residual] >= 2)
        self.mlp = make_mlp(spec.hidden_size, spec.mlp, make.within("mlp"))
        self.experts = self.token_input = None
        if spec.experts is not None:
            make_experts = make.within("experts")
            self.experts = ExpertsBesideMlp(spec.hidden_size, spec.experts, spec.norm, make_experts)
        self.mlp_out_norm = norm(NORMS_BEHIND[spec.residual] >= 2)
        if spec.token_size:
            self.token_input = TokenInputGate(spec, make.within("token_input"))
        self.scalar = empty_parameter(1) if spec.has_scalar else None
        self.is_parallel = spec.residual.startswith("parallel")
        self.norms_sums = spec.residual == "sums"
        self.num_ranks = spec.num_ranks

    def forward(
        self,
        x: Tensor,  # [tokens, hidden]
        update: Tensor,  # [tokens, hidden]
        cos: Tensor,  # [tokens, 1, rotary_dim]
        sin: Tensor,
        token_input: Tensor | None,  # [tokens, token_size], where the spec has a token_size
        cache: Cache,
        attn: Metadata,
    ) -> tuple[Tensor, Tensor]:
        x = x + update
        if self.norms_sums:
            return self._forward_norming_sums(x, cos, sin, cache, attn)
        attn_in = mlp_in = x if self.attn_norm is None else self.attn_norm(x)
        attended = self.attn(attn_in, cos, sin, cache, attn)
        if self.is_parallel:
            mlp_in = mlp_in if self.mlp_norm is None else self.mlp_norm(x)
            update = self._over_ranks(self._scaled(self.mlp(mlp_in)) + self._scaled(attended))
            return self._with_token_input(x, update, token_input)
        x = mlp_in = x + self._scaled(self._over_ranks(attended), self.attn_out_norm)
        if self.mlp_norm is not None:
            mlp_in = self.mlp_norm(x)
        update = self.mlp(mlp_in)
        update = self._over_ranks(update) if self.experts is None else self.experts(x, update)
        return self._with_token_input(x, self._scaled(update, self.mlp_out_norm), token_input)

    def _with_token_input(
        self, x: Tensor, update: Tensor, token_input: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.token_input is not None:
            x = x + update
            update = self.token_input(x, token_input)
        if self.scalar is not None:
            x, update = x * self.scalar, update * self.scalar
        return x, update

    def store(
        self,
        x: Tensor,
        update: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Store the keys and values of all tokens, as `forward` does, and compute nothing else."""
        assert isinstance(self.attn, PagedAttention)
        x = x + update
        attn_in = x if self.attn_norm is None or self.norms_sums else self.attn_norm(x)
        self.attn.store(attn_in, cos, sin, kv_cache, slot_mapping)

    def _forward_norming_sums(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache, attn: Metadata
    ) -> tuple[Tensor, Tensor]:
        """The post-norm block: it normalises each sum, and leaves no pending residual update."""
        assert self.attn_norm is not None and self.mlp_norm is not None
        attended = self._over_ranks(self.attn(x, cos, sin, cache, attn))
        x = self.attn_norm(x + self._scaled(attended))
        x = self.mlp_norm(x + self._scaled(self._over_ranks(self.mlp(x))))
        return x, _no_update(x)

    def _over_ranks(self, part: Tensor) -> Tensor:
        """The sum of all ranks' outputs of a half of the block."""
        return all_reduce(part) if self.num_ranks > 1 else part

    def _scaled(self, out: Tensor, norm: nn.Module | None = None) -> Tensor:
        out = out if norm is None else norm(out)
        return out if self.spec.residual_scale == 1 else out * self.spec.residual_scale


class Decoder(nn.Module):
    """A decoder-only transformer on a paged KV cache.

    `block_forward` runs a block, `enter` everything before the first block, `leave` everything
    behind the last block. `compiledllm.graphs` replaces all three by compiled functions.
    takes_sampled_tokens: whether `forward` accepts `SampledTokens`. num_sampled_layers: number of
    layers that run for these tokens only: the last one that stores keys and values, and those
    behind it. products: kernels of matrix products and norms. rank: which of the spec's ranks the
    process is.
    """

    edges = "enter", "leave"

    def __init__(
        self,
        spec: ModelSpec,
        backend: AttentionBackend,
        products: Products | None = None,
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.spec = spec
        ranks = Ranks(rank, spec.num_ranks)
        self._vocab = ranks.shard_of_rows(spec.vocab_size, spec.vocab_rows)
        self.shards = {"embedding": self._vocab} if ranks.are_many else {}
        self.backend = backend
        self.num_sampled_layers = _num_behind_last_stored(spec) + 1
        last_mixers = (layer.mixer for layer in spec.layers[-self.num_sampled_layers :])
        last_attend = all(isinstance(mixer, AttentionSpec) for mixer in last_mixers)
        self.takes_sampled_tokens = backend.takes_sampled_tokens and last_attend
        self._make = make = Factory(products or Products(), spec.formats, ranks=ranks)
        self.embedding = empty_parameter(spec.vocab_rows, spec.embedding_width)
        self.lm_head = self._make_head(is_tied=spec.tie_word_embeddings)
        self.project_in = self.project_out = None
        if size := spec.embedding_size:
            self.project_in = make.linear("project_in", size, {"": spec.hidden_size})
            self.project_out = make.linear("project_out", spec.hidden_size, {"": size})
        scale = torch.tensor(spec.embedding_scale, dtype=self.embedding.dtype, device="cpu")
        self._embedding_scale = scale.item()  # rounded to the embedding's dtype
        size = spec.num_learned_positions
        self.positions = empty_parameter(size, spec.hidden_size) if size else None
        self.layers = nn.ModuleList(DecoderBlock(layer, backend, make) for layer in spec.layers)
        self._share_kv_scales()
        self.final_norm = make.norm(spec.final_norm, spec.hidden_size)
        self.token_inputs = None
        if spec.token_size:
            self.token_inputs = TokenInputs(spec, make.within("token_inputs"))
        ropes = list(dict.fromkeys(attention.rope for attention in spec.attentions))
        self.rotary = nn.ModuleList(RotaryTable(rope) for rope in ropes)
        # Layers with a state get the first table, as all blocks are called alike, and ignore it.
        self._rotary_index = [
            ropes.index(layer.mixer.rope) if isinstance(layer.mixer, AttentionSpec) else 0
            for layer in spec.layers
        ]
        self.block_forward: BlockForward = DecoderBlock.forward
        self.enter: Callable[..., BlockInputs] = _enter
        self.leave: Callable[..., Tensor] = _leave

    def forward(
        self,
        input_ids: Tensor,  # int64 [tokens]
        positions: Tensor,  # int64 [tokens]
        caches: Sequence[Cache],
        attn: Sequence[Metadata],
        sampled: SampledTokens | None = None,
    ) -> Tensor:
        """Hidden states behind the final norm, [tokens, hidden]. caches, attn: one per layer.

        With `sampled`, returns the hidden states of these tokens only, [samples, hidden]. For other
        tokens the first of the last `num_sampled_layers` blocks just stores keys and values.
        """
        x, update, tables, inputs = self.enter(self, input_ids, positions)
        layer_inputs = inputs if inputs is not None else [None] * len(self.layers)
        steps = list(zip(self.layers, self._rotary_index, layer_inputs, caches, attn, strict=True))
        if sampled is not None:
            cut = len(steps) - self.num_sampled_layers
            x, update = self._run(steps[:cut], x, update, tables)
            self._store(steps[cut], x, update, tables)
            x, update = x[sampled.indices], update[sampled.indices]
            tables = [(cos[sampled.indices], sin[sampled.indices]) for cos, sin in tables]
            steps = [
                (layer, index, None if part is None else part[sampled.indices], cache, metadata)
                for (layer, index, part, cache, _), metadata in zip(
                    steps[cut:], sampled.attn, strict=True
                )
            ]
        x, update = self._run(steps, x, update, tables)
        return self.leave(self, x, update)

    def _run(
        self, steps: list[LayerStep], x: Tensor, update: Tensor, tables: Tables
    ) -> tuple[Tensor, Tensor]:
        for layer, index, token_input, cache, metadata in steps:
            x, update = self.block_forward(
                layer, x, update, *tables[index], token_input, cache, metadata
            )
        return x, update

    def _store(self, step: LayerStep, x: Tensor, update: Tensor, tables: Tables) -> None:
        layer, index, _, cache, metadata = step
        assert isinstance(cache, Tensor) and isinstance(metadata, AttentionMetadata)
        slots = metadata.slot_mapping
        cast("DecoderBlock", layer).store(x, update, *tables[index], cache, slots)

    def _share_kv_scales(self) -> None:
        """Give layers that read other layers' keys and values the scales of these layers."""
        blocks = cast("list[DecoderBlock]", list(self.layers))
        for block in blocks:
            attention = block.attn
            if isinstance(attention, PagedAttention) and attention.spec.kv_layer is not None:
                source = blocks[attention.spec.kv_layer].attn
                assert isinstance(source, PagedAttention)
                attention.kv_scales = source.kv_scales

    @property
    def kv_scales(self) -> dict[int, Tensor]:
        """By layer that stores keys and values, their scales [2] in an FP8 cache.

        To be written in place.
        """
        mixers = (cast("DecoderBlock", layer).attn for layer in self.layers)
        return {
            index: mixer.kv_scales
            for index, mixer in enumerate(mixers)
            if isinstance(mixer, PagedAttention) and mixer.spec.kv_layer is None
        }

    def untie_head(self) -> None:
        """Give the output head an uninitialised matrix of its own, and update `spec`."""
        self.spec = replace(self.spec, tie_word_embeddings=False)
        self.lm_head = self._make_head(is_tied=False)

    def _make_head(self, is_tied: bool) -> Head:
        spec, embedding = self.spec, self.embedding if is_tied else None
        rows, bias = spec.vocab_rows, spec.lm_head_bias
        return self._make.head(spec.embedding_width, rows, bias, embedding, self._vocab)

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        if self.spec.num_ranks > 1:
            x = self._embed_over_ranks(input_ids)
        else:
            x = F.embedding(input_ids, self.embedding)
        if self._embedding_scale != 1:
            x = x * self._embedding_scale
        if self.project_in is not None:
            x = self.project_in(x)
        if self.positions is not None:
            x = x + F.embedding(positions + self.spec.first_position, self.positions)
        return x

    def _embed_over_ranks(self, input_ids: Tensor) -> Tensor:
        """Each rank looks up its own rows of the vocabulary; the others' are zero."""
        ((start, end),) = self._vocab.ranges
        is_here = (input_ids >= start) & (input_ids < end)
        rows = F.embedding(torch.where(is_here, input_ids - start, 0), self.embedding)
        return all_reduce(rows.masked_fill(~is_here.unsqueeze(-1), 0))

    def compute_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[tokens, hidden] -> [tokens, vocab], in the model's dtype; written to `out` if given."""
        spec = self.spec
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        if spec.num_ranks > 1:
            logits = self._logits_of_ranks(hidden, out)
        else:
            logits = self.lm_head.into(out, hidden)
        if spec.logit_scale != 1:
            logits.mul_(spec.logit_scale)
        if spec.logit_soft_cap:
            logits.div_(spec.logit_soft_cap).tanh_().mul_(spec.logit_soft_cap)
        return logits

    def _logits_of_ranks(self, hidden: Tensor, out: Tensor | None) -> Tensor:
        """The logits of the whole vocabulary, the same bits on every rank."""
        spec = self.spec
        parts = all_gather(self.lm_head.into(None, hidden), spec.num_ranks)  # [ranks, rows, part]
        logits = parts.transpose(0, 1).flatten(1)[:, : spec.vocab_size]
        return logits.contiguous() if out is None else out.copy_(logits)


def _enter(decoder: Decoder, input_ids: Tensor, positions: Tensor) -> BlockInputs:
    """x and update of the first block, [tokens, hidden]; cos and sin of each rotary table.

    Also the layers' own inputs, [layers, tokens, token_size]; None if they have none.
    """
    x = decoder.embed(input_ids, positions)
    tables = [rotary(positions, x.dtype) for rotary in decoder.rotary]
    inputs = None if decoder.token_inputs is None else decoder.token_inputs(input_ids, x)
    return x, _no_update(x), tables, inputs


def _leave(decoder: Decoder, x: Tensor, update: Tensor) -> Tensor:
    """Hidden states behind the final norm, [tokens, hidden], from the last block's x and update."""
    hidden: Tensor = decoder.final_norm(x + update)
    return hidden


def _no_update(x: Tensor) -> Tensor:
    """Zeros, computed by the kernel that makes x.

    `zeros_like` would take a kernel of its own. Inductor's kernels that read nothing do not wait
    for their predecessor, but later kernels rely on that wait. Inductor simplifies x * 0 to zeros.
    """
    return x.clamp(0, 0)


def _num_behind_last_stored(spec: ModelSpec) -> int:
    """Number of layers behind the last one that keeps something of the tokens it has seen."""
    keeps = [not isinstance(cache, SharedKV) for cache in spec.layer_caches]
    return keeps[::-1].index(True)
