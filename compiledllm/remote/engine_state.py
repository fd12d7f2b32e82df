"""The state of an engine in another process, as seen by the processes that use the engine."""

from __future__ import annotations

import asyncio
from typing import Literal

from compiledllm.remote.limits import Limits
from compiledllm.remote.wire import Failed, Ready, Stats

State = Literal["loading", "ready", "draining", "dead"]


class EngineState:
    """The state of one engine. limits: on requests, and on the engine's silence.

    Attributes: `state`, `ready` (the engine's last `Ready` message), `stats` (after the engine's
    last step), `failure` (why the engine ended), `num_restarts`.
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
