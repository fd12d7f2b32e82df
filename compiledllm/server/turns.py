"""Limits how many requests begin per pass of the event loop, so that many do not delay streams."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """Lets `per_pass` callers begin in each pass of the event loop, in order of arrival.

    Between passes, messages of the engine are read and streams write.
    """

    def __init__(self, per_pass: int) -> None:
        self._per_pass = per_pass
        self._num_begun = 0  # in this pass
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Return when it is the caller's turn, at once if fewer than `per_pass` have begun."""
        loop = asyncio.get_running_loop()
        if self._num_begun == 0:
            loop.call_soon(self._pass)
        if self._num_begun < self._per_pass:
            self._num_begun += 1
            return
        waiter = loop.create_future()
        self._waiting.append(waiter)
        await waiter

    def _pass(self) -> None:
        self._num_begun = 0
        while self._waiting and self._num_begun < self._per_pass:
            waiter = self._waiting.popleft()
            if not waiter.done():  # the waiting request may have been cancelled
                waiter.set_result(None)
                self._num_begun += 1
        if self._num_begun:
            asyncio.get_running_loop().call_soon(self._pass)
