"""The decoder block of all families, built from a LayerSpec.

A block returns the residual stream `x` and `update`, the output of its last branch. The next block
adds `update` to `x`, so that the addition fuses with its norm inside the compiled block. Among
several ranks, if the spec defers sums, `update` is the rank's summand: the sum is fused, too.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from compiledllm.kernels.backend import AttentionBackend, AttentionMetadata, StateMetadata
from compiledllm.kernels.collectives import all_reduce
from compiledllm.models.formats.weight_format import empty_parameter
from compiledllm.models.layers.attention import PagedAttention
from compiledllm.models.layers.factory import Factory
from compiledllm.models.layers.mixer import make_mixer
from compiledllm.models.layers.moe import ExpertsBesideMlp, make_mlp
from compiledllm.models.layers.norm import RMSNorm
from compiledllm.models.layers.token_input import TokenInputGate
from compiledllm.models.spec import NORMS_AFTER, NORMS_BEFORE, LayerSpec

# A layer has either a KV cache with AttentionMetadata, or a list of states with StateMetadata.
Cache = Tensor | list[Tensor]
Metadata = AttentionMetadata | StateMetadata


class DecoderBlock(nn.Module):
    """x += update; x += mix(norm(x)); returns x and the next block's update = mlp(norm(x)).

    The norms and residual additions of other kinds of blocks are those of `LayerSpec.residual`.
    """

    def __init__(self, spec: LayerSpec, backend: AttentionBackend, make: Factory) -> None:
        super().__init__()
        self.spec = spec
        make = replace(make, formats=spec.formats)

        def norm(exists: bool) -> nn.Module | None:
            return make.norm(spec.norm, spec.hidden_size) if exists else None

        self.attn_norm = norm(NORMS_BEFORE[spec.residual] >= 1)
        self.attn = make_mixer(spec.hidden_size, spec.mixer, backend, make.within("attn"))
        self.attn_out_norm = norm(NORMS_AFTER[spec.residual] >= 1)
        self.mlp_norm = norm(NORMS_BEFORE[spec.residual] >= 2)
        self.mlp = make_mlp(spec.hidden_size, spec.mlp, make.within("mlp"))
        self.experts = self.token_input = None
        if spec.experts is not None:
            make_experts = make.within("experts")
            self.experts = ExpertsBesideMlp(spec.hidden_size, spec.experts, spec.norm, make_experts)
        self.mlp_out_norm = norm(NORMS_AFTER[spec.residual] >= 2)
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
        if self.spec.defers_sum:
            return self._forward_with_parts(x, update, cos, sin, cache, attn)
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

    def _forward_with_parts(
        self, x: Tensor, part: Tensor, cos: Tensor, sin: Tensor, cache: Cache, attn: Metadata
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, but `part` and the second result are the rank's summands of the updates."""
        assert isinstance(self.attn_norm, RMSNorm) and isinstance(self.mlp_norm, RMSNorm)
        x, attn_in = self.attn_norm.after_sum(x, part)
        x, mlp_in = self.mlp_norm.after_sum(x, self.attn(attn_in, cos, sin, cache, attn))
        return x, self.mlp(mlp_in)

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
        if self.spec.defers_sum:
            assert isinstance(self.attn_norm, RMSNorm)
            _, attn_in = self.attn_norm.after_sum(x, update)
        else:
            x = x + update
            attn_in = x if self.attn_norm is None or self.norms_sums else self.attn_norm(x)
        self.attn.store(attn_in, cos, sin, kv_cache, slot_mapping)

    def _forward_norming_sums(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache, attn: Metadata
    ) -> tuple[Tensor, Tensor]:
        """The block with residual "sums": normalises each sum, and leaves no pending update."""
        assert self.attn_norm is not None and self.mlp_norm is not None
        attended = self._over_ranks(self.attn(x, cos, sin, cache, attn))
        x = self.attn_norm(x + self._scaled(attended))
        x = self.mlp_norm(x + self._scaled(self._over_ranks(self.mlp(x))))
        return x, no_update(x)

    def _over_ranks(self, part: Tensor) -> Tensor:
        """The sum of all ranks' outputs of a half of the block."""
        return all_reduce(part) if self.num_ranks > 1 else part

    def _scaled(self, out: Tensor, norm: nn.Module | None = None) -> Tensor:
        out = out if norm is None else norm(out)
        return out if self.spec.residual_scale == 1 else out * self.spec.residual_scale


def no_update(x: Tensor) -> Tensor:
    """Zeros, computed by the kernel that makes x.

    `zeros_like` would take a kernel of its own. Inductor's kernels that read nothing do not wait
    for their predecessor, but later kernels rely on that wait. Inductor simplifies x * 0 to zeros.
    """
    return x.clamp(0, 0)
