"""Ranks as Ray actors, where Ray is installed: the same tokens, and an end that ends the engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from compiledllm import ConfigError, Engine, SamplingParams
from compiledllm.engine.rank_processes import RankError
from tests.engine.test_ranks import FIXED, GREEDY, PROMPTS

HAS_RAY = find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="needs Ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def tokens_of(engine: Engine) -> list[list[int]]:
    outputs = engine.generate(PROMPTS, SamplingParams(**GREEDY), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@needs_ray
def test_actors_give_the_tokens_of_one_process_until_one_is_killed(
    cluster: Any, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: heard.append(failed.exc_value))
    model = tiny_model("llama")
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    engine = Engine(model, **FIXED | options)
    assert tokens_of(engine) == tokens_of(Engine(model, **FIXED))
    (rank,) = engine.core.worker._group.ranks
    cluster.kill(rank._actor)
    with pytest.raises(RuntimeError):
        while True:
            tokens_of(engine)
    assert engine.core.worker.is_broken
    with pytest.raises(RankError):
        tokens_of(engine)


@needs_ray
def test_more_ranks_than_the_cluster_has_room_for(
    cluster: Any, tiny_model: Callable[..., Path]
) -> None:
    options = {"tensor_parallel_size": 4, "distributed_executor_backend": "ray"}
    with pytest.raises(ConfigError, match="needs as many CPUs, and Ray's cluster has 2"):
        Engine(tiny_model("llama"), **FIXED | options)


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_the_error_says_how_to_get_it(tiny_model: Callable[..., Path]) -> None:
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    with pytest.raises(ConfigError, match=r"pip install 'compiledllm\[ray\]', or use 'mp'"):
        Engine(tiny_model("llama"), **FIXED | options)
