"""Answers of `/v1/completions`."""

from __future__ import annotations

from typing import Any

from compiledllm.engine.prompts import Prompt
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
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.events import Template, event, hole
from compiledllm.server.openai.logprobs import text_logprobs
from compiledllm.server.openai.protocol import CompletionRequest
from compiledllm.server.openai.sampling import sampling_params, structured_outputs_from

DEFAULT_MAX_TOKENS = 16  # OpenAI's default
_KIND = "text_completion"


class CompletionAnswer(Answer[CompletionRequest]):
    """Each choice is text, of one or several prompts, which `echo` repeats in front of the text."""

    body_type = CompletionRequest
    id_prefix = "cmpl"

    def __init__(self, body: CompletionRequest, context: Context) -> None:
        super().__init__(body, context)
        self.params = _params(body, context.requests.defaults)
        self.keeps_prompt_text = body.echo
        self._tokenizer = context.requests.tokenizer
        self._num_top = body.logprobs  # besides the token's own; None: no log probabilities
        self._shows_token_ids = body.return_token_ids
        self._prompt_fields = PromptFields(body)
        self._usage = StreamUsage(body, context.settings.shows_cached_tokens)
        self._num_shown: dict[int, int] = {}  # characters that the stream has shown, by choice
        self._template: Template | None = None  # for a choice's events after the first

    def prompts(self, body: CompletionRequest) -> list[Prompt]:
        """The body's prompts, tokenised here if special tokens must not be added."""
        prompt: Any = body.prompt
        many = prompt if body.has_many_prompts else [prompt]
        if body.add_special_tokens or not isinstance(many[0], str):
            return list(many)
        requests = self._context.requests
        tokenizer = requests.require_tokenizer("a text prompt")
        max_tokens = requests.max_tokenized(body.truncate_prompt_tokens is not None)
        return [
            {"prompt": text, "prompt_token_ids": tokenizer.encode(text, False, max_tokens)}
            for text in many
        ]

    # -- whole -------------------------------------------------------------------------------------

    def whole(self, outputs: list[RequestOutput], num_output_tokens: int) -> dict[str, Any]:
        choices = [
            self._choice(self._index(prompt_index, completion), output, completion)
            for prompt_index, output in enumerate(outputs)
            for completion in output.outputs
        ]
        counts = usage(outputs, num_output_tokens, self._context.settings.shows_cached_tokens)
        return envelope(_KIND, self._context) | {"choices": choices, "usage": counts}

    def _index(self, prompt_index: int, completion: CompletionOutput) -> int:
        return prompt_index * self.params.n + completion.index

    def _choice(
        self,
        index: int,
        output: RequestOutput,
        completion: CompletionOutput,
        shows_prompt: bool = True,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index} | finish_fields(completion)
        if shows_prompt:
            choice |= self._prompt_fields.of(output)
        if self._shows_token_ids:
            choice["token_ids"] = completion.token_ids
        if shows_prompt and self.keeps_prompt_text:
            return choice | self._echoed(output, completion)
        found, offsets = list(completion.logprobs or []), list(completion.text_offsets or [])
        logprobs = self._logprobs(completion.token_ids, found, completion.text, offsets)
        return choice | {"text": completion.text, "logprobs": logprobs}

    def _echoed(self, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """The prompt's text followed by the completion's, with the log probabilities of both."""
        prompt_text = self._prompt_text(output)
        text = prompt_text + completion.text
        if self._num_top is None:
            return {"text": text, "logprobs": None}
        ends = [len(prompt_text) + offset for offset in completion.text_offsets or []]
        offsets = self._prompt_offsets(output, prompt_text) + ends
        token_ids = output.prompt_token_ids + completion.token_ids
        found = list(output.prompt_logprobs or []) + list(completion.logprobs or [])
        return {"text": text, "logprobs": self._logprobs(token_ids, found, text, offsets)}

    def _logprobs(
        self, token_ids: list[int], found: list[Any], text: str, offsets: list[int]
    ) -> dict[str, Any] | None:
        if self._num_top is None:
            return None
        return text_logprobs(token_ids, found, self._num_top, self._tokenizer, text, offsets)

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)

    def _prompt_offsets(self, output: RequestOutput, text: str) -> list[int]:
        """The position in the prompt's text at which each token begins."""
        if self._tokenizer is None:
            return [0] * len(output.prompt_token_ids)
        return self._tokenizer.pieces.offsets(output.prompt_token_ids, text)

    # -- streams -----------------------------------------------------------------------------------

    def begin(self) -> bytes:
        has_more = self._shows_token_ids or self.params.wants_logprobs or self._usage.in_events
        if not has_more:
            choice = {name: hole(name) for name in ("index", "finish_reason", "stop_reason")}
            chunk = self._chunk([choice | {"text": hole("text"), "logprobs": None}])
            self._template = Template(chunk | {"created": hole("created")})
        return b""

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return envelope(_KIND, self._context) | {"choices": choices}

    def grow(self, prompt_index: int, output: RequestOutput, completion: CompletionOutput) -> bytes:
        index = self._index(prompt_index, completion)
        if self._usage.is_requested:
            self._usage.add(prompt_index, output, len(completion.token_ids))
        has_begun = index in self._num_shown
        if self._template is not None and has_begun and completion.text:
            return self._template.fill(
                index, completion.text, shown_reason(completion), completion.stop_reason
            )
        choice = self._choice(index, output, completion, shows_prompt=not has_begun)
        self._continue(choice)
        chunk = self._chunk([choice])
        if self._usage.in_events:
            chunk["usage"] = self._usage.for_prompt(prompt_index)
        return event(chunk)

    def _continue(self, choice: dict[str, Any]) -> None:
        """Count a choice's offsets from the beginning of the text that its events make together."""
        shown = self._num_shown.get(choice["index"], 0)
        if choice["logprobs"] is not None:
            starts = choice["logprobs"]["text_offset"]
            choice["logprobs"]["text_offset"] = [shown + start for start in starts]
        self._num_shown[choice["index"]] = shown + len(choice["text"])

    def end(self) -> bytes:
        if not self._usage.at_end:
            return b""
        return event(self._chunk([]) | {"usage": self._usage.total()})


def _params(body: CompletionRequest, defaults: SamplingParams) -> SamplingParams:
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
    more["max_tokens"] = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        more["prompt_logprobs"] = body.logprobs
    if body.max_tokens == 0:
        more["min_tokens"] = 0
    more["structured_outputs"] = structured_outputs_from(body)
    return sampling_params(body, defaults, **more)
