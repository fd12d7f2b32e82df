"""Answers of `/v1/responses`."""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec

from compiledllm.engine.prompts import Prompt
from compiledllm.outputs import CompletionOutput, RequestOutput
from compiledllm.server.openai.answer import Answer, Context, usage
from compiledllm.server.openai.chat_answer import ChatAnswer
from compiledllm.server.openai.chat_choice import Choice
from compiledllm.server.openai.errors import ApiError, error_body
from compiledllm.server.openai.field_errors import renamed_fields
from compiledllm.server.openai.logprobs import chat_logprobs
from compiledllm.server.openai.protocol import ChatRequest
from compiledllm.server.openai.reasoning_count import ReasoningCount
from compiledllm.server.openai.response_store import StoredResponse
from compiledllm.server.openai.responses_input import chat_request, input_items
from compiledllm.server.openai.responses_items import (
    EventWriter,
    OutputItems,
    ReasoningItem,
    SummaryItem,
)
from compiledllm.server.openai.responses_protocol import (
    ResponseItem,
    ResponsesRequest,
    ResponseTool,
)

# Fields of the chat request -> fields of the body.
_NAMES = {"response_format": "text.format", "reasoning_effort": "reasoning.effort"}
_NAMES |= {"messages": "input", "max_tokens": "max_output_tokens"}


class ResponsesAnswer(Answer[ResponsesRequest]):
    """A response of items. A chat answer makes the prompt and takes the text apart."""

    body_type = ResponsesRequest
    id_prefix = "resp"
    last_event = b""

    def __init__(self, body: ResponsesRequest, context: Context) -> None:
        super().__init__(body, context)
        self._tokenizer = context.requests.require_tokenizer("a conversation")
        earlier = _earlier_items(body, context)
        chat = chat_request(body, earlier, self.ignored)
        self._chat_body: ChatRequest | None = chat  # until the prompt is made
        with renamed_fields(_NAMES):
            self._chat = ChatAnswer(chat, context)
        self.params = self._chat.params
        self._num_top = body.top_logprobs or 0
        self._head = _head(body, context)
        # The conversation before the answer, if the response is to be kept.
        self._items = [*earlier, *input_items(body)] if self._head["store"] else None
        self._writer = EventWriter()
        summary = body.reasoning.summary if body.reasoning else None
        kind = ReasoningItem if summary in (None, "none") else SummaryItem
        self._output_items = OutputItems(self._writer, kind)
        self._choice: Choice | None = None  # once there is an output
        self._reasoning = ReasoningCount(self._chat.reasoning_end_id)
        self._output: RequestOutput | None = None  # the last one
        self._num_tokens = 0
        self._finish_reason: str | None = None

    def prompts(self, body: ResponsesRequest) -> list[Prompt]:
        assert self._chat_body is not None
        with renamed_fields(_NAMES):
            prompts = self._chat.prompts(self._chat_body)
        self._chat_body = None
        self.ignored += [_NAMES.get(name, name) for name in self._chat.ignored]
        return prompts

    # -- whole -------------------------------------------------------------------------------------

    def whole(self, outputs: list[RequestOutput], num_output_tokens: int) -> dict[str, Any]:
        (self._output,) = outputs
        (completion,) = self._output.outputs
        self._num_tokens = num_output_tokens
        self._add(completion)
        self._output_items.end(self._status)
        return self._finished()

    def _add(self, completion: CompletionOutput) -> bytes:
        """The events of more of the answer."""
        reason = self._finish_reason = completion.finish_reason
        if self._choice is None:
            self._choice = self._chat.new_choice()
        deltas = self._choice.deltas(completion.text, reason is not None, reason == "stop")
        num_reasoning = self._reasoning.add(completion.token_ids, *deltas)
        logprobs = chat_logprobs(completion, self._num_top, self._tokenizer)
        content = logprobs["content"][num_reasoning:] if logprobs else []
        return self._output_items.grow(deltas, content)

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _finished(self) -> dict[str, Any]:
        """The response at its end. Keeps it, if asked to."""
        response = self._shown(self._status) | {"usage": self._usage()}
        if self._status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        if self._items is not None:
            items = [*self._items, *self._output_items.finished]
            stored = StoredResponse(msgspec.json.encode(response), msgspec.json.encode(items))
            store = self._context.settings.response_store
            store.add(self._context.owner, response["id"], stored)
        return response

    def _shown(self, status: str) -> dict[str, Any]:
        return self._head | {"status": status, "output": self._output_items.finished}

    def _usage(self) -> dict[str, Any]:
        assert self._output is not None
        shows_cached = self._context.settings.shows_cached_tokens
        counts = usage([self._output], self._num_tokens, shows_cached)
        cached = counts.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._reasoning.total},
            "total_tokens": counts["total_tokens"],
        }

    # -- streams -----------------------------------------------------------------------------------

    def begin(self) -> bytes:
        response = self._shown("in_progress")
        created = self._writer.event("created", response=response)
        return created + self._writer.event("in_progress", response=response)

    def grow(self, prompt_index: int, output: RequestOutput, completion: CompletionOutput) -> bytes:
        self._output = output
        self._num_tokens += len(completion.token_ids)
        if self._choice is None or not self._shows_as_is(self._choice, completion):
            return self._add(completion)
        self._finish_reason = completion.finish_reason
        return self._output_items.add(completion.text)

    def _shows_as_is(self, choice: Choice, completion: CompletionOutput) -> bool:
        """Whether the text goes on unchanged in the open item, without log probabilities."""
        is_text = self._output_items.is_in_text and choice.shows_as_is and completion.text
        return bool(is_text and completion.logprobs is None)

    def end(self) -> bytes:
        events = self._output_items.end(self._status)
        return events + self._writer.event(self._status, response=self._finished())

    def fail(self, error: ApiError) -> bytes:
        message = error_body(error)["error"]["message"]
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        failed = {"error": {"code": code, "message": message}}
        events = self._output_items.close("incomplete")
        return events + self._writer.event("failed", response=self._shown("failed") | failed)


def _earlier_items(body: ResponsesRequest, context: Context) -> list[ResponseItem]:
    """The conversation up to the end of the response that the body continues."""
    if body.previous_response_id is None:
        return []
    try:
        stored = context.settings.response_store.get(context.owner, body.previous_response_id)
    except ApiError as error:
        name = "previous_response_id"
        raise ApiError(400, f"{name}: {error.message}", name, error.code) from None
    return msgspec.json.decode(stored.items, type=list[ResponseItem])


def _head(body: ResponsesRequest, context: Context) -> dict[str, Any]:
    """The fields that do not change. Instructions are not repeated, as they may be long."""
    choice, form = body.tool_choice, body.text.format if body.text else None
    defaults = context.requests.defaults
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": context.model,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {
            "effort": body.reasoning and body.reasoning.effort,
            "summary": body.reasoning and body.reasoning.summary,
        },
        "service_tier": "default",
        "store": body.store and context.settings.response_store.capacity > 0,
        "temperature": defaults.temperature if body.temperature is None else body.temperature,
        "text": {"format": form.plain() if form else {"type": "text"}},
        "tool_choice": choice if isinstance(choice, str) else choice.plain() if choice else "auto",
        "tools": [_shown_tool(tool) for tool in body.tools or [] if tool.type == "function"],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": defaults.top_p if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _shown_tool(tool: ResponseTool) -> dict[str, Any]:
    names = ("type", "name", "description", "parameters", "strict")
    return {name: getattr(tool, name) for name in names}
