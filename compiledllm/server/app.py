"""The routes. `create_app` makes the application of one engine; `launch` starts both."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from compiledllm.log import log
from compiledllm.server import convert
from compiledllm.server.engine_client import EngineClient
from compiledllm.server.errors import ApiError, error_response, response_to
from compiledllm.server.live_request import (
    DeadlineExceeded,
    EngineError,
    Overloaded,
    Unavailable,
)
from compiledllm.server.metrics import Metrics
from compiledllm.server.origins import EXPOSED_HEADERS, Cors, PageCheck
from compiledllm.server.protocol import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorResponse,
    TokenizeRequest,
)
from compiledllm.server.security import Guard
from compiledllm.server.serving import Job, Serving
from compiledllm.version import __version__

_PAGE = Path(__file__).with_name("page.html")
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 429, 500, 503, 504)
}


@dataclass(frozen=True, slots=True)
class AppOptions:
    """What the routes need to know besides the engine."""

    model_names: list[str]
    api_keys: list[str]
    cors: Cors = Cors()
    serves_only_local: bool = False  # the address is this machine's alone
    strict_fields: bool = False
    logs_requests: bool = False
    metrics_prefix: str = "compiledllm:"
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    shows_cached_tokens: bool = True


def create_app(engine: EngineClient, options: AppOptions) -> FastAPI:
    """The application; its `state.metrics` writes the log line."""
    app = FastAPI(
        title="compiledllm", version=__version__, docs_url=None, redoc_url=None, responses=_ERRORS
    )
    metrics = Metrics(options.metrics_prefix, options.model_names[0], engine)
    app.state.metrics = metrics
    serving = Serving(
        engine,
        options.model_names,
        metrics,
        options.logs_requests,
        options.tool_call_parser,
        options.reasoning_parser,
        options.shows_cached_tokens,
    )
    _add_generation(app, serving, _Fields(options.strict_fields))
    _add_text_tools(app, serving)
    _add_models(app, serving)
    _add_state(app, engine, metrics)
    _add_errors(app, metrics)
    pages = PageCheck(
        options.cors.origins, is_local=options.serves_only_local and not options.api_keys
    )
    app.add_middleware(Guard, keys=options.api_keys, pages=pages)
    if options.cors.origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(  # around the guard: a preflight has no key, and errors need headers
            CORSMiddleware,
            allow_origins=options.cors.origins,
            allow_methods=options.cors.methods,
            allow_headers=options.cors.headers,
            allow_credentials=options.cors.credentials,
            expose_headers=EXPOSED_HEADERS,
        )
    return app


class _Fields:
    """What to do about fields that no body has: name each once in the log, and in the response."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._named: set[str] = set()

    def headers(self, body: Body) -> dict[str, str]:
        unknown = body.unknown_fields
        if not unknown:
            return {}
        if self._strict:
            raise ApiError(400, f"unknown fields: {', '.join(unknown)}", unknown[0])
        for name in set(unknown) - self._named:
            self._named.add(name)
            log.warning("requests have a field that is ignored: %.64r", name)
        plain = [name for name in unknown if name.isascii() and name.isprintable()]
        return {"x-ignored-fields": ",".join(plain)[:1024]}


def _add_generation(app: FastAPI, serving: Serving, fields: _Fields) -> None:
    async def respond(body: ChatRequest | CompletionRequest, request: Request) -> Response:
        headers = fields.headers(body)
        state = request.scope["state"]
        job = await serving.job(body, state["request_id"], state["cache_salt"])
        if body.stream:
            return _EventStream(serving, job, headers | {"cache-control": "no-cache"})
        try:
            answer = await _unless_disconnected(request.receive, serving.answer(job))
        finally:
            serving.release(job)
        if answer is None:
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(answer, headers=headers)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await respond(body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await respond(body, request)


class _EventStream(StreamingResponse):
    """A job's server-sent events. However it ends, and if it never begins, the job is released."""

    def __init__(self, serving: Serving, job: Job, headers: dict[str, str]) -> None:
        super().__init__(serving.stream(job), 200, headers, "text/event-stream")
        self._serving, self._job = serving, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_disconnected(receive, self.stream_response(send))
        finally:
            self._serving.release(self._job)

    async def stream_response(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        async for piece in self.body_iterator:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unless_disconnected(receive: Receive, work: Awaitable[Any]) -> Any:
    """The work's result; None, and the work is cancelled, if the client leaves first."""

    async def wait_for_end() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_end())
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for pending in (task, left):
            pending.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


def _add_text_tools(app: FastAPI, serving: Serving) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        requests = serving.factory()
        serving.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")

        def work() -> list[int]:
            tokenizer = requests.require_tokenizer("/tokenize")
            if body.prompt is not None:
                return tokenizer.encode(body.prompt, body.add_special_tokens)
            prompt = convert.chat_prompt(
                body.messages or [],
                body.add_generation_prompt,
                body.continue_final_message,
                body.chat_template_kwargs,
                requests,
            )
            ids: list[int] = prompt["prompt_token_ids"]
            return ids

        tokens = await asyncio.to_thread(work)
        answer = {"count": len(tokens), "max_model_len": requests.max_model_len, "tokens": tokens}
        if body.return_token_strs and requests.tokenizer is not None:
            answer["token_strs"] = [requests.tokenizer.token_text(i) for i in tokens]
        return answer

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        requests = serving.factory()
        serving.check_model(body.model)
        for token_id in body.tokens:
            if token_id >= requests.vocab_size:
                raise ApiError(400, f"token id {token_id} is not in the vocabulary", "tokens")
        tokenizer = requests.require_tokenizer("/detokenize")
        return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}


def _add_models(app: FastAPI, serving: Serving) -> None:
    def card(name: str) -> dict[str, Any]:
        requests = serving.engine.requests
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "compiledllm",
            "max_model_len": None if requests is None else requests.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in serving.model_names]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        return card(serving.check_model(model))


def _add_state(app: FastAPI, engine: EngineClient, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the engine is alive: 503 if it is dead, or silent for too long."""
        problem = engine.why_unhealthy()
        body = {"status": "unhealthy" if problem else "ok", "engine": engine.state}
        if problem:
            body["reason"] = problem
        return JSONResponse(body, 503 if problem else 200)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether requests are taken now."""
        problem = engine.why_unhealthy()
        is_ready = engine.state == "ready" and problem is None
        body = {"ready": is_ready, "engine": engine.state}
        return JSONResponse(body, 200 if is_ready else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/config")
    async def config() -> dict[str, Any]:
        """Every resolved option, and why those that were open have their values."""
        if engine.ready is None:
            return {"options": {}, "choices": {}}
        return {"options": engine.ready.options, "choices": engine.ready.choices}

    @app.get("/", response_class=FileResponse, include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE, headers={"content-security-policy": _CONTENT_POLICY})


_CONTENT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
)


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    Handler = Callable[[Request, Exception], Awaitable[Response]]

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        field = ".".join(where) or None
        given = json.dumps(first.get("input"), default=str)[:80]
        message = f"{field or 'body'}: {first['msg']}, got {given}"
        return error_response(ApiError(400, message, field))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = 400 if error.status_code == 422 else error.status_code
        return error_response(ApiError(status, str(error.detail)), dict(error.headers or {}))

    async def other(request: Request, error: Exception) -> Response:
        if isinstance(error, Overloaded):
            metrics.rejections.inc()
        response = response_to(error)
        if response.status_code == 500:
            log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return response

    handlers: dict[Any, Handler] = {RequestValidationError: invalid, HTTPException: http}
    for kind in (ApiError, Overloaded, Unavailable, EngineError, DeadlineExceeded, ValueError):
        handlers[kind] = other
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
