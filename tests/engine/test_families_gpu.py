"""Every family on a GPU: compiled and captured steps give the tokens of the CPU's eager ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compiledllm import Engine, SamplingParams
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


def assert_tokens_of_the_cpu(checkpoint: Path, prompts: list[list[int]]) -> None:
    """Also from the prefix cache, in every size of a batch, without a late compilation."""
    reference = Engine(checkpoint, device="cpu", enforce_eager=True, **FIXED)
    engine = Engine(checkpoint, **FIXED)
    assert engine.core.runner.graphs is not None
    expected = tokens(reference, prompts)
    assert tokens(engine, prompts) == expected
    assert tokens(engine, prompts) == expected
    assert [tokens(engine, [prompt])[0] for prompt in prompts[:6]] == expected[:6]
    assert engine.core.runner.compiler.num_recompiles == 0
    engine.core.scheduler.check_invariants()


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
