"""Answers of `/v1/chat/completions` and `/v1/completions`, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any

from compiledllm.engine.requests import RequestFactory
from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.outputs import CompletionOutput, RequestOutput
from compiledllm.server.engine_client import EngineClient
from compiledllm.server.live_request import EngineError
from compiledllm.server.metrics import Metrics
from compiledllm.server.openai import convert
from compiledllm.server.openai.errors import ApiError, as_api_error, error_body
from compiledllm.server.openai.events import DONE, Template, event, hole
from compiledllm.server.openai.jobs import AnswerOptions, Job


class Serving:
    """Makes answers from jobs."""

    def __init__(
        self, engine: EngineClient, metrics: Metrics, shows_cached_tokens: bool = True
    ) -> None:
        self.engine = engine
        self.metrics = metrics
        self._shows_cached_tokens = shows_cached_tokens

    def release(self, job: Job) -> None:
        """Abort a job's unfinished requests, because nobody waits for the answer."""
        self.engine.release(job.lives)

    async def _generate(self, job: Job, place: int) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """Yield the outputs of one prompt of a job. place: the prompt's index in the job."""
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
        if job.options.hides_output:
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
        tokenizer, options = job.requests.tokenizer, job.options
        base: dict[str, Any] = {"index": index} | convert.finish_fields(completion)
        base |= _more_fields(options, output, completion)
        if options.is_chat:
            choice = job.choice(index)
            message = choice.message(completion.text, completion.finish_reason == "stop")
            if choice.has_calls:
                base |= convert.ended_by_calls(completion)
            found = convert.chat_logprobs(completion, options.num_top or 0, tokenizer)
            return base | {"message": message, "logprobs": found}
        text, tokens = completion.text, list(completion.token_ids)
        found_all: list[Any] = list(completion.logprobs or [])
        offsets = list(completion.text_offsets or [])
        if options.hides_output:
            text, tokens, found_all, offsets = "", [], [], []
            base |= {"finish_reason": "length", "stop_reason": None}
        if options.echo:
            prompt_text = _prompt_text(output, job.requests)
            if options.num_top is not None:
                starts = _prompt_offsets(output, prompt_text, tokenizer)
                offsets = starts + [len(prompt_text) + offset for offset in offsets]
            text = prompt_text + text
            tokens = output.prompt_token_ids + tokens
            found_all = list(output.prompt_logprobs or []) + found_all
        logprobs = None
        if options.num_top is not None:
            logprobs = convert.text_logprobs(
                tokens, found_all, options.num_top, tokenizer, text, offsets
            )
        return base | {"text": text, "logprobs": logprobs}

    # -- streams -------------------------------------------------------------------------------

    async def stream(self, job: Job) -> AsyncIterator[bytes]:
        """Yield server-sent events. An error on the way becomes an event of its own."""
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
            if job.options.include_usage:
                seen = [output for output in last if output is not None]
                total = 0 if job.options.hides_output else sum(counts)
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
        """The event of a completion's new text; in a chat, an event with the role comes first."""
        role, options = b"", job.options
        if job.is_chat and index not in job.shown:
            job.shown[index] = 0
            begun = _chat_delta(index, {"role": "assistant", "content": ""})
            begun |= _prompt_fields(options, output)
            role = event(self._chunk(job, begun))
        chunk = self._chunk(job, self._delta(job, output, completion, index))
        if options.include_usage and job.is_chat:
            chunk["usage"] = None
        if options.continuous_usage:
            chunk["usage"] = self._usage([output], 0 if options.hides_output else num_tokens)
        return role + event(chunk)

    def _template(self, job: Job) -> Template | None:
        """A template for a choice's events after the first, or None if they show more than text."""
        options = job.options
        has_more = options.return_token_ids or job.params.wants_logprobs
        if has_more or options.continuous_usage or options.hides_output:
            return None
        choice: dict[str, Any] = {"index": hole("index")}
        ending = {name: hole(name) for name in ("finish_reason", "stop_reason")}
        if job.is_chat:
            choice |= {"delta": {"content": hole("text")}, "logprobs": None} | ending
        else:
            choice |= ending | {"text": hole("text"), "logprobs": None}
        chunk = self._chunk(job, choice) | {"created": hole("created")}
        has_usage = job.is_chat and options.include_usage
        return Template(chunk | {"usage": None} if has_usage else chunk)

    def _merged(self, job: Job) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """The outputs of all prompts as they arrive, each with the index of its prompt."""
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
        tokenizer, options = job.requests.tokenizer, job.options
        if options.is_chat:
            choice = job.choice(index)
            reason = completion.finish_reason
            delta = choice.delta(completion.text, reason is not None, reason == "stop")
            found = convert.chat_logprobs(completion, options.num_top or 0, tokenizer)
            more = _chat_delta(index, delta) | {"logprobs": found}
            more |= convert.finish_fields(completion)
            if choice.has_calls:
                more |= convert.ended_by_calls(completion)
            return more | ({"token_ids": completion.token_ids} if options.return_token_ids else {})
        seen = _without_prompt(job) if index in job.shown else job
        shown = self._choice(seen, output, completion, index)
        offset = job.shown.get(index, 0)
        if shown["logprobs"] is not None:
            starts = shown["logprobs"]["text_offset"]
            shown["logprobs"]["text_offset"] = [offset + start for start in starts]
        job.shown[index] = offset + len(shown["text"])
        return shown


def _more_fields(
    options: AnswerOptions, output: RequestOutput, completion: CompletionOutput
) -> dict[str, Any]:
    """The requested fields of a choice besides its text."""
    more = _prompt_fields(options, output)
    if options.return_token_ids:
        more["token_ids"] = [] if options.hides_output else completion.token_ids
    return more


def _prompt_fields(options: AnswerOptions, output: RequestOutput) -> dict[str, Any]:
    """The requested fields about the prompt; in a stream they are sent once per choice."""
    more: dict[str, Any] = {}
    if options.return_token_ids and not options.is_past_prompt:
        more["prompt_token_ids"] = output.prompt_token_ids
    if options.prompt_logprobs:
        more["prompt_logprobs"] = _plain_prompt_logprobs(output)
    return more


def _failure(completion: CompletionOutput) -> Exception | None:
    """The error that ended a completion, if any: of the request's own grammar, or of the engine."""
    if completion.finish_reason != "error":
        return None
    cause = str(completion.stop_reason)
    if cause.startswith("structured_outputs"):
        return ApiError(400, cause)
    return EngineError(cause)


def _filled(
    template: Template | None, job: Job, completion: CompletionOutput, index: int
) -> bytes | None:
    """The event of a completion's new text from the template; None if that does not fit."""
    if template is None or not completion.text or index not in job.shown:
        return None
    if job.is_chat and not job.choice(index).shows_as_is:
        return None
    shown = convert.finish_fields(completion)
    return template.fill(index, completion.text, **shown)


def _chat_delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _without_prompt(job: Job) -> Job:
    """The job for a choice's later events, without the prompt's fields that the first event had."""
    options = job.options
    if not (options.echo or options.prompt_logprobs or options.return_token_ids):
        return job
    rest = replace(options, echo=False, prompt_logprobs=False, is_past_prompt=True)
    return replace(job, options=rest)


def _prompt_text(output: RequestOutput, requests: RequestFactory) -> str:
    if output.prompt is not None:
        return output.prompt
    if requests.tokenizer is None:
        return ""
    return requests.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)


def _prompt_offsets(output: RequestOutput, text: str, tokenizer: Tokenizer | None) -> list[int]:
    """The position in the prompt's text at which each token begins."""
    if tokenizer is None:
        return [0] * len(output.prompt_token_ids)
    return tokenizer.pieces.offsets(output.prompt_token_ids, text)


def _plain_prompt_logprobs(output: RequestOutput) -> list[Any] | None:
    """Prompt log probabilities in vLLM's format: per token, a map from token id to its entry."""
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
