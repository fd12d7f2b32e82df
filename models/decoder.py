"""The decoder of all families: embedding, blocks, final norm and logits, built from a ModelSpec.

The module knows nothing of requests or scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiledllm.kernels.backend import AttentionBackend, AttentionMetadata
from compiledllm.kernels.collectives import all_reduce, gather_columns
from compiledllm.kernels.decode_step import DecodeStep
from compiledllm.models.formats.weight_format import empty_parameter
from compiledllm.models.layer_cache import SharedKV
from compiledllm.models.layers.altup import Streams, make_block
from compiledllm.models.layers.attention import PagedAttention
from compiledllm.models.layers.block import Cache, DecoderBlock, Metadata, no_update
from compiledllm.models.layers.factory import Factory, Products
from compiledllm.models.layers.linear import Head
from compiledllm.models.layers.norm import RMSNorm
from compiledllm.models.layers.rope import RotaryTable
from compiledllm.models.layers.token_input import TokenInputs
from compiledllm.models.shards import Ranks
from compiledllm.models.spec import AttentionSpec, ModelSpec

BlockForward = Callable[..., tuple[Tensor, Tensor]]
Tables = list[tuple[Tensor, Tensor]]  # cos and sin of each rotary table
BlockInputs = tuple[Tensor, Tensor, Tables, Tensor | None]
# A layer, the index of its rotary table, its per-layer token input, its cache and its metadata.
LayerStep = tuple[nn.Module, int, Tensor | None, Cache, Metadata]


class SampledTokens(NamedTuple):
    """The tokens of a step whose hidden states are needed, normally the sampled tokens.

    attn: metadata for each of the last `Decoder.num_sampled_layers` layers, with one row per needed
    token over the token's whole context. The slots are padding, because the keys and values of all
    tokens are stored separately.
    """

    indices: Tensor  # int64 [samples], into the step's tokens
    attn: Sequence[AttentionMetadata]


class Decoder(nn.Module):
    """A decoder-only transformer on a paged KV cache.

    `block_forward` runs a block, `enter` everything before the first block, `leave` everything
    after the last block. `compiledllm.graphs` replaces all three by compiled functions.
    decode_step: runs all blocks of the small decode steps that it accepts; None: blocks always run
    one by one. takes_sampled_tokens: whether `forward` accepts `SampledTokens`. num_sampled_layers:
    number of layers that run for these tokens only: the last layer that stores keys and values, and
    all layers after it. products: the kernels for matrix products and norms. rank: the rank of this
    process, below `spec.num_ranks`.
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
        self.backend = backend
        self.num_sampled_layers = _num_after_last_stored(spec) + 1
        last_mixers = (layer.mixer for layer in spec.layers[-self.num_sampled_layers :])
        last_attend = all(isinstance(mixer, AttentionSpec) for mixer in last_mixers)
        self.takes_sampled_tokens = backend.takes_sampled_tokens and last_attend
        self._make = make = Factory(products or Products(), spec.formats, ranks=ranks)
        self.embedding = make.embedding(
            "embedding", spec.vocab_rows, spec.embedding_width, self._vocab
        )
        self.lm_head = self._make_head(is_tied=spec.tie_word_embeddings)
        self.project_in = self.project_out = None
        if size := spec.embedding_size:
            self.project_in = make.linear("project_in", size, {"": spec.hidden_size})
            self.project_out = make.linear("project_out", spec.hidden_size, {"": size})
        scale = torch.tensor(spec.embedding_scale, dtype=self.embedding.dtype, device="cpu")
        self._embedding_scale = scale.item()  # rounded to the embedding's dtype
        size = spec.num_learned_positions
        self.positions = empty_parameter(size, spec.hidden_size) if size else None
        self.layers = nn.ModuleList(make_block(layer, backend, make) for layer in spec.layers)
        self._share_kv_scales()
        self.final_norm = make.norm(spec.final_norm, spec.hidden_size)
        self.token_inputs = None
        if spec.token_size:
            self.token_inputs = TokenInputs(spec, make.within("token_inputs"))
        self.streams = Streams(spec, make.within("streams")) if spec.num_streams > 1 else None
        ropes = list(dict.fromkeys(attention.rope for attention in spec.attentions))
        self.rotary = nn.ModuleList(RotaryTable(rope) for rope in ropes)
        # All blocks have the same arguments. Layers with a state get the first table and ignore it.
        self._rotary_index = [
            ropes.index(layer.mixer.rope) if isinstance(layer.mixer, AttentionSpec) else 0
            for layer in spec.layers
        ]
        self.block_forward: BlockForward = type(self.layers[0]).forward
        self.enter: Callable[..., BlockInputs] = _enter
        self.leave: Callable[..., Tensor] = _leave
        self.decode_step: DecodeStep | None = None

    def forward(
        self,
        input_ids: Tensor,  # int64 [tokens]
        positions: Tensor,  # int64 [tokens]
        caches: Sequence[Cache],
        attn: Sequence[Metadata],
        sampled: SampledTokens | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [tokens, hidden]. caches, attn: one per layer.

        With `sampled`, returns the hidden states of these tokens only, [samples, hidden]. For all
        other tokens, the first of the last `num_sampled_layers` blocks just stores keys and values,
        and the blocks after it do not run.
        """
        x, update, tables, inputs = self.enter(self, input_ids, positions)
        first = attn[0]
        if self.decode_step is not None and self.decode_step.takes(first):
            x, update = self.decode_step(x, *tables[0], first)
            return self.leave(self, x, update)
        layer_inputs = [None] * len(self.layers) if inputs is None else list(inputs)
        steps = list(zip(self.layers, self._rotary_index, layer_inputs, caches, attn, strict=True))
        if sampled is not None:
            cut = len(steps) - self.num_sampled_layers
            x, update = self._run(steps[:cut], x, update, tables)
            self._store(steps[cut], x, update, tables)
            x, update = x[sampled.indices], update[sampled.indices]
            tables = [(cos[sampled.indices], sin[sampled.indices]) for cos, sin in tables]
            if inputs is not None:
                # Index the inputs of all layers, not only of the last ones: compiled code expects
                # a layer's input at an offset in a larger tensor, as in a step without `sampled`.
                layer_inputs = list(inputs[:, sampled.indices])
            parts = zip(steps[cut:], layer_inputs[cut:], sampled.attn, strict=True)
            steps = [
                (layer, index, part, cache, metadata)
                for (layer, index, _, cache, _), part, metadata in parts
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
        """Give each layer that reads another layer's keys and values the other layer's scales."""
        blocks = cast("list[DecoderBlock]", list(self.layers))
        for block in blocks:
            attention = block.attn
            if isinstance(attention, PagedAttention) and attention.spec.kv_layer is not None:
                source = blocks[attention.spec.kv_layer].attn
                assert isinstance(source, PagedAttention)
                attention.kv_scales = source.kv_scales

    @property
    def kv_scales(self) -> dict[int, Tensor]:
        """Index of each layer that stores keys and values -> their scales in an FP8 cache, [2].

        The engine writes the scales in place.
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
            x = self.embedding(input_ids)
        if self._embedding_scale != 1:
            x = x * self._embedding_scale
        if self.project_in is not None:
            x = self.project_in(x)
        if self.positions is not None:
            x = x + F.embedding(positions + self.spec.first_position, self.positions)
        return x

    def _embed_over_ranks(self, input_ids: Tensor) -> Tensor:
        """The embedding of the tokens, of which each rank looks up its own part of the vocabulary.

        Returns the rank's summand, which is zero for other ranks' tokens, if the model defers sums.
        """
        ((start, end),) = self._vocab.ranges
        is_here = (input_ids >= start) & (input_ids < end)
        rows = self.embedding(torch.where(is_here, input_ids - start, 0))
        part = rows.masked_fill(~is_here.unsqueeze(-1), 0)
        return part if self.spec.defers_sums else all_reduce(part)

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
        part, size = self.lm_head.into(None, hidden), self.spec.vocab_size
        is_padded = size < part.shape[1] * self.spec.num_ranks
        logits = gather_columns(part, None if is_padded else out)
        if not is_padded:
            return logits
        logits = logits[:, :size]
        return logits.contiguous() if out is None else out.copy_(logits)


def _enter(decoder: Decoder, input_ids: Tensor, positions: Tensor) -> BlockInputs:
    """The inputs of the blocks: x, update, the rotary tables, and the per-layer token inputs.

    x and update of the first block: [tokens, hidden]; with several residual streams, x is [tokens,
    streams, hidden]. Rotary tables: cos and sin of each distinct RopeSpec. Per-layer token inputs:
    [layers, tokens, token_size]; None if the model has none.
    """
    x = decoder.embed(input_ids, positions)
    tables = [rotary(positions, x.dtype) for rotary in decoder.rotary]
    inputs = None if decoder.token_inputs is None else decoder.token_inputs(input_ids, x)
    update = no_update(x)
    if decoder.spec.defers_sums:
        return update, x, tables, inputs  # the first block sums the embedding over ranks
    return x if decoder.streams is None else decoder.streams.begin(x), update, tables, inputs


def _leave(decoder: Decoder, x: Tensor, update: Tensor) -> Tensor:
    """Hidden states after the final norm, [tokens, hidden], from the last block's x and update."""
    if decoder.spec.defers_sums:
        return cast("RMSNorm", decoder.final_norm).after_sum(x, update)[1]
    x = x + update if decoder.streams is None else decoder.streams.end(x, update)
    hidden: Tensor = decoder.final_norm(x)
    return hidden


def _num_after_last_stored(spec: ModelSpec) -> int:
    """Number of layers after the last layer with a cache of its own."""
    keeps = [not isinstance(cache, SharedKV) for cache in spec.layer_caches]
    return keeps[::-1].index(True)
