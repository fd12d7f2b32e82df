"""Answers to `/v1/chat/completions` and `/v1/completions`, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from compiledllm.engine.prompts import Prompt
from compiledllm.engine.request_state import RequestState
from compiledllm.engine.requests import RequestFactory
from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.grammars.compiler import MAX_WAITING
from compiledllm.log import log
from compiledllm.outputs import CompletionOutput, RequestOutput
from compiledllm.sampling_params import SamplingParams
from compiledllm.server import convert
from compiledllm.server.chat import Choice, reasoning_mode
from compiledllm.server.engine_client import EngineClient
from compiledllm.server.errors import ApiError, as_api_error, error_body
from compiledllm.server.events import DONE, Template, event, hole
from compiledllm.server.live_request import EngineError, LiveRequest
from compiledllm.server.metrics import Metrics
from compiledllm.server.protocol import ChatRequest, CompletionRequest, Generation
from compiledllm.server.tools import ToolUse, tool_use

SHORT_PROMPT = 8192  # token ids, which take about a millisecond to check


@dataclass(slots=True)
class Job:
    """One HTTP request: its engine requests, one for each prompt, and how to show them."""

    body: Generation
    request_id: str
    model: str
    params: SamplingParams
    states: list[RequestState]
    requests: RequestFactory
    lives: list[LiveRequest] = field(default_factory=list)  # the states, once they are admitted
    shown: dict[int, int] = field(default_factory=dict)  # characters, by choice
    use: ToolUse | None = None
    reasoning: str = "off"
    salt: str = ""  # of its holder's key, in the prefix cache
    choices: dict[int, Choice] = field(default_factory=dict)  # of a chat, by index

    @property
    def num_choices(self) -> int:
        return self.params.n

    @property
    def is_chat(self) -> bool:
        return isinstance(self.body, ChatRequest)

    def choice(self, index: int) -> Choice:
        if index not in self.choices:
            self.choices[index] = Choice(self.use, self.reasoning)
        return self.choices[index]


class Serving:
    """Makes jobs from bodies and answers from jobs."""

    def __init__(
        self,
        engine: EngineClient,
        model_names: list[str],
        metrics: Metrics,
        logs_requests: bool = False,
        tool_call_parser: str = "auto",
        reasoning_parser: str = "auto",
        shows_cached_tokens: bool = True,
    ) -> None:
        self.engine = engine
        self._tool_call_parser = tool_call_parser
        self._reasoning_parser = reasoning_parser
        self._shows_cached_tokens = shows_cached_tokens
        self.logs_requests = logs_requests  # ids and sizes, never prompts
        self._numbers = itertools.count()
        self._compiling = ThreadPoolExecutor(2 * MAX_WAITING, "compiling")  # they wait, no more
        self.model_names = model_names
        self.metrics = metrics

    # -- jobs ----------------------------------------------------------------------------------

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

    async def job(self, body: ChatRequest | CompletionRequest, http_id: str, salt: str = "") -> Job:
        """Templates, tokens and checks; in a thread if they may take long, and hold nobody up.

        http_id: of the HTTP request, the client's own or one made for it. salt: in front of the
        body's own.
        """
        requests, model = self.factory(), self.check_model(body.model)
        prefix = "chatcmpl" if isinstance(body, ChatRequest) else "cmpl"
        name = f"{prefix}-{body.request_id or http_id}"
        job = Job(body, name, model, requests.defaults, [], requests, salt=salt)
        number = next(self._numbers)  # an id may come twice
        if _is_soon_made(body):
            self._fill(job, number)
        else:
            await asyncio.to_thread(self._fill, job, number)
        if job.params.structured_outputs is not None:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._compiling, self._compile, job)
        job.lives = self.engine.admit(job.states)
        level = logging.INFO if self.logs_requests else logging.DEBUG
        tokens = sum(len(state.completions[0].request.prompt_token_ids) for state in job.states)
        log.log(level, "request %s: %d prompts, %d tokens", name, len(job.states), tokens)
        return job

    def _fill(self, job: Job, number: int) -> None:
        body, requests = job.body, job.requests
        if isinstance(body, ChatRequest):
            prompts: list[Prompt] = [self._chat_prompt(job, body)]
        else:
            assert isinstance(body, CompletionRequest)
            job.params = convert.completion_params(body, requests.defaults)
            prompts = convert.completion_prompts(body, requests)
        salt = job.salt + (body.cache_salt or "")
        for i, prompt in enumerate(prompts):
            request_id = f"{job.request_id}-{number}-{i}"
            try:
                state = requests.make(
                    request_id, prompt, job.params, body.priority, None, salt, compiles=False
                )
            except ValueError as error:
                raise convert.as_form_error(body, error) from None
            job.states.append(state)

    def _compile(self, job: Job) -> None:
        """Where it waits for the compilers, no thread that others need does."""
        try:
            for state in job.states:
                job.requests.compile(state)
        except ValueError as error:
            raise convert.as_form_error(job.body, error) from None

    def _chat_prompt(self, job: Job, body: ChatRequest) -> dict[str, Any]:
        """The conversation as a prompt; and how its answer is read."""
        tokenizer = job.requests.require_tokenizer("a conversation")
        schema = convert.answer_schema(body)
        job.use = tool_use(body, self._tool_call_parser, tokenizer, schema)
        job.params = convert.chat_params(body, job.requests.defaults, job.use)
        prompt = convert.chat_prompt(
            body.messages,
            body.add_generation_prompt,
            body.continue_final_message,
            body.chat_template_kwargs,
            job.requests,
            job.use,
            body.reasoning_effort,
        )
        if job.params.structured_outputs is None:  # a form holds from the first token on
            template = tokenizer.chat_template_text
            job.reasoning = reasoning_mode(self._reasoning_parser, template, prompt["prompt"])
        return prompt

    def release(self, job: Job) -> None:
        """Nobody waits for its answer any more."""
        self.engine.release(job.lives)

    async def _generate(self, job: Job, place: int) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """The outputs of a prompt, with its place among the job's."""
        timing, live = self.metrics.begin(), job.lives[place]
        with self.engine.following(live):
            while not live.state.is_over:
                output = await live.take()
                self.metrics.grow(timing, output)
                if output.finished:
                    self.metrics.end(timing, output)
                yield place, output

    # -- whole answers -------------------------------------------------------------------------

    async def answer(self, job: Job) -> dict[str, Any]:
        tasks = [asyncio.create_task(self._last(job, place)) for place in range(len(job.lives))]
        try:
            outputs = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        choices = [
            self._choice(job, output, completion, place * job.num_choices + completion.index)
            for place, output in enumerate(outputs)
            for completion in output.outputs
        ]
        total = sum(c.request.num_output_tokens for state in job.states for c in state.completions)
        if _hides_output(job):
            total = 0
        kind = "chat.completion" if job.is_chat else "text_completion"
        return convert.envelope(kind, job.request_id, job.model) | {
            "choices": choices,
            "usage": self._usage(outputs, total),
        }

    def _usage(self, outputs: list[RequestOutput], num_output_tokens: int) -> dict[str, Any]:
        return convert.usage(outputs, num_output_tokens, self._shows_cached_tokens)

    async def _last(self, job: Job, place: int) -> RequestOutput:
        outputs = [output async for _, output in self._generate(job, place)]
        for completion in outputs[-1].outputs:
            if failure := _failure(completion):
                raise failure
        return outputs[-1]

    def _choice(
        self, job: Job, output: RequestOutput, completion: CompletionOutput, index: int
    ) -> dict[str, Any]:
        tokenizer = job.requests.tokenizer
        base: dict[str, Any] = {"index": index} | convert.finish_fields(completion)
        if job.body.return_token_ids:
            base["token_ids"] = completion.token_ids
            base["prompt_token_ids"] = output.prompt_token_ids
        if job.body.prompt_logprobs is not None:
            base["prompt_logprobs"] = _plain_prompt_logprobs(output)
        if isinstance(job.body, ChatRequest):
            choice = job.choice(index)
            message = choice.message(completion.text, completion.finish_reason == "stop")
            if choice.has_calls:
                base |= convert.ended_by_calls(completion)
            found = convert.chat_logprobs(completion, job.body.top_logprobs or 0, tokenizer)
            return base | {"message": message, "logprobs": found}
        body = job.body
        assert isinstance(body, CompletionRequest)
        text, tokens = completion.text, list(completion.token_ids)
        found_all: list[Any] = list(completion.logprobs or [])
        offsets = list(completion.text_offsets or [])
        if _hides_output(job):
            text, tokens, found_all, offsets = "", [], [], []
            base |= {"finish_reason": "length", "stop_reason": None}
        if body.echo:
            prompt_text = _prompt_text(output, job.requests)
            if body.logprobs is not None:
                starts = _prompt_offsets(output, prompt_text, tokenizer)
                offsets = starts + [len(prompt_text) + offset for offset in offsets]
            text = prompt_text + text
            tokens = output.prompt_token_ids + tokens
            found_all = list(output.prompt_logprobs or []) + found_all
        logprobs = None
        if body.logprobs is not None:
            logprobs = convert.text_logprobs(
                tokens, found_all, body.logprobs, tokenizer, text, offsets
            )
        return base | {"text": text, "logprobs": logprobs}

    # -- streams -------------------------------------------------------------------------------

    async def stream(self, job: Job) -> AsyncIterator[bytes]:
        """Server-sent events. What goes wrong on the way is an event of its own."""
        template = self._template(job)
        counts = [0] * len(job.states)
        last: list[RequestOutput | None] = [None] * len(job.states)
        try:
            async with contextlib.aclosing(self._merged(job)) as merged:
                async for place, output in merged:
                    last[place] = output
                    for completion in output.outputs:
                        if failure := _failure(completion):
                            raise failure
                        counts[place] += len(completion.token_ids)
                        index = place * job.num_choices + completion.index
                        yield _filled(template, job, completion, index) or self._event(
                            job, output, completion, index, counts[place]
                        )
            if _wants_usage(job):
                seen = [output for output in last if output is not None]
                total = 0 if _hides_output(job) else sum(counts)
                yield event(self._chunk(job, None) | {"usage": self._usage(seen, total)})
        except Exception as error:
            yield event(error_body(as_api_error(error)))
        yield DONE

    def _event(
        self,
        job: Job,
        output: RequestOutput,
        completion: CompletionOutput,
        index: int,
        num_tokens: int,
    ) -> bytes:
        """What a completion has grown by; the first of a chat behind one that names the role."""
        role = b""
        if job.is_chat and index not in job.shown:
            job.shown[index] = 0
            begun = _chat_delta(index, {"role": "assistant", "content": ""})
            role = event(self._chunk(job, begun))
        chunk = self._chunk(job, self._delta(job, output, completion, index))
        options = job.body.stream_options
        if options is not None and options.include_usage:
            if job.is_chat:
                chunk["usage"] = None
            if options.continuous_usage_stats:
                chunk["usage"] = self._usage([output], num_tokens)
        return role + event(chunk)

    def _template(self, job: Job) -> Template | None:
        """Of the events of `_event` behind a choice's first, if they show nothing but text."""
        body = job.body
        has_usage = body.stream_options is not None and body.stream_options.continuous_usage_stats
        has_more = has_usage or body.return_token_ids or job.params.wants_logprobs
        if has_more or _hides_output(job):
            return None
        choice: dict[str, Any] = {"index": hole("index")}
        ending = {name: hole(name) for name in ("finish_reason", "stop_reason")}
        if job.is_chat:
            choice |= {"delta": {"content": hole("text")}, "logprobs": None} | ending
        else:
            choice |= ending | {"text": hole("text"), "logprobs": None}
        chunk = self._chunk(job, choice) | {"created": hole("created")}
        return Template(chunk | {"usage": None} if job.is_chat and _wants_usage(job) else chunk)

    def _merged(self, job: Job) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """The outputs of all prompts as they come, each with its prompt's place."""
        return self._generate(job, 0) if len(job.lives) == 1 else self._generate_all(job)

    async def _generate_all(self, job: Job) -> AsyncGenerator[tuple[int, RequestOutput]]:
        queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue()

        async def feed(place: int) -> None:
            try:
                async for item in self._generate(job, place):
                    queue.put_nowait(item)
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(feed(place)) for place in range(len(job.lives))]
        try:
            unfinished = len(tasks)
            while unfinished:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    unfinished -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _chunk(self, job: Job, choice: dict[str, Any] | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if job.is_chat else "text_completion"
        choices = [] if choice is None else [choice]
        return convert.envelope(kind, job.request_id, job.model) | {"choices": choices}

    def _delta(
        self,
        job: Job,
        output: RequestOutput,
        completion: CompletionOutput,
        index: int,
    ) -> dict[str, Any]:
        tokenizer = job.requests.tokenizer
        if isinstance(job.body, ChatRequest):
            choice = job.choice(index)
            reason = completion.finish_reason
            delta = choice.delta(completion.text, reason is not None, reason == "stop")
            found = convert.chat_logprobs(completion, job.body.top_logprobs or 0, tokenizer)
            more = _chat_delta(index, delta) | {"logprobs": found}
            more |= convert.finish_fields(completion)
            if choice.has_calls:
                more |= convert.ended_by_calls(completion)
            return more | ({"token_ids": completion.token_ids} if job.body.return_token_ids else {})
        assert isinstance(job.body, CompletionRequest)
        has_echo = job.body.echo or job.body.prompt_logprobs is not None
        seen = _without_echo(job) if has_echo and index in job.shown else job
        shown = self._choice(seen, output, completion, index)
        offset = job.shown.get(index, 0)
        if shown["logprobs"] is not None:
            starts = shown["logprobs"]["text_offset"]
            shown["logprobs"]["text_offset"] = [offset + start for start in starts]
        job.shown[index] = offset + len(shown["text"])
        return shown


def _is_soon_made(body: ChatRequest | CompletionRequest) -> bool:
    """Whether it is one prompt of token ids, and nothing is to be tokenised or compiled for it.

    Handing it to a thread would take longer.
    """
    if isinstance(body, ChatRequest) or isinstance(body.prompt, str):
        return False
    if (body.n or 1) > 1 or (body.best_of or 1) > 1:  # a request for each
        return False
    more = (body.response_format, body.structured_outputs, body.bad_words)
    is_short = isinstance(body.prompt[0], int) and len(body.prompt) <= SHORT_PROMPT
    return is_short and all(asked is None for asked in more)


def _failure(completion: CompletionOutput) -> Exception | None:
    """If it ended in an error: that of the request's own grammar, or of the engine."""
    if completion.finish_reason != "error":
        return None
    cause = str(completion.stop_reason)
    if cause.startswith("structured_outputs"):
        return ApiError(400, cause)
    return EngineError(cause)


def _filled(
    template: Template | None, job: Job, completion: CompletionOutput, index: int
) -> bytes | None:
    """The event of what a completion has grown by; None if it is not as the template has it."""
    if template is None or not completion.text or index not in job.shown:
        return None
    if job.is_chat and not job.choice(index).shows_as_is:
        return None
    shown = convert.finish_fields(completion)
    return template.fill(index, completion.text, **shown)


def _wants_usage(job: Job) -> bool:
    options = job.body.stream_options
    return options is not None and options.include_usage


def _chat_delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _without_echo(job: Job) -> Job:
    body = job.body.model_copy(update={"echo": False, "prompt_logprobs": None})
    return Job(body, job.request_id, job.model, job.params, job.states, job.requests)


def _hides_output(job: Job) -> bool:
    """max_tokens=0: only the prompt was asked about."""
    return isinstance(job.body, CompletionRequest) and job.body.max_tokens == 0


def _prompt_text(output: RequestOutput, requests: RequestFactory) -> str:
    if output.prompt is not None:
        return output.prompt
    if requests.tokenizer is None:
        return ""
    return requests.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)


def _prompt_offsets(output: RequestOutput, text: str, tokenizer: Tokenizer | None) -> list[int]:
    """Where each token of the prompt begins in its text."""
    if tokenizer is None:
        return [0] * len(output.prompt_token_ids)
    return tokenizer.pieces.offsets(output.prompt_token_ids, text)


def _plain_prompt_logprobs(output: RequestOutput) -> list[Any] | None:
    """As vLLM shows them: for each token of the prompt, token id -> its entry."""
    if output.prompt_logprobs is None:
        return None
    return [
        found
        and {
            str(token_id): {
                "logprob": max(entry.logprob, -9999.0),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in found.items()
        }
        for found in output.prompt_logprobs
    ]
