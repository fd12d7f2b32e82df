"""A request that a client waits for, the limits on such requests, and the errors that end one.

Tokens are added to the request's state as they arrive, and the waiting client takes one output with
all new tokens. A slow reader therefore gets fewer outputs with more tokens each, and nothing queues
up.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from compiledllm.engine.request_state import RequestState
from compiledllm.outputs import RequestOutput


class Unavailable(Exception):
    """The engine accepts no requests: it is loading, draining or dead. retry_after: seconds."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Overloaded(Exception):
    """The limit on waiting requests or tokens is reached. retry_after: seconds."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class EngineError(Exception):
    """The engine could not finish a request, through no fault of the request."""


class DeadlineExceeded(Exception):
    """A request took longer than allowed."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on requests, and timeouts in seconds.

    queued_requests: requests that may wait beyond those that run. queued_tokens: prompt tokens of
    all waiting and running requests.
    """

    queued_requests: int
    queued_tokens: int
    request_seconds: float
    stuck_seconds: float  # without a sign of life; after twice this time the engine is restarted
    load_seconds: float = 3600.0  # for the engine to load


@dataclass(eq=False, slots=True)
class LiveRequest:
    """A request with a client that waits for its output."""

    state: RequestState
    error: Exception | None = None  # raised by `take` after the last output
    was_shown: bool = False  # whether any output has been taken
    ran_at_crash: bool = False  # running when an engine ended, and restarted since
    num_tokens: int = field(init=False)  # prompt tokens, counted once per completion
    _waiter: asyncio.Future[None] | None = None

    def __post_init__(self) -> None:
        self.num_tokens = sum(c.request.num_prompt_tokens for c in self.state.completions)

    def wake(self) -> None:
        """Resume the waiting client if there is enough new text for an output."""
        if self._waiter is not None and self.state.is_due:
            self._resume()

    def fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
        self._resume()

    async def take(self) -> RequestOutput:
        """Wait for new tokens and return one output. Raises the error that ended the request."""
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
