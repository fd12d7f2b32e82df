"""Threads for what would hold up the event loop: reading large bodies, templates, tokenising.

A lane for short texts and one for long ones, so that no crowd of long ones delays a short one.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from compiledllm.grammars.compiler import MAX_WAITING
from compiledllm.server.live_request import Overloaded

T = TypeVar("T")
Receive = Callable[[], Awaitable[Any]]

SHORT_BYTES = 2**16  # of a body whose text takes some 0.1 s to tokenise at most
SHORT_THREADS = 2
LARGE_BLOCK_BYTES = 2**20  # of memory
MAX_WAITING_BYTES = 2**28  # of the bodies that wait for a thread, or have one


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class Lanes:
    """Runs work in threads, and forgets what has not begun when its client leaves."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(SHORT_THREADS, "short")
        self._long = ThreadPoolExecutor(1, "long")
        self._compiling = ThreadPoolExecutor(2 * MAX_WAITING, "compiling")  # threads that wait
        self._num_bytes = 0
        _return_large_blocks()

    async def run(self, num_bytes: int, receive: Receive, work: Callable[[], T]) -> T:
        """What the work returns. num_bytes: of the body that the work is for.

        Raises ClientLeft as soon as `receive` says so, and Overloaded if too much waits already.
        """
        if self._num_bytes and self._num_bytes + num_bytes > MAX_WAITING_BYTES:
            raise Overloaded(
                f"bodies of {self._num_bytes} bytes wait to be read, and {MAX_WAITING_BYTES} may", 5
            )
        self._num_bytes += num_bytes
        try:
            lane = self._short if num_bytes <= SHORT_BYTES else self._long
            return await self._run_in(lane, receive, work)
        finally:
            self._num_bytes -= num_bytes

    async def compile(self, receive: Receive, work: Callable[[], None]) -> None:
        """Run work that waits for the helper which compiles grammars; it holds up no lane."""
        await self._run_in(self._compiling, receive, work)

    async def _run_in(self, lane: ThreadPoolExecutor, receive: Receive, work: Callable[[], T]) -> T:
        waiting = [work]  # emptied when the work begins, or when the client leaves
        future = lane.submit(lambda: waiting.pop()())
        try:
            return await unless_left(receive, asyncio.wrap_future(future))
        finally:
            waiting.clear()

    def close(self) -> None:
        """Let what runs end by itself, and drop the rest."""
        for lane in (self._short, self._long, self._compiling):
            lane.shutdown(wait=False, cancel_futures=True)


_M_MMAP_THRESHOLD = -3


def _return_large_blocks() -> None:
    """Have glibc give what held a large body back to the system once it is freed.

    By default it raises its limit for doing so up to 32 MiB as such blocks are freed.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


async def unless_left(receive: Receive, work: Awaitable[T]) -> T:
    """What the work returns. Raises ClientLeft, and the work is cancelled, if the client leaves."""

    async def wait_for_end() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_end())
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return await task
    finally:
        for pending in (task, left):
            pending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(task, left, return_exceptions=True)
