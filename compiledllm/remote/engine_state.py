"""What an engine's users see of it, whichever process owns the engine's process."""

from __future__ import annotations

import asyncio
from typing import Literal

from compiledllm.remote.limits import Limits
from compiledllm.remote.wire import Failed, Ready, Stats

State = Literal["loading", "ready", "draining", "dead"]


class EngineState:
    """limits: of requests, and of the engine's silence.

    Attributes: `state`, `ready` (the engine's last `Ready` message), `stats` (after its last step),
    `failure` (why it ended), `num_restarts`.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.state: State = "loading"
        self.ready: Ready | None = None
        self.stats: Stats | None = None
        self.failure: Failed | None = None
        self.num_restarts = 0
        self._changed = asyncio.Event()

    async def wait_until_settled(self) -> None:
        """Return once the engine is ready or has failed for good."""
        while self.state == "loading":
            self._changed.clear()
            await self._changed.wait()

    def _set(self, state: State) -> None:
        self.state = state
        self._changed.set()
