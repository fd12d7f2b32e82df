"""The opt-in access log: a line per answer with status, tokens and finish reasons, never text."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from compiledllm.log import log
from compiledllm.outputs import RequestOutput

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(slots=True)
class _Answer:
    """The status and the token counts of the answer to the current HTTP request so far."""

    status: int | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    endings: list[str] = field(default_factory=list)


_current: ContextVar[_Answer | None] = ContextVar("answer", default=None)


class AccessLog:
    """ASGI middleware that logs each answer; only `BelowRoot` is outside of it."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer, started = _Answer(), time.monotonic()

        async def send_and_note(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
            await send(message)

        token = _current.set(answer)
        try:
            await self._app(scope, receive, send_and_note)
        finally:
            _current.reset(token)
            _log(scope, answer, time.monotonic() - started)


def note_end(output: RequestOutput, num_tokens: int) -> None:
    """Add a finished request to the answer that is being made, if there is an access log."""
    answer = _current.get()
    if answer is not None:
        answer.num_prompt_tokens += len(output.prompt_token_ids)
        answer.num_tokens += num_tokens
        answer.endings += [str(completion.finish_reason) for completion in output.outputs]


def _log(scope: MutableMapping[str, Any], answer: _Answer, seconds: float) -> None:
    request_id = scope.get("state", {}).get("request_id", "-")
    client = (scope.get("client") or ("-",))[0]
    tokens = ""
    if answer.endings:
        endings = ", ".join(dict.fromkeys(answer.endings))
        tokens = f" {answer.num_prompt_tokens}+{answer.num_tokens} tokens, {endings}"
    log.info(
        "%s %s %.200s %s %.3f s%s [%s]",
        *(client, scope["method"], scope["path"], answer.status, seconds, tokens, request_id),
    )
