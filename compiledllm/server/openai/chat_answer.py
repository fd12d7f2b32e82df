"""Answers of `/v1/chat/completions`."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

from compiledllm.engine.prompts import Prompt
from compiledllm.grammars.text import json_schema_of
from compiledllm.outputs import CompletionOutput, RequestOutput
from compiledllm.sampling_params import SamplingParams
from compiledllm.server.openai.answer import (
    Answer,
    Context,
    PromptFields,
    StreamUsage,
    envelope,
    finish_fields,
    shown_reason,
    usage,
)
from compiledllm.server.openai.call_grammars import json_in_channels
from compiledllm.server.openai.chat_choice import Choice
from compiledllm.server.openai.chat_prompt import Conversation, chat_prompt, effort_arguments
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.events import Template, event, hole
from compiledllm.server.openai.logprobs import chat_logprobs
from compiledllm.server.openai.protocol import ChatRequest
from compiledllm.server.openai.reasoning_formats import (
    Reasoning,
    ReasoningFormat,
    find_reasoning,
)
from compiledllm.server.openai.sampling import sampling_params, structured_outputs_from
from compiledllm.server.openai.tools import ToolUse, tool_use
from compiledllm.structured_outputs import StructuredOutputsParams


class ChatAnswer(Answer[ChatRequest]):
    """Each choice is a message: reasoning, content and tool calls, taken out of the text."""

    body_type = ChatRequest
    id_prefix = "chatcmpl"

    def __init__(self, body: ChatRequest, context: Context) -> None:
        super().__init__(body, context)
        self._tokenizer = context.requests.require_tokenizer("a conversation")
        self._tool_use = tool_use(
            body, context.settings.tool_call_parser, self._tokenizer, _schema_beside_calls(body)
        )
        self.params = _params(body, context.requests.defaults, self._tool_use)
        self._num_top = body.top_logprobs or 0  # log probabilities besides the token's own
        self._shows_token_ids = body.return_token_ids
        self._prompt_fields = PromptFields(body)
        self._usage = StreamUsage(body, context.settings.shows_cached_tokens)
        self._reasoning = Reasoning()
        self._choices: dict[int, Choice] = {}  # those that the stream has begun, by index
        self._template: Template | None = None  # for a choice's events after the first

    def prompts(self, body: ChatRequest) -> list[Prompt]:
        """The rendered conversation, whose end also tells where reasoning begins."""
        requests = self._context.requests
        effort = body.reasoning_effort
        if effort is not None and not effort_arguments(self._tokenizer, effort):
            self.ignored.append("reasoning_effort")
        max_tokens = requests.max_tokenized(body.truncate_prompt_tokens is not None)
        conversation = Conversation.from_body(body, max_tokens, effort)
        prompt = chat_prompt(conversation, self._tokenizer, self._tool_use)
        if self._reasoning_form is not None:
            self._reasoning = Reasoning(
                self._reasoning_form, self._reasoning_form.mode(prompt["prompt"])
            )
            self._leave_reasoning_free()
        self._show_markers()
        return [prompt]

    def _leave_reasoning_free(self) -> None:
        """Let the form of a structured answer begin after the reasoning, or else allow none."""
        outputs = self.params.structured_outputs
        if outputs is None:
            return
        if self._reasoning.mode == "channels":
            self.params.structured_outputs = self._in_channels(outputs)
            return
        begin_calls = "" if self._tool_use is None else self._tool_use.format.ends_reasoning
        tokens = self._reasoning.tokens(self._tokenizer, begin_calls)
        self.params.structured_outputs = dataclasses.replace(outputs, reasoning=tokens)
        if tokens is None:
            self._reasoning = Reasoning()

    def _in_channels(self, outputs: StructuredOutputsParams) -> StructuredOutputsParams:
        """The form with gpt-oss's channels around it, if it is JSON.

        The grammar of calls has its channels already; other forms have none.
        """
        if self._tool_use is not None or (outputs.json is None and outputs.json_object is None):
            return outputs
        grammar = json_in_channels(json_schema_of(outputs), self._tokenizer.token_id)
        return StructuredOutputsParams(grammar=grammar)

    def _show_markers(self) -> None:
        """Keep special tokens in the text if reasoning needs them; stop at the format's `stops`."""
        marker = self.reasoning_end_id
        if marker is not None and not self._tokenizer.decode([marker]):
            self.params.skip_special_tokens = False
        if self._tool_use is not None and (texts := self._tool_use.format.stops):
            ids = {self._tokenizer.token_id(text) for text in texts}
            known = {None, *self._context.requests.eos_token_ids}
            stops = [token_id for token_id in ids - known if token_id is not None]
            self.params.stop_token_ids = [*(self.params.stop_token_ids or ()), *stops]

    @cached_property
    def _reasoning_form(self) -> ReasoningFormat | None:
        parser = self._context.settings.reasoning_parser
        return find_reasoning(parser, self._tokenizer.chat_template_text)

    @property
    def reasoning_end_id(self) -> int | None:
        """The token that ends reasoning; None if there is none."""
        form = self._reasoning_form
        return None if form is None else self._tokenizer.token_id(form.end)

    def new_choice(self) -> Choice:
        """A parser of the text of one choice; the prompt must have been made."""
        return Choice(self._tool_use, self._reasoning)

    # -- whole -------------------------------------------------------------------------------------

    def whole(self, outputs: list[RequestOutput], num_output_tokens: int) -> dict[str, Any]:
        (output,) = outputs
        choices = [self._whole_choice(output, completion) for completion in output.outputs]
        counts = usage(outputs, num_output_tokens, self._context.settings.shows_cached_tokens)
        return envelope("chat.completion", self._context) | {"choices": choices, "usage": counts}

    def _whole_choice(self, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        choice = self.new_choice()
        message = choice.message(completion.text, completion.finish_reason == "stop")
        fields = {"index": completion.index} | _finish_fields(completion, choice)
        fields |= self._prompt_fields.of(output) | self._token_ids(completion)
        return fields | {"message": message, "logprobs": self._logprobs(completion)}

    def _token_ids(self, completion: CompletionOutput) -> dict[str, Any]:
        return {"token_ids": completion.token_ids} if self._shows_token_ids else {}

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        return chat_logprobs(completion, self._num_top, self._tokenizer)

    # -- streams -----------------------------------------------------------------------------------

    def begin(self) -> bytes:
        if not (self._shows_token_ids or self.params.wants_logprobs or self._usage.in_events):
            self._template = self._make_template()
        return b""

    def _make_template(self) -> Template:
        choice = _delta(hole("index"), {"content": hole("text")})
        choice |= {name: hole(name) for name in ("finish_reason", "stop_reason")}
        return Template(self._chunk(choice) | {"created": hole("created")})

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = envelope("chat.completion.chunk", self._context) | {"choices": [choice]}
        return chunk | {"usage": None} if self._usage.at_end else chunk

    def grow(self, prompt_index: int, output: RequestOutput, completion: CompletionOutput) -> bytes:
        index = completion.index
        if self._usage.is_requested:
            self._usage.add(prompt_index, output, len(completion.token_ids))
        choice = self._choices.get(index)
        role = b""
        if choice is None:
            choice = self._choices[index] = self.new_choice()
            role = self._role_event(index, output)
        elif self._template is not None and completion.text and choice.shows_as_is:
            return self._template.fill(
                index, completion.text, shown_reason(completion), completion.stop_reason
            )
        chunk = self._chunk(self._new_part(choice, completion))
        if self._usage.in_events:
            chunk["usage"] = self._usage.for_prompt(prompt_index)
        return role + event(chunk)

    def _role_event(self, index: int, output: RequestOutput) -> bytes:
        """The event that begins a choice, with the requested fields about the prompt."""
        begun = _delta(index, {"role": "assistant", "content": ""})
        begun |= self._prompt_fields.of(output)
        return event(envelope("chat.completion.chunk", self._context) | {"choices": [begun]})

    def _new_part(self, choice: Choice, completion: CompletionOutput) -> dict[str, Any]:
        reason = completion.finish_reason
        delta = choice.delta(completion.text, reason is not None, reason == "stop")
        part = _delta(completion.index, delta) | {"logprobs": self._logprobs(completion)}
        return part | _finish_fields(completion, choice) | self._token_ids(completion)

    def end(self) -> bytes:
        if not self._usage.at_end:
            return b""
        chunk = envelope("chat.completion.chunk", self._context) | {"choices": []}
        return event(chunk | {"usage": self._usage.total()})


def _delta(index: Any, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _finish_fields(completion: CompletionOutput, choice: Choice) -> dict[str, Any]:
    """The common fields, but with "tool_calls" for a complete answer that calls tools."""
    fields = finish_fields(completion)
    if choice.has_calls and completion.finish_reason == "stop":
        fields["finish_reason"] = "tool_calls"
    return fields


def _params(body: ChatRequest, defaults: SamplingParams, use: ToolUse | None) -> SamplingParams:
    """Sampling parameters of a chat. With tools, special tokens stay: they may be call markers."""
    if body.chat_template is not None:
        raise ApiError(400, "chat_template in a request is not allowed", "chat_template")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", "top_logprobs")
    limit = body.requested_max_tokens[1] or defaults.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    more: dict[str, Any] = {}
    if use is None:
        more["structured_outputs"] = structured_outputs_from(body)
    else:
        more |= {"structured_outputs": use.structured_outputs, "skip_special_tokens": False}
    return sampling_params(body, defaults, max_tokens=limit, logprobs=logprobs, **more)


def _schema_beside_calls(body: ChatRequest) -> dict[str, Any] | None:
    """The JSON schema of an answer that may call tools instead; None: any text, or no tools."""
    outputs = structured_outputs_from(body)
    if outputs is None or not body.tools or body.tool_choice == "none":
        return None
    if outputs.json is None and outputs.json_object is None:
        raise ApiError(
            400,
            "with tools, the form of an answer can only be JSON; leave one of them out",
            "tools",
        )
    return json_schema_of(outputs)
