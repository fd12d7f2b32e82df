"""The ledger of a start: the seconds of each phase, which add up to the whole start.

    ledger = Ledger()
    with ledger.phase("weights"):
        ...
    ledger.close()

Knows no torch, as importing torch is a phase.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

# In the order of a start. "import": torch and our modules. "plan": everything before the weights.
# "ranks": starting the processes of other ranks, and waiting for what they do as this one does.
# "memory": measuring how much memory steps take, and allocating the KV cache. "compile": compiling
# the decoder's blocks, or loading compiled ones. "rest": what no other phase covers.
PHASES = ("import", "plan", "ranks", "weights", "memory", "compile", "capture", "tokenizer", "rest")


class Ledger:
    """Seconds by phase, from now until `close`. Phases of one ledger never overlap."""

    def __init__(self) -> None:
        self.phases_s: dict[str, float] = {}
        self.weight_bytes = 0  # read from files; 0 for random weights
        self._started = time.perf_counter()
        self._open = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to a phase."""
        assert name in PHASES and not self._open, (name, self._open)
        started, self._open = time.perf_counter(), name
        try:
            yield
        finally:
            self._open = ""
            self.phases_s[name] = self.phases_s.get(name, 0.0) + time.perf_counter() - started

    def close(self) -> dict[str, float]:
        """All phases in order, with "rest", and "total", their sum. May be called again later."""
        total = time.perf_counter() - self._started
        known = {name: self.phases_s[name] for name in PHASES if name in self.phases_s}
        return {**known, "rest": total - sum(known.values()), "total": total}

    def line(self) -> str:
        """The total and the phases on one line, for the log."""
        seconds = self.close()
        total = seconds.pop("total")
        parts = [f"{name} {phase_s:.1f}" for name, phase_s in seconds.items() if phase_s >= 0.05]
        rate = ""
        if self.weight_bytes and (weights_s := seconds.get("weights")):
            rate = f"; weights at {self.weight_bytes / weights_s / 1e9:.1f} GB/s"
        return f"{total:.1f} s ({', '.join(parts)}{rate})"
