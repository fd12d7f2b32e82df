"""Every family on a GPU, after a cold and a warm start, gives the tokens of the eager CPU path."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compiledllm import Engine, SamplingParams
from tests.support.artifacts import keep_artifacts_in, wait_until_kept
from tests.support.families import GEMMA4, GEMMA4_DENSE, GEMMA4_SHARED, IN_ENGINE, VARIANTS

pytestmark = pytest.mark.gpu

FIXED: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": 2**27,
    "max_num_batched_tokens": 70,
    "max_num_seqs": 8,
}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
HEADS_OF_GEMMA4 = {"head_dim": 256, "global_head_dim": 512}  # as the published models have them


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(3)
    lengths = [1, 2, 15, 16, 17, 100, *(draw.randrange(1, 90) for _ in range(10))]
    return [[draw.randrange(3, 128) for _ in range(length)] for length in lengths]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_artifacts_in(tmp_path / "caches", monkeypatch)


def assert_tokens_of_the_cpu(checkpoint: Path, prompts: list[list[int]]) -> None:
    """After a start that compiles and after one from its artifact; also from the prefix cache."""
    reference = Engine(checkpoint, device="cpu", enforce_eager=True, **FIXED)
    expected = tokens(reference, prompts)
    for is_restored in (False, True):
        engine = Engine(checkpoint, **FIXED)
        wait_until_kept()
        worker = engine.core.worker
        why = worker.cache.reason, worker.runner.compiler.why_not_saved
        assert worker.is_restored == is_restored, why
        assert engine.core.runner.graphs is not None
        assert tokens(engine, prompts) == expected
        assert tokens(engine, prompts) == expected
        assert [tokens(engine, [prompt])[0] for prompt in prompts[:6]] == expected[:6]
        assert engine.core.worker.stats().num_recompiles == 0
        engine.core.scheduler.check_invariants()
        del engine
        gc.collect()


def tokens(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    outputs = engine.generate(prompts, GREEDY, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("family", IN_ENGINE)
def test_family(family: str, tiny_model: Callable[..., Path], prompts: list[list[int]]) -> None:
    shape = VARIANTS[family, IN_ENGINE[family]]
    if "linear_value_head_dim" in shape:
        shape = shape | {"linear_value_head_dim": 16}  # the least that GPU kernels take
    assert_tokens_of_the_cpu(tiny_model(family, **shape), prompts)


@pytest.mark.parametrize("variant", [GEMMA4_DENSE, GEMMA4_SHARED], ids=["k_eq_v", "shared_kv"])
def test_heads_of_gemma_4(
    variant: dict[str, Any], tiny_model: Callable[..., Path], prompts: list[list[int]]
) -> None:
    checkpoint = tiny_model("gemma4", **GEMMA4 | variant | HEADS_OF_GEMMA4)
    assert_tokens_of_the_cpu(checkpoint, prompts)
