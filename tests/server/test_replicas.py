"""Several fake engines behind one server: routing, health, restarts and metrics of each."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from compiledllm.remote.engine_client import EngineClient
from compiledllm.remote.errors import EngineError
from compiledllm.remote.limits import Limits
from compiledllm.remote.replicas import Replicas
from compiledllm.server.app import AppOptions, create_app
from tests.server.test_life import FAKE, OPTIONS, Answer, call, is_ok
from tests.support.server import holding

WORD = 64  # tokens of a prompt's piece, many times a router's


class Rig:
    """Two replicas, and the HTTP application in front of them."""

    def __init__(self, folder: Path) -> None:
        limits = Limits(99, 10**6, request_s=30, stuck_s=5)
        self._hold = folder / "hold"
        environment = {"FAKE_HOLD": str(self._hold)}
        self.clients = [
            EngineClient(OPTIONS, limits, folder / "crashes", FAKE, environment) for _ in range(2)
        ]
        self.engine = Replicas(self.clients)
        self.app = create_app(self.engine, AppOptions(model_names=["fake"], api_keys=[]))

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.01)

    def holding(self) -> AbstractContextManager[None]:
        return holding(self._hold)

    async def ask(self, prompt: list[int], max_tokens: int = 5) -> Answer:
        body = {"prompt": prompt, "max_tokens": max_tokens}
        return await call(self.app, "POST", "/v1/completions", body)

    def kill(self, index: int) -> int:
        child = self.clients[index]._child
        assert child is not None
        os.kill(child.process.pid, signal.SIGKILL)
        return child.process.pid

    async def metrics(self, name: str) -> list[float]:
        lines = (await call(self.app, "GET", "/metrics")).text.splitlines()
        found = [line for line in lines if line.startswith(f"compiledllm:{name}{{")]
        assert all(f'engine="{index}"' in line for index, line in enumerate(found))
        return [float(line.split()[-1]) for line in found]


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Callable[[Rig], Awaitable[None]]], None]:
    """play(scene): run `await scene(rig)` once both replicas are ready."""

    def run(scene: Callable[[Rig], Awaitable[None]]) -> None:
        async def main() -> None:
            rig = Rig(tmp_path)
            rig.engine.start()
            try:
                await rig.engine.wait_until_settled()
                await rig.until(lambda: all(c.state == "ready" for c in rig.clients))
                await scene(rig)
            finally:
                await rig.engine.stop()

        asyncio.run(asyncio.wait_for(main(), 60))

    return run


def test_requests_are_spread_and_chats_stay(play: Callable[..., None]) -> None:
    async def scene(rig: Rig) -> None:
        answers = await asyncio.gather(*(rig.ask([5 + i] * 8) for i in range(8)))
        assert all(map(is_ok, answers))
        assert await rig.metrics("generation_tokens_total") == [20, 20]
        chat = [7] * WORD
        for turn in range(10):
            busy = asyncio.create_task(rig.ask([9], 40))  # so that the less busy one changes
            assert is_ok(await rig.ask(chat))
            chat = [*chat, *[10 + turn] * WORD]
            await busy
        of_chat = [c.live.num_finished for c in rig.clients]
        assert sum(of_chat) == 28
        ready = (await call(rig.app, "GET", "/health")).json()
        assert ready["status"] == "ok" and ready["replicas"] == ["ready", "ready"]
        assert rig.clients[0].requests is rig.clients[1].requests or rig.clients[1].requests

    play(scene)


def test_a_killed_replica_leaves_the_others_requests_alone(play: Callable[..., None]) -> None:
    async def scene(rig: Rig) -> None:
        with rig.holding():
            tasks = [asyncio.create_task(rig.ask([5 + i], 60)) for i in range(8)]
            await rig.until(lambda: all(len(c.live) == 4 and c.stats for c in rig.clients))
            rig.kill(0)
            await rig.until(lambda: rig.clients[0].state == "loading")
            assert rig.engine.state == "ready" and rig.engine.why_unhealthy() is None
            # Its own requests, and those that only waited for the lost one.
            assert len(rig.clients[1].live) >= 4
        assert is_ok(await rig.ask([50]))  # by the other one
        assert all(is_ok(answer, 60) for answer in await asyncio.gather(*tasks))
        assert await rig.metrics("engine_restarts_total") == [1, 0]
        await rig.until(lambda: rig.clients[0].state == "ready")

    play(scene)


def test_requests_that_only_waited_for_an_ended_replica_go_to_another(
    play: Callable[..., None],
) -> None:
    async def scene(rig: Rig) -> None:
        lost, other = rig.clients
        with rig.holding():
            tasks = [asyncio.create_task(rig.ask([5 + i], 60)) for i in range(16)]
            await rig.until(lambda: all(len(c.live) == 8 and c.stats for c in rig.clients))
            rig.kill(0)
            await rig.until(lambda: lost.state == "loading")
            assert (len(lost.live), len(other.live)) == (4, 12), "four ran there"
            moved = [live for live in other.live if live.has_moved]
            assert len(moved) == 4
            with rig.engine.following(moved[0]):
                pass  # its client leaves
            assert len(other.live) == 11 and moved[0] not in other.live
            moved[0].fail(EngineError("left"))
        answers = await asyncio.gather(*tasks)
        assert sorted(is_ok(answer, 60) for answer in answers) == [False] + [True] * 15

    play(scene)


def test_draining_waits_for_all_replicas(play: Callable[..., None]) -> None:
    async def scene(rig: Rig) -> None:
        with rig.holding():
            tasks = [asyncio.create_task(rig.ask([5 + i], 30)) for i in range(4)]
            await rig.until(lambda: len(rig.engine.live) == 4)
            drained = asyncio.create_task(rig.engine.drain(20))
        await drained
        assert all(is_ok(answer, 30) for answer in await asyncio.gather(*tasks))
        refused = await rig.ask([5])
        assert refused.status == 503 and "draining" in refused.text
        assert len(rig.engine.live) == 0

    play(scene)


def test_a_replica_that_is_given_up_leaves_one_that_serves(
    play: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(rig: Rig) -> None:
        monkeypatch.setattr(rig.clients[0]._restarts, "note_crash", lambda _: False)
        rig.kill(0)
        await rig.until(lambda: rig.clients[0].state == "dead")
        assert rig.engine.failure is None and rig.engine.state == "ready"
        assert all([is_ok(await rig.ask([5 + i])) for i in range(4)])
        assert await rig.metrics("engine_ready") == [0, 1]
        monkeypatch.setattr(rig.clients[1]._restarts, "note_crash", lambda _: False)
        rig.kill(1)
        await rig.engine.wait_until_dead()
        assert rig.engine.failure is not None and rig.engine.state == "dead"
        health = await call(rig.app, "GET", "/health")
        assert health.status == 503 and "SIGKILL" in health.text

    play(scene)
