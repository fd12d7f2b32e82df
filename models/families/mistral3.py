"""The text model of Mistral Small 3.1, 3.2 and Ministral 3; images are not supported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiledllm.config import ConfigError
from compiledllm.models.families import mistral
from compiledllm.models.families.wrapper import TOWERS, make_text_spec, wrapped
from compiledllm.models.spec import ModelSpec

NAMES = wrapped(mistral.NAMES)
IGNORED = TOWERS
TIES_MISSING_HEAD = True


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Mistral3Config."""
    kind = hf.text_config.model_type
    if kind not in ("mistral", "ministral", "ministral3"):
        raise ConfigError(f"mistral3: text_config has model_type={kind!r}: not supported")
    spec = make_text_spec(hf, mistral.spec_from_hf, "Mistral3ForConditionalGeneration")
    # Published configs set tie_word_embeddings for the text only; the default of the whole model's
    # config class is True, which counts in files without a head (TIES_MISSING_HEAD).
    is_tied = spec.tie_word_embeddings and bool(hf.text_config.tie_word_embeddings)
    return replace(spec, tie_word_embeddings=is_tied)
