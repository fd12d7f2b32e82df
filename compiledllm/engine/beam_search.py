"""Beam search on top of the engine: each round generates one more token of every beam.

With the prefix cache, a round recomputes at most the last block of each beam.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from compiledllm.beam_search_params import BeamSearchParams
from compiledllm.engine.prompts import Prompt
from compiledllm.engine.requests import RequestFactory
from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.outputs import BeamSearchOutput, BeamSearchSequence, PositionLogprobs
from compiledllm.sampling_params import SamplingParams


@dataclass(slots=True)
class _Search:
    """The search for one prompt: the beams that still grow, and the beams that have ended."""

    beams: list[BeamSearchSequence]
    ended: list[BeamSearchSequence] = field(default_factory=list)

    def can_grow(self, max_model_len: int) -> bool:
        return bool(self.beams) and len(self.beams[0].tokens) < max_model_len


def beam_search(
    requests: RequestFactory,
    next_logprobs: Callable[[list[list[int]], SamplingParams], list[PositionLogprobs]],
    prompts: list[Prompt],
    params: BeamSearchParams,
) -> list[BeamSearchOutput]:
    """The `beam_width` best sequences of each prompt, best first.

    next_logprobs: returns the log probabilities of the token after each sequence of token ids.
    """
    searches = [_Search([BeamSearchSequence(requests.tokenize(prompt))]) for prompt in prompts]
    one_token = SamplingParams(
        temperature=0,
        max_tokens=1,
        logprobs=min(2 * params.beam_width, requests.vocab_size),
        ignore_eos=True,
        detokenize=False,
    )
    for _ in range(params.max_tokens):
        growing = [search for search in searches if search.can_grow(requests.max_model_len)]
        if not growing:
            break
        tokens = [beam.tokens for search in growing for beam in search.beams]
        nexts = iter(next_logprobs(tokens, one_token))
        for search in growing:
            _extend(search, [next(nexts) for _ in search.beams], params, requests.eos_token_ids)
    return [_best(requests.tokenizer, search, params) for search in searches]


def _extend(
    search: _Search,
    nexts: list[PositionLogprobs],
    params: BeamSearchParams,
    eos_token_ids: frozenset[int],
) -> None:
    """Replace the beams by their best continuations; sequences that end move to `ended`.

    nexts: per beam, the log probabilities of its next token.
    """
    candidates: list[BeamSearchSequence] = []
    for beam, found in zip(search.beams, nexts, strict=True):
        for token_id, logprob in found.items():
            longer = BeamSearchSequence(
                tokens=[*beam.tokens, token_id],
                logprobs=[*beam.logprobs, found],
                cum_logprob=beam.cum_logprob + logprob.logprob,
            )
            if token_id in eos_token_ids and not params.ignore_eos:
                longer.finish_reason = "stop"
                search.ended.append(longer)
            else:
                candidates.append(longer)
    candidates.sort(key=lambda beam: beam.cum_logprob, reverse=True)
    search.beams = candidates[: params.beam_width]


def _best(
    tokenizer: Tokenizer | None, search: _Search, params: BeamSearchParams
) -> BeamSearchOutput:
    def score(beam: BeamSearchSequence) -> float:
        length = len(beam.tokens) - (beam.finish_reason == "stop")
        return float(beam.cum_logprob / length**params.length_penalty)

    for beam in search.beams:
        beam.finish_reason = "length"
    ordered = sorted(search.ended + search.beams, key=score, reverse=True)[: params.beam_width]
    for beam in ordered:
        keeps_end = params.include_stop_str_in_output or beam.finish_reason != "stop"
        shown = beam.tokens if keeps_end else beam.tokens[:-1]
        beam.text = None if tokenizer is None else tokenizer.decode(shown)
    return BeamSearchOutput(ordered)
