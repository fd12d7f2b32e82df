"""The progress of a batch: counts, shown by a progress bar in a terminal or else by log lines."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

from tqdm import tqdm

from compiledllm.log import log

LOG_LINE_INTERVAL_S = 10.0


class BatchProgress:
    """Counts lines. num_done: lines with an answer. num_earlier: of these, those of an earlier run.

    num_failed: lines whose answer is an error.
    """

    def __init__(self) -> None:
        self.num_done = self.num_failed = self.num_earlier = 0
        self._total: int | None = None
        self._bar = tqdm(desc="answered", unit="line", disable=not sys.stderr.isatty())

    def set_total(self, num_lines: int) -> None:
        self._total = self._bar.total = num_lines
        self._bar.refresh()

    def add(self, is_ok: bool, is_new: bool = True) -> None:
        self.num_done += 1
        self.num_failed += not is_ok
        self.num_earlier += not is_new
        if not is_ok:
            self._bar.set_postfix(failed=self.num_failed, refresh=False)
        self._bar.update()

    async def log_lines(self, more: Callable[[], None]) -> None:
        """Log the progress every LOG_LINE_INTERVAL_S, if there is no bar; then call `more`."""
        while self._bar.disable:
            await asyncio.sleep(LOG_LINE_INTERVAL_S)
            log.info("%s", self)
            more()

    def __str__(self) -> str:
        total = "" if self._total is None else f" of {self._total}"
        earlier = f", {self.num_earlier} of them before" if self.num_earlier else ""
        failed = f"; {self.num_failed} failed" if self.num_failed else ""
        return f"{self.num_done}{total} lines are answered{earlier}{failed}"

    def close(self) -> None:
        self._bar.close()
