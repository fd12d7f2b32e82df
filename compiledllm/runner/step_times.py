"""Measures how long steps take, by running them, for schedulers with an ITL target."""

from __future__ import annotations

import time
from collections.abc import Sequence

from compiledllm.resolved_config import StepLimits
from compiledllm.runner.model_runner import ModelRunner
from compiledllm.sampling_params import SamplingParams
from compiledllm.types import (
    NewRequest,
    RequestSpec,
    ScheduledRequest,
    SchedulerOutput,
    StepTimes,
)

_RUNS = 3  # timed runs of each step, after a warm-up run; the fastest one counts
_FAR_POSITION = 16384  # position at which the cost of attention to earlier tokens is measured
_MAX_OF_TARGET = 2.0  # sizes are measured until a step takes longer than this times the target


def measure_step_times(
    runner: ModelRunner,
    limits: StepLimits,
    max_blocks: int,
    captured: Sequence[int],
    target_s: float,
) -> StepTimes:
    """Run steps of one request, on the null block, and time them. Leaves no request behind.

    max_blocks: width of the block tables. captured: token counts of captured steps with prompts; if
    there are none, powers of two are measured. target_s: steps that take much longer are not
    measured.
    """
    longest = min(limits.max_model_len, max_blocks * limits.block_size)
    max_tokens = min(limits.max_num_batched_tokens, longest)
    probe = _Probe(runner, limits.block_size)
    sizes = [(1, probe.fastest_s(1, 0))]
    for tokens in sorted(set(captured)) or [2**i for i in range(4, max_tokens.bit_length())]:
        if tokens > max_tokens or sizes[-1][1] > _MAX_OF_TARGET * target_s:
            break
        sizes.append((tokens, max(probe.fastest_s(tokens, 0), sizes[-1][1])))
    position = min(_FAR_POSITION, longest // 2)
    fitting = [(tokens, s) for tokens, s in sizes if tokens <= longest - position]
    chunk = next((tokens for tokens, s in reversed(fitting) if s <= target_s), 1)
    read_s = pair_s = 0.0
    if position > 0:
        read_s = max(probe.fastest_s(1, position) - sizes[0][1], 0.0) / position
        more_s = probe.fastest_s(chunk, position) - dict(sizes)[chunk]
        pair_s = max(more_s, 0.0) / (chunk * position)
    runner.reset()
    return StepTimes(tuple(sizes), read_s, pair_s)


class _Probe:
    """Runs steps as a scheduler would, each with a new request."""

    def __init__(self, runner: ModelRunner, block_size: int) -> None:
        self._runner = runner
        self._block_size = block_size
        self._num_tables = runner.num_block_tables
        self._vocab_size = runner.model.spec.vocab_size
        self._count = 0

    def fastest_s(self, num_tokens: int, position: int) -> float:
        """Seconds of a step with `num_tokens` tokens of one request, after `position` tokens."""
        return min([self._run_s(num_tokens, position) for _ in range(1 + _RUNS)][1:])

    def _run_s(self, num_tokens: int, position: int) -> float:
        freed = [f"step-times-{self._count}"] if self._count else []
        self._count += 1
        request_id, length = f"step-times-{self._count}", position + num_tokens
        token_ids = [7 * i % self._vocab_size for i in range(length)]  # varied, for MoE
        params = SamplingParams(temperature=0.0, max_tokens=1)
        new = NewRequest(RequestSpec(request_id, token_ids, params, max_tokens=1), token_ids)
        blocks = [[0] * -(-length // self._block_size) for _ in range(self._num_tables)]
        line = ScheduledRequest(request_id, position, num_tokens, blocks, True)
        step = SchedulerOutput([new], [line], freed)
        started = time.perf_counter()
        self._runner.collect(self._runner.launch(step))
        return time.perf_counter() - started
