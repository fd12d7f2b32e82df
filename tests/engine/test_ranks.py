"""The processes of ranks: what their end does to an engine."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from compiledllm import ConfigError, Engine, SamplingParams
from compiledllm.engine.rank_processes import RankError
from tests.support.ranks import FIXED, GREEDY, PROMPTS


@pytest.mark.parametrize("moment", ["idle", "at work"])
def test_a_killed_rank_ends_the_engine(
    moment: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: heard.append(failed.exc_value))
    engine = Engine(tiny_model("llama"), **FIXED, tensor_parallel_size=2)
    (rank,) = engine.core.worker._group.ranks
    params = SamplingParams(**GREEDY)

    def kill() -> None:
        os.kill(rank.pid, signal.SIGKILL)

    if moment == "idle":
        kill()
    else:
        threading.Timer(0.05, kill).start()
        params = SamplingParams(**GREEDY | {"max_tokens": 400})
    with pytest.raises(RuntimeError):
        while True:
            engine.generate(PROMPTS, params, use_tqdm=False)
    assert engine.core.worker.is_broken
    with pytest.raises(RankError):
        engine.generate(PROMPTS, params, use_tqdm=False)
    deadline = time.monotonic() + 60
    while not heard and time.monotonic() < deadline:
        time.sleep(0.01)
    assert isinstance(heard[0], RankError), "an engine's process ends by this"


def test_one_divided_model_a_process_at_a_time(tiny_model: Callable[..., Path]) -> None:
    model, options = tiny_model("llama"), FIXED | {"tensor_parallel_size": 2}
    first = Engine(model, **options)
    with pytest.raises(ConfigError, match=r"call the other's shutdown\(\) first"):
        Engine(model, **options)
    tokens = first.generate(PROMPTS, SamplingParams(**GREEDY), use_tqdm=False)
    first.shutdown()
    again = Engine(model, **options).generate(PROMPTS, SamplingParams(**GREEDY), use_tqdm=False)
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in tokens]


def test_gloo_is_told_the_interface_that_leads_to_the_first_rank() -> None:
    from compiledllm.kernels.collectives import interface_to

    assert interface_to("127.0.0.1") == ("lo" if sys.platform == "linux" else None)
    assert interface_to("no such host") is None


def test_ranks_without_ray_say_how_to_get_it(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    with pytest.raises(ConfigError, match=r"pip install 'compiledllm\[ray\]', or use 'mp'"):
        Engine(tiny_model("llama"), **FIXED | options)
