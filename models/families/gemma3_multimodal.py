"""The text model of a multimodal Gemma 3 checkpoint; images are not supported."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families import gemma2
from compiledllm.models.families.hf import expect
from compiledllm.models.families.wrapper import TOWERS, make_text_spec, wrapped
from compiledllm.models.spec import ModelSpec

NAMES = wrapped(gemma2.NAMES)
IGNORED = TOWERS


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Gemma3Config."""
    # transformers reads the field in the text model only.
    expect(hf.text_config, "final_logit_softcapping", None)
    return make_text_spec(hf, gemma2.spec_from_hf, "Gemma3ForConditionalGeneration")
