"""SmolLM3: Llama without rotary embedding on some layers."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families import llama
from compiledllm.models.families.hf import of_layer, window_of
from compiledllm.models.families.llama import with_attention
from compiledllm.models.spec import LayerSpec, ModelSpec, RopeSpec

NAMES = llama.NAMES


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers SmolLM3Config."""

    def adapt(layer: LayerSpec, index: int) -> LayerSpec:
        changes = {} if of_layer(hf, "no_rope_layers", index) else {"rope": RopeSpec(())}
        return with_attention(layer, sliding_window=window_of(hf, index), **changes)

    return llama.adapted(hf, "SmolLM3ForCausalLM", adapt)
