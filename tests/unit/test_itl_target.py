"""A target of ITL against a simulated device: a clock that a cost model moves."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from compiledllm.config import ConfigError, EngineConfig
from compiledllm.resolved_config import resolve
from compiledllm.scheduler.block_pool import BlockPool
from compiledllm.scheduler.policy import BALANCED_TOKENS, Pace
from compiledllm.scheduler.prompt_budget import MIN_PROMPT_TOKENS, ItlTarget
from compiledllm.scheduler.scheduler import Scheduler
from compiledllm.types import Request, SchedulerOutput, StepOutput, StepTimes
from tests.support.requests import make_request

# Like Qwen3-8B on an H200: seconds of captured steps, and of attention.
SIZES = (1, 32, 64, 128, 192, 256, 384, 512, 768, *range(1024, 2048, 256), 2048, 2560, 3072, 4096)
PARITY = 13_000  # position
TARGET_S = 0.030


def step_s(size: int) -> float:
    return max(0.0042 + 5e-6 * size, 0.001 + 18e-6 * size)


MEASURED = StepTimes(
    tuple((size, step_s(size)) for size in SIZES), read_s=36e-9, pair_s=18e-6 / PARITY
)


@dataclass
class Device:
    """Says how long a step takes. Differs from what was measured by `factor` and noise."""

    factor: float = 1.0
    noise: float = 0.0
    shortest_attention_s: float = 0.0  # per position: what a chunk takes however small it is
    rng: random.Random = field(default_factory=lambda: random.Random(1))

    def run_s(self, step: SchedulerOutput) -> float:
        num_tokens = step.num_scheduled_tokens
        size = next((s for s in SIZES if s >= num_tokens), num_tokens)
        read = sum(line.num_computed_tokens for line in step.scheduled)
        seconds = step_s(size) + read * MEASURED.read_s
        for line in step.scheduled:
            if line.num_scheduled_tokens > 1:
                pairs = line.num_computed_tokens * line.num_scheduled_tokens
                least = line.num_computed_tokens * self.shortest_attention_s
                seconds += max(pairs * MEASURED.pair_s, least)
        return seconds * self.factor * (1 + self.noise * self.rng.random())


@dataclass
class Outcome:
    gaps: list[float] = field(default_factory=list)  # beside a prompt
    chunks: list[int] = field(default_factory=list)  # prompt tokens of each step beside chats
    seconds: float = 0.0  # until the last prompt was computed

    def percentile(self, share: float) -> float:
        return sorted(self.gaps)[int(share * (len(self.gaps) - 1))]


def run(
    device: Device,
    target_s: float | None,
    *prompts: int,
    num_streams: int = 32,
    cached: int = 0,
    parity: float = PARITY,
) -> Outcome:
    """Streams of 200 tokens of context decode; then the prompts come, all at once.

    cached: tokens at the prompts' beginning that the prefix cache knows.
    """
    target = None if target_s is None else ItlTarget(target_s, MEASURED)
    pace = Pace(BALANCED_TOKENS, parity=parity, target=target)
    scheduler = Scheduler(BlockPool(60_000), 16, 1024, 16384, pace=pace)

    def add(name: str, num_tokens: int, first: int, max_tokens: int = 100_000) -> Request:
        prompt = [3] * cached + [first] * (num_tokens - cached)
        request = make_request(name, prompt, max_tokens=max_tokens)
        scheduler.add(request)
        return request

    def advance() -> float:
        step = scheduler.schedule()
        seconds = device.run_s(step)
        tokens = {line.request_id: 5 for line in step.scheduled if line.samples}
        if target is not None:
            target.learn(step, seconds)
        scheduler.update(step, StepOutput(tokens))
        outcome.chunks.append(step.num_scheduled_tokens - num_streams)
        outcome.gaps.append(seconds)
        return seconds

    outcome = Outcome()
    if cached:
        add("first", cached + 16, 4, max_tokens=1)
        while scheduler.has_unfinished():
            advance()
    for index in range(num_streams):
        add(f"stream {index}", max(200, cached + 1), 100 + index)
    while any(request.num_output_tokens < 2 for request in scheduler.requests.values()):
        advance()
    outcome.gaps.clear()
    outcome.chunks.clear()
    waiting = [
        add(f"prompt {i}", length, 1000 + i, max_tokens=1) for i, length in enumerate(prompts)
    ]
    while any(not request.is_finished for request in waiting):
        outcome.seconds += advance()
    return outcome


DEVICES: dict[str, Callable[[], Device]] = {
    "as measured": Device,
    "noisy": lambda: Device(noise=0.1),
    "slower than measured": lambda: Device(factor=1.5, noise=0.05),
    "small chunks attend no faster": lambda: Device(shortest_attention_s=400 * MEASURED.pair_s),
}


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("prompts", [(32_000,), (32_000, 500, 32_000), (2000,) * 64])
def test_gaps_stay_within_the_target_and_prompts_advance(
    name: str, prompts: tuple[int, ...]
) -> None:
    outcome = run(DEVICES[name](), TARGET_S, *prompts)
    late = [gap for gap in outcome.gaps if gap > TARGET_S]
    learning = 4 if name == "slower than measured" else 0
    assert len(late) <= 0.01 * len(outcome.gaps) + learning, late
    assert min(outcome.chunks) >= 1
    # The target is used: prompts are not held back more than the target asks.
    assert outcome.percentile(0.5) > 0.6 * TARGET_S


def test_a_higher_target_computes_prompts_sooner() -> None:
    slow, fast = (run(Device(), target_s, 32_000).seconds for target_s in (0.012, 0.060))
    assert fast < 0.8 * slow


def test_tokens_behind_a_cached_prefix_count_as_what_their_attention_costs() -> None:
    outcome = run(Device(), TARGET_S, *[22_000] * 4, num_streams=8, cached=20_000)
    assert max(outcome.gaps) <= TARGET_S


def test_a_target_that_cannot_be_held_does_not_stop_prompts() -> None:
    outcome = run(Device(), 0.001, 3000)
    assert set(outcome.chunks[:-1]) == {MIN_PROMPT_TOKENS}


def test_one_slow_step_does_not_hold_prompts_back_for_long() -> None:
    target = ItlTarget(TARGET_S, MEASURED)
    steps = [_mixed_step(512)] * 30
    target.learn(steps[0], 5.0)
    assert target.slowdown <= 1.25
    for step in steps:
        target.learn(step, step_s(512))
    assert target.slowdown < 1.1


def test_decode_steps_and_steps_beyond_the_measured_sizes_teach_nothing() -> None:
    target = ItlTarget(TARGET_S, MEASURED)
    target.learn(_mixed_step(1), 1.0)
    target.learn(_mixed_step(SIZES[-1] + 1), 9.0)
    assert target.slowdown == 1


def _mixed_step(num_tokens: int) -> SchedulerOutput:
    scheduler = Scheduler(BlockPool(1000), 16, 64, 16384)
    scheduler.add(make_request("r", [3] * num_tokens, max_tokens=1))
    return scheduler.schedule()


def test_without_a_target_chunks_shrink_where_attention_costs_most() -> None:
    """64 prompts of 32k tokens beside 32 streams: steps of 2048 tokens would take 3 times as long
    at the prompts' ends as at their beginnings."""
    before = run(Device(), None, *[32_000] * 64, parity=float("inf"))
    outcome = run(Device(), None, *[32_000] * 64)
    assert max(outcome.gaps) < 1.6 * outcome.gaps[0] < 0.6 * max(before.gaps)
    assert outcome.seconds < 1.15 * before.seconds


def test_without_a_target_a_single_prompt_is_computed_as_ever() -> None:
    outcome = run(Device(), None, 32_000)
    assert set(outcome.chunks[1:-1]) == {2 * BALANCED_TOKENS - 33}


@pytest.mark.parametrize(
    "options, told",
    [
        ({"target_itl_ms": 0}, "above 0, got 0"),
        ({"target_itl_ms": float("nan")}, "above 0, got nan"),
        ({"target_itl_ms": float("inf")}, "above 0, got inf"),
        ({"target_itl_ms": 30, "mixed_prompt_tokens": 64}, "mixed_prompt_tokens=64 fixes them"),
        ({"target_itl_ms": 30, "deterministic": True}, "deterministic=True rules out"),
        ({"target_itl_ms": 30, "tensor_parallel_size": 2}, "each GPU measures its own"),
        ({"target_itl_ms": "30"}, "must be a number"),
    ],
)
def test_targets_that_cannot_be_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        EngineConfig.from_options(**options)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_with_a_target_no_number_of_prompt_tokens_is_fixed(on_gpu: bool) -> None:
    config, _ = resolve(EngineConfig.from_options(target_itl_ms=30), on_gpu, 4096)
    assert config.mixed_prompt_tokens is None
