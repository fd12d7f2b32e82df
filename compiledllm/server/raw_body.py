"""Reads the bytes of a request's body if its content type is JSON."""

from __future__ import annotations

from starlette.requests import Request

from compiledllm.server.client_left import ClientLeft
from compiledllm.server.openai.errors import ApiError

_JSON = "application/json"


async def read_body(request: Request) -> bytes:
    """Read the whole body. Raises ApiError (415) for other content types, and ClientLeft.

    Unlike Starlette's `body`, the bytes are not kept by the request, which lives as long as its
    answer.
    """
    _check_type(request.headers.get("content-type"))
    pieces = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces) if len(pieces) > 1 else pieces[0]


def _check_type(content_type: str | None) -> None:
    """Accept JSON or no content type. Types that web pages of any origin may send are refused."""
    name = (content_type or _JSON).partition(";")[0].strip().lower()
    is_json = name == _JSON or (name.startswith("application/") and name.endswith("+json"))
    if not is_json:
        raise ApiError(
            415,
            "the body must be JSON: send the header 'content-type: application/json', "
            f"got '{content_type}'",
            code="unsupported_content_type",
        )
