"""A request that somebody waits for, how many there may be, and what can become of one.

Tokens are booked in its state as they come; whoever waits makes the output of all that is there. So
a reader that is late gets few outputs with many tokens each, and nothing piles up for it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from compiledllm.engine.request_state import RequestState
from compiledllm.outputs import RequestOutput


class Unavailable(Exception):
    """The engine takes no requests: it is loading, draining or dead. retry_after: seconds."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Overloaded(Exception):
    """As many requests or tokens wait as may. retry_after: seconds."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class EngineError(Exception):
    """A request could not be finished, through no fault of its own."""


class DeadlineExceeded(Exception):
    """A request took longer than it may."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is accepted at most. Queued: waiting or running, beyond what runs at once."""

    queued_requests: int
    queued_tokens: int
    request_seconds: float
    stuck_seconds: float  # without a sign of life; twice that: the engine is started again
    load_seconds: float = 3600.0  # that the engine may load for


@dataclass(eq=False, slots=True)
class LiveRequest:
    """A request with somebody waiting for it."""

    state: RequestState
    error: Exception | None = None  # what ends it, once what came before is taken
    was_shown: bool = False  # any of it
    ran_at_crash: bool = False  # and was started over
    num_tokens: int = field(init=False)  # of its prompt, for each completion
    _waiter: asyncio.Future[None] | None = None

    def __post_init__(self) -> None:
        self.num_tokens = sum(c.request.num_prompt_tokens for c in self.state.completions)

    def wake(self) -> None:
        """Something came: if it is to be shown, whoever waits takes it."""
        if self._waiter is not None and self.state.is_due:
            self._resume()

    def fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
        self._resume()

    async def take(self) -> RequestOutput:
        """What came since the last time, as one output. Raises what ended the request."""
        while (output := self.state.next_output()) is None:
            if self.error is not None:
                raise self.error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self.was_shown = True
        return output

    def _resume(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
