"""Tracks how long the engine's process and the engine's loop have been silent.

Time is counted in ticks of the watching process. A tick counts for at most two intervals, so that a
pause of the watching process or of the whole machine does not count as the engine's silence.
"""

from __future__ import annotations

import time

from compiledllm.remote.limits import Limits
from compiledllm.remote.wire import Alive, FromEngine, Ready

KILL_FACTOR = 2.0  # a silent engine is killed after this multiple of the limit
# A process does not answer while the interpreter starts or loads a large library.
MIN_LOAD_KILL_S = 10.0
# On a CPU that others use as well, a step of a large model can take minutes. Such an engine is
# unhealthy, but its process answers and the step may still end.
CPU_STEP_KILL_FACTOR = 10.0


class VitalSigns:
    """Call `begin` when a process starts, `hear` with its messages, `tick` every `interval_s`.

    limits: after `stuck_s` of silence the engine is unhealthy; loading may take `load_s`.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.interval_s = min(1.0, limits.stuck_s / 4)
        self.begin()

    def begin(self) -> None:
        # `_process` and `_loop` are the times of their last signs of life.
        self._now = self._process = self._loop = 0.0
        self._ticked = time.monotonic()
        self._is_loading = True
        self._loop_kill_factor = KILL_FACTOR

    def hear(self, message: FromEngine) -> None:
        """Note a message, which shows that the process lives, and unless `Alive`, the loop, too."""
        self._process = self._now
        if isinstance(message, Alive):
            self._loop = max(self._loop, self._now - message.loop_silence_s)
            return
        self._loop = self._now
        if isinstance(message, Ready):
            self._is_loading = False
            self._loop_kill_factor = CPU_STEP_KILL_FACTOR if message.is_cpu else KILL_FACTOR

    def tick(self) -> None:
        now = time.monotonic()
        self._now += min(now - self._ticked, 2 * self.interval_s)
        self._ticked = now

    @property
    def silence_s(self) -> float:
        """Seconds since the last sign of the process or of the loop, whichever is longer."""
        return self._now - min(self._process, self._loop)

    def why_unhealthy(self) -> str | None:
        limit, silence_s = self._limits.stuck_s, self._now - self._process
        if silence_s > limit:
            return f"the engine's process gave no sign of life for {silence_s:.0f} s"
        silence_s = self._now - self._loop
        return f"no step was finished for {silence_s:.0f} s" if silence_s > limit else None

    def why_lost(self) -> str | None:
        """The reason to kill the process, or None."""
        limit = self._limits.stuck_s
        longest_s = KILL_FACTOR * limit, self._loop_kill_factor * limit  # process, loop
        if self._is_loading:
            longest_s = (max(longest_s[0], MIN_LOAD_KILL_S),) * 2
        if self._now - self._process > longest_s[0] or self._now - self._loop > longest_s[1]:
            return self.why_unhealthy()
        return None

    @property
    def is_overdue(self) -> bool:
        """Whether loading takes longer than allowed."""
        return self._is_loading and self._now > self._limits.load_s
