"""Gemma 4 through the engine: KV of two shapes in one pool, and layers that read others' KV."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compiledllm import Engine, SamplingParams
from compiledllm.choices import Choice
from compiledllm.graphs.compile import Variant
from compiledllm.platform import Platform
from compiledllm.runner import model_runner
from tests.support.captured import Uncaptured
from tests.support.families import EXPERTS, GEMMA4

S, F = "sliding_attention", "full_attention"
# All that the models of the family have, in one. Keys and values of a layer with full attention
# take twice as many bytes as those of a layer with a window of 20 tokens.
CONFIG: dict[str, Any] = GEMMA4 | {
    "num_hidden_layers": 4,
    "layer_types": [S, F, S, F],
    "num_kv_shared_layers": 2,
    "global_head_dim": 64,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 16,
    "enable_moe_block": True,
    "top_k_experts": 3,
    "num_experts": EXPERTS["num_experts"],
    "moe_intermediate_size": EXPERTS["moe_intermediate_size"],
}
NUM_TOKENS = 17
SHARED = [random.Random(0).randrange(3, 128) for _ in range(130)]
PROMPTS = [[random.Random(n).randrange(3, 128) for _ in range(n)] for n in (1, 33, 100, 276)]
PROMPTS += [[*SHARED[:n], *range(3, 8)] for n in (130, 96)]
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("gemma4_text", **CONFIG)


@pytest.fixture(scope="module")
def expected(
    checkpoint: Path, greedy_by_transformers: Callable[..., list[list[int]]]
) -> list[list[int]]:
    return greedy_by_transformers(checkpoint, PROMPTS, NUM_TOKENS)


def make(checkpoint: Path, **options: Any) -> Engine:
    fixed = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "num_kv_blocks": 200}
    return Engine(checkpoint, **(fixed | {"enforce_eager": True} | options))


def greedy(engine: Engine, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    outputs = engine.generate(prompts, GREEDY, use_tqdm=False)
    engine.core.scheduler.check_invariants()
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("max_tokens", [512, 48])
def test_greedy_tokens_are_those_of_transformers(
    max_tokens: int, checkpoint: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One-shot and in chunks, then from the prefix cache; the last layers for sampled tokens."""
    monkeypatch.setattr(model_runner, "_MIN_TOKENS_FOR_SAMPLED_ONLY", 30)
    engine = make(checkpoint, max_num_batched_tokens=max_tokens, async_scheduling=True)
    layout = engine.core.plan.kv_layout
    assert (layout.windows, layout.splits) == ((20, 0), (1, 4))
    assert engine.core.plan.config.limits.block_size == 64
    assert engine.core.runner.model.num_sampled_layers == 3
    assert greedy(engine) == expected
    assert greedy(engine) == expected
    (output,) = engine.generate([PROMPTS[3]], GREEDY, use_tqdm=False)
    assert output.num_cached_tokens == 256


def test_preempted_requests_get_the_same_tokens(
    checkpoint: Path, expected: list[list[int]]
) -> None:
    needed = make(checkpoint).core.plan.blocks_per_context
    engine = make(checkpoint, num_kv_blocks=needed // 2 + 10, max_num_batched_tokens=64)
    assert greedy(engine) == expected
    assert engine.core.scheduler.num_preemptions > 0


def test_compiled_blocks_give_the_same_tokens(
    checkpoint: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of tokens but one, which no step here has."""
    monkeypatch.setattr(model_runner, "variants_for", lambda *_: [Variant(2, 2**30, 2)])
    engine = make(checkpoint, enforce_eager=False, compile_when="start")
    compiler = engine.core.runner.compiler
    assert compiler.is_ready, compiler.error
    assert greedy(engine, PROMPTS[1:3]) == expected[1:3]
    assert compiler.num_recompiles == 0


def test_what_is_captured_gives_the_same_tokens(
    checkpoint: Path, expected: list[list[int]]
) -> None:
    engine = make(checkpoint, max_num_seqs=12, max_num_batched_tokens=64)
    graphs = Uncaptured(engine.core.runner, 64)
    engine.core.runner.graphs = graphs  # type: ignore[assignment]
    assert greedy(engine) == expected
    assert {shape.is_decode for shape in graphs.replayed} == {True, False}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
def test_triton_attention_reads_blocks_of_both_sizes(
    checkpoint: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its interpreter; blocks that are free are NaN, so that reading one would be seen."""
    choice = Choice("triton", "as asked")
    monkeypatch.setattr(Platform, "choose_attention_backend", lambda *_: choice)
    engine = make(checkpoint, max_num_batched_tokens=64)
    core = engine.core
    engine.add_request(PROMPTS[2], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    while engine.has_unfinished_requests():
        outputs = engine.step()
        free = list(core.scheduler.block_pool._free)
        core.scheduler.block_pool.reset_prefix_cache()
        for kv_cache in core.runner.kv_caches:
            kv_cache[:, free] = float("nan")
    assert outputs[0].outputs[0].token_ids == expected[2][:3]


def test_layers_that_share_kv_share_its_scales(checkpoint: Path) -> None:
    engine = make(checkpoint, kv_cache_dtype="fp8")
    model = engine.core.runner.model
    assert list(model.kv_scales) == [0, 1]
    scales = [layer.attn.kv_scales for layer in model.layers]
    assert scales[2] is scales[0] and scales[3] is scales[1]
    assert (scales[1] != 1).any(), "measured"
    assert all(len(set(tokens)) > 1 for tokens in greedy(engine))
