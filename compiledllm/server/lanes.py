"""Threads for work that would block the event loop: parsing large bodies, templates, tokenising.

Short and long texts have separate lanes, so that many long texts do not delay a short one.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from compiledllm.grammars.compiler import MAX_WAITING
from compiledllm.remote.errors import Overloaded

T = TypeVar("T")
Receive = Callable[[], Awaitable[Any]]

SHORT_BYTES = 2**16  # of a body; tokenising its text takes at most about 0.1 s
SHORT_THREADS = 2
LARGE_BLOCK_BYTES = 2**20  # allocations from this size on are returned to the system when freed
MAX_WAITING_BYTES = 2**28  # of all bodies whose work waits or runs


class ClientLeft(Exception):
    """The client has closed its connection, so nobody waits for the answer."""


class Lanes:
    """Runs work in threads, and drops work that has not begun when its client leaves."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(SHORT_THREADS, "short")
        self._long = ThreadPoolExecutor(1, "long")
        self._compiling = ThreadPoolExecutor(2 * MAX_WAITING, "compiling")  # threads that wait
        self._num_bytes = 0
        _return_large_blocks()

    async def run(self, num_bytes: int, receive: Receive, work: Callable[[], T]) -> T:
        """Run work and return its result. num_bytes: size of the body that the work reads.

        Raises ClientLeft as soon as `receive` reports a disconnect, and Overloaded if too many
        bytes wait.
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


_M_MMAP_THRESHOLD = -3


def _return_large_blocks() -> None:
    """Make glibc return the memory of large bodies to the system when it is freed.

    By default glibc raises its threshold for returning a block, up to 32 MiB, as large blocks are
    freed.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


async def unless_left(receive: Receive, work: Awaitable[T]) -> T:
    """Return the result of the work. If the client leaves, cancel it and raise ClientLeft."""

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
