"""Apertus: Llama with an RMSNorm on each head of q and k, and an ungated MLP with xIELU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiledllm.models.families import llama, qwen3
from compiledllm.models.families.llama import with_attention
from compiledllm.models.formats.slicing import Content
from compiledllm.models.spec import LayerSpec, MlpSpec, ModelSpec

NAMES = {name: target for name, target in qwen3.NAMES.items() if "layernorm" not in name} | {
    "model.layers.*.attention_layernorm.weight": "layers.*.attn_norm.weight",
    "model.layers.*.feedforward_layernorm.weight": "layers.*.mlp_norm.weight",
    "model.layers.*.mlp.up_proj.*": "layers.*.mlp.up.*",
    "model.layers.*.mlp.act_fn.*": "layers.*.mlp.activation.*",
}


def unpack(
    tensors: Iterable[tuple[str, Content]], _spec: ModelSpec
) -> Iterator[tuple[str, Content]]:
    """Yield each number of the activation as a vector [1]; some checkpoints store scalars []."""
    for name, tensor in tensors:
        if ".act_fn." in name and isinstance(tensor, Tensor):
            tensor = tensor.reshape(1)
        yield name, tensor


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers ApertusConfig."""

    def adapt(layer: LayerSpec, _index: int) -> LayerSpec:
        mlp = layer.mlp
        assert isinstance(mlp, MlpSpec)
        layer = with_attention(layer, qk_norm=layer.norm)
        return replace(layer, mlp=replace(mlp, gated=False))

    return llama.adapted(hf, "ApertusForCausalLM", adapt)
