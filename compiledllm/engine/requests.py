"""Makes requests from prompts and parameters: tokenises, checks, and makes `n` completions."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from compiledllm.config import ConfigError
from compiledllm.engine.params import (
    check_params,
    check_some_token_is_allowed,
    params_for_core,
    tokenize_bad_words,
)
from compiledllm.engine.prompts import PROMPT_KEYS, Prompt, as_token_ids
from compiledllm.engine.request_state import Completion, RequestState
from compiledllm.engine.served_model import ServedModel
from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.grammars.grammar import Grammars
from compiledllm.grammars.library import Vocabulary, require_llguidance
from compiledllm.log import log
from compiledllm.models.generation_config import generation_defaults, generation_eos_token_ids
from compiledllm.models.pooling import StoredPooling, stored_pooling
from compiledllm.models.reranker import StoredReranker, stored_reranker
from compiledllm.pooling_params import PoolingParams
from compiledllm.sampling_params import RequestOutputKind, SamplingParams
from compiledllm.types import RequestSpec

MAX_TRUNCATED_TOKENS = 2**17  # tokens of a text before truncation; tokenising takes some 50 MB


class RequestFactory:
    """Makes requests for one model.

    Attributes: `defaults` (sampling parameters of a request without any), `eos_token_ids`,
    `max_model_len`, `vocab_size`, `tokenizer`.
    """

    def __init__(self, model: ServedModel, tokenizer: Tokenizer | None) -> None:
        self._config = model.config
        self._model_path = model.model_path
        self._num_slots = model.num_slots
        self._random = random.Random(model.config.model.seed)
        self.max_model_len = model.max_model_len
        self._longer = ""  # second way out in the error about a prompt that is too long
        if model.max_position > self.max_model_len:
            self._longer = f" or raise max_model_len (the model knows up to {model.max_position})"
        self.vocab_size = model.vocab_size
        self.tokenizer = tokenizer
        self.eos_token_ids = self._find_eos_token_ids(model.eos_token_ids)
        self.defaults = self._default_sampling_params()
        self._grammars: Grammars | None = None

    def make(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        priority: int = 0,
        max_logprobs: int | None = None,
        cache_salt: str = "",
        compiles: bool = True,
        waits_for_batch: bool = False,
    ) -> RequestState:
        """A request with all its completions. Raises ValueError if the request is impossible.

        compiles: False: the caller calls `compile` itself, which blocks on a helper process.
        """
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {params!r}")
        self._check_priority(priority)
        params = params.checked_copy()  # which the caller cannot change
        text, token_ids = self._read_sampled_prompt(prompt, params)
        cache_salt = cache_salt or _salt_of(prompt)
        if max_logprobs is None:
            max_logprobs = self._config.model.max_logprobs
        check_params(params, self.vocab_size, max_logprobs)
        spec = RequestSpec(
            request_id=request_id if params.num_candidates == 1 else f"0_{request_id}",
            prompt_token_ids=token_ids,
            sampling_params=params_for_core(params),
            max_tokens=self._max_tokens(params, len(token_ids)),
            stop_token_ids=self._stop_token_ids(params),
            seed=self._random.getrandbits(63) if params.seed is None else params.seed,
            priority=priority,
            bad_words=self._bad_words(params),
            cache_salt=cache_salt,
            waits_for_batch=waits_for_batch,
        )
        check_some_token_is_allowed(spec)
        names = (f"{i}_{request_id}" for i in range(1, params.num_candidates))
        specs = [spec, *(make_sibling(spec, name, i) for i, name in enumerate(names, start=1))]
        completions = [Completion(i, s, params, self.tokenizer) for i, s in enumerate(specs)]
        state = RequestState(request_id, params, completions, text)
        if compiles:
            self.compile(state)
        return state

    def make_pooling(
        self,
        request_id: str,
        prompt: Prompt,
        params: PoolingParams,
        priority: int = 0,
        cache_salt: str = "",
    ) -> RequestState:
        """A request for the vector of a prompt, which draws no token. ValueError if impossible."""
        if not isinstance(params, PoolingParams):
            raise ValueError(f"pooling_params must be PoolingParams, got {params!r:.80}")
        self._check_priority(priority)
        text, token_ids = self._read_prompt(prompt, params.truncate_prompt_tokens, num_new=0)
        stored, size = self.pooling, params.dimensions
        if size is not None and size > stored.max_dimensions:
            raise ValueError(f"dimensions must be at most {stored.max_dimensions}, got {size}")
        kind = params.kind or stored.kind
        sampling = SamplingParams(
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_reading_prefix_cache=params.skip_reading_prefix_cache or kind == "mean",
        )
        spec = RequestSpec(
            request_id,
            token_ids,
            sampling,
            max_tokens=0,
            priority=priority,
            cache_salt=cache_salt or _salt_of(prompt),
            pooling=kind,
        )
        completion = Completion(0, spec, sampling, tokenizer=None)
        return RequestState(request_id, sampling, [completion], text)

    @cached_property
    def pooling(self) -> StoredPooling:
        """The checkpoint's pooling. Raises ConfigError if the engine does not support it."""
        return stored_pooling(self._model_path)

    @cached_property
    def reranker(self) -> StoredReranker | None:
        """How a reranker judges pairs; None for other models. Raises ConfigError."""
        return stored_reranker(self._model_path, self._config.model.model or "")

    def compile(self, state: RequestState) -> None:
        """Compile a request's structured_outputs, if set. Raises ValueError and CompilersBusy."""
        form = state.params.structured_outputs
        if form is not None:
            state.grammar = self.grammars().compile(form)
            more: Any = {"grammar": state.grammar.text, "reasoning": form.reasoning}
            for completion in state.completions:
                completion.spec = dataclasses.replace(completion.spec, **more)

    def tokenized(self, prompt: Prompt, params: SamplingParams) -> dict[str, Any]:
        """A prompt in the form that `make` takes, with its token ids, truncated and checked."""
        text, token_ids = self._read_sampled_prompt(prompt, params)
        return {"prompt": text, "prompt_token_ids": token_ids}

    def check_room(self, request: RequestSpec) -> None:
        """Raise ValueError if the KV cache could not hold a request even if it were alone.

        The scheduler checks this, too, when the request is added. The KV of the last token is never
        stored.
        """
        room = self._num_slots - request.num_prompt_tokens + 1
        if max(request.max_tokens, 1) > room:
            way_out = f"max_tokens <= {room} would fit" if room > 0 else "shorten the prompt"
            raise ValueError(
                f"a prompt of {request.num_prompt_tokens} tokens with max_tokens="
                f"{request.max_tokens} is more than the {self._num_slots} tokens of the KV cache; "
                f"{way_out}, or give the cache more room (num_kv_blocks, kv_cache_memory_bytes)"
            )

    def tokenize(self, prompt: Prompt) -> list[int]:
        """A prompt's token ids, checked."""
        _, token_ids = self._tokenize(prompt, is_truncated=False)
        self._check_prompt(token_ids)
        return token_ids

    def grammars(self) -> Grammars:
        """The compiler of structured_outputs, made once. Raises ValueError if it cannot be made."""
        if self._grammars is None:
            self._grammars = Grammars(self._vocabulary())
        return self._grammars

    def _vocabulary(self) -> Vocabulary:
        require_llguidance()
        tokenizer = self.require_tokenizer("structured_outputs")
        if not self.eos_token_ids:
            raise ValueError("structured_outputs needs an end-of-sequence token: there is none")
        eos = tuple(sorted(self.eos_token_ids))
        return Vocabulary(tokenizer.backend_json(), self.vocab_size, eos)

    def require_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"{what} needs a tokenizer, but skip_tokenizer_init=True; pass "
                '{"prompt_token_ids": [...]} instead'
            )
        return self.tokenizer

    def _stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        stop_ids = frozenset(params.stop_token_ids or ())
        return stop_ids if params.ignore_eos else stop_ids | self.eos_token_ids

    def _max_tokens(self, params: SamplingParams, num_prompt_tokens: int) -> int:
        """`max_tokens`, limited by the context; by default what context and KV cache hold."""
        room = self.max_model_len - num_prompt_tokens
        if params.max_tokens is not None:
            return min(room, params.max_tokens)
        return min(room, max(self._num_slots - num_prompt_tokens + 1, 1))

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not params.bad_words:
            return ()
        tokenizer = self.require_tokenizer("bad_words")
        return tokenize_bad_words(params.bad_words, tokenizer, self.vocab_size)

    def _read_sampled_prompt(
        self, prompt: Prompt, params: SamplingParams
    ) -> tuple[str | None, list[int]]:
        num_new = 1 if params.max_tokens is None else params.max_tokens
        return self._read_prompt(prompt, params.truncate_prompt_tokens, num_new)

    def _read_prompt(
        self, prompt: Prompt, keep: int | None, num_new: int
    ) -> tuple[str | None, list[int]]:
        """A prompt's text and its token ids, truncated and checked.

        The text is None if it is unknown or if token ids were cut off. keep:
        `truncate_prompt_tokens`. num_new: number of tokens to generate after the prompt.
        """
        text, token_ids = self._tokenize(prompt, keep is not None, num_new)
        if keep == -1:
            keep = max(self.max_model_len - num_new, 1)
        kept = token_ids if keep is None or keep >= len(token_ids) else token_ids[-keep:]
        self._check_prompt(kept, num_new)
        return (text if kept is token_ids else None), kept

    def _check_priority(self, priority: int) -> None:
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise ValueError(f"priority must be an integer, got {priority!r}")
        if priority and self._config.scheduler.scheduling_policy != "priority":
            raise ValueError(
                f"priority={priority} has no effect with scheduling_policy="
                f"'{self._config.scheduler.scheduling_policy}'; use scheduling_policy='priority'"
            )

    def max_tokenized(self, is_truncated: bool, num_new: int = 1) -> int:
        """Maximum number of tokens of a prompt; with `is_truncated`, of a text before truncation.

        num_new: number of tokens to generate after the prompt, of which one must have room.
        """
        max_tokens = self.max_model_len - min(num_new, 1)
        return max(max_tokens, MAX_TRUNCATED_TOKENS) if is_truncated else max_tokens

    def _tokenize(
        self, prompt: Prompt, is_truncated: bool, num_new: int = 1
    ) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            given = {name for name, value in prompt.items() if name in PROMPT_KEYS or value}
            if given.isdisjoint(("prompt", "prompt_token_ids")) or given - set(PROMPT_KEYS):
                raise ValueError(
                    "a prompt dict takes 'prompt' (text) or 'prompt_token_ids', and 'cache_salt', "
                    f"got keys {sorted(map(str, prompt))}"
                )
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), as_token_ids(prompt["prompt_token_ids"])
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            tokenizer = self.require_tokenizer("a text prompt")
            max_tokens = self.max_tokenized(is_truncated, num_new)
            return prompt, tokenizer.encode(prompt, True, max_tokens)
        return None, as_token_ids(prompt)

    def _check_prompt(self, token_ids: list[int], num_new: int = 1) -> None:
        if not token_ids:
            raise ValueError("the prompt is empty; give at least one token")
        vocab_size, max_len = self.vocab_size, self.max_model_len
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            index = next(i for i, t in enumerate(token_ids) if not 0 <= t < vocab_size)
            raise ValueError(
                f"token id {token_ids[index]} at position {index} of the prompt is out of range; "
                f"the vocabulary has ids 0 to {vocab_size - 1}"
            )
        if len(token_ids) + min(num_new, 1) > max_len:
            room = f"{max_len - 1} (and one to generate)" if num_new else f"{max_len}"
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens and max_model_len={max_len} leaves room "
                f"for {room}; shorten it{self._longer}"
            )

    def _default_sampling_params(self) -> SamplingParams:
        """vLLM's defaults; with generation_config="auto" the checkpoint's, which are logged."""
        if self._config.model.generation_config == "off":
            return SamplingParams()
        found = generation_defaults(self._model_path)
        try:
            params = SamplingParams(**found)
        except ValueError as error:
            raise ConfigError(
                f"{self._model_path}/generation_config.json: {error}; use generation_config='off'"
            ) from None
        shown = ", ".join(f"{name}={value}" for name, value in found.items()) or "no defaults"
        log.info("%-10s %s (generation_config.json)", "sampling", shown)
        return params

    def _find_eos_token_ids(self, config_ids: tuple[int, ...]) -> frozenset[int]:
        """As in transformers' generate: ids of generation_config or config, and the tokenizer's."""
        ids = generation_eos_token_ids(self._model_path) or config_ids
        own = self.tokenizer.eos_token_id if self.tokenizer else None
        known = frozenset(ids) | (frozenset() if own is None else frozenset((own,)))
        return frozenset(i for i in known if i < self.vocab_size)


def make_sibling(first: RequestSpec, request_id: str, index: int) -> RequestSpec:
    """A further completion of the same prompt: it shares the prompt's blocks, but not the seed.

    Only the first request returns the log probabilities of the prompt.
    """
    params = first.sampling_params
    if params.prompt_logprobs is not None:
        params = dataclasses.replace(params, prompt_logprobs=None)
    return dataclasses.replace(
        first,
        request_id=request_id,
        sampling_params=params,
        seed=(first.seed + index + 2**63) % 2**64 - 2**63,  # wraps like an int64
        sibling_id=first.request_id,
    )


def _salt_of(prompt: Prompt) -> str:
    return str(prompt.get("cache_salt") or "") if isinstance(prompt, Mapping) else ""
