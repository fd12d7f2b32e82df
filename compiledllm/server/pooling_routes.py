"""The routes that answer with numbers about prompts: from a request's body to its answer."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request, Response

from compiledllm.server.client_left import unless_left
from compiledllm.server.openai.embedding_answer import EmbeddingAnswer
from compiledllm.server.openai.jobs import JobMaker
from compiledllm.server.openai.known_fields import ignored_header
from compiledllm.server.openai.pooling_answer import PoolingAnswer
from compiledllm.server.openai.pooling_protocol import BODIES
from compiledllm.server.openai.score_answer import RerankAnswer, ScoreAnswer
from compiledllm.server.openai.serving import Serving
from compiledllm.server.openapi import body_of
from compiledllm.server.raw_body import read_body


def add_pooling(app: FastAPI, jobs: JobMaker, serving: Serving) -> None:
    async def respond(kind: type[PoolingAnswer[Any]], request: Request) -> Response:
        state, receive = request.scope["state"], request.receive
        data = await read_body(request)
        job = await jobs.job(kind, data, state["request_id"], receive, state["cache_salt"])
        try:
            outputs = await unless_left(receive, serving.last_outputs(job))
            assert isinstance(job.answer, PoolingAnswer)
            answer = await asyncio.to_thread(job.answer.encoded, outputs)
        finally:
            serving.release(job)
        return Response(answer, headers=ignored_header(job.ignored), media_type="application/json")

    async def embeddings(request: Request) -> Response:
        return await respond(EmbeddingAnswer, request)

    async def score(request: Request) -> Response:
        return await respond(ScoreAnswer, request)

    async def rerank(request: Request) -> Response:
        return await respond(RerankAnswer, request)

    for path in BODIES:
        handler = {"score": score, "rerank": rerank}.get(path.rpartition("/")[2], embeddings)
        app.post(path, openapi_extra=body_of(BODIES[path]))(handler)
