"""The line that the server logs every ten seconds while it works."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from compiledllm.log import log
from compiledllm.remote.wire import Stats

LOG_LINE_INTERVAL_S = 10.0


class HasLogLine(Protocol):
    def log_line(self) -> None:
        """Log what happened since the last call, if anything did."""


async def log_lines(metrics: HasLogLine) -> None:
    """Log lines until cancelled."""
    while True:
        await asyncio.sleep(LOG_LINE_INTERVAL_S)
        metrics.log_line()


class LogLine:
    """Adds up the steps of all engines; `show` logs rates since its last call."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._generated = self._computed = 0
        self._stats: dict[int, Stats] = {}  # by engine
        self._hits = (0, 0)

    def add(self, stats: Stats, num_generated: int, engine: int = 0) -> None:
        self._stats[engine] = stats
        self._generated += num_generated
        self._computed += stats.num_tokens

    def show(self) -> None:
        every, seconds = list(self._stats.values()), time.monotonic() - self._since
        self._since = time.monotonic()
        generated, computed, self._generated, self._computed = self._generated, self._computed, 0, 0
        if not computed:
            return
        found = sum(s.prefix_queries for s in every), sum(s.prefix_hits for s in every)
        queries, hits = found[0] - self._hits[0], found[1] - self._hits[1]
        self._hits = found
        log.info(
            "%.1f tokens/s generated, %.1f computed, %d running, %d waiting, KV %.1f%%, "
            "prefix hits %.1f%%",
            generated / seconds,
            computed / seconds,
            sum(stats.num_running for stats in every),
            sum(stats.num_waiting for stats in every),
            100 * max(stats.kv_usage for stats in every),
            100 * hits / queries if queries > 0 else 0.0,
        )
