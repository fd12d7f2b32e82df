"""The one decoder: embedding, blocks, final norm, logits, built from a ModelSpec.

Blocks pass the residual stream and the addition that is still due to it, so that the addition fuses
with the next block's norm inside the compiled block. Knows nothing of requests or scheduling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from compiledllm.kernels.attention import AttentionMetadata
from compiledllm.kernels.linear import linear
from compiledllm.models.layers.attention import PagedAttention
from compiledllm.models.layers.linear import empty_parameter
from compiledllm.models.layers.mlp import GatedMlp
from compiledllm.models.layers.norm import RMSNorm
from compiledllm.models.layers.rope import RotaryTable
from compiledllm.models.spec import LayerSpec, ModelSpec

BlockForward = Callable[..., tuple[Tensor, Tensor]]


class DecoderBlock(nn.Module):
    """x += due; x += attn(norm(x)); returns x, mlp(norm(x)): the last addition is still due."""

    def __init__(self, spec: LayerSpec, backend: str) -> None:
        super().__init__()
        self.spec = spec
        self.attn_norm = RMSNorm(spec.hidden_size, spec.norm)
        self.attn = PagedAttention(spec.hidden_size, spec.attn, backend)
        self.mlp_norm = RMSNorm(spec.hidden_size, spec.norm)
        self.mlp = GatedMlp(spec.hidden_size, spec.mlp)

    def forward(
        self,
        x: Tensor,  # [tokens, hidden]
        due: Tensor,  # [tokens, hidden]
        cos: Tensor,
        sin: Tensor,
        kv_cache: Tensor,
        attn: AttentionMetadata,
    ) -> tuple[Tensor, Tensor]:
        x = x + due
        x = x + self.attn(self.attn_norm(x), cos, sin, kv_cache, attn)
        return x, self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """A decoder-only transformer over a paged KV cache.

    `block_forward` runs a block; `compiledllm.graphs` replaces it by the compiled one. `product`
    gives the logits.
    """

    product: Callable[..., Tensor] = staticmethod(linear)

    def __init__(self, spec: ModelSpec, backend: str) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = empty_parameter(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(layer, backend) for layer in spec.layers)
        self.final_norm = RMSNorm(spec.hidden_size, spec.final_norm)
        tied = spec.tie_word_embeddings
        self.lm_head = None if tied else empty_parameter(spec.vocab_size, spec.hidden_size)
        ropes = dict.fromkeys(layer.attn.rope for layer in spec.layers)
        self.rotary = nn.ModuleList(RotaryTable(rope) for rope in ropes)
        self._rotary_index = [list(ropes).index(layer.attn.rope) for layer in spec.layers]
        self.block_forward: BlockForward = DecoderBlock.forward

    def forward(
        self,
        input_ids: Tensor,  # int64 [tokens]
        positions: Tensor,  # int64 [tokens]
        kv_caches: list[Tensor],
        attn: AttentionMetadata,
    ) -> Tensor:
        """Hidden states after the final norm, [tokens, hidden]."""
        x = F.embedding(input_ids, self.embedding)
        due = x.new_zeros(x.shape)
        tables = [rotary(positions, x.dtype) for rotary in self.rotary]
        for layer, index, kv_cache in zip(self.layers, self._rotary_index, kv_caches, strict=True):
            x, due = self.block_forward(layer, x, due, *tables[index], kv_cache, attn)
        hidden: Tensor = self.final_norm(x + due)
        return hidden

    def compute_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[tokens, hidden] -> [tokens, vocab], in the model's dtype; into `out` if it is given."""
        head = self.embedding if self.lm_head is None else self.lm_head
        return self.product(hidden, head, None, out)
