"""Turns a request's body into a job: reads, renders, tokenises, checks and admits.

An `Answer` knows what an endpoint's body asks for; this module knows no endpoint.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, field
from typing import Any

from compiledllm.engine.prompts import Prompt
from compiledllm.engine.request_state import RequestState
from compiledllm.engine.requests import RequestFactory
from compiledllm.log import log
from compiledllm.remote.live_request import LiveRequest
from compiledllm.remote.replicas import ServedEngine
from compiledllm.server.client_left import Receive
from compiledllm.server.lanes import SHORT_BYTES, Lanes
from compiledllm.server.openai.answer import (
    DEFAULT_SETTINGS,
    Answer,
    AnswerSettings,
    BodyT,
    Context,
)
from compiledllm.server.openai.bodies import Body, parse
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.field_errors import as_field_error, as_structured_error
from compiledllm.server.openai.known_fields import KnownFields
from compiledllm.server.openai.protocol import GenerationBase


@dataclass(slots=True)
class Job:
    """One HTTP request: its engine requests, one per prompt, and the answer that shows them.

    requests: the factory that made `states`. live_requests: the states, once admitted. ignored:
    names of fields that had no effect.
    """

    request_id: str
    answer: Answer[Any]
    requests: RequestFactory
    is_streamed: bool = False
    states: list[RequestState] = field(default_factory=list)
    live_requests: list[LiveRequest] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


class JobMaker:
    """Makes jobs from bodies.

    logs_requests: log the ids and sizes of requests, never prompts.
    """

    def __init__(
        self,
        engine: ServedEngine,
        model_names: list[str],
        fields: KnownFields,
        logs_requests: bool = False,
        settings: AnswerSettings = DEFAULT_SETTINGS,
    ) -> None:
        self.engine = engine
        self.model_names = model_names
        self.lanes = Lanes()
        self._fields = fields
        self._logs_requests = logs_requests
        self._settings = settings
        self._numbers = itertools.count()

    def factory(self) -> RequestFactory:
        return self.engine.require_ready()

    def check_model(self, name: str | None) -> str:
        if name is not None and name not in self.model_names:
            raise ApiError(
                404,
                f"model '{name}' does not exist; there is {', '.join(self.model_names)}",
                "model",
                "model_not_found",
            )
        return name or self.model_names[0]

    def unknown_fields(self, body: Body) -> list[str]:
        """The names of fields that the body's kind lacks. Raises ApiError in strict mode."""
        return self._fields.unknown(body)

    async def job(
        self,
        kind: type[Answer[BodyT]],
        data: bytes,
        http_id: str,
        receive: Receive,
        salt: str = "",
    ) -> Job:
        """Read a body, render templates, tokenise, check and admit.

        Work that may take long runs in a thread. http_id: the HTTP request's id, from the client or
        generated. receive: reports that the client has left, which raises ClientLeft. salt: the API
        key's cache salt, put in front of the body's cache_salt; also the answer's `owner`.
        """
        number = next(self._numbers)  # makes ids unique, as clients may repeat theirs

        def make(body: BodyT) -> Job:
            return self._make(kind, body, http_id, number, salt)

        if len(data) > SHORT_BYTES:
            whole = len(data)
            job = await self.lanes.run(whole, receive, lambda: make(parse(kind.body_type, data)))
        else:
            body = parse(kind.body_type, data)
            if body.is_made_at_once:
                job = make(body)
            else:
                job = await self.lanes.run(len(data), receive, lambda: make(body))
        if job.answer.params.structured_outputs is not None:
            await self.lanes.compile(receive, lambda: _compile(job))
        job.live_requests = self.engine.admit(job.states)
        self._log(job)
        return job

    def _make(
        self, kind: type[Answer[BodyT]], body: BodyT, http_id: str, number: int, salt: str
    ) -> Job:
        requests, model = self.factory(), self.check_model(body.model)
        ignored = self.unknown_fields(body)
        name = f"{kind.id_prefix}-{body.request_id or http_id}"
        try:
            answer = kind(body, Context(name, model, requests, self._settings, salt))
            # A cheap check before tokenising.
            self.engine.check_admission(answer.params.num_candidates * body.num_prompts, 0)
            prompts = answer.prompts(body)
            job = Job(name, answer, requests, body.stream, ignored=ignored + answer.ignored)
            self._add_requests(job, prompts, body, number, salt + (body.cache_salt or ""))
        except ValueError as error:
            raise as_field_error(body, error) from None
        return job

    def _add_requests(
        self, job: Job, prompts: list[Prompt], body: GenerationBase, number: int, salt: str
    ) -> None:
        requests, params, num_tokens = job.requests, job.answer.params, 0
        for i, prompt in enumerate(prompts):
            request_id = f"{job.request_id}-{self.engine.id_prefix}{number}-{i}"
            if len(prompts) > 1 or params.num_candidates > 1:
                prompt = requests.tokenized(prompt, params)
                num_tokens += len(prompt["prompt_token_ids"]) * params.num_candidates
                self.engine.check_admission(params.num_candidates * (i + 1), num_tokens)
            state = job.answer.make_request(request_id, prompt, body.priority, salt)
            first = state.completions[0].spec
            _check_context(body, first.num_prompt_tokens, requests.max_model_len)
            requests.check_room(first)
            if not job.answer.keeps_prompt_text:
                state.prompt = None
            job.states.append(state)

    def _log(self, job: Job) -> None:
        level = logging.INFO if self._logs_requests else logging.DEBUG
        if log.isEnabledFor(level):
            tokens = sum(len(s.completions[0].spec.prompt_token_ids) for s in job.states)
            number = len(job.states)
            log.log(level, "request %s: %d prompts, %d tokens", job.request_id, number, tokens)


def _compile(job: Job) -> None:
    """Wait until the helper process has compiled the grammars, in a thread that only waits."""
    try:
        for state in job.states:
            job.requests.compile(state)
    except ValueError as error:
        raise as_structured_error(job.answer.structured_field, error) from None


def _check_context(body: GenerationBase, num_prompt_tokens: int, max_model_len: int) -> None:
    """Raise ValueError if the requested number of tokens does not fit after the prompt."""
    name, requested = body.requested_max_tokens
    if requested is not None and num_prompt_tokens + requested > max_model_len:
        raise ValueError(
            f"{name} must be at most {max_model_len - num_prompt_tokens} after a prompt of "
            f"{num_prompt_tokens} tokens, as max_model_len={max_model_len}, got {requested}"
        )
