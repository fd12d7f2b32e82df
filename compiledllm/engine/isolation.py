"""Finds the request that makes steps fail, by bisection of the requests of a failed step."""

from __future__ import annotations

from compiledllm.log import log
from compiledllm.scheduler.scheduler import Scheduler
from compiledllm.types import RequestUpdate, StepNews

MAX_FAILED = 8  # requests ended in a row, without a successful step, before the engine gives up


class Isolation:
    """Recomputes suspects in ever smaller groups, until one fails alone; the other groups wait.

    A group is cleared once each of its requests has drawn `TOKENS` tokens. One token is not enough:
    it only shows that the prompt can be computed.
    """

    TOKENS = 3

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._suspects: dict[str, int] = {}  # request_id -> tokens since it became a suspect
        self._held: list[list[str]] = []  # groups of request ids that wait
        self._num_failed = 0  # requests found to blame since the last successful step

    def after_failure(self, scheduled: list[str], error: Exception) -> StepNews:
        """Halve the suspects of an abandoned step, or end the request to blame.

        Returns the news of the ended request; empty news while there are several suspects.
        """
        alive = self._scheduler.requests
        suspects = [i for i in scheduled if i in self._suspects] or scheduled
        suspects = [request_id for request_id in suspects if request_id in alive]
        if len(suspects) <= 1:
            text = f"{type(error).__name__}: {error}"
            log.error("request %s makes its steps fail (%s)", suspects, text)
            self._num_failed += 1
            ended = [self._scheduler.finish(request_id, "error", text) for request_id in suspects]
            self._next_group()
            return StepNews(updates=[RequestUpdate.of(r, []) for r in ended if r is not None])
        half = (len(suspects) + 1) // 2
        self._suspects, rest = dict.fromkeys(suspects[:half], 0), suspects[half:]
        self._scheduler.hold(rest)
        self._held.append(rest)
        return StepNews()

    @property
    def is_hopeless(self) -> bool:
        """Whether every request fails, so that none is to blame (memory may be used up)."""
        return self._num_failed >= MAX_FAILED

    def after_success(self, news: StepNews) -> None:
        """Count the suspects' tokens. Once all suspects are cleared, the next group may run."""
        if news.token_ids or news.updates:
            self._num_failed = 0
        if not self._suspects:
            return
        for request_id in news.request_ids:
            if request_id in self._suspects:
                self._suspects[request_id] += 1
        alive = self._scheduler.requests
        if all(n >= self.TOKENS or i not in alive for i, n in self._suspects.items()):
            self._next_group()

    def _next_group(self) -> None:
        self._suspects = dict.fromkeys(self._held.pop() if self._held else [], 0)
        self._scheduler.release(self._suspects)
