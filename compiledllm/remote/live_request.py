"""A request that a client waits for.

Tokens are added to the request's state as they arrive, and the waiting client takes one output with
all new tokens. A slow reader therefore gets fewer outputs with more tokens each, and nothing queues
up.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from compiledllm.engine.request_state import RequestState
from compiledllm.outputs import RequestOutput


@dataclass(eq=False, slots=True)
class LiveRequest:
    """A request with a client that waits for its output."""

    state: RequestState
    error: Exception | None = None  # raised by `take` after the last output
    was_shown: bool = False  # whether any output has been taken
    ran_at_crash: bool = False  # was running when an engine ended, and started over since
    has_moved: bool = False  # was given to this engine after another engine had ended
    num_tokens: int = field(init=False)  # prompt tokens, counted once per completion
    _waiter: asyncio.Future[None] | None = None

    def __post_init__(self) -> None:
        self.num_tokens = sum(c.spec.num_prompt_tokens for c in self.state.completions)

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
