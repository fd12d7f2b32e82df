"""The text model of a multimodal Gemma 3 checkpoint; images are not supported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiledllm.models.families import gemma2
from compiledllm.models.families.hf import dtype_of, eos_token_ids
from compiledllm.models.spec import ModelSpec

_NAMES = {name.removeprefix("model."): target for name, target in gemma2.NAMES.items()}
NAMES = (
    {f"model.language_model.{name}": target for name, target in _NAMES.items()}
    | {f"language_model.model.{name}": target for name, target in _NAMES.items()}
    | {"lm_head.*": "lm_head.*", "language_model.lm_head.*": "lm_head.*"}
)
IGNORED = (
    "model.vision_tower.**",
    "model.multi_modal_projector.**",
    "vision_tower.**",
    "multi_modal_projector.**",
)


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Gemma3Config."""
    text = gemma2.spec_from_hf(hf.text_config)
    return replace(
        text,
        architecture="Gemma3ForConditionalGeneration",
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        dtype=dtype_of(hf),
        eos_token_ids=eos_token_ids(hf) or text.eos_token_ids,
    )
