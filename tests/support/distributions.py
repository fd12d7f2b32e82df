"""Compares two engines by the distributions that they draw from, where rounding differs."""

from __future__ import annotations

from typing import Any

import torch

from compiledllm import Engine, SamplingParams

VOCABULARY = 128
# The largest difference of log probabilities, in standard deviations of the distribution's. Sums in
# float64 instead of bfloat16's differ by up to 0.06 (4 layers of 64), and wrong ones by 0.4.
MAX_DIFFERENCE = 0.15
# A model of a size for which one kernel runs whole decode steps. With the larger weights of other
# tiny models, its scores would have a standard deviation of 12, and right kernels in bfloat16 would
# differ by up to 0.9 from an exact result; with these weights, by up to 0.11.
WIDE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "initializer_range": 0.05,
}

Steps = list[tuple[int, list[float]]]  # of a request: token and log probabilities of the vocabulary


def steps_of(engine: Engine, prompts: list[list[int]], max_tokens: int = 32) -> list[Steps]:
    """Generate greedily. The engine needs max_logprobs=VOCABULARY."""
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=VOCABULARY
    )
    found = []
    for output in engine.generate(prompts, params, use_tqdm=False):
        completion = output.outputs[0]
        rows = [
            [by_id[token].logprob for token in range(VOCABULARY)] for by_id in completion.logprobs
        ]
        found.append(list(zip(completion.token_ids, rows, strict=True)))
    engine.core.scheduler.check_invariants()
    return found


def assert_alike(found: list[Steps], expected: list[Steps]) -> None:
    """Equal but for rounding, up to the first token that rounding has changed."""
    num_compared = 0
    for steps, wanted in zip(found, expected, strict=True):
        for index, ((token, row), (wanted_token, wanted_row)) in enumerate(
            zip(steps, wanted, strict=True)
        ):
            spread = torch.tensor(wanted_row).std().item()
            worst = max(abs(a - b) for a, b in zip(row, wanted_row, strict=True))
            assert worst <= MAX_DIFFERENCE * spread, (index, worst, spread)
            num_compared += index > 0  # the first token is a prompt's
            if token != wanted_token:
                break
    assert num_compared >= len(expected), "prompts gave other tokens"
