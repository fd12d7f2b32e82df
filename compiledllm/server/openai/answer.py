"""The base class of all endpoints' answers, and the fields that OpenAI's answers share."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import msgspec

from compiledllm.engine.prompts import Prompt
from compiledllm.engine.request_state import RequestState
from compiledllm.engine.requests import RequestFactory
from compiledllm.outputs import CompletionOutput, FinishReason, RequestOutput
from compiledllm.sampling_params import SamplingParams
from compiledllm.server.openai.errors import ApiError, error_body
from compiledllm.server.openai.events import DONE, event
from compiledllm.server.openai.logprobs import prompt_logprobs
from compiledllm.server.openai.protocol import Generation, GenerationBase, StreamOptions
from compiledllm.server.openai.response_store import ResponseStore

BodyT = TypeVar("BodyT", bound=GenerationBase)


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """The server's options about answers.

    tool_call_parser, reasoning_parser: values of the command-line options. shows_cached_tokens:
    whether usage has the number of cached tokens. response_store: keeps responses that later
    requests can refer to.
    """

    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    shows_cached_tokens: bool = True
    response_store: ResponseStore = field(default_factory=ResponseStore)


DEFAULT_SETTINGS = AnswerSettings()


@dataclass(frozen=True, slots=True)
class Context:
    """Everything that an answer knows besides the body.

    model: the name that the answer shows. owner: identifies the client's API key; empty unless the
    server has several keys.
    """

    request_id: str
    model: str
    requests: RequestFactory
    settings: AnswerSettings = DEFAULT_SETTINGS
    owner: str = ""


class Answer(ABC, Generic[BodyT]):
    """One answer in the format of an endpoint, from the body to the last byte.

    An endpoint is a subclass, its body and a route. First an answer makes `params` and `prompts`
    for the engine. Then it shows the engine's outputs, either with `whole` or as a stream:
    `begin()`, `grow` for each completion of each output, `end()`, then `last_event`. An instance
    does not keep the body, which may be large.

    ignored: names of known fields that had no effect. keeps_prompt_text: the outputs must have the
    prompt's text. streams: whether the answer can be streamed. takes_long_to_encode: whether
    `encoded` should run in a thread.
    """

    body_type: type[BodyT]
    id_prefix: ClassVar[str]
    last_event: ClassVar[bytes] = DONE  # also sent after an error
    streams: ClassVar[bool] = True
    takes_long_to_encode: ClassVar[bool] = False

    params: SamplingParams
    keeps_prompt_text: bool = False

    def __init__(self, body: BodyT, context: Context) -> None:
        """Raises ValueError and ApiError for a body that cannot be answered."""
        self.structured_field = body.structured_field
        self.ignored: list[str] = []
        self._context = context

    @abstractmethod
    def prompts(self, body: BodyT) -> list[Prompt]:
        """The prompts to complete, in order. Called once, and may take long."""

    def make_request(
        self, request_id: str, prompt: Prompt, priority: int, cache_salt: str
    ) -> RequestState:
        """The engine's request for one of the prompts, in order. Raises ValueError."""
        requests, params = self._context.requests, self.params
        return requests.make(request_id, prompt, params, priority, None, cache_salt, compiles=False)

    @abstractmethod
    def whole(self, outputs: list[RequestOutput], num_output_tokens: int) -> dict[str, Any]:
        """The JSON of a complete answer. outputs: the last output of each prompt."""

    def encoded(self, outputs: list[RequestOutput], num_output_tokens: int) -> bytes:
        """`whole` as JSON."""
        return msgspec.json.encode(self.whole(outputs, num_output_tokens))

    def begin(self) -> bytes:
        """The events before any output; may be empty."""
        return b""

    @abstractmethod
    def grow(self, prompt_index: int, output: RequestOutput, completion: CompletionOutput) -> bytes:
        """The events for the new part of a completion in `output.outputs`.

        prompt_index: the index in `prompts` of the prompt that the output belongs to.
        """

    def end(self) -> bytes:
        """The events after all outputs; may be empty."""
        return b""

    def fail(self, error: ApiError) -> bytes:
        """The event of an error that ends the stream."""
        return event(error_body(error))


class PromptFields:
    """The requested fields about a prompt, in the order in which they are sent."""

    def __init__(self, body: Generation) -> None:
        self._has_token_ids = body.return_token_ids
        self._has_logprobs = body.prompt_logprobs is not None

    def of(self, output: RequestOutput) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self._has_token_ids:
            fields["prompt_token_ids"] = output.prompt_token_ids
        if self._has_logprobs:
            fields["prompt_logprobs"] = prompt_logprobs(output)
        return fields


class StreamUsage:
    """Counts a stream's tokens, if its client asked for usage.

    at_end: whether usage is sent in an event at the end. in_events: whether every event has the
    usage of its prompt so far.
    """

    def __init__(self, body: Generation, shows_cached: bool) -> None:
        options = body.stream_options or StreamOptions()
        self.at_end, self.in_events = options.include_usage, options.continuous_usage_stats
        self.is_requested = self.at_end or self.in_events
        self._shows_cached = shows_cached
        self._outputs: dict[int, RequestOutput] = {}  # the last one, by prompt
        self._num_tokens: dict[int, int] = {}  # by prompt

    def add(self, prompt_index: int, output: RequestOutput, num_tokens: int) -> None:
        self._outputs[prompt_index] = output
        self._num_tokens[prompt_index] = self._num_tokens.get(prompt_index, 0) + num_tokens

    def for_prompt(self, prompt_index: int) -> dict[str, Any]:
        output = self._outputs[prompt_index]
        return usage([output], self._num_tokens[prompt_index], self._shows_cached)

    def total(self) -> dict[str, Any]:
        return usage(self._outputs.values(), sum(self._num_tokens.values()), self._shows_cached)


def usage(
    outputs: Iterable[RequestOutput], num_output_tokens: int, shows_cached: bool
) -> dict[str, Any]:
    """Token counts of an answer. shows_cached: count prompt tokens found in the prefix cache."""
    prompt_tokens = cached = 0
    for output in outputs:
        prompt_tokens += len(output.prompt_token_ids)
        cached += output.num_cached_tokens
    counts: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": prompt_tokens + num_output_tokens,
    }
    return counts | ({"prompt_tokens_details": {"cached_tokens": cached}} if shows_cached else {})


def envelope(kind: str, context: Context) -> dict[str, Any]:
    """The fields that an answer and each chunk of a stream begin with. kind: OpenAI's `object`."""
    created = int(time.time())
    return {"id": context.request_id, "object": kind, "created": created, "model": context.model}


def shown_reason(completion: CompletionOutput) -> FinishReason | None:
    """The finish reason in OpenAI's terms, which lack "repetition"."""
    reason = completion.finish_reason
    return "stop" if reason == "repetition" else reason


def finish_fields(completion: CompletionOutput) -> dict[str, Any]:
    """OpenAI's finish reason and vLLM's stop_reason."""
    return {"finish_reason": shown_reason(completion), "stop_reason": completion.stop_reason}
