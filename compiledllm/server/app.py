"""The HTTP routes. `create_app` makes the application for an engine; `launch` starts both."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from compiledllm.log import OneLine, log
from compiledllm.remote.errors import Overloaded
from compiledllm.remote.replicas import ServedEngine, clients_of
from compiledllm.server.access_log import AccessLog
from compiledllm.server.answer_routes import add_answers, add_stored_responses
from compiledllm.server.anthropic.protocol import BODIES as ANTHROPIC_BODIES
from compiledllm.server.anthropic.protocol import CountTokensRequest
from compiledllm.server.anthropic.token_count import TokenCounter
from compiledllm.server.chat_page import chat_page
from compiledllm.server.client_left import ClientLeft
from compiledllm.server.docs_page import docs_page
from compiledllm.server.metrics import Metrics
from compiledllm.server.openai.answer import DEFAULT_SETTINGS, AnswerSettings
from compiledllm.server.openai.errors import RAISED, ApiError
from compiledllm.server.openai.jobs import JobMaker
from compiledllm.server.openai.known_fields import KnownFields, ignored_header
from compiledllm.server.openai.pooling_protocol import BODIES as POOLING_BODIES
from compiledllm.server.openai.protocol import BODIES, DetokenizeRequest, TokenizeRequest
from compiledllm.server.openai.responses_protocol import BODIES as RESPONSES_BODIES
from compiledllm.server.openai.serving import Serving
from compiledllm.server.openai.text_tools import TextTools
from compiledllm.server.openapi import add_bodies, body_of
from compiledllm.server.origins import EXPOSED_HEADERS, Cors, PageCheck
from compiledllm.server.raw_body import read_body
from compiledllm.server.responses import (
    EngineHealth,
    EngineReadiness,
    ErrorResponse,
    error_response,
    response_to,
)
from compiledllm.server.root_path import BelowRoot
from compiledllm.server.security import Guard
from compiledllm.server.whole_server import OneProcess, WholeServer
from compiledllm.version import __version__

_Responses = dict[int | str, dict[str, Any]]  # of a route, by status, for OpenAPI
_STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
_ERRORS: _Responses = {status: {"model": ErrorResponse} for status in _STATUSES}
_TEXT = {"schema": {"type": "string"}}


def _state_of(model: Any) -> _Responses:
    """Responses of a route about the engine's state. Spare connections get an ErrorResponse."""
    return {200: {"model": model}, 503: {"model": model | ErrorResponse}}


@dataclass(frozen=True, slots=True)
class AppOptions:
    """Options of the routes that do not concern the engine."""

    model_names: list[str]
    api_keys: list[str]
    cors: Cors = Cors()
    serves_only_local: bool = False  # the listening address is a loopback address
    strict_fields: bool = False
    logs_requests: bool = False
    logs_access: bool = False
    has_docs: bool = True
    root_path: str = ""  # the path below which a proxy serves this server, such as /llm
    metrics_prefix: str = "compiledllm:"
    answers: AnswerSettings = DEFAULT_SETTINGS


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """Add the schemas of bodies, because `bodies` reads them and FastAPI does not know them."""
        schema = super().openapi()
        bodies = BODIES | RESPONSES_BODIES | ANTHROPIC_BODIES | POOLING_BODIES
        add_bodies(schema, tuple(bodies.values()))
        return schema


def create_app(
    engine: ServedEngine, options: AppOptions, whole: WholeServer | None = None
) -> FastAPI:
    """Make the application; its `state.metrics` writes the periodic log line.

    whole: all HTTP processes of the server; None: this is the only process.
    """
    app = _App(
        title="compiledllm",
        version=__version__,
        servers=[{"url": options.root_path}] if options.root_path else None,
        openapi_url="/openapi.json" if options.has_docs else None,
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
    )
    metrics = Metrics(options.metrics_prefix, options.model_names[0], engine)
    app.state.metrics = metrics
    jobs = JobMaker(
        engine,
        options.model_names,
        KnownFields(options.strict_fields),
        options.logs_requests,
        options.answers,
    )
    serving = Serving(engine, metrics)
    add_answers(app, jobs, serving)
    add_stored_responses(app, options.answers.response_store)
    _add_text_tools(app, TextTools(jobs))
    _add_token_count(app, TokenCounter(jobs, options.answers))
    _add_models(app, jobs)
    _add_state(app, engine, whole or OneProcess(engine, metrics))
    _add_chat_page(app)
    if options.has_docs:
        _add_docs(app)
    _add_errors(app, metrics)
    pages = PageCheck(
        options.cors.origins, is_local=options.serves_only_local and not options.api_keys
    )
    app.add_middleware(Guard, keys=options.api_keys, pages=pages)
    if options.cors.origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(  # outside the guard: a preflight has no key, and errors need headers
            CORSMiddleware,
            allow_origins=options.cors.origins,
            allow_methods=options.cors.methods,
            allow_headers=options.cors.headers,
            allow_credentials=options.cors.credentials,
            expose_headers=EXPOSED_HEADERS,
        )
    if options.logs_access:
        app.add_middleware(AccessLog)
    if options.root_path:
        app.add_middleware(BelowRoot, root_path=options.root_path)
    logging.getLogger("uvicorn.error").addFilter(OneLine())  # its tracebacks quote clients, too
    return app


def _add_text_tools(app: FastAPI, tools: TextTools) -> None:
    async def respond(work: Callable[[bytes], bytes], request: Request) -> Response:
        data = await read_body(request)
        answer = await tools.lanes.run(len(data), request.receive, lambda: work(data))
        return Response(answer, media_type="application/json")

    @app.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        return await respond(tools.tokenize, request)

    @app.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        return await respond(tools.detokenize, request)


def _add_token_count(app: FastAPI, counter: TokenCounter) -> None:
    @app.post("/v1/messages/count_tokens", openapi_extra=body_of(CountTokensRequest))
    async def count_tokens(request: Request) -> Response:
        data = await read_body(request)
        answer, ignored = await counter.lanes.run(
            len(data), request.receive, lambda: counter.count(data)
        )
        return Response(answer, headers=ignored_header(ignored), media_type="application/json")


def _add_models(app: FastAPI, jobs: JobMaker) -> None:
    def card(name: str) -> dict[str, Any]:
        requests = jobs.engine.requests
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "compiledllm",
            "max_model_len": None if requests is None else requests.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in jobs.model_names]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        return card(jobs.check_model(model))


def _add_state(app: FastAPI, engine: ServedEngine, whole: WholeServer) -> None:
    @app.get("/health", responses=_state_of(EngineHealth))
    async def health() -> JSONResponse:
        """Whether the engine is alive; 503 if the engine is dead or silent for too long."""
        problem = engine.why_unhealthy()
        status = "unhealthy" if problem else "ok"
        body: dict[str, Any] = {"status": status, "engine": engine.state}
        if problem:
            body["reason"] = problem
        if len(clients := clients_of(engine)) > 1:
            body["replicas"] = [client.state for client in clients]
        if states := whole.process_states():
            body["http_processes"] = states
        return JSONResponse(body, 503 if problem else 200)

    @app.get("/ready", responses=_state_of(EngineReadiness))
    async def ready() -> JSONResponse:
        """Whether the server accepts requests now."""
        is_ready = whole.is_ready()
        body = {"ready": is_ready, "engine": engine.state}
        return JSONResponse(body, 200 if is_ready else 503)

    # SageMaker's name of the health check, which may be a POST.
    app.add_api_route("/ping", health, responses=_state_of(EngineHealth))
    app.add_api_route("/ping", health, methods=["POST"], include_in_schema=False)

    @app.get("/load")
    async def load() -> dict[str, int]:
        """The number of requests that are being answered or are waiting."""
        return {"server_load": whole.num_live()}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get(
        "/metrics", response_class=Response, responses={200: {"content": {"text/plain": _TEXT}}}
    )
    async def prometheus() -> Response:
        return Response(
            await whole.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @app.get("/config")
    async def config() -> dict[str, Any]:
        """Every resolved option, and the reason for each value that the engine chose."""
        if engine.ready is None:
            return {"options": {}, "choices": {}}
        return {"options": engine.ready.options, "choices": engine.ready.choices}


def _add_chat_page(app: FastAPI) -> None:
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page(request: Request) -> Response:
        found = chat_page()
        if request.headers.get("if-none-match") == found.headers["etag"]:
            return Response(status_code=304, headers=found.headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            encoding = {"content-encoding": "gzip"}
            return HTMLResponse(found.compressed, headers=found.headers | encoding)
        return HTMLResponse(found.document, headers=found.headers)


def _add_docs(app: FastAPI) -> None:
    page: list[str] = []  # made once

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> HTMLResponse:
        if not page:
            page.append(docs_page(app.openapi()))
        return HTMLResponse(page[0], headers={"content-security-policy": _DOCS_POLICY})


_DOCS_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    Handler = Callable[[Request, Exception], Awaitable[Response]]

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        if error.status_code == 404:
            return error_response(
                ApiError(404, _no_route(request.url.path, paths), code="no_route"), request.url.path
            )
        message = str(error.detail)
        if error.status_code == 405:
            allowed = headers.get("Allow", "another method")
            message = f"{request.url.path} takes {allowed}, got {request.method}"
        return error_response(ApiError(error.status_code, message), request.url.path, headers)

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # the client is gone, so the response has no body

    async def other(request: Request, error: Exception) -> Response:
        if isinstance(error, Overloaded):
            metrics.rejections.inc()
        response = response_to(error, request.url.path)
        if response.status_code == 500:
            log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return response

    paths = sorted({route.path for route in app.routes if isinstance(route, APIRoute)})
    handlers: dict[Any, Handler] = {HTTPException: http, ClientLeft: left}
    for kind in (ApiError, *RAISED, ValueError):
        handlers[kind] = other
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _no_route(path: str, paths: list[str]) -> str:
    near = difflib.get_close_matches(path[:128], paths, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"there is no route {path[:128]}; {hint}known: {', '.join(paths)}"
