"""How a request's tokens are chosen. Field names, ranges and meanings are vLLM's.

Pure Python (no torch), importable from everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from compiledllm.beam_search_params import BeamSearchParams as BeamSearchParams  # as in vLLM
from compiledllm.checks import (
    Rechecked,
    is_finite,
    is_int,
    plain_number,
    require,
    require_int,
    strict_fields,
    string_list,
    token_biases,
    token_id_list,
)
from compiledllm.structured_outputs import StructuredOutputsParams
from compiledllm.vllm_options import without_vllm_fields

LogitsProcessor = Callable[..., Any]

GREEDY_BELOW = 1e-5  # lower temperatures are greedy
ALL_TOKENS = -1  # as a number of log probabilities: those of the whole vocabulary
MAX_N = 128
MAX_STOP_STRINGS = 128
MAX_STOP_LENGTH = 1000  # characters
MAX_STOP_TOKEN_IDS = 128
MAX_ALLOWED_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 128
MAX_LOGPROB_TOKEN_IDS = 128


class RequestOutputKind(Enum):
    """What each output of a stream holds.

    CUMULATIVE: everything generated so far. DELTA: only what is new since the last output.
    FINAL_ONLY: everything, in a single output at the end.
    """

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@strict_fields("repetition detection field")
@dataclass(frozen=True, slots=True)
class RepetitionDetectionParams:
    """Ends a request whose output repeats itself, with finish_reason "repetition".

    The request ends once its output ends in `min_count` repetitions of a pattern of
    `min_pattern_size` to `max_pattern_size` tokens. max_pattern_size 0: off; min_pattern_size 0
    means 1.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        for name in ("max_pattern_size", "min_pattern_size", "min_count"):
            require_int(self, name, 0, 2**31)
        sizes = self.min_pattern_size, self.max_pattern_size
        require(
            sizes[0] <= sizes[1], "min_pattern_size", sizes[0], f"at most {sizes[1]}, the largest"
        )
        ok = self.max_pattern_size == 0 or self.min_count >= 2
        require(ok, "min_count", self.min_count, "at least 2")


@strict_fields("sampling field", without_vllm_fields)
@dataclass(slots=True)
class SamplingParams(Rechecked):
    """How the next token is chosen, when a request ends, and what its outputs contain.

    Unlike vLLM's 16, `max_tokens` defaults to None: generate to the end of the context.

    n: outputs per prompt, 1 to 128; they share the prompt's KV blocks.
    best_of: number of outputs to generate, at least n; the n with the highest cumulative logprob
        are returned.
    temperature: 0 to 2; 0 (below 1e-5) is greedy, and then top_p, top_k and min_p have no effect.
    top_p: (0, 1]; keep the smallest set of tokens whose probability reaches it.
    top_k: keep the k most likely tokens; 0 or -1 keeps all.
    min_p: 0 to 1; keep tokens at least this likely, relative to the most likely one. Filters apply
        in the order top_k, top_p, min_p; tokens that tie with the last one kept stay too.
    seed: fixes the request's own random stream; None or -1 draws one from the engine's seed.
    presence_penalty, frequency_penalty: -2 to 2; subtracted from the logit of a token in the
        output; presence_penalty once, frequency_penalty once per occurrence.
    repetition_penalty: above 0; divides positive logits and multiplies negative ones of tokens in
        the prompt or the output.
    max_tokens: largest number of tokens to generate; 0 computes only the prompt, for its log
        probabilities or to cache it; None: up to `max_model_len`.
    min_tokens: end-of-sequence and stop rules have no effect before this many tokens.
    stop: string or up to 128 strings that end the text (matched on detokenised text, not included
        in the output unless `include_stop_str_in_output`).
    stop_token_ids: up to 128 token ids that end the request.
    ignore_eos: continue after the end-of-sequence token.
    logprobs: number of most likely tokens whose log probabilities are returned with each token,
        beside the token's own; -1: the whole vocabulary; None: no log probabilities. The values
        are the model's, before penalties, temperature and filters.
    prompt_logprobs: the same for each token of the prompt; turns off reading the prefix cache.
    logprob_token_ids: up to 128 ids whose log probabilities are also returned with each token.
    logit_bias: token id -> number added to its logit, clamped to -100 to 100; up to 1024 ids.
    allowed_token_ids: up to 1024 ids; no other token is generated.
    bad_words: up to 128 strings; a string's last token is never generated after its other tokens.
    logits_processors: callables (logits), (output_token_ids, logits) or (prompt_token_ids,
        output_token_ids, logits) -> logits, all float32 [vocab]. Slow: in every step the request
        waits for its last token; other requests do not wait.
    repetition_detection: ends output that repeats itself; a RepetitionDetectionParams or a dict.
    structured_outputs: the form of the output, as a StructuredOutputsParams or a dict. No token
        that breaks the form is drawn, and the request ends once the form is complete. As with
        logits_processors, the request waits for its last token in every step. Cannot be combined
        with min_tokens or ignore_eos.
    truncate_prompt_tokens: keep this many tokens from the end of the prompt; -1: as many as fit.
    skip_reading_prefix_cache: compute the whole prompt; None: only if prompt_logprobs needs it.
    detokenize: False leaves `text` empty.
    skip_special_tokens: leave special tokens out of `text`.
    spaces_between_special_tokens: accepted as True only; the tokenizer decides.
    output_kind: what each output of a stream holds.
    stream_interval: tokens between two outputs of a stream, >= 1; the first output comes at once.
    extra_args: kept for the caller, who may read it again; the engine does not.

    Raises ValueError naming the field, the value and the range.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logits_processors: list[LogitsProcessor] | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    structured_outputs: StructuredOutputsParams | None = None
    truncate_prompt_tokens: int | None = None
    skip_reading_prefix_cache: bool | None = None
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            setattr(self, name, plain_number(getattr(self, name)))
        for name in _SWITCHES:
            value = getattr(self, name)
            require(isinstance(value, bool), name, value, "True or False")
        self._check_numbers()
        self._check_lengths()
        self._check_logprobs()
        self._check_strings()
        self._check_token_ids()
        self._check_kinds()
        if self.seed == -1:
            self.seed = None
        self.note_checked()

    def _check_numbers(self) -> None:
        for name, min_value, max_value in _RANGES:
            value = getattr(self, name)
            ok = is_finite(value) and min_value <= value <= max_value
            require(ok, name, value, f"in [{min_value:g}, {max_value:g}]")
        top_p, repetition = self.top_p, self.repetition_penalty
        require(is_finite(top_p) and 0 < top_p <= 1, "top_p", top_p, "in (0, 1]")
        ok = is_finite(repetition) and repetition > 0
        require(ok, "repetition_penalty", repetition, "a finite number above 0")
        top_k_ok = is_int(self.top_k) and -1 <= self.top_k < 2**63
        require(top_k_ok, "top_k", self.top_k, "an integer >= 1, or 0 or -1 for all tokens")
        seed_ok = self.seed is None or (is_int(self.seed) and -(2**63) <= self.seed < 2**63)
        require(seed_ok, "seed", self.seed, "None or a 64-bit integer")
        require_int(self, "n", 1, MAX_N)
        if self.best_of is not None:
            require_int(self, "best_of", self.n, MAX_N)

    def _check_lengths(self) -> None:
        for name, smallest in (("max_tokens", 0), ("stream_interval", 1)):
            value = getattr(self, name)
            ok = value is None or (is_int(value) and value >= smallest)
            require(ok, name, value, f"an integer >= {smallest} or None")
        min_ok = is_int(self.min_tokens) and self.min_tokens >= 0
        require(min_ok, "min_tokens", self.min_tokens, "an integer >= 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}"
            )
        keep = self.truncate_prompt_tokens
        ok = keep is None or (is_int(keep) and (keep == -1 or keep >= 1))
        require(ok, "truncate_prompt_tokens", keep, "an integer >= 1, -1 or None")

    def _check_logprobs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if isinstance(value, bool):  # OpenAI's chat API has a boolean here
                setattr(self, name, value := int(value) or None)
            ok = value is None or (is_int(value) and value >= ALL_TOKENS)
            require(ok, name, value, "an integer >= 0, or -1 for the whole vocabulary")

    def _check_strings(self) -> None:
        self.stop = string_list(self.stop, "stop", MAX_STOP_STRINGS)
        long = [text for text in self.stop if len(text) > MAX_STOP_LENGTH]
        require(not long, "stop", long and len(long[0]), f"at most {MAX_STOP_LENGTH} characters")
        self.bad_words = string_list(self.bad_words, "bad_words", MAX_BAD_WORDS)
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True; use stop_token_ids instead")

    def _check_token_ids(self) -> None:
        self.stop_token_ids = token_id_list(
            self.stop_token_ids, "stop_token_ids", MAX_STOP_TOKEN_IDS
        )
        if self.allowed_token_ids is not None:
            ids = token_id_list(self.allowed_token_ids, "allowed_token_ids", MAX_ALLOWED_TOKEN_IDS)
            require(bool(ids), "allowed_token_ids", ids, "None or at least one token id")
            self.allowed_token_ids = ids
        if self.logprob_token_ids is not None:
            self.logprob_token_ids = token_id_list(
                self.logprob_token_ids, "logprob_token_ids", MAX_LOGPROB_TOKEN_IDS
            )
        if self.logit_bias is not None:
            self.logit_bias = token_biases(self.logit_bias, "logit_bias", MAX_LOGIT_BIAS)

    def _check_kinds(self) -> None:
        processors = self.logits_processors
        if processors is not None:
            ok = isinstance(processors, (list, tuple)) and all(map(callable, processors))
            require(ok, "logits_processors", processors, "a list of callables")
            self.logits_processors = list(processors) or None
        if isinstance(self.repetition_detection, Mapping):
            self.repetition_detection = RepetitionDetectionParams(**self.repetition_detection)
        rule = self.repetition_detection
        ok = rule is None or isinstance(rule, RepetitionDetectionParams)
        require(ok, "repetition_detection", rule, "a RepetitionDetectionParams or None")
        self._check_structured_outputs()
        kind = self.output_kind
        require(isinstance(kind, RequestOutputKind), "output_kind", kind, "a RequestOutputKind")
        spaces = self.spaces_between_special_tokens
        must = "True (the tokenizer decides about spaces)"
        require(spaces, "spaces_between_special_tokens", spaces, must)
        extra = self.extra_args
        ok = extra is None or isinstance(extra, Mapping)
        require(ok, "extra_args", extra, "a mapping or None")
        skip = self.skip_reading_prefix_cache
        require(skip in (None, True, False), "skip_reading_prefix_cache", skip, "True or False")

    def _check_structured_outputs(self) -> None:
        if isinstance(self.structured_outputs, Mapping):
            self.structured_outputs = StructuredOutputsParams(**self.structured_outputs)
        form = self.structured_outputs
        ok = form is None or isinstance(form, StructuredOutputsParams)
        require(ok, "structured_outputs", form, "a StructuredOutputsParams or None")
        for name in ("min_tokens", "ignore_eos"):
            if form is not None and getattr(self, name):
                raise ValueError(
                    f"{name} does not go with structured_outputs, whose form says where the output "
                    f"ends; leave it out, got {getattr(self, name)}"
                )

    def clone(self) -> SamplingParams:
        """A copy whose lists and mappings are its own; logits processors are shared."""
        memo = {id(processor): processor for processor in self.logits_processors or ()}
        return copy.deepcopy(self, memo)

    def without_text(self) -> SamplingParams:
        """The parameters without texts (stop strings, words, forms), as the engine's core needs."""
        if not (self.stop or self.bad_words or self.structured_outputs or self.extra_args):
            return self
        params = copy.copy(self)
        params.stop, params.bad_words, params.structured_outputs = [], [], None
        params.extra_args = None
        return params

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def num_candidates(self) -> int:
        """Number of outputs to generate; `n` of them are returned."""
        return self.n if self.best_of is None else self.best_of

    @property
    def stop_strings(self) -> list[str]:
        """`stop`, which is always a list after construction."""
        assert isinstance(self.stop, list)
        return self.stop

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None or bool(self.logprob_token_ids)

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )

    @property
    def reads_prefix_cache(self) -> bool:
        if self.skip_reading_prefix_cache is None:
            return self.prompt_logprobs is None
        return not self.skip_reading_prefix_cache and self.prompt_logprobs is None


_SWITCHES = (
    "ignore_eos",
    "include_stop_str_in_output",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)
_RANGES = (
    ("temperature", 0.0, 2.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)
_NUMBERS = (
    *(name for name, _, _ in _RANGES),
    *("n", "best_of", "top_k", "top_p", "seed", "max_tokens", "min_tokens", "repetition_penalty"),
    *("logprobs", "prompt_logprobs", "stream_interval", "truncate_prompt_tokens"),
)
