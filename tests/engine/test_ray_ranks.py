"""Ranks as Ray actors, where Ray is installed: the same tokens, and an end that ends the engine."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from compiledllm import ConfigError, Engine, SamplingParams
from compiledllm.engine.rank_processes import RankError
from tests.support.ranks import FIXED, GREEDY, PROMPTS
from tests.support.ray_cluster import two_machines

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_machines() as found:
        yield found


def tokens_of(engine: Engine) -> list[list[int]]:
    outputs = engine.generate(PROMPTS, SamplingParams(**GREEDY), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@needs_ray
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


@needs_ray
def test_heads_that_cannot_be_divided(cluster: Any, tiny_model: Callable[..., Path]) -> None:
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    model = tiny_model("llama", num_attention_heads=3, num_key_value_heads=3, hidden_size=48)
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        Engine(model, **FIXED | options)


@needs_ray
def test_more_ranks_than_the_cluster_has_room_for(
    cluster: Any, tiny_model: Callable[..., Path]
) -> None:
    options = {"tensor_parallel_size": 4, "distributed_executor_backend": "ray"}
    with pytest.raises(ConfigError, match="needs as many CPUs, and Ray's cluster has 2"):
        Engine(tiny_model("llama"), **FIXED | options)


def test_without_ray_the_error_says_how_to_get_it(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    with pytest.raises(ConfigError, match=r"pip install 'compiledllm\[ray\]', or use 'mp'"):
        Engine(tiny_model("llama"), **FIXED | options)
