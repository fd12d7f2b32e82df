"""`/v1/messages/count_tokens`, from a body's bytes to the answer's bytes."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from compiledllm.server.anthropic.conversion import chat_request
from compiledllm.server.anthropic.protocol import CountTokensRequest
from compiledllm.server.openai.answer import AnswerSettings, Context
from compiledllm.server.openai.bodies import parse
from compiledllm.server.openai.chat_answer import ChatAnswer
from compiledllm.server.openai.field_errors import as_field_error
from compiledllm.server.openai.jobs import JobMaker


class TokenCounter:
    """lanes: the threads in which the caller runs `count`."""

    def __init__(self, jobs: JobMaker, settings: AnswerSettings) -> None:
        self.lanes = jobs.lanes
        self._jobs, self._settings = jobs, settings

    def count(self, data: bytes) -> tuple[bytes, list[str]]:
        """The answer and the ignored fields. The prompt may be longer than the context."""
        body = parse(CountTokensRequest, data)
        requests, model = self._jobs.factory(), self._jobs.check_model(body.model)
        ignored = self._jobs.unknown_fields(body)
        template = requests.require_tokenizer("a conversation").chat_template_text
        try:
            chat = chat_request(body, template, ignored)
            chat.truncate_prompt_tokens = -1  # lets the prompt be longer than the context
            answer = ChatAnswer(chat, Context("", model, requests, self._settings))
            (prompt,) = answer.prompts(chat)
        except ValueError as error:
            raise as_field_error(body, error) from None
        tokens = cast(dict[str, Any], prompt)["prompt_token_ids"]
        return msgspec.json.encode({"input_tokens": len(tokens)}), ignored + answer.ignored
