"""Per-layer token inputs ("per-layer embeddings" of Gemma 3n and Gemma 4).

Each layer has an input of its own for every token, beside the hidden state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compiledllm.models.layers.factory import Factory
from compiledllm.models.layers.mlp import make_activation
from compiledllm.models.spec import LayerSpec, MlpSpec, ModelSpec


class TokenInputs(nn.Module):
    """The inputs of all layers: a row of a table plus a projection of the embedding."""

    def __init__(self, spec: ModelSpec, make: Factory) -> None:
        super().__init__()
        self.num_layers, self.size = len(spec.layers), spec.token_size
        width = self.num_layers * self.size
        self.table = make.embedding("table", spec.token_vocab_size, width)
        self.projection = make.linear("projection", spec.hidden_size, {"": width})
        self.norm = make.norm(spec.final_norm, self.size)
        self.projection_scale = spec.hidden_size**-0.5
        self.num_rows = spec.token_vocab_size
        self.is_whole = self.num_rows >= spec.vocab_size
        scale = torch.tensor(self.size**0.5, dtype=self.table.dtype, device="cpu")
        self.table_scale = scale.item()  # rounded to the table's dtype

    def forward(self, input_ids: Tensor, x: Tensor) -> Tensor:
        """input_ids [tokens], their embeddings x [tokens, hidden] -> [layers, tokens, size]."""
        projected = self.norm(self._by_layer(self.projection(x) * self.projection_scale))
        if not self.is_whole:  # tokens for images have no row in the table and use the first row
            input_ids = torch.where(input_ids < self.num_rows, input_ids, 0)
        looked_up = self._by_layer(self.table(input_ids) * self.table_scale)
        total: Tensor = (projected + looked_up) * 2**-0.5
        return total.transpose(0, 1).contiguous()

    def _by_layer(self, x: Tensor) -> Tensor:
        return x.view(-1, self.num_layers, self.size)


class TokenInputGate(nn.Module):
    """norm(out(act(gate(x)) * token input)), [tokens, hidden] -> [tokens, hidden].

    act: the activation of the block's MLP.
    """

    def __init__(self, spec: LayerSpec, make: Factory) -> None:
        super().__init__()
        assert isinstance(spec.mlp, MlpSpec)
        self.activation = make_activation(spec.mlp.activation)
        self.gate = make.linear("gate", spec.hidden_size, {"": spec.token_size})
        self.out = make.linear("out", spec.token_size, {"": spec.hidden_size})
        self.norm = make.norm(spec.norm, spec.hidden_size)

    def forward(self, x: Tensor, token_input: Tensor) -> Tensor:
        """token_input: [tokens, size]."""
        out: Tensor = self.norm(self.out(self.activation(self.gate(x)) * token_input))
        return out
