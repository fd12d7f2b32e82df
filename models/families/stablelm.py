"""StableLM: Llama with LayerNorm and partial rotary embedding, sequential or parallel MLP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from compiledllm.models.families import llama
from compiledllm.models.families.hf import activation_of, attention_of, model_spec
from compiledllm.models.formats.slicing import Content
from compiledllm.models.spec import LayerSpec, MlpSpec, ModelSpec, NormSpec

NAMES = llama.NAMES | {
    "model.layers.*.input_layernorm.*": "layers.*.attn_norm.*",
    "model.layers.*.post_attention_layernorm.*": "layers.*.mlp_norm.*",
    "model.norm.*": "final_norm.*",
    # Names that `unpack` yields.
    "model.layers.*.self_attn.q_layernorm.weight": "layers.*.attn.q_norm.weight",
    "model.layers.*.self_attn.k_layernorm.weight": "layers.*.attn.k_norm.weight",
}


def unpack(
    tensors: Iterable[tuple[str, Content]], _spec: ModelSpec
) -> Iterator[tuple[str, Content]]:
    """Stack the norms of a layer's heads to [heads, head_dim]; yield other tensors unchanged.

    The stacked norms come last, after all other tensors.
    """
    heads: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors:
        stem, _, rest = name.partition("_layernorm.norms.")
        if rest and isinstance(tensor, Tensor):
            heads.setdefault(stem, {})[int(rest.partition(".")[0])] = tensor
        else:
            yield name, tensor
    for stem, norms in heads.items():
        yield f"{stem}_layernorm.weight", torch.stack([norms[head] for head in sorted(norms)])


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers StableLmConfig."""
    norm = NormSpec(hf.layer_norm_eps, "layer", bias=True)
    layer = LayerSpec(
        hf.hidden_size,
        attention_of(
            hf,
            qkv_bias=hf.use_qkv_bias,
            qk_norm=NormSpec(hf.layer_norm_eps, "layer") if hf.qk_layernorm else None,
            qk_norm_over="heads",
        ),
        MlpSpec(hf.intermediate_size, activation=activation_of(hf)),
        norm,
        residual="parallel" if hf.use_parallel_residual else "pre",
    )
    return model_spec(hf, "StableLmForCausalLM", (layer,) * hf.num_hidden_layers, norm)
