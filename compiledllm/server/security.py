"""What stands before every route: keys, sizes, the request's id, and its turn.

Plain ASGI, so streams stream.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from compiledllm.server.errors import ApiError, error_response
from compiledllm.server.turns import Turns

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/ready"})
MAX_BODY_BYTES = 32 * 2**20
REQUESTS_PER_PASS = 8  # of the event loop: some milliseconds, as much as a token of 256 streams
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Guard:
    """Refuses what has no key or is too large, and gives every response its request's id."""

    def __init__(self, app: App, keys: Iterable[str] = ()) -> None:
        self._app = app
        self._turns = Turns(REQUESTS_PER_PASS)
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            await send(message)

        problem = self._problem(scope, headers)
        if problem is not None:
            # A browser asks its user for the key: any name, and the key as the password.
            kind = 'Basic realm="compiledllm"' if scope["path"] == "/" else "Bearer"
            extra = {"www-authenticate": kind} if problem.status == 401 else None
            await error_response(problem, extra)(scope, receive, send_with_id)  # type: ignore[arg-type]
            return
        if scope["method"] == "POST":
            await self._turns.wait()
        await self._app(scope, _limited(receive), send_with_id)

    def _problem(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._keys and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
            return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return _too_large()
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"basic":
            key = _password(key)
        given = hashlib.sha256(key.strip()).digest()
        matches = [secrets.compare_digest(given, known) for known in self._keys]
        return kind.lower() in (b"bearer", b"basic") and any(matches)


def _password(credentials: bytes) -> bytes:
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except ValueError:
        return b""


def _limited(receive: Receive) -> Receive:
    """Counts what really comes; a body that lies about its length ends in an error, too."""
    received = 0

    async def limited() -> MutableMapping[str, Any]:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise _too_large()
        return message

    return limited


def _too_large() -> ApiError:
    return ApiError(413, f"the body must be at most {MAX_BODY_BYTES} bytes")
