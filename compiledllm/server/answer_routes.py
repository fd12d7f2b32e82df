"""The routes that run the model: from a request's body to its answer, whole or as events."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from compiledllm.server.client_left import ClientLeft, unless_left
from compiledllm.server.endpoints import ENDPOINTS
from compiledllm.server.openai.answer import Answer
from compiledllm.server.openai.jobs import Job, JobMaker
from compiledllm.server.openai.known_fields import ignored_header
from compiledllm.server.openai.response_store import ResponseStore
from compiledllm.server.openai.serving import Serving
from compiledllm.server.openapi import body_of
from compiledllm.server.raw_body import read_body


def add_answers(app: FastAPI, jobs: JobMaker, serving: Serving) -> None:
    async def respond(kind: type[Answer[Any]], request: Request) -> Response:
        state, receive = request.scope["state"], request.receive
        data = await read_body(request)
        job = await jobs.job(kind, data, state["request_id"], receive, state["cache_salt"])
        headers = ignored_header(job.ignored)
        if job.is_streamed:
            return _EventStream(serving, job, headers | {"cache-control": "no-cache"})
        try:
            answer = await unless_left(receive, serving.encoded(job))
        finally:
            serving.release(job)
        return Response(answer, headers=headers, media_type="application/json")

    def route(kind: type[Answer[Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def handler(request: Request) -> Response:
            return await respond(kind, request)

        return handler

    for path, kind in ENDPOINTS.items():
        app.post(path, name=path.rpartition("/")[2], **_described(kind))(route(kind))


def add_stored_responses(app: FastAPI, store: ResponseStore) -> None:
    """The routes of responses that were kept, each for the key that asked for it."""
    path = "/v1/responses/{response_id}"

    @app.get(path, response_class=Response, responses={200: {"content": {"application/json": {}}}})
    async def stored(response_id: str, request: Request) -> Response:
        found = store.get(request.scope["state"]["cache_salt"], response_id)
        return Response(found.response, media_type="application/json")

    @app.delete(path)
    async def remove(response_id: str, request: Request) -> dict[str, Any]:
        store.remove(request.scope["state"]["cache_salt"], response_id)
        return {"id": response_id, "object": "response", "deleted": True}


def _described(kind: type[Answer[Any]]) -> dict[str, Any]:
    """What OpenAPI says about a route: its body, and events beside JSON where it streams."""
    events: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
    return {"responses": events if kind.streams else {}, "openapi_extra": body_of(kind.body_type)}


class _EventStream(StreamingResponse):
    """A job's server-sent events. The job is released even if the stream fails or never starts."""

    def __init__(self, serving: Serving, job: Job, headers: dict[str, str]) -> None:
        super().__init__(serving.stream(job), 200, headers, "text/event-stream")
        self._serving, self._job = serving, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientLeft):
                await unless_left(receive, self.stream_response(send))
        finally:
            self._serving.release(self._job)

    async def stream_response(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        async for piece in self.body_iterator:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
