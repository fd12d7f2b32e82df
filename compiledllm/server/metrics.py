"""Prometheus metrics with vLLM's names and a configurable prefix."""

from __future__ import annotations

import time
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from compiledllm.outputs import RequestMetrics, RequestOutput
from compiledllm.remote.engine_life import EngineLife
from compiledllm.remote.replicas import ServedEngine, clients_of
from compiledllm.sampling_params import SamplingParams
from compiledllm.server.access_log import note_end
from compiledllm.server.engine_metrics import EngineMetrics
from compiledllm.server.quick_histogram import QuickHistogram

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_LONG = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 240.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1.0, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_OUTPUTS = (1, 2, 5, 10, 20)


@dataclass(slots=True)
class _Timing:
    """The times of a request in progress, in seconds of `time.monotonic`.

    last: when the last output with tokens was shown; None before the first output.
    """

    arrival: float
    params: SamplingParams
    last: float | None = None
    num_tokens: int = 0


class Metrics:
    """Metrics of requests' latencies, and of the reports of engines that this process owns."""

    def __init__(self, prefix: str, model: str, engine: ServedEngine) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._prefix = prefix
        counter, histogram = self._counter, self._histogram
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests")
        self.cached_tokens = counter(
            "prompt_tokens_cached", "Prompt tokens of finished requests found in the prefix cache"
        )
        self.rejections = counter(
            "admission_rejections", "Requests refused because too many were waiting"
        )
        self.ttft = histogram("time_to_first_token_seconds", "Time to the first token", _SECONDS)
        self.itl = QuickHistogram(
            f"{prefix}inter_token_latency_seconds", "Time between tokens", model, _BETWEEN
        )
        self.registry.register(self.itl)
        self.tpot = histogram(
            "request_time_per_output_token_seconds",
            "Mean time between a request's tokens",
            _BETWEEN,
        )
        self.queued = histogram(
            "request_queue_time_seconds", "From a request's arrival to its first step", _LONG
        )
        self.prefill = histogram(
            "request_prefill_time_seconds", "From the first step to the first token", _LONG
        )
        self.decode = histogram(
            "request_decode_time_seconds", "From the first token to the last one", _LONG
        )
        self.inference = histogram(
            "request_inference_time_seconds", "From the first step to the last token", _LONG
        )
        self.params_n = histogram("request_params_n", "Outputs asked for", _OUTPUTS)
        self.params_max_tokens = histogram(
            "request_params_max_tokens", "max_tokens, where it was set", _TOKENS
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Time of whole requests", _LONG)
        self.prompt_lengths = histogram("request_prompt_tokens", "Length of prompts", _TOKENS)
        self.output_lengths = histogram("request_generation_tokens", "Length of outputs", _TOKENS)
        self.success = Counter(
            f"{prefix}request_success",
            "Finished requests",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        owned = [client for client in clients_of(engine) if isinstance(client, EngineLife)]
        self._of_engines = EngineMetrics(self.registry, prefix, model, owned) if owned else None

    def _counter(self, name: str, text: str) -> Counter:
        made = Counter(self._prefix + name, text, ["model_name"], registry=self.registry)
        return made.labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(
            self._prefix + name, text, ["model_name"], registry=self.registry, buckets=buckets
        )
        return made.labels(self._model)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        if self._of_engines is not None:
            self._of_engines.count_restarts()
        return generate_latest(self.registry)

    def log_line(self) -> None:
        """Log what happened since the last call, if anything did."""
        if self._of_engines is not None:
            self._of_engines.line.show()

    # -- requests ------------------------------------------------------------------------------

    def begin(self, params: SamplingParams) -> _Timing:
        return _Timing(time.monotonic(), params)

    def grow(self, timing: _Timing, output: RequestOutput) -> None:
        """Record an output of a request."""
        now = time.monotonic()
        count = 0
        for completion in output.outputs:
            count += len(completion.token_ids)
        if timing.last is None:
            assert output.metrics is not None
            first_token_time = output.metrics.first_token_time or now
            self.ttft.observe(max(first_token_time - timing.arrival, 0.0))
        elif count:  # tokens that arrive together share the time since the last output
            self.itl.observe((now - timing.last) / count, times=count)
        if count or timing.last is None:
            timing.last = now
        timing.num_tokens += count

    def end(self, timing: _Timing, output: RequestOutput) -> None:
        """Record the end of a request."""
        now, count = time.monotonic(), timing.num_tokens
        note_end(output, count)
        self.e2e.observe(now - timing.arrival)
        self.prompt_tokens.inc(len(output.prompt_token_ids))
        self.cached_tokens.inc(output.num_cached_tokens)
        self.prompt_lengths.observe(len(output.prompt_token_ids))
        self.output_lengths.observe(count)
        times = output.metrics
        assert times is not None
        if times.first_token_time is not None and count > 1:
            self.tpot.observe((times.last_token_time - times.first_token_time) / (count - 1))
        self._observe_phases(times)
        self.params_n.observe(timing.params.n)
        if timing.params.max_tokens is not None:
            self.params_max_tokens.observe(timing.params.max_tokens)
        for completion in output.outputs:
            self.success.labels(self._model, str(completion.finish_reason)).inc()

    def _observe_phases(self, times: RequestMetrics) -> None:
        """Record the phases that a request has reached."""
        start, first = times.first_scheduled_time, times.first_token_time
        if start is None:
            return
        self.queued.observe(max(start - times.arrival_time, 0.0))
        if first is not None:
            self.prefill.observe(max(first - start, 0.0))
            self.decode.observe(times.last_token_time - first)
            self.inference.observe(max(times.last_token_time - start, 0.0))
