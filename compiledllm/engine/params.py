"""Checks sampling parameters against a model's vocabulary, and turns bad words into token ids."""

from __future__ import annotations

import dataclasses

from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.sampling_params import ALL_TOKENS, MAX_BAD_WORDS, SamplingParams
from compiledllm.types import RequestSpec


def check_params(params: SamplingParams, vocab_size: int, max_logprobs: int) -> None:
    """Raise ValueError for parameters that this model cannot serve."""
    form = params.structured_outputs
    reasoning = None if form is None else form.reasoning
    ids = {
        "structured_outputs.reasoning": None if reasoning is None else reasoning.token_ids,
        "stop_token_ids": params.stop_token_ids,
        "allowed_token_ids": params.allowed_token_ids,
        "logprob_token_ids": params.logprob_token_ids,
        "logit_bias": params.logit_bias,
    }
    for name, values in ids.items():
        for token_id in values or ():
            if token_id >= vocab_size:
                raise ValueError(
                    f"{name} has {token_id}; the vocabulary has ids 0 to {vocab_size - 1}"
                )
    max_count = vocab_size if max_logprobs == ALL_TOKENS else max_logprobs
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and (vocab_size if value == ALL_TOKENS else value) > max_count:
            raise ValueError(
                f"{name} must be at most {max_logprobs}, got {value}; the engine option "
                "max_logprobs is the limit (-1: none)"
            )


def check_some_token_is_allowed(request: RequestSpec) -> None:
    """Raise ValueError if every token that is allowed as the first token is also banned."""
    params = request.sampling_params
    if params.allowed_token_ids is not None:
        banned = {word[0] for word in request.bad_words if len(word) == 1}
        banned |= request.stop_token_ids if params.min_tokens else set()
        if banned.issuperset(params.allowed_token_ids):
            raise ValueError(
                "allowed_token_ids has only tokens that bad_words or min_tokens ban; allow another"
            )


def params_for_core(params: SamplingParams) -> SamplingParams:
    """The parameters that the core needs: without texts, and with logprobs to rank candidates."""
    if params.num_candidates > params.n and not params.wants_logprobs:
        params = dataclasses.replace(params, logprobs=0)
    return params.without_text()


def tokenize_bad_words(
    words: list[str], tokenizer: Tokenizer, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """Token ids of each word at the beginning of a text, and after a space.

    As in vLLM, the second variant is left out unless the space merges into the word's first token.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
        if not bare:
            raise ValueError(f"bad_words has {word!r}, which is no token")
        found[bare] = None
        if spaced and spaced[0] != bare[0] and len(spaced) == len(bare):
            found[spaced] = None
    if len(found) > 2 * MAX_BAD_WORDS or any(i >= vocab_size for ids in found for i in ids):
        raise ValueError("bad_words has tokens that the model does not know")
    return tuple(found)
