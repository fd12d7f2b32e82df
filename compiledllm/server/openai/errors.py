"""Errors in OpenAI's format."""

from __future__ import annotations

from typing import Any

from compiledllm.grammars.compiler import CompilersBusy
from compiledllm.remote.errors import (
    DeadlineExceeded,
    EngineError,
    Overloaded,
    Unavailable,
)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}

# Errors that a handler may raise besides ApiError and ValueError, each with a status of its own.
RAISED = (CompilersBusy, DeadlineExceeded, EngineError, Overloaded, Unavailable)
_MAX_MESSAGE = 1000  # characters: a message may quote the client's input


class ApiError(Exception):
    """An error that is sent to the client. param: the name of the field that is wrong."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def error_body(error: ApiError) -> dict[str, Any]:
    kind = _TYPES.get(error.status, "server_error")
    message = error.message
    if len(message) > _MAX_MESSAGE:
        message = f"{message[: _MAX_MESSAGE // 2]} ... {message[-_MAX_MESSAGE // 2 :]}"
    detail = {"message": message, "type": kind, "param": error.param}
    return {"error": detail | {"code": error.code}}


def as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, CompilersBusy):
        return ApiError(503, str(error), code="compilers_busy")
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, str(error), code="deadline_exceeded")
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    return ApiError(500, f"{type(error).__name__}: {error}")
