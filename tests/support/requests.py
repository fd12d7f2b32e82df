"""Makes requests for the core, with defaults for fields that a test is not about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compiledllm.sampling_params import SamplingParams
from compiledllm.types import Grammar, NewRequest, Request, RequestSpec


def make_request(
    request_id: str = "r",
    prompt_token_ids: Sequence[int] = (1,),
    params: SamplingParams | None = None,
    max_tokens: int = 9,
    grammar: Grammar | None = None,
    arrival_time: float | None = None,
    **more: Any,
) -> Request:
    """A new request. more: further fields of its RequestSpec."""
    ids, params = list(prompt_token_ids), params or SamplingParams()
    spec = RequestSpec(request_id, ids, params, max_tokens, **more)
    given = {} if arrival_time is None else {"arrival_time": arrival_time}
    return Request(spec, grammar, **given)


def make_new_request(
    request_id: str,
    token_ids: list[int],
    num_prompt_tokens: int | None = None,
    params: SamplingParams | None = None,
    grammar: Grammar | None = None,
    **more: Any,
) -> NewRequest:
    """A request that enters the device's table; tokens after the prompt's are outputs."""
    request = make_request(request_id, token_ids[:num_prompt_tokens], params, **more)
    return NewRequest(request.spec, token_ids, grammar)
