"""The metrics of a server with several HTTP processes, in the process that owns them."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from compiledllm.remote.engine_life import EngineLife
from compiledllm.server.engine_metrics import EngineMetrics
from compiledllm.server.process_metrics import ProcessMetrics
from compiledllm.server.process_settings import ProcessState


class OwnerMetrics:
    """Metrics of engines, which the owner knows, and of requests, which HTTP processes report.

    Attributes: `of_processes` (the sums of the reports), `restarts` (a counter).
    """

    def __init__(self, prefix: str, model: str, engines: Sequence[EngineLife]) -> None:
        self.registry = CollectorRegistry()
        self.of_processes = ProcessMetrics()
        self.registry.register(self.of_processes)
        self._of_engines = EngineMetrics(self.registry, prefix, model, engines)
        text = "HTTP processes that take requests"
        gauge = Gauge(f"{prefix}http_processes", text, ["model_name"], registry=self.registry)
        self._processes = gauge.labels(model)
        name, text = f"{prefix}http_process_restarts", "Starts of HTTP processes after their end"
        counter = Counter(name, text, ["model_name"], registry=self.registry)
        self.restarts = counter.labels(model)

    def set_processes(self, states: Sequence[ProcessState]) -> None:
        self._processes.set(list(states).count(ProcessState.READY))

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        self._of_engines.count_restarts()
        return generate_latest(self.registry)

    def log_line(self) -> None:
        """Log what happened since the last call, if anything did."""
        self._of_engines.line.show()
