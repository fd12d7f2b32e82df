"""Compares two engines whose rounding differs, by the distributions that they draw tokens from."""

from __future__ import annotations

from typing import Any

import torch

from compiledllm import Engine, SamplingParams

VOCABULARY = 128
# The largest allowed difference of log probabilities, in standard deviations of a step's log
# probabilities. Sums in float64 instead of bfloat16 make differences of up to 0.06 (4 layers of
# width 64), and wrong results differ by 0.4.
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

# For each step of a request: the drawn token, and the log probabilities of the whole vocabulary.
Steps = list[tuple[int, list[float]]]


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
    """Assert that steps are equal up to rounding, until rounding has changed a token."""
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
