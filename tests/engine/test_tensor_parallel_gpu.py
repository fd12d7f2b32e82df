"""Tensor parallelism on two GPUs: captured steps with their sums give the tokens of one GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compiledllm import ConfigError, Engine, SamplingParams
from compiledllm.engine.rank_processes import RankError
from tests.engine.captured_ranks import FIXED, GREEDY, PROMPTS, results_of
from tests.support.quantized import save_quantized
from tests.support.ranks import LastingRanks, lasting_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

ROOT = Path(__file__).parents[2]
END_S = 100  # for a process to start, compile, capture, generate and end
EAGER = {"enforce_eager": True}
SHAPE = {"hidden_size": 512, "head_dim": 128, "intermediate_size": 1024}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    "olmo2": {"pad_token_id": 0},
    "gemma2": {"sliding_window": 20, "query_pre_attn_scalar": 128},
}


@pytest.fixture(scope="module")
def captured(tiny_model: Callable[..., Path]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Processes with captured engines, by dtype, which run while other tests do."""
    command = [sys.executable, "-m", "tests.engine.captured_ranks"]
    model = str(tiny_model("llama", **SHAPE))
    found = {
        dtype: subprocess.Popen(
            [*command, model, dtype], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for dtype in ("bfloat16", "float32")
    }
    yield found
    for process in found.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def ranks(captured: object) -> Iterator[LastingRanks]:
    with lasting_ranks(2, "cuda") as found:
        yield found


def assert_near(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for found, wanted in zip(actual["logprobs"], expected["logprobs"], strict=True):
        torch.testing.assert_close(
            torch.tensor(found), torch.tensor(wanted), atol=tolerance, rtol=0
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_two_gpus_give_the_tokens_of_one(
    family: str, ranks: LastingRanks, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model(family, **SHAPE | FAMILIES[family])
    one, two = (results_of(str(model), size, dtype="float32", **EAGER) for size in (1, 2))
    assert two["tokens"] == one["tokens"]
    assert_near(two, one, 1e-3)


def check_bfloat16(model: Path) -> None:
    """Sums are rounded otherwise than in one process, so log probabilities are near, not equal."""
    one, two = (results_of(str(model), size, dtype="bfloat16", **EAGER) for size in (1, 2))
    assert_near(two, one, 0.25)
    assert two["again"] == two["tokens"]


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str, ranks: LastingRanks, tiny_model: Callable[..., Path]) -> None:
    check_bfloat16(tiny_model(family, **SHAPE | FAMILIES[family]))


@pytest.mark.parametrize("kind", ["fp8 of channels", "gptq", "awq"])
def test_quantised_weights(
    kind: str, ranks: LastingRanks, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    check_bfloat16(save_quantized(tiny_model("llama", **SHAPE), tmp_path, kind)[0])


def test_sampling_with_seeds_and_processors(
    ranks: LastingRanks, tiny_model: Callable[..., Path]
) -> None:
    model, found = tiny_model("llama", **SHAPE), []
    for size in (1, 2):
        engine = Engine(model, **FIXED | EAGER, dtype="float32", tensor_parallel_size=size)
        seeded = SamplingParams(temperature=1.0, seed=5, top_p=0.9, max_tokens=24, ignore_eos=True)
        edited = SamplingParams(**GREEDY, logits_processors=[lambda ids, x: x.roll(1)])
        outputs = [
            *engine.generate(PROMPTS, seeded, use_tqdm=False),
            *engine.generate(PROMPTS, edited, use_tqdm=False),
        ]
        found.append([list(output.outputs[0].token_ids) for output in outputs])
    assert found[0] == found[1]


def test_more_ranks_than_gpus_are_refused(tiny_model: Callable[..., Path]) -> None:
    count = torch.cuda.device_count()
    heads = {"num_attention_heads": 2 * count, "num_key_value_heads": 1, "head_dim": 16}
    sizes = {"hidden_size": 64 * count, "intermediate_size": 64 * count}
    with pytest.raises(ConfigError, match=f"there are {count}; use at most {count}"):
        Engine(tiny_model("llama", **heads | sizes), **FIXED, tensor_parallel_size=2 * count)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_steps_and_the_end_of_their_process(
    dtype: str,
    captured: dict[str, subprocess.Popen[str]],
    tiny_model: Callable[..., Path],
) -> None:
    """Of a process that has captured sums: NCCL waits for graphs, and a kernel for other ranks."""
    process = captured[dtype]
    printed, _ = process.communicate(timeout=END_S)
    assert process.returncode == 0
    two = json.loads(printed.splitlines()[-1])
    one = results_of(str(tiny_model("llama", **SHAPE)), 1, dtype=dtype, **EAGER)
    assert two["again"] == two["tokens"] and two["recompiles"] == 0
    assert_near(two, one, 1e-3 if dtype == "float32" else 0.25)
    if dtype == "float32":
        assert two["tokens"] == one["tokens"]
    print(two["sums_by"])


def test_a_killed_rank_ends_the_engine(
    ranks: LastingRanks, tiny_model: Callable[..., Path]
) -> None:
    """The first rank, which waits for the killed one in a kernel, can use its GPU again."""
    options = FIXED | EAGER | {"dtype": "bfloat16"}
    engine = Engine(tiny_model("llama", **SHAPE), **options, tensor_parallel_size=2)
    (rank,) = ranks.ranks
    os.kill(rank.pid, signal.SIGKILL)
    rank._process.wait()
    with pytest.raises((RankError, RuntimeError)):
        while True:
            engine.generate(PROMPTS, SamplingParams(**GREEDY), use_tqdm=False)
    ranks.close()
    torch.cuda.synchronize()
