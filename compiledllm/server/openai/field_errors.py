"""Names the field of a body that an error of the engine's checks is about."""

from __future__ import annotations

import re

from compiledllm.server.openai.bodies import fields_of
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.protocol import GenerationBase


def as_field_error(body: GenerationBase, error: ValueError) -> ApiError:
    """An error about the request, with the name of the field concerned."""
    text = str(error)
    if text.startswith("structured_outputs"):
        return as_structured_error(body.structured_field, error)
    first = re.split(r"\W", text, maxsplit=1)[0]
    if first in fields_of(type(body)):
        return ApiError(400, text, first)
    is_about_prompt = text.startswith(("the prompt", "a prompt", "token id", "messages"))
    return ApiError(400, text, body.prompt_field if is_about_prompt else None)


def as_structured_error(field: str, error: ValueError) -> ApiError:
    """An error about structured output, with the name of the field that asked for it."""
    return ApiError(400, str(error).replace("structured_outputs", field, 1), field)
