"""Tensor parallelism on two GPUs: captured steps with their sums give the tokens of one GPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compiledllm import ConfigError, Engine, SamplingParams
from compiledllm.engine.rank_processes import RankError
from tests.support.quantized import save_quantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

PROMPTS = [[random.Random(n).randrange(3, 128) for _ in range(n)] for n in (1, 17, 100, 300, 64)]
GREEDY = {"temperature": 0, "max_tokens": 32, "ignore_eos": True}
FIXED: dict[str, Any] = {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 2**27}
SHAPE = {"hidden_size": 512, "head_dim": 128, "intermediate_size": 1024}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    "olmo2": {"pad_token_id": 0},
    "gemma2": {"sliding_window": 20, "query_pre_attn_scalar": 128},
}


def outputs_of(model: Path, size: int, **options: Any) -> list[Any]:
    engine = Engine(model, **FIXED | {"max_num_seqs": 16} | options, tensor_parallel_size=size)
    params = SamplingParams(**GREEDY, logprobs=1, prompt_logprobs=1)
    first = engine.generate(PROMPTS, params, use_tqdm=False)
    return [*first, *engine.generate(PROMPTS[:1], params, use_tqdm=False)]


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"max_num_batched_tokens": 64}])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_gpus_give_the_tokens_of_one(
    family: str, options: dict[str, Any], tiny_model: Callable[..., Path]
) -> None:
    if options and family != "llama":
        pytest.skip("one family shows it")
    model = tiny_model(family, **SHAPE | FAMILIES[family])
    exact = {"dtype": "float32"} | options
    assert tokens_of(outputs_of(model, 2, **exact)) == tokens_of(outputs_of(model, 1, **exact))


@pytest.mark.parametrize("kind", ["fp8 of channels", "gptq", "awq"])
def test_quantised_weights_in_bfloat16(
    kind: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Sums are rounded otherwise than in one process, so log probabilities are near, not equal."""
    packed, _ = save_quantized(tiny_model("llama", **SHAPE), tmp_path, kind)
    one, two = (outputs_of(packed, size, dtype="bfloat16") for size in (1, 2))
    for a, b in zip(one, two, strict=True):
        for x, y in zip(a.prompt_logprobs[1:], b.prompt_logprobs[1:], strict=True):
            token = next(iter(x))
            assert token in y and abs(x[token].logprob - y[token].logprob) < 0.25


def test_sampling_with_seeds_and_processors(tiny_model: Callable[..., Path]) -> None:
    model, found = tiny_model("llama", **SHAPE), []
    for size in (1, 2):
        engine = Engine(model, **FIXED, dtype="float32", tensor_parallel_size=size)
        seeded = SamplingParams(temperature=1.0, seed=5, top_p=0.9, max_tokens=24, ignore_eos=True)
        edited = SamplingParams(**GREEDY, logits_processors=[lambda ids, x: x.roll(1)])
        found.append(
            tokens_of(engine.generate(PROMPTS, seeded, use_tqdm=False))
            + tokens_of(engine.generate(PROMPTS, edited, use_tqdm=False))
        )
        if size == 2:
            print(engine.core.report["all_reduce"])
    assert found[0] == found[1]


def test_more_ranks_than_gpus_are_refused(tiny_model: Callable[..., Path]) -> None:
    count = torch.cuda.device_count()
    heads = {"num_attention_heads": 2 * count, "num_key_value_heads": 1, "head_dim": 16}
    sizes = {"hidden_size": 64 * count, "intermediate_size": 64 * count}
    with pytest.raises(ConfigError, match=f"there are {count}; use at most {count}"):
        Engine(tiny_model("llama", **heads | sizes), **FIXED, tensor_parallel_size=2 * count)


def test_a_killed_rank_ends_the_engine(tiny_model: Callable[..., Path]) -> None:
    import os
    import signal

    engine = Engine(
        tiny_model("llama", **SHAPE), **FIXED, enforce_eager=True, tensor_parallel_size=2
    )
    (rank,) = engine.core.worker._group.ranks
    os.kill(rank.pid, signal.SIGKILL)
    rank._process.wait()
    with pytest.raises((RankError, RuntimeError)):
        while True:
            engine.generate(PROMPTS, SamplingParams(**GREEDY), use_tqdm=False)
