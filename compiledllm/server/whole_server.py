"""Facts about the whole server, which every one of its HTTP processes can report."""

from __future__ import annotations

from typing import Protocol

from compiledllm.remote.replicas import ServedEngine
from compiledllm.server.metrics import Metrics


class WholeServer(Protocol):
    """All HTTP processes of a server together."""

    async def metrics_text(self) -> bytes:
        """All metrics in Prometheus's text format."""

    def num_live(self) -> int:
        """The number of requests that are being answered or are waiting."""

    def is_ready(self) -> bool:
        """Whether every process that takes connections takes requests, too."""

    def process_states(self) -> list[str]:
        """The state of each HTTP process, if there are several."""


class OneProcess:
    """A server with a single HTTP process."""

    def __init__(self, engine: ServedEngine, metrics: Metrics) -> None:
        self._engine, self._metrics = engine, metrics

    async def metrics_text(self) -> bytes:
        return self._metrics.text()

    def num_live(self) -> int:
        return len(self._engine.live)

    def is_ready(self) -> bool:
        return self._engine.state == "ready" and self._engine.why_unhealthy() is None

    def process_states(self) -> list[str]:
        return []
