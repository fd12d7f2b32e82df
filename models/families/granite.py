"""Granite, dense: Llama with multipliers on the embedding, the residual stream and the logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiledllm.models.families import llama
from compiledllm.models.families.hf import positive
from compiledllm.models.families.llama import with_attention
from compiledllm.models.spec import LayerSpec, ModelSpec

NAMES = llama.NAMES


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers GraniteConfig."""

    def adapt(layer: LayerSpec, _index: int) -> LayerSpec:
        layer = with_attention(layer, scale=hf.attention_multiplier)
        return replace(layer, residual_scale=hf.residual_multiplier)

    return llama.adapted(
        hf,
        "GraniteForCausalLM",
        adapt,
        embedding_scale=hf.embedding_multiplier,
        logit_scale=1 / positive(hf, "logits_scaling"),
    )
