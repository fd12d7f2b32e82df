"""`/tokenize` and `/detokenize`, from a body's bytes to the answer's bytes."""

from __future__ import annotations

from typing import Any

import msgspec

from compiledllm.server.openai.bodies import parse
from compiledllm.server.openai.chat_prompt import Conversation, chat_prompt
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.jobs import JobMaker
from compiledllm.server.openai.protocol import DetokenizeRequest, TokenizeRequest


class TextTools:
    """Answers both routes. lanes: the threads in which the caller runs the methods."""

    def __init__(self, jobs: JobMaker) -> None:
        self.lanes = jobs.lanes
        self._jobs = jobs

    def tokenize(self, data: bytes) -> bytes:
        """Tokenise a text or a conversation, which may be longer than the model's context."""
        body = parse(TokenizeRequest, data)
        requests = self._jobs.factory()
        self._jobs.check_model(body.model)
        tokenizer = requests.require_tokenizer("/tokenize")
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        max_tokens = requests.max_tokenized(is_truncated=True)
        if body.prompt is not None:
            tokens = tokenizer.encode(body.prompt, body.add_special_tokens, max_tokens)
        else:
            conversation = Conversation.from_body(body, max_tokens)
            tokens = chat_prompt(conversation, tokenizer)["prompt_token_ids"]
        answer: dict[str, Any] = {"count": len(tokens), "max_model_len": requests.max_model_len}
        answer["tokens"] = tokens
        if body.return_token_strs:
            answer["token_strs"] = [tokenizer.token_text(token_id) for token_id in tokens]
        return msgspec.json.encode(answer)

    def detokenize(self, data: bytes) -> bytes:
        body = parse(DetokenizeRequest, data)
        requests = self._jobs.factory()
        self._jobs.check_model(body.model)
        max_tokens = requests.max_tokenized(is_truncated=True)
        if len(body.tokens) > max_tokens:
            got = len(body.tokens)
            raise ApiError(
                400, f"tokens must be at most {max_tokens} token ids, got {got}", "tokens"
            )
        for token_id in body.tokens and (min(body.tokens), max(body.tokens)):
            if not 0 <= token_id < requests.vocab_size:
                raise ApiError(
                    400,
                    f"tokens must be of the vocabulary, 0 to {requests.vocab_size - 1}, "
                    f"got {token_id}",
                    "tokens",
                )
        tokenizer = requests.require_tokenizer("/detokenize")
        return msgspec.json.encode({"prompt": tokenizer.decode(body.tokens, False)})
