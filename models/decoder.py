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
from compiledllm.models.formats.weight_format import empty_parameter
from compiledllm.models.layers.attention import PagedAttention
from compiledllm.models.layers.factory import Factory, Products
from compiledllm.models.layers.linear import Head
from compiledllm.models.layers.mixer import make_mixer
from compiledllm.models.layers.moe import make_mlp
from compiledllm.models.layers.rope import RotaryTable
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
BlockInputs = tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]


class SampledTokens(NamedTuple):
    """The tokens of a step whose hidden states are needed, normally the sampled tokens.

    attn: metadata for the last layer, with one row per needed token over the token's whole context.
    The slots are padding, because the keys and values of all tokens are stored separately.
    """

    indices: Tensor  # int64 [samples], into the step's tokens
    attn: AttentionMetadata


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
        self.mlp_out_norm = norm(NORMS_BEHIND[spec.residual] >= 2)
        self.is_parallel = spec.residual.startswith("parallel")
        self.norms_sums = spec.residual == "sums"

    def forward(
        self,
        x: Tensor,  # [tokens, hidden]
        update: Tensor,  # [tokens, hidden]
        cos: Tensor,  # [tokens, 1, rotary_dim]
        sin: Tensor,
        cache: Cache,
        attn: Metadata,
    ) -> tuple[Tensor, Tensor]:
        x = x + update
        if self.norms_sums:
            return self._forward_norming_sums(x, cos, sin, cache, attn)
        attn_in = mlp_in = x if self.attn_norm is None else self.attn_norm(x)
        attended = self._scaled(self.attn(attn_in, cos, sin, cache, attn), self.attn_out_norm)
        if not self.is_parallel:
            x = mlp_in = x + attended
        if self.mlp_norm is not None:
            mlp_in = self.mlp_norm(x)
        update = self._scaled(self.mlp(mlp_in), self.mlp_out_norm)
        return x, update + attended if self.is_parallel else update

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
        x = self.attn_norm(x + self._scaled(self.attn(x, cos, sin, cache, attn), None))
        x = self.mlp_norm(x + self._scaled(self.mlp(x), None))
        return x, _no_update(x)

    def _scaled(self, out: Tensor, norm: nn.Module | None) -> Tensor:
        out = out if norm is None else norm(out)
        return out if self.spec.residual_scale == 1 else out * self.spec.residual_scale


class Decoder(nn.Module):
    """A decoder-only transformer on a paged KV cache.

    `block_forward` runs a block, `enter` everything before the first block, `leave` everything
    behind the last block. `compiledllm.graphs` replaces all three by compiled functions.
    takes_sampled_tokens: whether `forward` accepts `SampledTokens`. products: kernels of matrix
    products and norms.
    """

    edges = "enter", "leave"

    def __init__(
        self, spec: ModelSpec, backend: AttentionBackend, products: Products | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backend = backend
        last_attends = isinstance(spec.layers[-1].mixer, AttentionSpec)
        self.takes_sampled_tokens = backend.takes_sampled_tokens and last_attends
        self._make = make = Factory(products or Products(), spec.formats)
        self.embedding = empty_parameter(spec.vocab_size, spec.embedding_width)
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
        self.final_norm = make.norm(spec.final_norm, spec.hidden_size)
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
        tokens the last block just stores keys and values.
        """
        x, update, tables = self.enter(self, input_ids, positions)
        *body, last = zip(self.layers, self._rotary_index, caches, attn, strict=True)
        for layer, index, cache, metadata in body:
            x, update = self.block_forward(layer, x, update, *tables[index], cache, metadata)
        layer, index, cache, metadata = last
        cos, sin = tables[index]
        if sampled is not None:
            assert isinstance(cache, Tensor) and isinstance(metadata, AttentionMetadata)
            cast("DecoderBlock", layer).store(x, update, cos, sin, cache, metadata.slot_mapping)
            x, update, cos, sin = (part[sampled.indices] for part in (x, update, cos, sin))
            metadata = sampled.attn
        x, update = self.block_forward(layer, x, update, cos, sin, cache, metadata)
        return self.leave(self, x, update)

    @property
    def kv_scales(self) -> dict[int, Tensor]:
        """By layer, the scales [2] of keys and values in an FP8 cache; to be written in place."""
        mixers = (cast("DecoderBlock", layer).attn for layer in self.layers)
        return {
            index: mixer.kv_scales
            for index, mixer in enumerate(mixers)
            if isinstance(mixer, PagedAttention)
        }

    def untie_head(self) -> None:
        """Give the output head an uninitialised matrix of its own, and update `spec`."""
        self.spec = replace(self.spec, tie_word_embeddings=False)
        self.lm_head = self._make_head(is_tied=False)

    def _make_head(self, is_tied: bool) -> Head:
        spec, embedding = self.spec, self.embedding if is_tied else None
        return self._make.head(spec.embedding_width, spec.vocab_size, spec.lm_head_bias, embedding)

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(input_ids, self.embedding)
        if self._embedding_scale != 1:
            x = x * self._embedding_scale
        if self.project_in is not None:
            x = self.project_in(x)
        if self.positions is not None:
            x = x + F.embedding(positions + self.spec.first_position, self.positions)
        return x

    def compute_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[tokens, hidden] -> [tokens, vocab], in the model's dtype; written to `out` if given."""
        spec = self.spec
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        logits = self.lm_head.into(out, hidden)
        if spec.logit_scale != 1:
            logits.mul_(spec.logit_scale)
        if spec.logit_soft_cap:
            logits.div_(spec.logit_soft_cap).tanh_().mul_(spec.logit_soft_cap)
        return logits


def _enter(decoder: Decoder, input_ids: Tensor, positions: Tensor) -> BlockInputs:
    """x and update of the first block, [tokens, hidden]; cos and sin of each rotary table."""
    x = decoder.embed(input_ids, positions)
    return x, _no_update(x), [rotary(positions, x.dtype) for rotary in decoder.rotary]


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
