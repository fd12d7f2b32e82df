"""Responses besides answers: errors and the engine's state, with their descriptions for OpenAPI."""

from __future__ import annotations

from typing import Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from compiledllm.grammars.compiler import CompilersBusy
from compiledllm.remote.errors import Overloaded, Unavailable
from compiledllm.server.anthropic.errors import error_body_for
from compiledllm.server.openai.errors import ApiError, as_api_error


def error_response(
    error: ApiError, path: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """The error in the format of the API that the request's path belongs to."""
    return JSONResponse(error_body_for(error, path), error.status, headers)


def response_to(error: Exception, path: str) -> JSONResponse:
    """The response to an exception of a handler; 500 for unexpected exceptions."""
    if isinstance(error, Overloaded | Unavailable):
        status = 429 if isinstance(error, Overloaded) else 503
        after = {"retry-after": str(error.retry_after)}
        return error_response(ApiError(status, str(error)), path, after)
    headers = {"retry-after": "1"} if isinstance(error, CompilersBusy) else None
    return error_response(as_api_error(error), path, headers)


class EngineHealth(BaseModel):
    """`GET /health`. reason: why the engine is unhealthy.

    replicas, http_processes: the state of each, if there are several.
    """

    status: Literal["ok", "unhealthy"]
    engine: str
    reason: str | None = None
    replicas: list[str] | None = None
    http_processes: list[str] | None = None


class EngineReadiness(BaseModel):
    """`GET /ready`."""

    ready: bool
    engine: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every error, whatever its status."""

    error: ErrorDetail
