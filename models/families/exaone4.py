"""EXAONE 4: post-norms; models with sliding windows rotate in the layers with windows only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiledllm.models.families import llama, olmo2
from compiledllm.models.families.hf import window_of
from compiledllm.models.families.llama import with_attention
from compiledllm.models.spec import LayerSpec, ModelSpec, RopeSpec

NAMES = olmo2.NAMES


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Exaone4Config."""

    def adapt(layer: LayerSpec, index: int) -> LayerSpec:
        window = window_of(hf, index)
        is_rotated = hf.sliding_window is None or window
        changes = {} if is_rotated else {"rope": RopeSpec(())}
        layer = with_attention(layer, qk_norm=layer.norm, sliding_window=window, **changes)
        return replace(layer, residual="post")

    return llama.adapted(hf, "Exaone4ForCausalLM", adapt)
