"""Adds the name of the body's field to errors of the engine's checks."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

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


@contextlib.contextmanager
def renamed_fields(names: dict[str, str]) -> Iterator[None]:
    """Let errors name the fields of the client's body. names: chat request's field -> body's."""
    try:
        yield
    except ApiError as error:
        if error.param not in names:
            raise
        name = names[error.param]
        message = error.message.replace(error.param, name, 1)
        raise ApiError(error.status, message, name, error.code) from None
