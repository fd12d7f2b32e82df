"""Renders a conversation to a prompt with the model's chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.protocol import ChatRequest, Message, TokenizeRequest
from compiledllm.server.openai.tools import ToolUse, plain_message

# Arguments of `encode_chat` and `apply_chat_template` that a request must not set.
_RESERVED = {"tokenize", "chat_template", "add_generation_prompt", "continue_final_message"}
_RESERVED |= {"conversation", "messages", "return_tensors", "return_dict", "padding", "truncation"}
_RESERVED |= {"max_length", "tokenizer_kwargs", "return_assistant_tokens_mask", "tools"}
_RESERVED |= {"self", "max_tokens"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """The input of a chat template.

    reasoning_effort: has an effect only if the template has a variable for it. max_tokens: a longer
    prompt is an error.
    """

    messages: list[Message]
    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: dict[str, Any]
    max_tokens: int
    reasoning_effort: str | None = None

    @classmethod
    def from_body(
        cls,
        body: ChatRequest | TokenizeRequest,
        max_tokens: int,
        reasoning_effort: str | None = None,
    ) -> Conversation:
        return cls(
            body.messages or [],
            body.add_generation_prompt and not body.continue_final_message,
            body.continue_final_message,
            body.chat_template_kwargs or {},
            max_tokens,
            reasoning_effort,
        )


def chat_prompt(
    conversation: Conversation, tokenizer: Tokenizer, tool_use: ToolUse | None = None
) -> dict[str, Any]:
    """Render a conversation with the model's chat template, with tools and reasoning effort."""
    given = conversation.template_kwargs
    reserved = _RESERVED & set(given)
    if reserved:
        raise ApiError(
            400, f"chat_template_kwargs must not have {sorted(reserved)}", "chat_template_kwargs"
        )
    messages, max_tokens = conversation.messages, conversation.max_tokens
    tokenizer.check_length(sum(message.num_characters for message in messages), max_tokens)
    more: dict[str, Any] = {} if tool_use is None else {"tools": tool_use.tools}
    if conversation.reasoning_effort is not None:
        more |= effort_arguments(tokenizer, conversation.reasoning_effort)
    text, token_ids = tokenizer.encode_chat(
        [plain_message(message) for message in messages],
        max_tokens=max_tokens,
        add_generation_prompt=conversation.add_generation_prompt,
        continue_final_message=conversation.continue_final_message,
        **(more | given),
    )
    return {"prompt": text, "prompt_token_ids": token_ids}


def effort_arguments(tokenizer: Tokenizer, effort: str) -> dict[str, Any]:
    """The chat template's arguments for this reasoning effort; empty if the template has none."""
    template = tokenizer.chat_template_text
    if "reasoning_effort" in template:
        return {"reasoning_effort": effort}
    if effort == "none" and "enable_thinking" in template:
        return {"enable_thinking": False}
    return {}
