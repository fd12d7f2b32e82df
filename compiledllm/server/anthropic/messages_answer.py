"""Answers of `/v1/messages`."""

from __future__ import annotations

import json
from typing import Any

from compiledllm.engine.prompts import Prompt
from compiledllm.outputs import CompletionOutput, RequestOutput
from compiledllm.server.anthropic.block_events import BlockEvents, named_event
from compiledllm.server.anthropic.conversion import chat_request
from compiledllm.server.anthropic.errors import anthropic_error_body
from compiledllm.server.anthropic.protocol import MessagesRequest
from compiledllm.server.openai.answer import Answer, Context
from compiledllm.server.openai.chat_answer import ChatAnswer
from compiledllm.server.openai.chat_choice import Choice
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.field_errors import renamed_fields
from compiledllm.server.openai.protocol import ChatRequest

# Fields of the chat request -> fields of the body.
_NAMES = {"response_format": "output_config.format", "reasoning_effort": "output_config.effort"}


class MessagesAnswer(Answer[MessagesRequest]):
    """A message of content blocks. A chat answer makes the prompt and takes the text apart."""

    body_type = MessagesRequest
    id_prefix = "msg"
    last_event = b""

    def __init__(self, body: MessagesRequest, context: Context) -> None:
        super().__init__(body, context)
        tokenizer = context.requests.require_tokenizer("a conversation")
        chat = chat_request(body, tokenizer.chat_template_text, self.ignored)
        self._chat_body: ChatRequest | None = chat  # until the prompt is made
        with renamed_fields(_NAMES):
            self._chat = ChatAnswer(chat, context)
        self.params = self._chat.params
        self._choice: Choice | None = None  # once the stream has begun
        self._blocks = BlockEvents()
        self._num_tokens = 0
        self._output: RequestOutput | None = None  # the stream's last one
        self._stop: dict[str, str | None] = {}

    def prompts(self, body: MessagesRequest) -> list[Prompt]:
        assert self._chat_body is not None
        prompts = self._chat.prompts(self._chat_body)
        self._chat_body = None
        self.ignored += [_NAMES.get(name, name) for name in self._chat.ignored]
        return prompts

    def whole(self, outputs: list[RequestOutput], num_output_tokens: int) -> dict[str, Any]:
        (output,) = outputs
        (completion,) = output.outputs
        choice = self._chat.new_choice()
        deltas = choice.deltas(completion.text, True, completion.finish_reason == "stop")
        more = _stop_fields(completion, choice) | {"usage": self._usage(output, num_output_tokens)}
        return self._envelope() | {"content": _blocks_of(deltas)} | more

    # -- streams -----------------------------------------------------------------------------------

    def grow(self, prompt_index: int, output: RequestOutput, completion: CompletionOutput) -> bytes:
        self._output = output
        self._num_tokens += len(completion.token_ids)
        start, choice, reason = b"", self._choice, completion.finish_reason
        if choice is None:
            choice = self._choice = self._chat.new_choice()
            start = self._start(output)
        if choice.shows_as_is:
            events = self._blocks.text("text", completion.text) if completion.text else b""
        else:
            deltas = choice.deltas(completion.text, reason is not None, reason == "stop")
            events = b"".join(map(self._blocks.add, deltas))
        if reason is not None:
            self._stop = _stop_fields(completion, choice)
        return start + events

    def end(self) -> bytes:
        assert self._output is not None
        usage = self._usage(self._output, self._num_tokens)
        delta = {"type": "message_delta", "delta": self._stop, "usage": usage}
        return self._blocks.close() + named_event(delta) + named_event({"type": "message_stop"})

    def fail(self, error: ApiError) -> bytes:
        return named_event(anthropic_error_body(error))

    def _start(self, output: RequestOutput) -> bytes:
        """The first events, sent with the first output, which has the number of cached tokens."""
        message = self._envelope() | {"content": [], "stop_reason": None, "stop_sequence": None}
        message["usage"] = self._usage(output, 0)
        return named_event({"type": "message_start", "message": message}) + named_event(
            {"type": "ping"}
        )

    # -- both --------------------------------------------------------------------------------------

    def _envelope(self) -> dict[str, Any]:
        context = self._context
        return {
            "id": context.request_id,
            "type": "message",
            "role": "assistant",
            "model": context.model,
        }

    def _usage(self, output: RequestOutput, num_output_tokens: int) -> dict[str, int]:
        """Token counts. Anthropic's input_tokens do not include cached tokens."""
        cached = output.num_cached_tokens if self._context.settings.shows_cached_tokens else 0
        return {
            "input_tokens": len(output.prompt_token_ids) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": num_output_tokens,
        }


def _stop_fields(completion: CompletionOutput, choice: Choice) -> dict[str, str | None]:
    reason, sequence = "end_turn", None
    if completion.finish_reason == "length":
        reason = "max_tokens"
    elif completion.finish_reason == "stop":
        if isinstance(completion.stop_reason, str):
            reason, sequence = "stop_sequence", completion.stop_reason
        elif choice.has_calls:
            reason = "tool_use"
    return {"stop_reason": reason, "stop_sequence": sequence}


def _blocks_of(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content blocks of a complete answer's deltas."""
    blocks: list[dict[str, Any]] = []
    for delta in deltas:
        if reasoning := delta.get("reasoning"):
            blocks.append({"type": "thinking", "thinking": reasoning, "signature": ""})
        if content := delta.get("content"):
            blocks.append({"type": "text", "text": content})
        for call in delta.get("tool_calls", ()):
            function = call["function"]
            block = {"type": "tool_use", "id": call["id"], "name": function["name"]}
            blocks.append(block | {"input": _input(function["arguments"])})
    return blocks


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call; text that is not a JSON object is kept as INVALID_JSON."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": arguments}
