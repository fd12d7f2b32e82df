"""Work in threads: who waits for whom, and what becomes of work whose client has left."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

pytest.importorskip("fastapi")

from compiledllm.remote.errors import Overloaded
from compiledllm.server import lanes
from compiledllm.server.client_left import ClientLeft, unless_left
from compiledllm.server.lanes import SHORT_BYTES, Lanes

LONG_BYTES = SHORT_BYTES + 1


async def stays() -> dict[str, str]:
    return await asyncio.Future()


async def leaves() -> dict[str, str]:
    await asyncio.sleep(0)
    return {"type": "http.disconnect"}


def test_long_work_holds_up_no_short_work() -> None:
    async def run() -> None:
        made, gate = Lanes(), threading.Event()
        long = [asyncio.create_task(made.run(LONG_BYTES, stays, gate.wait)) for _ in range(9)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(made.run(1, stays, lambda: "short"), 5) == "short"
        assert not any(task.done() for task in long)
        gate.set()
        await asyncio.wait_for(asyncio.gather(*long), 5)
        made.close()

    asyncio.run(run())


def test_what_has_not_begun_is_dropped_when_its_client_leaves() -> None:
    async def run() -> None:
        made, gate, begun = Lanes(), threading.Event(), list[int]()
        first = asyncio.create_task(made.run(LONG_BYTES, stays, gate.wait))
        await asyncio.sleep(0)
        for number in range(9):
            with pytest.raises(ClientLeft):
                await made.run(LONG_BYTES, leaves, lambda n=number: begun.append(n))
        gate.set()
        await asyncio.wait_for(first, 5)
        assert await made.run(LONG_BYTES, stays, lambda: list(begun)) == []
        made.close()

    asyncio.run(run())


def test_more_bytes_than_may_wait_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MAX_WAITING_BYTES", 3 * LONG_BYTES)

    async def run() -> None:
        made, gate = Lanes(), threading.Event()
        held = [asyncio.create_task(made.run(LONG_BYTES, stays, gate.wait)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await made.run(LONG_BYTES, stays, gate.wait)
        gate.set()
        await asyncio.gather(*held)
        huge: Any = await made.run(9 * LONG_BYTES, stays, lambda: "one alone is always taken")
        assert huge
        made.close()

    asyncio.run(run())


def test_errors_of_the_work_reach_who_asked() -> None:
    def fail() -> None:
        raise ValueError("so")

    async def run() -> None:
        made = Lanes()
        with pytest.raises(ValueError, match="so"):
            await made.run(1, stays, fail)
        with pytest.raises(ClientLeft):
            await unless_left(leaves, asyncio.sleep(60))
        made.close()

    asyncio.run(run())
