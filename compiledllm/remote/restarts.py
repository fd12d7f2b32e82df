"""Decides whether an ended engine is restarted, and after which delay."""

from __future__ import annotations

import time

MAX_CRASHES = 5  # crashes without running requests within WINDOW_S; after more, no restart
MAX_EXPLAINED_CRASHES = 12  # crashes with running requests, since a request finished
WINDOW_S = 600.0
MAX_DELAY_S = 30.0
_FIRST_DELAY_S = 0.5


class Restarts:
    """Counts the crashes since the last request that finished.

    A crash with requests running is attributed to one of them, which is found and ended (`Replay`).
    Such crashes therefore count separately, with a higher limit.
    """

    def __init__(self) -> None:
        self._unexplained: list[float] = []
        self._num_explained = 0

    def note_success(self) -> None:
        """Note that a request finished."""
        if self._unexplained or self._num_explained:
            self._unexplained.clear()
            self._num_explained = 0

    def note_crash(self, is_explained: bool) -> bool:
        """Note that the engine ended, and return whether to restart it.

        is_explained: whether a request was running.
        """
        if is_explained:
            self._num_explained += 1
        else:
            now = time.monotonic()
            self._unexplained = [t for t in self._unexplained if now - t < WINDOW_S] + [now]
        return (
            len(self._unexplained) <= MAX_CRASHES and self._num_explained <= MAX_EXPLAINED_CRASHES
        )

    @property
    def delay_s(self) -> float:
        """Seconds before the next start: 0 after a first crash, then doubled by each crash."""
        counted = len(self._unexplained) + max(self._num_explained - MAX_CRASHES, 0)
        return min(_FIRST_DELAY_S * 2 ** (counted - 2), MAX_DELAY_S) if counted > 1 else 0.0
