"""Middleware before every route: API keys, origins, body sizes, request ids and turns.

The middleware is plain ASGI, so that streams are not buffered.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from compiledllm.log import log
from compiledllm.server.anthropic.errors import is_anthropic
from compiledllm.server.openai.body_budget import MAX_BODY_BYTES
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.origins import PageCheck
from compiledllm.server.responses import error_response
from compiledllm.server.turns import Turns

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/ready", "/ping"})
MAX_UNFINISHED_BYTES = 512 * 2**20  # of all bodies that are being received
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# Requests that may begin in one pass of the event loop. They take some ms, about as long as one
# token of 256 streams.
REQUESTS_PER_PASS = 8
_TOO_LARGE = f"the body must be at most {MAX_BODY_BYTES} bytes"
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Guard:
    """Refuses requests without a key, from foreign pages or too large; sets the request id.

    Every response has its request's id, even the response to an unexpected exception. With several
    keys, each request's state gets a `cache_salt` derived from its key, so that cached-token counts
    and response times do not reveal the prompts of another key.
    """

    def __init__(self, app: App, keys: Iterable[str] = (), pages: PageCheck | None = None) -> None:
        self._app = app
        self._turns = Turns(REQUESTS_PER_PASS)
        self._keys = [hashlib.sha256(key.encode()).digest() for key in dict.fromkeys(keys)]
        self._pages = pages or PageCheck()
        self._unfinished = _Unfinished()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        ids = [(b"x-request-id", request_id)]
        if is_anthropic(scope["path"]):
            ids.append((b"request-id", request_id))
        is_begun = False

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            nonlocal is_begun
            if message["type"] == "http.response.start":
                is_begun = True
                message["headers"] = [*message.get("headers", []), *ids]
            await send(message)

        scope["state"]["cache_salt"] = ""
        problem = self._problem(scope, headers)
        if problem is not None:
            # For `/` the browser asks its user: any name, and the key as the password.
            kind = 'Basic realm="compiledllm"' if scope["path"] == "/" else "Bearer"
            extra = {"www-authenticate": kind} if problem.status == 401 else None
            await error_response(problem, scope["path"], extra)(  # type: ignore[arg-type]
                scope, receive, send_with_id
            )
            return
        if scope["method"] == "POST":
            await self._turns.wait()
        try:
            if b"transfer-encoding" in headers or len(headers.get(b"content-length", b"")) > 5:
                await self._app_with_long_body(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            return  # the client is gone
        except Exception as error:
            # Starlette's own answer would lack the request id and the CORS headers.
            log.error("%s %.200r failed", scope["method"], scope["path"], exc_info=error)
            if is_begun:
                raise
            failure = ApiError(500, f"{type(error).__name__}: {error}")
            await error_response(failure, scope["path"])(  # type: ignore[arg-type]
                scope, receive, send_with_id
            )

    async def _app_with_long_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive, self._unfinished)
        try:
            await self._app(scope, body.receive, send)
        finally:
            body.forget()

    def _problem(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._keys and scope["path"] not in OPEN_PATHS:
            key = self._key_of(headers)
            if key is None:
                return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
            if len(self._keys) > 1:
                scope["state"]["cache_salt"] = hashlib.sha256(b"cache salt" + key).hexdigest()
        if scope["method"] not in _SAFE_METHODS and self._pages.is_foreign(headers):
            return ApiError(
                403,
                "a web page of another origin may not use this server; if it is yours, start the "
                "server with --allowed-origins and the page's origin",
            )
        length = headers.get(b"content-length", b"0").strip()  # bounded by the parser
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return ApiError(413, _TOO_LARGE)
        return None

    def _key_of(self, headers: dict[bytes, bytes]) -> bytes | None:
        """The digest of the request's key; None if the key is missing or unknown."""
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        if not kind:
            kind, key = b"bearer", headers.get(b"x-api-key", b"")  # as Anthropic's clients send it
        if kind.lower() == b"basic":
            key = _password(key)
        given = hashlib.sha256(key.strip()).digest()
        matches = [secrets.compare_digest(given, known) for known in self._keys]
        is_known = kind.lower() in (b"bearer", b"basic") and any(matches)
        return given if is_known else None


def _password(credentials: bytes) -> bytes:
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except ValueError:
        return b""


@dataclass(slots=True)
class _Unfinished:
    """Bytes received of all incomplete bodies."""

    num_bytes: int = 0


class _Body:
    """A body whose received bytes are counted, whatever its content-length says."""

    def __init__(self, receive: Receive, unfinished: _Unfinished) -> None:
        self._receive, self._unfinished = receive, unfinished
        self._num_bytes = 0

    async def receive(self) -> MutableMapping[str, Any]:
        """Receive a message. Raises HTTPException, which FastAPI passes on when reading a body."""
        message = await self._receive()
        if body := message.get("body"):
            self._num_bytes += len(body)
            self._unfinished.num_bytes += len(body)
            if self._num_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, _TOO_LARGE)
            if self._unfinished.num_bytes > MAX_UNFINISHED_BYTES:
                busy = "the bodies that are being received take too much memory; try again"
                raise HTTPException(503, busy, {"retry-after": "1"})
        if not message.get("more_body"):
            self.forget()
        return message

    def forget(self) -> None:
        """Subtract this body's bytes, because it is complete or dropped."""
        self._unfinished.num_bytes -= self._num_bytes
        self._num_bytes = 0
