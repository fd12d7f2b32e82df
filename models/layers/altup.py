"""Alternating updates (AltUp): several residual streams, of which a block computes on the first.

Between the blocks, x is [tokens, streams, hidden]. Each block predicts the streams by a learned mix
of the streams, runs mixer and MLP on the first stream, and corrects all streams by the difference
between the result and the prediction. A low-rank map (LAuReL) runs beside the mixer. Gemma 3n has
such blocks.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from compiledllm.kernels.backend import AttentionBackend
from compiledllm.models.formats.weight_format import empty_parameter
from compiledllm.models.layers.attention import PagedAttention
from compiledllm.models.layers.block import Cache, DecoderBlock, Metadata
from compiledllm.models.layers.factory import Factory
from compiledllm.models.spec import LayerSpec, ModelSpec

_MIN_MEAN_SQUARE = 1e-5


class Streams(nn.Module):
    """Makes the streams from the embedding, and one hidden state from the streams at the end."""

    def __init__(self, spec: ModelSpec, make: Factory) -> None:
        super().__init__()
        size, others = spec.hidden_size, range(spec.num_streams - 1)
        self.split, self.join = (
            nn.ModuleList(make.linear(f"{way}.{index}", size, {"": size}) for index in others)
            for way in ("split", "join")
        )

    def begin(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, streams, hidden]."""
        others = (_as_large_as(x, project(x)) for project in self.split)
        return torch.stack((x, *others), dim=1)

    def end(self, x: Tensor, update: Tensor) -> Tensor:
        """[tokens, streams, hidden], [tokens, hidden] -> [tokens, hidden]."""
        first, *others = _with_update(x, update).unbind(1)
        projected = (
            project(part.contiguous()) for project, part in zip(self.join, others, strict=True)
        )
        return torch.stack((first, *(_as_large_as(first, part) for part in projected))).mean(0)


def _as_large_as(x: Tensor, part: Tensor) -> Tensor:
    """`part` with the root mean square of x."""
    size = x.square().mean(-1, keepdim=True).sqrt()
    return part * size / part.square().mean(-1, keepdim=True).clamp(min=_MIN_MEAN_SQUARE).sqrt()


def _with_update(x: Tensor, update: Tensor) -> Tensor:
    """The streams, after the last block's pending addition to all but the first."""
    return torch.cat((x[:, :1], x[:, 1:] + update.unsqueeze(1)), dim=1)


class AltUp(nn.Module):
    """Predicts the streams before a block, and corrects them after the block."""

    def __init__(self, spec: LayerSpec, make: Factory) -> None:
        super().__init__()
        hidden, count = spec.hidden_size, spec.num_streams
        self.router_norm = make.norm(spec.norm, hidden)
        self.router = make.linear("router", hidden, {"": count})
        self.prediction = empty_parameter(count * count, count)
        self.correction = empty_parameter(count, count)
        self.scale = empty_parameter(hidden)
        self.router_scale = hidden**-1.0

    def predict(self, x: Tensor) -> Tensor:
        """x, the result: [tokens, streams, hidden]."""
        count = x.shape[1]
        mix = _small_product(self._modes(x[:, 0]), self.prediction).view(-1, count, count)
        return x + (mix.unsqueeze(-1) * x.unsqueeze(1)).sum(2)

    def correct(self, predicted: Tensor, out: Tensor) -> Tensor:
        """predicted, the result: [tokens, streams, hidden].

        out: the block's output, [tokens, hidden].
        """
        shares = _small_product(self._modes(out), self.correction) + 1
        return predicted + (out - predicted[:, 0]).unsqueeze(1) * shares.unsqueeze(-1)

    def _modes(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, streams]."""
        routed: Tensor = self.router(self.router_norm(x) * self.router_scale)
        return routed.float().tanh().to(x.dtype)


def _small_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [tokens, few], weight [outputs, few] -> [tokens, outputs], which the compiler can fuse."""
    return (x.unsqueeze(1) * weight).sum(-1)


class Laurel(nn.Module):
    """x + norm(right(left(x))), [tokens, hidden]."""

    def __init__(self, spec: LayerSpec, make: Factory) -> None:
        super().__init__()
        hidden, rank = spec.hidden_size, spec.laurel_rank
        self.left = make.linear("left", hidden, {"": rank})
        self.right = make.linear("right", rank, {"": hidden})
        self.norm = make.norm(spec.norm, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.norm(self.right(self.left(x)))
        return out


class AltUpBlock(DecoderBlock):
    """A block on several residual streams.

    Returns the streams, and the update that the next block adds to all streams but the first. x,
    the first result: [tokens, streams, hidden]. update, the second result: [tokens, hidden].
    """

    def __init__(self, spec: LayerSpec, backend: AttentionBackend, make: Factory) -> None:
        super().__init__(spec, backend, make)
        assert spec.residual == "sandwich" and spec.laurel_rank and spec.experts is None, spec
        make = replace(make, formats=spec.formats)
        self.altup = AltUp(spec, make.within("altup"))
        self.laurel = Laurel(spec, make.within("laurel"))

    def forward(
        self,
        x: Tensor,
        update: Tensor,
        cos: Tensor,
        sin: Tensor,
        token_input: Tensor | None,
        cache: Cache,
        attn: Metadata,
    ) -> tuple[Tensor, Tensor]:
        assert self.attn_norm is not None and self.mlp_norm is not None
        assert self.token_input is not None
        predicted = self.altup.predict(_with_update(x, update))
        active = predicted[:, 0]
        attn_in = self.attn_norm(active)
        attended = self._scaled(
            self._over_ranks(self.attn(attn_in, cos, sin, cache, attn)), self.attn_out_norm
        )
        middle = (active + attended + self.laurel(attn_in)) * 2**-0.5
        out = middle + self._scaled(
            self._over_ranks(self.mlp(self.mlp_norm(middle))), self.mlp_out_norm
        )
        corrected = self.altup.correct(predicted, out)
        return corrected, self.token_input(corrected[:, 0] * self.altup.scale, token_input)

    def store(
        self,
        x: Tensor,
        update: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """As `DecoderBlock.store`."""
        assert isinstance(self.attn, PagedAttention) and self.attn_norm is not None
        active = self.altup.predict(_with_update(x, update))[:, 0]
        self.attn.store(self.attn_norm(active), cos, sin, kv_cache, slot_mapping)


def make_block(spec: LayerSpec, backend: AttentionBackend, make: Factory) -> DecoderBlock:
    return (AltUpBlock if spec.num_streams > 1 else DecoderBlock)(spec, backend, make)
