"""When an engine that has ended is started again: at once, later, or no more."""

from __future__ import annotations

import time

MAX_CRASHES = 5  # that no request explains, in WINDOW_S; then a restart does not mend what is wrong
MAX_EXPLAINED_CRASHES = 12  # with requests running, none of which was finished since
WINDOW_S = 600.0
MAX_DELAY_S = 30.0
_FIRST_DELAY_S = 0.5


class Restarts:
    """Crashes since the last request that was finished: what counts against another start.

    A crash with requests running is explained by one of them, which is found and ended. So
    poisonous requests do not use up the restarts of an engine that is well without them.
    """

    def __init__(self) -> None:
        self._unexplained: list[float] = []
        self._num_explained = 0

    def succeed(self) -> None:
        """A request was finished."""
        if self._unexplained or self._num_explained:
            self._unexplained.clear()
            self._num_explained = 0

    def crash(self, is_explained: bool) -> bool:
        """The engine has ended; whether it is started again. is_explained: while a request ran."""
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
        """Before the next start: 0 after a first crash, then doubled by each."""
        counted = len(self._unexplained) + max(self._num_explained - MAX_CRASHES, 0)
        return min(_FIRST_DELAY_S * 2 ** (counted - 2), MAX_DELAY_S) if counted > 1 else 0.0
