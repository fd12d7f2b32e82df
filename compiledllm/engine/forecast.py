"""Says how long a call may take that set no limit, once its speed is known."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from compiledllm.engine.request_state import RequestState
from compiledllm.log import log

DELAY_S = 3.0  # of work, after which the speed is known


@contextlib.contextmanager
def forecast(states: list[RequestState], num_generated: Callable[[], int]) -> Iterator[None]:
    """While the block runs, log once how long requests without max_tokens may take.

    num_generated: the number of tokens that the engine has generated since its start.
    """
    if all(state.params.max_tokens is not None for state in states):
        yield
        return
    started, before = time.monotonic(), num_generated()

    def say() -> None:
        _say(states, num_generated() - before, time.monotonic() - started)

    timer = threading.Timer(DELAY_S, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(states: list[RequestState], num_tokens: int, seconds: float) -> None:
    longest = [c.spec.max_tokens for state in states for c in state.completions]
    if not num_tokens:
        log.info("max_tokens is not set: up to %d tokens a request", max(longest))
        return
    rate = num_tokens / seconds
    log.info(
        "max_tokens is not set: up to %d tokens a request, in all up to %s at %.0f tokens/s",
        *(max(longest), duration(sum(longest) / rate), rate),
    )


def duration(seconds: float) -> str:
    """A rough length of time in words."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
