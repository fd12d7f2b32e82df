"""Converts OpenAI's bodies to engine requests, and engine outputs to OpenAI's answers."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from compiledllm.engine.prompts import Prompt
from compiledllm.engine.requests import RequestFactory
from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.grammars.text import json_schema_of
from compiledllm.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from compiledllm.sampling_params import RequestOutputKind, SamplingParams
from compiledllm.server.openai.bodies import fields_of
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    Generation,
    Message,
    ResponseFormat,
    TokenizeRequest,
)
from compiledllm.server.openai.tools import ToolUse, plain_message
from compiledllm.structured_outputs import StructuredOutputsParams

DEFAULT_MAX_TOKENS = 16  # tokens of a text completion, OpenAI's default

# Template arguments that would change more than the rendered text.
_RESERVED = {"tokenize", "chat_template", "add_generation_prompt", "continue_final_message"}
_RESERVED |= {"conversation", "messages", "return_tensors", "return_dict", "padding", "truncation"}
_RESERVED |= {"max_length", "tokenizer_kwargs", "return_assistant_tokens_mask", "tools"}
_RESERVED |= {"self", "max_tokens"}

# Body fields that are sampling parameters of the same name; None keeps the default.
_SAME = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "ignore_eos"),
    *("min_tokens", "skip_special_tokens", "spaces_between_special_tokens", "prompt_logprobs"),
    *("allowed_token_ids", "bad_words", "logprob_token_ids", "truncate_prompt_tokens"),
    "include_stop_str_in_output",
)


def sampling_params(body: Generation, defaults: SamplingParams, **more: Any) -> SamplingParams:
    """The body's sampling parameters over the server's defaults. ApiError names a wrong field."""
    given = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    if body.repetition_detection is not None:
        given["repetition_detection"] = body.repetition_detection.plain()
    base = {
        name: getattr(defaults, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    try:
        return SamplingParams(**(base | given | more | {"output_kind": kind}))
    except ValueError as error:
        raise ApiError(400, str(error), str(error).partition(" ")[0]) from None


def completion_params(body: CompletionRequest, defaults: SamplingParams) -> SamplingParams:
    if body.suffix:
        raise ApiError(400, "suffix is not supported: leave it out", "suffix")
    if body.stream and body.best_of is not None and body.best_of > (body.n or 1):
        raise ApiError(400, "best_of cannot be streamed: leave out stream or best_of", "best_of")
    if body.logprob_token_ids and not body.logprobs:
        raise ApiError(
            400,
            f"logprob_token_ids needs logprobs of at least 1, got {body.logprobs}; give logprobs",
            "logprob_token_ids",
        )
    more: dict[str, Any] = {"best_of": body.best_of, "logprobs": body.logprobs}
    limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    more["max_tokens"] = max(limit, 1)  # the engine's minimum; hidden if max_tokens is 0
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        more["prompt_logprobs"] = body.logprobs
    if body.max_tokens == 0:
        more["min_tokens"] = 0
    more["structured_outputs"] = form_of(body)
    return sampling_params(body, defaults, **more)


def form_of(body: Generation) -> StructuredOutputsParams | None:
    """The structured output that the body asks for. Raises ApiError naming the field."""
    wanted, given = body.response_format, body.structured_outputs
    name = "response_format" if given is None else "structured_outputs"
    if wanted is not None and wanted.type != "text" and given is not None:
        raise ApiError(400, "give either response_format or structured_outputs, not both", name)
    try:
        if given is not None:
            return StructuredOutputsParams(**given.plain())
        return None if wanted is None else _form_of_format(wanted)
    except ValueError as error:
        raise ApiError(400, str(error).replace("structured_outputs", name), name) from None


def _form_of_format(wanted: ResponseFormat) -> StructuredOutputsParams | None:
    if wanted.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise ValueError('response_format needs a json_schema: {"name": ..., "schema": {...}}')
        return StructuredOutputsParams(json=wanted.json_schema.schema_)
    if wanted.type == "structural_tag":
        tag = {"structures": wanted.structures, "triggers": wanted.triggers}
        return StructuredOutputsParams(structural_tag=tag)
    return None


def answer_schema(body: ChatRequest) -> dict[str, Any] | None:
    """The JSON schema of an answer that may call tools instead; None: any text, or no tools."""
    form = form_of(body)
    if form is None or not body.tools or body.tool_choice == "none":
        return None
    if form.json is None and form.json_object is None:
        raise ApiError(400, "tools go with JSON only: leave structured_outputs out", "tools")
    return json_schema_of(form)


def form_field(body: Generation) -> str:
    """The field of the body that asks for structured output, if any does."""
    if body.structured_outputs is not None:
        return "structured_outputs"
    return "tools" if isinstance(body, ChatRequest) and body.tools else "response_format"


def as_form_error(name: str, error: ValueError) -> ApiError:
    """An error about structured output, with the name of the field that asked for it."""
    return ApiError(400, str(error).replace("structured_outputs", name, 1), name)


def as_field_error(body: Generation, error: ValueError) -> ApiError:
    """An error about the request, with the name of the field concerned."""
    text = str(error)
    is_chat = isinstance(body, ChatRequest)
    if text.startswith("structured_outputs"):
        return as_form_error(form_field(body), error)
    first = re.split(r"\W", text, maxsplit=1)[0]
    if first in fields_of(type(body)):
        return ApiError(400, text, first)
    is_about_prompt = text.startswith(("the prompt", "a prompt", "token id", "messages"))
    prompt = "messages" if is_chat else "prompt"
    return ApiError(400, text, prompt if is_about_prompt else None)


def chat_params(body: ChatRequest, defaults: SamplingParams, use: ToolUse | None) -> SamplingParams:
    """Sampling parameters of a chat. With tools, special tokens stay: they may be call markers."""
    if body.chat_template is not None:
        raise ApiError(400, "chat_template in a request is not allowed", "chat_template")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", "top_logprobs")
    limit = body.asked_tokens[1] or defaults.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    more: dict[str, Any] = {}
    if use is None:
        more["structured_outputs"] = form_of(body)
    else:
        more |= {"structured_outputs": use.form, "skip_special_tokens": False}
    return sampling_params(body, defaults, max_tokens=limit, logprobs=logprobs, **more)


def completion_prompts(body: CompletionRequest, requests: RequestFactory) -> list[Prompt]:
    """The body's prompts, tokenised here if special tokens must not be added."""
    prompt: Any = body.prompt
    many = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if body.add_special_tokens or not isinstance(many[0], str):
        return list(many)
    tokenizer = requests.require_tokenizer("a text prompt")
    most = requests.max_tokenized(body.truncate_prompt_tokens is not None)
    return [
        {"prompt": text, "prompt_token_ids": tokenizer.encode(text, False, most)} for text in many
    ]


@dataclass(frozen=True, slots=True)
class Conversation:
    """The input of a chat template.

    reasoning_effort: passed only to templates that use the variable. max_tokens: a longer prompt is
    an error.
    """

    messages: list[Message]
    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: dict[str, Any]
    max_tokens: int
    reasoning_effort: str | None = None

    @classmethod
    def of(cls, body: ChatRequest | TokenizeRequest, max_tokens: int) -> Conversation:
        return cls(
            body.messages or [],
            body.add_generation_prompt and not body.continue_final_message,
            body.continue_final_message,
            body.chat_template_kwargs or {},
            max_tokens,
            body.reasoning_effort if isinstance(body, ChatRequest) else None,
        )


def chat_prompt(
    conversation: Conversation, tokenizer: Tokenizer, use: ToolUse | None = None
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
    more: dict[str, Any] = {} if use is None else {"tools": use.tools}
    if knows_effort(tokenizer) and conversation.reasoning_effort is not None:
        more["reasoning_effort"] = conversation.reasoning_effort
    text, token_ids = tokenizer.encode_chat(
        [plain_message(message) for message in messages],
        max_tokens=max_tokens,
        add_generation_prompt=conversation.add_generation_prompt,
        continue_final_message=conversation.continue_final_message,
        **(more | given),
    )
    return {"prompt": text, "prompt_token_ids": token_ids}


def knows_effort(tokenizer: Tokenizer) -> bool:
    """Whether the chat template uses reasoning_effort."""
    return "reasoning_effort" in tokenizer.chat_template_text


# -- responses -------------------------------------------------------------------------------------


def usage(
    outputs: Iterable[RequestOutput], num_output_tokens: int, shows_cached: bool = True
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


def envelope(kind: str, request_id: str, model: str) -> dict[str, Any]:
    return {"id": request_id, "object": kind, "created": int(time.time()), "model": model}


def finish_fields(completion: CompletionOutput) -> dict[str, Any]:
    """The finish reason in OpenAI's terms, which lack "repetition", and vLLM's stop_reason."""
    reason = completion.finish_reason
    known = "stop" if reason == "repetition" else reason
    return {"finish_reason": known, "stop_reason": completion.stop_reason}


def ended_by_calls(completion: CompletionOutput) -> dict[str, Any]:
    """The finish reason of an answer that calls tools and was not truncated."""
    return {"finish_reason": "tool_calls"} if completion.finish_reason == "stop" else {}


def chat_logprobs(
    completion: CompletionOutput, top: int, tokenizer: Tokenizer | None
) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    content = []
    ids, text, offsets = completion.token_ids, completion.text, completion.text_offsets or []
    shown = _shown_texts(ids, text, offsets, tokenizer)
    for token_id, own, found in zip(ids, shown, completion.logprobs, strict=True):
        entry, *others = _entries(found, token_id, top, tokenizer)
        if own != entry["token"]:
            entry |= {"token": own, "bytes": list(own.encode())}
        content.append(entry | {"top_logprobs": others})
    return {"content": content, "refusal": None}


def _entries(
    found: PositionLogprobs, token_id: int, top: int, tokenizer: Tokenizer | None
) -> list[dict[str, Any]]:
    """The sampled token's entry, then the most likely tokens' and the requested tokens' entries."""
    return [_entry(i, found, tokenizer) for i in (token_id, *_ranked(found, top))]


def _ranked(found: PositionLogprobs, top: int) -> list[int]:
    """Token ids: the most likely tokens, then the tokens that were asked for."""
    best = sorted(
        (i for i, entry in found.items() if entry.rank is not None and entry.rank <= top),
        key=lambda i: found[i].rank or 0,
    )
    return best + [i for i, entry in found.items() if entry.rank is None]


def _entry(token_id: int, found: PositionLogprobs, tokenizer: Tokenizer | None) -> dict[str, Any]:
    text = _token_text(token_id, tokenizer)
    piece = text.encode() if tokenizer is None else tokenizer.token_bytes(token_id)
    return {"token": text, "logprob": _finite(found[token_id].logprob), "bytes": list(piece)}


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity


def _token_text(token_id: int, tokenizer: Tokenizer | None) -> str:
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)


def _shown_texts(
    token_ids: list[int], text: str, offsets: list[int], tokenizer: Tokenizer | None
) -> list[str]:
    """The vocabulary's text of each token, without a space at its edge that the text lacks."""
    texts = [_token_text(token_id, tokenizer) for token_id in token_ids]
    for i, (start, end) in enumerate(zip(offsets, [*offsets, len(text)][1:], strict=True)):
        shown = text[max(start, 0) : end]
        is_whole = start >= 0 and (shown or start == 0)  # otherwise the text lacks the token
        if is_whole and shown != texts[i] and shown.strip(" ") == texts[i].strip(" "):
            texts[i] = shown
    return texts


def text_logprobs(
    token_ids: list[int],
    found: list[PositionLogprobs | None],
    top: int,
    tokenizer: Tokenizer | None,
    text: str,
    offsets: list[int],
) -> dict[str, Any]:
    """Log probabilities of a text completion; the first token of a prompt has none.

    offsets: the position in `text` at which each token begins.
    """
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for token_id, entries in zip(token_ids, found, strict=True):
        if entries is None:
            values.append(None)
            tops.append(None)
        else:
            values.append(_finite(entries[token_id].logprob))
            tops.append(_by_text(entries, token_id, top, tokenizer) if top else None)
    return {
        "tokens": _shown_texts(token_ids, text, offsets, tokenizer),
        "token_logprobs": values,
        "top_logprobs": tops if top else None,
        "text_offset": offsets,
    }


def _by_text(
    found: PositionLogprobs, own: int, top: int, tokenizer: Tokenizer | None
) -> dict[str, float]:
    """Map token texts to log probabilities, the most likely first and the sampled token last.

    Among tokens with the same text, the sampled token has the text as its key, or else the most
    likely one; the other keys are "token_id:N".
    """
    ranked = _ranked(found, top)
    keys: dict[str, int] = {}
    for token_id in dict.fromkeys((own, *ranked)):
        text = _token_text(token_id, tokenizer)
        keys[text if text and text not in keys else f"token_id:{token_id}"] = token_id
    key_of = {token_id: key for key, token_id in keys.items()}
    return {key_of[i]: _finite(found[i].logprob) for i in dict.fromkeys((*ranked, own))}
