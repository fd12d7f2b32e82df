"""Errors in Anthropic's format."""

from __future__ import annotations

from typing import Any

from compiledllm.server.openai.errors import ApiError, error_body

PATH = "/v1/messages"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error_body(error: ApiError) -> dict[str, Any]:
    """The body of an error, with the message as long as in OpenAI's format."""
    default = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _TYPES.get(error.status, default)
    message = error_body(error)["error"]["message"]
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_body_for(error: ApiError, path: str) -> dict[str, Any]:
    """The body of an error in the format of the API that a request's path belongs to."""
    return anthropic_error_body(error) if is_anthropic(path) else error_body(error)


def is_anthropic(path: str) -> bool:
    """Whether errors of this path have Anthropic's format."""
    return path == PATH or path.startswith(f"{PATH}/")
