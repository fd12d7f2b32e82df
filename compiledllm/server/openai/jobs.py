"""Turns a request's body into a job: reads, renders, tokenises, checks and admits."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, field
from typing import Any, TypeVar

from compiledllm.engine.prompts import Prompt
from compiledllm.engine.request_state import RequestState
from compiledllm.engine.requests import RequestFactory
from compiledllm.log import log
from compiledllm.sampling_params import SamplingParams
from compiledllm.server.engine_client import EngineClient
from compiledllm.server.lanes import SHORT_BYTES, Lanes, Receive
from compiledllm.server.live_request import LiveRequest
from compiledllm.server.openai import convert
from compiledllm.server.openai.bodies import parse
from compiledllm.server.openai.chat_choice import Choice, reasoning_mode
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.known_fields import KnownFields
from compiledllm.server.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    Generation,
    StreamOptions,
)
from compiledllm.server.openai.tools import ToolUse, tool_use

BodyT = TypeVar("BodyT", bound=Generation)

SHORT_PROMPT = 8192  # token ids, whose check takes about a millisecond


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """The fields of a body that say how its answer is shown; the rest of the body is dropped.

    num_top: log probabilities per token besides the token's own; None: no log probabilities.
    """

    is_chat: bool
    echo: bool = False
    num_top: int | None = None
    prompt_logprobs: bool = False
    return_token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    hides_output: bool = False  # max_tokens=0: only the prompt is shown
    is_past_prompt: bool = False  # a stream has already shown the prompt's fields

    @classmethod
    def of(cls, body: Generation) -> AnswerOptions:
        stream = body.stream_options or StreamOptions()
        text = body if isinstance(body, CompletionRequest) else None
        return cls(
            is_chat=text is None,
            echo=text is not None and text.echo,
            num_top=_num_top(body),
            prompt_logprobs=body.prompt_logprobs is not None,
            return_token_ids=body.return_token_ids,
            include_usage=stream.include_usage,
            continuous_usage=stream.continuous_usage_stats,
            hides_output=text is not None and text.max_tokens == 0,
        )


def _num_top(body: Generation) -> int | None:
    if isinstance(body, CompletionRequest):
        return body.logprobs
    assert isinstance(body, ChatRequest)
    return body.top_logprobs or 0


@dataclass(slots=True)
class Job:
    """One HTTP request: its engine requests, one per prompt, and how their answers are shown.

    ignored: names of fields that had no effect. form_field: the field that asked for structured
    output.
    """

    options: AnswerOptions
    request_id: str
    model: str
    params: SamplingParams
    states: list[RequestState]
    requests: RequestFactory
    lives: list[LiveRequest] = field(default_factory=list)  # the admitted states
    shown: dict[int, int] = field(default_factory=dict)  # characters shown so far, by choice
    use: ToolUse | None = None
    reasoning: str = "off"
    choices: dict[int, Choice] = field(default_factory=dict)  # the choices of a chat, by index
    is_streamed: bool = False
    ignored: list[str] = field(default_factory=list)
    form_field: str = "structured_outputs"

    @property
    def num_choices(self) -> int:
        return self.params.n

    @property
    def is_chat(self) -> bool:
        return self.options.is_chat

    def choice(self, index: int) -> Choice:
        if index not in self.choices:
            self.choices[index] = Choice(self.use, self.reasoning)
        return self.choices[index]


class JobMaker:
    """Makes jobs from bodies.

    logs_requests: log the ids and sizes of requests, never prompts.
    """

    def __init__(
        self,
        engine: EngineClient,
        model_names: list[str],
        fields: KnownFields,
        logs_requests: bool = False,
        tool_call_parser: str = "auto",
        reasoning_parser: str = "auto",
    ) -> None:
        self.engine = engine
        self.model_names = model_names
        self.lanes = Lanes()
        self._fields = fields
        self._logs_requests = logs_requests
        self._tool_call_parser = tool_call_parser
        self._reasoning_parser = reasoning_parser
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

    async def job(
        self, kind: type[BodyT], data: bytes, http_id: str, receive: Receive, salt: str = ""
    ) -> Job:
        """Read a body, render templates, tokenise, check and admit.

        Work that may take long runs in a thread. http_id: the HTTP request's id, from the client or
        generated. receive: reports that the client has left, which raises ClientLeft. salt: the API
        key's cache salt, put in front of the body's cache_salt.
        """
        number = next(self._numbers)  # makes ids unique, as clients may repeat theirs

        def make(body: Generation) -> Job:
            return self._make(body, http_id, number, salt)

        if len(data) > SHORT_BYTES:
            job = await self.lanes.run(len(data), receive, lambda: make(parse(kind, data)))
        else:
            body = parse(kind, data)
            if _is_soon_made(body):
                job = make(body)
            else:
                job = await self.lanes.run(len(data), receive, lambda: make(body))
        if job.params.structured_outputs is not None:
            await self.lanes.compile(receive, lambda: _compile(job))
        job.lives = self.engine.admit(job.states)
        level = logging.INFO if self._logs_requests else logging.DEBUG
        if log.isEnabledFor(level):
            tokens = sum(len(s.completions[0].request.prompt_token_ids) for s in job.states)
            number = len(job.states)
            log.log(level, "request %s: %d prompts, %d tokens", job.request_id, number, tokens)
        return job

    def _make(self, body: Generation, http_id: str, number: int, salt: str) -> Job:
        requests, model = self.factory(), self.check_model(body.model)
        ignored = self._fields.unknown(body)
        prefix = "chatcmpl" if isinstance(body, ChatRequest) else "cmpl"
        name = f"{prefix}-{body.request_id or http_id}"
        job = Job(AnswerOptions.of(body), name, model, requests.defaults, [], requests)
        job.is_streamed, job.ignored = body.stream, ignored
        job.form_field = convert.form_field(body)
        try:
            self._fill(job, body, number, salt + (body.cache_salt or ""))
        except ValueError as error:
            raise convert.as_field_error(body, error) from None
        return job

    def _fill(self, job: Job, body: Generation, number: int, salt: str) -> None:
        requests = job.requests
        if isinstance(body, ChatRequest):
            prompts: list[Prompt] = [self._chat_prompt(job, body)]
        else:
            assert isinstance(body, CompletionRequest)
            job.params = convert.completion_params(body, requests.defaults)
            many = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
            num_requests = job.params.num_candidates * (len(body.prompt) if many else 1)
            self.engine.check_admission(num_requests, 0)  # a cheap check before tokenising
            prompts = convert.completion_prompts(body, requests)
        num_tokens = 0
        for i, prompt in enumerate(prompts):
            request_id = f"{job.request_id}-{number}-{i}"
            if len(prompts) > 1 or job.params.num_candidates > 1:
                prompt = requests.tokenized(prompt, job.params)
                num_tokens += len(prompt["prompt_token_ids"]) * job.params.num_candidates
                self.engine.check_admission(job.params.num_candidates * (i + 1), num_tokens)
            state = requests.make(
                request_id, prompt, job.params, body.priority, None, salt, compiles=False
            )
            first = state.completions[0].request
            _check_context(body, first.num_prompt_tokens, requests.max_model_len)
            requests.check_room(first)
            if not job.options.echo:
                for completion in state.completions:  # the prompt's text is not needed any more
                    completion.request.prompt = None
            job.states.append(state)

    def _chat_prompt(self, job: Job, body: ChatRequest) -> dict[str, Any]:
        """Render the conversation to a prompt, and set how the job's answer is parsed."""
        tokenizer = job.requests.require_tokenizer("a conversation")
        schema = convert.answer_schema(body)
        job.use = tool_use(body, self._tool_call_parser, tokenizer, schema)
        job.params = convert.chat_params(body, job.requests.defaults, job.use)
        self.engine.check_admission(job.params.num_candidates, 0)
        if body.reasoning_effort is not None and not convert.knows_effort(tokenizer):
            job.ignored.append("reasoning_effort")
        max_tokens = job.requests.max_tokenized(body.truncate_prompt_tokens is not None)
        conversation = convert.Conversation.of(body, max_tokens)
        prompt = convert.chat_prompt(conversation, tokenizer, job.use)
        if job.params.structured_outputs is None:  # a grammar applies from the first token
            template = tokenizer.chat_template_text
            job.reasoning = reasoning_mode(self._reasoning_parser, template, prompt["prompt"])
        return prompt


def _compile(job: Job) -> None:
    """Wait until the helper process has compiled the grammars, in a thread that only waits."""
    try:
        for state in job.states:
            job.requests.compile(state)
    except ValueError as error:
        raise convert.as_form_error(job.form_field, error) from None


def _is_soon_made(body: Generation) -> bool:
    """Whether the body is one prompt of token ids, without anything to tokenise or to compile.

    For such a body a thread would cost more time than it saves.
    """
    if not isinstance(body, CompletionRequest) or isinstance(body.prompt, str):
        return False
    if (body.n or 1) > 1 or (body.best_of or 1) > 1:  # several engine requests take longer
        return False
    more = (body.response_format, body.structured_outputs, body.bad_words)
    is_short = isinstance(body.prompt[0], int) and len(body.prompt) <= SHORT_PROMPT
    return is_short and all(asked is None for asked in more)


def _check_context(body: Generation, num_prompt_tokens: int, max_model_len: int) -> None:
    """Raise ValueError if the requested number of tokens does not fit after the prompt."""
    name, asked = body.asked_tokens
    if asked is not None and num_prompt_tokens + asked > max_model_len:
        raise ValueError(
            f"{name} must be at most {max_model_len - num_prompt_tokens} behind a prompt of "
            f"{num_prompt_tokens} tokens, as max_model_len={max_model_len}, got {asked}"
        )
