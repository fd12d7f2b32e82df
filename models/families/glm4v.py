"""The text model of GLM-4.1V, 4.5V and 4.6V, dense and MoE; images are not supported."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families import glm4, glm4_moe
from compiledllm.models.families.wrapper import TOWERS, make_text_spec, wrapped
from compiledllm.models.spec import ModelSpec

NAMES = wrapped(glm4.NAMES | glm4_moe.NAMES)
IGNORED = TOWERS
unpack = glm4_moe.unpack
_ARCHITECTURES = {
    "glm4v": "Glm4vForConditionalGeneration",
    "glm4v_moe": "Glm4vMoeForConditionalGeneration",
    "glm46v": "Glm46VForConditionalGeneration",
}


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Glm4vConfig, Glm4vMoeConfig or Glm46VConfig."""
    is_moe = hf.text_config.model_type == "glm4v_moe_text"
    read = glm4_moe.spec_from_hf if is_moe else glm4.spec_from_hf
    return make_text_spec(hf, read, _ARCHITECTURES[hf.model_type])
