"""Ends work for a client that has closed its connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")
Receive = Callable[[], Awaitable[Any]]


class ClientLeft(Exception):
    """The client has closed its connection, so nobody waits for the answer."""


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
