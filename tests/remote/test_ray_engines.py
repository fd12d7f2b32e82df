"""Replicas on the machines of a Ray cluster, with fake engines: places, ends, what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from compiledllm import ConfigError
from compiledllm.remote.engine_client import EngineClient
from compiledllm.remote.limits import Limits
from compiledllm.remote.replicas import Replicas
from compiledllm.server.app import AppOptions, create_app
from tests.server.test_life import FAKE, KILL, OPTIONS, call, is_ok
from tests.support.ray_cluster import two_machines

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_machines() as found:
        yield found


@pytest.mark.parametrize(("engines", "ranks", "fit"), [(3, 1, 2), (2, 2, 1)])
def test_more_replicas_than_the_cluster_has_room_for(
    engines: int, ranks: int, fit: int, cluster: Any
) -> None:
    from compiledllm.remote.ray_engines import RayEngines

    with pytest.raises(ConfigError, match=f"Ray's cluster has 2; at most {fit} replicas fit"):
        RayEngines(engines, ranks, "cpu")


def test_replicas_on_two_machines_of_which_one_is_lost_and_comes_back(
    cluster: Any, tmp_path: Path
) -> None:
    from compiledllm.remote.ray_engines import RayEngines

    hold = tmp_path / "hold"
    limits, spawn = Limits(99, 10**6, request_s=100, stuck_s=5), RayEngines(2, 1, "cpu").spawn
    clients = [
        EngineClient(OPTIONS, limits, tmp_path, FAKE, {"FAKE_HOLD": str(hold)}, spawn=spawn)
        for _ in range(2)
    ]
    engine = Replicas(clients)
    app = create_app(engine, AppOptions(model_names=["fake"], api_keys=[]))

    async def ask(first: int, max_tokens: int = 5) -> Any:
        body = {"prompt": [first], "max_tokens": max_tokens}
        return await call(app, "POST", "/v1/completions", body)

    async def until_states(*states: str) -> None:
        while sorted(client.state for client in clients) != sorted(states):
            await asyncio.sleep(0.02)

    async def scene() -> None:
        await until_states("ready", "ready")
        assert is_ok(await ask(5))
        killed = await ask(KILL)
        assert killed.status == 500 and "for the second time while it ran" in killed.text
        await until_states("ready", "ready")
        hold.touch()
        tasks = [asyncio.create_task(ask(10 + i, 60)) for i in range(8)]
        while not all(len(client.live) == 4 and client.stats for client in clients):
            await asyncio.sleep(0.01)
        lost = next(iter(cluster.worker_nodes))
        await asyncio.to_thread(cluster.remove_node, lost, allow_graceful=False)
        await until_states("loading", "ready")
        assert not any(task.done() for task in tasks)
        hold.unlink()
        answers = await asyncio.gather(*tasks)
        assert all(is_ok(answer, 60) for answer in answers), [a.text for a in answers]
        assert is_ok(await ask(20))
        cluster.add_node(num_cpus=1)
        await until_states("ready", "ready")

    async def main() -> None:
        engine.start()
        try:
            await scene()
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(main(), 120))
