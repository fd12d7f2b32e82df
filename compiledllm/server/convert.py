"""Between OpenAI's bodies and the engine's requests and outputs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from compiledllm.engine.prompts import Prompt
from compiledllm.engine.requests import RequestFactory
from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.grammars.text import json_schema_of
from compiledllm.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from compiledllm.sampling_params import RequestOutputKind, SamplingParams
from compiledllm.server.errors import ApiError
from compiledllm.server.protocol import (
    ChatRequest,
    CompletionRequest,
    Generation,
    Message,
    ResponseFormat,
)
from compiledllm.server.tools import ToolUse, plain_message
from compiledllm.structured_outputs import StructuredOutputsParams

# Template arguments that decide about more than the template.
_RESERVED = {"tokenize", "chat_template", "add_generation_prompt", "continue_final_message"}
_RESERVED |= {"conversation", "messages", "return_tensors", "return_dict", "padding", "truncation"}
_RESERVED |= {"max_length", "tokenizer_kwargs", "return_assistant_tokens_mask", "tools"}

# Fields of a body that are sampling parameters of the same name; None leaves the default.
_SAME = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "ignore_eos"),
    *("min_tokens", "skip_special_tokens", "spaces_between_special_tokens", "prompt_logprobs"),
    *("allowed_token_ids", "bad_words", "logprob_token_ids", "truncate_prompt_tokens"),
    "include_stop_str_in_output",
)


def sampling_params(body: Generation, defaults: SamplingParams, **more: Any) -> SamplingParams:
    """The body's own over the server's defaults. Raises ApiError naming the field."""
    given = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    if body.repetition_detection is not None:
        given["repetition_detection"] = body.repetition_detection.model_dump(
            exclude=set(body.repetition_detection.unknown_fields)
        )
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
    more: dict[str, Any] = {"best_of": body.best_of, "logprobs": body.logprobs}
    # One token is the least the engine makes; nobody sees it.
    more["max_tokens"] = 1 if body.max_tokens == 0 else body.max_tokens
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        more["prompt_logprobs"] = body.logprobs
    if body.max_tokens == 0:
        more["min_tokens"] = 0
    more["structured_outputs"] = form_of(body)
    return sampling_params(body, defaults, **more)


def form_of(body: Generation) -> StructuredOutputsParams | None:
    """Of the answer, by response_format or structured_outputs. Raises ApiError naming the field."""
    wanted, given = body.response_format, body.structured_outputs
    name = "response_format" if given is None else "structured_outputs"
    if wanted is not None and wanted.type != "text" and given is not None:
        raise ApiError(400, "give either response_format or structured_outputs, not both", name)
    try:
        if given is not None:
            unknown = set(given.unknown_fields)
            return StructuredOutputsParams(**given.model_dump(by_alias=True, exclude=unknown))
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
    """Of an answer that may call tools instead; None: any text, or no tools."""
    form = form_of(body)
    if form is None or not body.tools or body.tool_choice == "none":
        return None
    if form.json is None and form.json_object is None:
        raise ApiError(400, "tools go with JSON only: leave structured_outputs out", "tools")
    return json_schema_of(form)


def as_form_error(body: Generation, error: ValueError) -> Exception:
    """The error; one about the answer's form under the name of the field that asked for it."""
    text = str(error)
    if not text.startswith("structured_outputs"):
        return error
    name = "structured_outputs"
    if body.structured_outputs is None:
        name = "tools" if isinstance(body, ChatRequest) and body.tools else "response_format"
    return ApiError(400, text.replace("structured_outputs", name, 1), name)


def chat_params(body: ChatRequest, defaults: SamplingParams, use: ToolUse | None) -> SamplingParams:
    """use: of tools, whose markers may be special tokens."""
    if body.chat_template is not None:
        raise ApiError(400, "chat_template in a request is not allowed", "chat_template")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", "top_logprobs")
    limit = body.max_completion_tokens or body.max_tokens or defaults.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    more: dict[str, Any] = {}
    if use is None:
        more["structured_outputs"] = form_of(body)
    else:
        more |= {"structured_outputs": use.form, "skip_special_tokens": False}
    return sampling_params(body, defaults, max_tokens=limit, logprobs=logprobs, **more)


def completion_prompts(body: CompletionRequest, requests: RequestFactory) -> list[Prompt]:
    """One or many, as token ids where the text's own special tokens are not wanted."""
    prompt: Any = body.prompt
    many = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if body.add_special_tokens or not isinstance(many[0], str):
        return list(many)
    tokenizer = requests.require_tokenizer("a text prompt")
    return [
        {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}
        for text in many
    ]


def chat_prompt(
    messages: list[Message],
    add_generation_prompt: bool,
    continue_final_message: bool,
    template_kwargs: dict[str, Any] | None,
    requests: RequestFactory,
    use: ToolUse | None = None,
    reasoning_effort: str | None = None,
) -> dict[str, Any]:
    """A conversation through the model's chat template, which may take tools and an effort."""
    reserved = _RESERVED & set(template_kwargs or {})
    if reserved:
        raise ApiError(
            400, f"chat_template_kwargs must not have {sorted(reserved)}", "chat_template_kwargs"
        )
    if add_generation_prompt and continue_final_message:
        add_generation_prompt = False
    tokenizer = requests.require_tokenizer("a conversation")
    more: dict[str, Any] = {} if use is None else {"tools": use.tools}
    if reasoning_effort is not None and "reasoning_effort" in tokenizer.chat_template_text:
        more["reasoning_effort"] = reasoning_effort
    text, token_ids = tokenizer.encode_chat(
        [plain_message(message) for message in messages],
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **(more | (template_kwargs or {})),
    )
    return {"prompt": text, "prompt_token_ids": token_ids}


# -- responses -------------------------------------------------------------------------------------


def usage(
    outputs: Iterable[RequestOutput], num_output_tokens: int, shows_cached: bool = True
) -> dict[str, Any]:
    """shows_cached: whether how much of the prompts was found in the prefix cache is told."""
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
    """OpenAI knows "stop" and "length"; "repetition" stops, too. stop_reason is vLLM's."""
    reason = completion.finish_reason
    known = "stop" if reason == "repetition" else reason
    return {"finish_reason": known, "stop_reason": completion.stop_reason}


def ended_by_calls(completion: CompletionOutput) -> dict[str, Any]:
    """The reason to show for an answer that calls tools and was not cut off."""
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
    """The token's own entry, then those of the most likely and of those asked for."""
    return [_entry(i, found, tokenizer) for i in (token_id, *_ranked(found, top))]


def _ranked(found: PositionLogprobs, top: int) -> list[int]:
    """Token ids: the most likely, then those that were asked for."""
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
    """Each token as the vocabulary has it, but for a space at its edge that the text lacks."""
    texts = [_token_text(token_id, tokenizer) for token_id in token_ids]
    for i, (start, end) in enumerate(zip(offsets, [*offsets, len(text)][1:], strict=True)):
        shown = text[max(start, 0) : end]
        is_whole = start >= 0 and (shown or start == 0)  # else nothing of it is in the text
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
    """Of a text completion; the first token of a prompt has none.

    offsets: where each token begins in `text`.
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
    """Text of a token -> its log probability, the most likely first and the own one last.

    Of tokens with the same text the own one has it, else the first; others are "token_id:N".
    """
    ranked = _ranked(found, top)
    keys: dict[str, int] = {}
    for token_id in dict.fromkeys((own, *ranked)):
        text = _token_text(token_id, tokenizer)
        keys[text if text and text not in keys else f"token_id:{token_id}"] = token_id
    key_of = {token_id: key for key, token_id in keys.items()}
    return {key_of[i]: _finite(found[i].logprob) for i in dict.fromkeys((*ranked, own))}
