"""Bounds the prompt tokens of a step in which requests decode, by a count or by a target for ITL.

ITL (inter-token latency) is the time between two tokens of a request.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from compiledllm.types import Request, SchedulerOutput, StepTimes

MIN_PROMPT_TOKENS = 32  # per step, so that prompts advance however low the target is
_PLANNED_SHARE = 0.9  # planned duration of a step / target; the margin absorbs variation
# In the moving mean of slowdowns, the weight of a step that is slower (faster) than predicted.
_LEARN_SLOWER, _LEARN_FASTER = 0.25, 0.05
_MAX_CHANGE = 2.0  # a step counts as at most this many times slower or faster than the mean


@dataclass(slots=True)
class PromptBudget:
    """How many prompt tokens may still join a step in which requests decode.

    num_tokens: prompt tokens left for all prompts together; negative after an exempt request has
    overdrawn the budget. exempt_from: the budget does not limit the prompt of a request that waits
    for its whole batch and has at least this many tokens left to draw.
    """

    num_tokens: int
    exempt_from: float = math.inf

    def is_exempt(self, request: Request) -> bool:
        return request.spec.waits_for_batch and request.num_tokens_left >= self.exempt_from

    def room(self, position: int) -> int:
        """Number of tokens that a prompt may get after its first `position` tokens."""
        return max(self.num_tokens, 0)

    def take(self, position: int, count: int) -> None:
        """Grant a prompt `count` tokens after its first `position` tokens."""
        self.num_tokens -= count


@dataclass(slots=True)
class TimedBudget(PromptBudget):
    """As many prompt tokens as a step can compute in a given time.

    num_tokens: minimum number of tokens for the best-ranked prompt, so that it advances; 0 for the
    other prompts. step_tokens: number of tokens in the step so far. left_s: seconds that remain for
    the part of a step's time that depends on its size alone: the planned duration, minus the times
    of reading contexts and of the granted tokens' attention to earlier tokens.
    """

    times: StepTimes = field(kw_only=True)
    step_tokens: int = field(kw_only=True)
    left_s: float = field(kw_only=True)

    def room(self, position: int) -> int:
        token_s = position * self.times.pair_s
        best = self.num_tokens
        for size, seconds in self.times.sizes:
            count = size - self.step_tokens
            if token_s > 0:
                count = min(count, int((self.left_s - seconds) / token_s))
            if seconds <= self.left_s:
                best = max(best, count)
        return best

    def take(self, position: int, count: int) -> None:
        self.num_tokens = 0
        self.step_tokens += count
        self.left_s -= count * position * self.times.pair_s


class ItlTarget:
    """Chooses the largest number of prompt tokens with which a step keeps the ITL below a target.

    The time of a step is predicted as a sum of three times measured at start (`StepTimes`): the
    time of the step's size, the time to read the context of decoding requests, and the time of
    attention between prompt tokens and the tokens before them. Sizes are those of captured steps,
    because steps of other sizes are padded to one of these.

    The prediction is multiplied by `slowdown`, a moving mean of measured / predicted time. The mean
    follows slower steps five times as fast as faster ones, so it stays near the slow end of the
    measured times.
    """

    def __init__(self, target_s: float, times: StepTimes) -> None:
        self._target_s = target_s
        self._times = times
        self._sizes = [size for size, _ in times.sizes]
        self.slowdown = 1.0

    def prompt_budget(self, running: Sequence[Request]) -> PromptBudget:
        """The prompts' budget in a step with the requests `running`, some of which decode.

        At least `MIN_PROMPT_TOKENS`, even if decoding alone takes longer than the target.
        """
        times = self._times
        read = [r.num_computed_tokens for r in running if len(r.token_ids) > r.num_prompt_tokens]
        left_s = _PLANNED_SHARE * self._target_s / self.slowdown - sum(read) * times.read_s
        return TimedBudget(MIN_PROMPT_TOKENS, times=times, step_tokens=len(running), left_s=left_s)

    def predict_s(self, step: SchedulerOutput) -> float:
        """Seconds that a step should take, uncorrected; NaN if it is larger than any measured."""
        num_tokens = num_read = num_pairs = 0
        for _, computed, count, _, _ in step.scheduled:
            num_tokens += count
            if count == 1:
                num_read += computed
            else:
                num_pairs += count * computed
        index = bisect_left(self._sizes, num_tokens)
        if index == len(self._sizes):
            return math.nan
        times = self._times
        return times.sizes[index][1] + num_read * times.read_s + num_pairs * times.pair_s

    def learn(self, step: SchedulerOutput, seconds: float) -> None:
        """Correct the predictions by the time that a step took; decode steps are ignored."""
        if step.num_scheduled_tokens == len(step.scheduled):
            return
        change = seconds / self.predict_s(step) / self.slowdown
        if math.isnan(change):
            return
        weight = _LEARN_SLOWER if change > 1 else _LEARN_FASTER
        bounded = min(max(change, 1 / _MAX_CHANGE), _MAX_CHANGE)
        self.slowdown *= 1 + weight * (bounded - 1)
