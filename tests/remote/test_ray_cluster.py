"""A Ray cluster of two machines: replicas with fake engines, and ranks as actors.

Places, the same tokens, ends, what is refused. The tests share a cluster, as it starts slowly.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from compiledllm import ConfigError, Engine, SamplingParams
from compiledllm.engine.rank_processes import RankError
from compiledllm.remote.engine_client import EngineClient
from compiledllm.remote.limits import Limits
from compiledllm.remote.replicas import Replicas
from compiledllm.server.app import AppOptions, create_app
from tests.server.test_life import FAKE, KILL, OPTIONS, call, is_ok
from tests.support.ranks import FIXED, GREEDY, PROMPTS
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


# -- ranks -----------------------------------------------------------------------------------------


def tokens_of(engine: Engine) -> list[list[int]]:
    outputs = engine.generate(PROMPTS, SamplingParams(**GREEDY), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_ranks_on_two_machines_give_the_tokens_of_one_process_until_one_is_lost(
    cluster: Any, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    heard: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: heard.append(failed.exc_value))
    model = tiny_model("llama")
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    engine = Engine(model, **FIXED | options)
    assert tokens_of(engine) == tokens_of(Engine(model, **FIXED))
    (rank,), (machine,) = engine.core.worker._group.ranks, cluster.worker_nodes
    ray.kill(rank._actor)
    cluster.remove_node(machine, allow_graceful=False)
    with pytest.raises(RuntimeError):
        while True:
            tokens_of(engine)
    assert engine.core.worker.is_broken
    with pytest.raises(RankError):
        tokens_of(engine)
    engine.shutdown()
    with pytest.raises(ConfigError, match="needs as many CPUs, and Ray's cluster has 1; use"):
        Engine(model, **FIXED | options)
    cluster.add_node(num_cpus=1)


def test_heads_that_cannot_be_divided(cluster: Any, tiny_model: Callable[..., Path]) -> None:
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    model = tiny_model("llama", num_attention_heads=3, num_key_value_heads=3, hidden_size=48)
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        Engine(model, **FIXED | options)


def test_more_ranks_than_the_cluster_has_room_for(
    cluster: Any, tiny_model: Callable[..., Path]
) -> None:
    options = {"tensor_parallel_size": 4, "distributed_executor_backend": "ray"}
    with pytest.raises(ConfigError, match="needs as many CPUs, and Ray's cluster has 2"):
        Engine(tiny_model("llama"), **FIXED | options)
