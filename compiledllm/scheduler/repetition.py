"""Detects output that repeats itself."""

from __future__ import annotations

from compiledllm.types import Request


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
