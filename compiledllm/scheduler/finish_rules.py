"""Decides whether a request's newest token is its last: stop tokens, length, repetitions.

The engine, which knows the text, looks for stop strings.
"""

from __future__ import annotations

from compiledllm.outputs import FinishReason
from compiledllm.types import Request


def reason_to_finish(request: Request, token_id: int) -> tuple[FinishReason, int | None] | None:
    """Why `token_id`, the newest token, ends the request, and the stop token; None if it does not.

    As in vLLM, only an explicit stop token is reported, the end of sequence is not.
    """
    spec, params = request.spec, request.spec.sampling_params
    is_long_enough = request.num_output_tokens >= params.min_tokens
    if token_id in spec.stop_token_ids and is_long_enough:
        return "stop", token_id if token_id in (params.stop_token_ids or ()) else None
    if len(request.token_ids) >= request.max_tokens_total:
        return "length", None
    if params.repetition_detection and is_long_enough and ends_in_repetition(request):
        return "repetition", None
    return None


def ends_in_repetition(request: Request) -> bool:
    """Whether the output ends in repetitions of a pattern, as `repetition_detection` describes."""
    rule = request.spec.sampling_params.repetition_detection
    if rule is None:
        return False
    tokens, start = request.token_ids, request.num_prompt_tokens
    return any(
        _ends_in_run(tokens, start, size, rule.min_count)
        for size in range(max(rule.min_pattern_size, 1), rule.max_pattern_size + 1)
    )


def _ends_in_run(tokens: list[int], start: int, size: int, count: int) -> bool:
    """Whether tokens[start:] ends in `count` repetitions of a pattern of `size` tokens."""
    last = len(tokens) - 1
    compared = size * (count - 1)
    if last + 1 - start < compared + size:
        return False
    return all(tokens[last - i] == tokens[last - i - size] for i in range(compared))
