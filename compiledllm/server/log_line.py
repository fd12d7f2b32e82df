"""The line that the server logs every ten seconds while it works."""

from __future__ import annotations

import time

from compiledllm.log import log
from compiledllm.remote.engine_client import EngineClient
from compiledllm.remote.wire import Stats


class LogLine:
    """Adds up steps, and logs rates since the last line."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._generated = self._computed = 0
        self._stats: Stats | None = None
        self._hits = (0, 0)

    def add(self, stats: Stats, num_generated: int) -> None:
        self._stats = stats
        self._generated += num_generated
        self._computed += stats.num_tokens

    def show(self, engine: EngineClient) -> None:
        stats, seconds = self._stats, time.monotonic() - self._since
        self._since = time.monotonic()
        generated, computed, self._generated, self._computed = self._generated, self._computed, 0, 0
        if stats is None or not computed:
            return
        queries, hits = stats.prefix_queries - self._hits[0], stats.prefix_hits - self._hits[1]
        self._hits = (stats.prefix_queries, stats.prefix_hits)
        log.info(
            "%.1f tokens/s generated, %.1f computed, %d running, %d waiting, KV %.1f%%, "
            "prefix hits %.1f%%",
            generated / seconds,
            computed / seconds,
            stats.num_running,
            stats.num_waiting,
            100 * stats.kv_usage,
            100 * hits / queries if queries else 0.0,
        )
