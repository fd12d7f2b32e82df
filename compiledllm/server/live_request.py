"""A request that somebody waits for, how many there may be, and what can become of one."""

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
    stuck_seconds: float


@dataclass(eq=False, slots=True)
class LiveRequest:
    """A request with somebody waiting for it."""

    state: RequestState
    outputs: list[RequestOutput] = field(default_factory=list)  # that nobody has taken yet
    error: Exception | None = None  # what ends it, once those are taken
    was_shown: bool = False  # any of it
    was_replayed: bool = False
    num_tokens: int = field(init=False)  # of its prompt, for each completion
    _waiter: asyncio.Future[None] | None = None

    def __post_init__(self) -> None:
        self.num_tokens = sum(c.request.num_prompt_tokens for c in self.state.completions)

    def put(self, output: RequestOutput) -> None:
        self.outputs.append(output)
        self.was_shown = True
        self._wake()

    def fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
        self._wake()

    async def take(self) -> list[RequestOutput]:
        """All that came since the last time, at least one. Raises what ended the request."""
        while not self.outputs:
            if self.error is not None:
                raise self.error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        outputs, self.outputs = self.outputs, []
        return outputs

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
