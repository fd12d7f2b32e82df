"""Threads for work that would block the event loop: parsing large bodies, templates, tokenising.

Short and long texts have separate lanes, so that many long texts do not delay a short one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from compiledllm.grammars.compiler import MAX_WAITING
from compiledllm.remote.errors import Overloaded
from compiledllm.server.client_left import Receive, unless_left

T = TypeVar("T")

SHORT_BYTES = 2**16  # of a body; tokenising its text takes at most about 0.1 s
SHORT_THREADS = 2
MAX_WAITING_BYTES = 2**28  # of all bodies whose work waits or runs


class Lanes:
    """Runs work in threads, and drops work that has not begun when its client leaves."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(SHORT_THREADS, "short")
        self._long = ThreadPoolExecutor(1, "long")
        self._compiling = ThreadPoolExecutor(2 * MAX_WAITING, "compiling")  # threads that wait
        self._num_bytes = 0

    async def run(self, num_bytes: int, receive: Receive, work: Callable[[], T]) -> T:
        """Run work and return its result. num_bytes: size of the body that the work reads.

        Raises ClientLeft as soon as `receive` reports a disconnect, and Overloaded if too many
        bytes wait.
        """
        if self._num_bytes and self._num_bytes + num_bytes > MAX_WAITING_BYTES:
            raise Overloaded(
                f"bodies of {self._num_bytes} bytes are waiting to be read, and at most "
                f"{MAX_WAITING_BYTES} bytes may; try again later",
                5,
            )
        self._num_bytes += num_bytes
        try:
            lane = self._short if num_bytes <= SHORT_BYTES else self._long
            return await self._run_in(lane, receive, work)
        finally:
            self._num_bytes -= num_bytes

    async def compile(self, receive: Receive, work: Callable[[], None]) -> None:
        """Run work that waits for the process that compiles grammars, without occupying a lane."""
        await self._run_in(self._compiling, receive, work)

    async def _run_in(self, lane: ThreadPoolExecutor, receive: Receive, work: Callable[[], T]) -> T:
        waiting = [work]  # emptied when the work begins or the client leaves
        future = lane.submit(lambda: waiting.pop()())
        try:
            return await unless_left(receive, asyncio.wrap_future(future))
        finally:
            waiting.clear()

    def close(self) -> None:
        """Drop waiting work. Running work ends by itself."""
        for lane in (self._short, self._long, self._compiling):
            lane.shutdown(wait=False, cancel_futures=True)
