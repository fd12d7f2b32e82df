"""Counts the tokens and finish reasons of an `Engine`'s requests, as metrics with vLLM's names."""

from __future__ import annotations

from collections import Counter as Multiset
from collections.abc import Iterable

from compiledllm.engine.request_state import RequestState
from compiledllm.outputs import Counter, Gauge, Metric
from compiledllm.scheduler.scheduler import Scheduler

PREFIX = "vllm:"


class Counts:
    """Counts since the engine's start. num_generated: generated tokens."""

    def __init__(self) -> None:
        self.num_generated = 0
        self._num_prompt_tokens = 0
        self._endings: Multiset[str] = Multiset()

    def note_finished(self, states: Iterable[RequestState]) -> None:
        for state in states:
            specs = [completion.spec for completion in state.completions]
            self._num_prompt_tokens += specs[0].num_prompt_tokens
            self._endings.update(str(c.finish_reason) for c in state.completions)

    def metrics(self, model: str, scheduler: Scheduler) -> list[Metric]:
        """The counts and the scheduler's state. model: value of the label `model_name`."""
        labels = {"model_name": model, "engine": "0"}
        gauges = {
            "num_requests_running": len(scheduler.running),
            "num_requests_waiting": len(scheduler.waiting),
            "kv_cache_usage_perc": scheduler.block_pool.usage,
        }
        counters = {
            "prompt_tokens": self._num_prompt_tokens,
            "generation_tokens": self.num_generated,
            "prefix_cache_queries": scheduler.num_prefix_queries,
            "prefix_cache_hits": scheduler.num_prefix_hits,
            "num_preemptions": scheduler.num_preemptions,
            "corrupted_requests": scheduler.num_failed_rows,
        }
        endings: list[Metric] = [
            Counter(f"{PREFIX}request_success", labels | {"finished_reason": reason}, count)
            for reason, count in sorted(self._endings.items())
        ]
        return [
            *(Gauge(PREFIX + name, labels, float(value)) for name, value in gauges.items()),
            *(Counter(PREFIX + name, labels, value) for name, value in counters.items()),
            *endings,
        ]
