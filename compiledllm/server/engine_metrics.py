"""Prometheus metrics of engines, from the statistics that each engine reports after a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from compiledllm.remote.engine_life import EngineLife
from compiledllm.remote.wire import FromEngine, Ready, StepOutputs
from compiledllm.server.log_line import LogLine

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
# Label of `cache_config_info`, as vLLM has it -> our option.
_CACHE_OPTIONS = {
    "block_size": "block_size",
    "num_gpu_blocks": "num_kv_blocks",
    "cache_dtype": "kv_cache_dtype",
    "enable_prefix_caching": "enable_prefix_caching",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "kv_cache_memory_bytes": "kv_cache_memory_bytes",
}
_GAUGES = {
    "num_requests_running": "Requests in the batch",
    "num_requests_waiting": "Requests that wait for room",
    "kv_cache_usage_perc": "Share of the KV blocks in use, 0 to 1",
    "engine_ready": "1 if the engine takes requests",
    "engine_seconds_without_step": "Seconds since the engine's last sign of life",
    "state_snapshot_bytes": "Snapshots of states, in bytes",
}
_COUNTERS = {
    "generation_tokens": "Tokens generated",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache",
    "prefix_cache_misses_of_state": "Prompt tokens whose KV was found, without a state",
    "state_snapshot_hits": "Requests that started from a snapshot",
    "num_preemptions": "Requests that had to be computed again",
    "corrupted_requests": "Requests whose logits were NaN or infinite",
    "engine_restarts": "Starts of the engine after its end",
    "recompiles": "Compilations after the start, each of which delayed a step; 0 is normal",
}


class EngineMetrics:
    """The metrics of all engines of a server, in `registry`. Observes the engines' messages.

    The label `engine`, with the replica's number, exists only if there are several.
    """

    def __init__(
        self, registry: CollectorRegistry, prefix: str, model: str, engines: Sequence[EngineLife]
    ) -> None:
        names = ["model_name", *(["engine"] if len(engines) > 1 else [])]

        def family(kind: Any, name: str, text: str, **more: Any) -> Any:
            return kind(prefix + name, text, names, registry=registry, **more)

        families: dict[str, Any] = {n: family(Gauge, n, text) for n, text in _GAUGES.items()}
        families |= {n: family(Counter, n, text) for n, text in _COUNTERS.items()}
        families["steps"] = family(
            Histogram, "engine_step_seconds", "Time of a step", buckets=_SECONDS
        )
        families["step_tokens"] = family(
            Histogram, "iteration_tokens_total", "Tokens computed in a step", buckets=_TOKENS
        )
        text = "The KV cache's options, as labels; always 1"
        cache = Gauge(
            f"{prefix}cache_config_info", text, [*names, *_CACHE_OPTIONS], registry=registry
        )
        self.line = LogLine()
        self._all = []
        for index, engine in enumerate(engines):
            labels = [model, str(index)][: len(names)]
            of_one = {name: family.labels(*labels) for name, family in families.items()}
            one = _OfEngine(engine, index, of_one, cache, labels, self.line)
            engine.observe = one.observe
            self._all.append(one)

    def count_restarts(self) -> None:
        """Count the restarts since the last message of each engine."""
        for one in self._all:
            one.count_restarts()


class _OfEngine:
    """The metrics of one engine, by name, with its labels."""

    def __init__(
        self,
        engine: EngineLife,
        index: int,
        metrics: dict[str, Any],
        cache: Gauge,
        labels: list[str],
        line: LogLine,
    ) -> None:
        self._engine, self._index, self._line = engine, index, line
        self._metrics, self._cache, self._labels = metrics, cache, labels
        self._seen: dict[str, float] = {}
        self._num_restarts = 0
        self._cache_labels: list[str] = []
        metrics["engine_ready"].set_function(lambda: engine.state == "ready")
        metrics["engine_seconds_without_step"].set_function(lambda: engine.signs.silence_s)

    def count_restarts(self) -> None:
        self._metrics["engine_restarts"].inc(self._engine.num_restarts - self._num_restarts)
        self._num_restarts = self._engine.num_restarts

    def observe(self, message: FromEngine) -> None:
        if not isinstance(message, StepOutputs):
            self._seen.clear()  # a new engine counts from zero
            self.count_restarts()
            if isinstance(message, Ready):
                self._show_cache(message.options)
            return
        stats, metrics, advance = message.stats, self._metrics, self._advance
        metrics["num_requests_running"].set(stats.num_running)
        metrics["num_requests_waiting"].set(stats.num_waiting)
        metrics["kv_cache_usage_perc"].set(stats.kv_usage)
        count = message.news.num_tokens
        metrics["generation_tokens"].inc(count)
        advance("num_preemptions", stats.num_preemptions)
        advance("corrupted_requests", stats.num_failed_rows)
        advance("recompiles", stats.num_recompiles)
        advance("prefix_cache_queries", stats.prefix_queries)
        advance("prefix_cache_hits", stats.prefix_hits)
        advance("prefix_cache_misses_of_state", stats.prefix_misses_of_state)
        advance("state_snapshot_hits", stats.snapshot_hits)
        metrics["state_snapshot_bytes"].set(stats.snapshot_bytes)
        if stats.num_tokens:
            metrics["steps"].observe(stats.step_s)
            metrics["step_tokens"].observe(stats.num_tokens)
        self._line.add(stats, count, self._index)

    def _advance(self, name: str, value: float) -> None:
        """Advance a counter to the engine's own count, which starts at zero with each engine."""
        self._metrics[name].inc(max(value - self._seen.get(name, 0), 0))
        self._seen[name] = value

    def _show_cache(self, options: dict[str, Any]) -> None:
        """Show the options of an engine that is ready, with vLLM's names of labels."""
        if self._cache_labels:
            self._cache.remove(*self._cache_labels)
        values = [str(options.get(name)) for name in _CACHE_OPTIONS.values()]
        self._cache_labels = [*self._labels, *values]
        self._cache.labels(*self._cache_labels).set(1)
