"""Models with sliding windows through the engine: blocks are freed and tokens stay the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compiledllm import Engine, SamplingParams
from compiledllm.choices import Choice
from compiledllm.config import ConfigError
from compiledllm.engine.core import EngineCore
from compiledllm.platform import Platform
from tests.support.captured import Uncaptured
from tests.support.families import GEMMA3N, LLAMA4

S, F = "sliding_attention", "full_attention"
GEMMA: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 20}
# Windows of 20 tokens and contexts of up to 300. name -> model type, config, groups' windows.
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "mistral": ("mistral", {"sliding_window": 20}, (20,)),
    "gemma2": ("gemma2", GEMMA | {"layer_types": [S, F, S, F], "num_hidden_layers": 4}, (20, 0)),
    "gemma3": (
        "gemma3_text",
        GEMMA | {"layer_types": [S, S, S, F, S, S, F], "num_hidden_layers": 7},
        (20, 20, 20, 0),
    ),
    "ministral": (
        "ministral",
        {"sliding_window": 33, "head_dim": 16, "layer_types": [F, S, S], "num_hidden_layers": 3},
        (0, 33, 33),
    ),
    "gemma3n": ("gemma3n_text", GEMMA3N, (20, 20, 0)),
    "llama4": ("llama4_text", LLAMA4 | {"attention_chunk_size": 20}, (20, 20, 20, 0)),
}
NUM_TOKENS = 17  # one more than a block's, so that every row begins another
SHARED = [random.Random(0).randrange(3, 128) for _ in range(130)]
PROMPTS = [[random.Random(n).randrange(3, 128) for _ in range(n)] for n in (1, 15, 40, 100, 276)]
PROMPTS += [[*SHARED[:n], *range(3, 8)] for n in (130, 96, 20)]  # hits, far past a window and not
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


@pytest.fixture(scope="module")
def checkpoint(name: str, tiny_model: Callable[..., Path]) -> Path:
    model_type, config, _ = MODELS[name]
    return tiny_model(model_type, **config)


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
    assert engine.core.scheduler.block_pool.usage == 0
    return [output.outputs[0].token_ids for output in outputs]


def blocks_needed(core: EngineCore, num_tokens: int) -> int:
    """Of 16 tokens, counted group by group."""
    whole = -(-num_tokens // 16)
    windows = core.plan.kv_layout.windows
    return sum(min(whole, -(-(w - 1) // 16) + 1) if w else whole for w in windows)


@pytest.mark.parametrize(
    "options",
    [
        {"async_scheduling": False},
        {"async_scheduling": True, "max_num_batched_tokens": 48},
        {"async_scheduling": False, "max_num_batched_tokens": 7, "max_num_seqs": 3},
        {"async_scheduling": True, "max_num_batched_tokens": 64, "enable_prefix_caching": False},
    ],
    ids=["one-shot", "chunked", "small chunks", "uncached"],
)
def test_greedy_tokens_are_those_of_transformers(
    options: dict[str, Any], name: str, checkpoint: Path, expected: list[list[int]]
) -> None:
    engine = make(checkpoint, **options)
    assert engine.core.plan.kv_layout.windows == MODELS[name][2]
    assert greedy(engine) == expected
    assert greedy(engine) == expected  # most of it from the prefix cache


@pytest.mark.parametrize("caching", [False, True])
def test_preempted_requests_get_the_same_tokens(
    caching: bool, checkpoint: Path, expected: list[list[int]]
) -> None:
    """In a pool that holds the longest request, and little else."""
    core = make(checkpoint).core
    num_blocks = blocks_needed(core, 276 + NUM_TOKENS) + 2
    engine = make(
        checkpoint,
        num_kv_blocks=num_blocks,
        max_num_batched_tokens=64,
        enable_prefix_caching=caching,
        async_scheduling=True,
    )
    assert greedy(engine) == expected
    assert engine.core.scheduler.num_preemptions > 0


def test_each_alone_and_twice(checkpoint: Path, expected: list[list[int]]) -> None:
    """The second time a prefix of nearly all is there, of which windowed layers keep the end."""
    engine = make(checkpoint, async_scheduling=True)
    for prompt, wanted in zip(PROMPTS, expected, strict=True):
        for _ in range(2):
            assert greedy(engine, [prompt]) == [wanted]
    (output,) = engine.generate([PROMPTS[4]], GREEDY, use_tqdm=False)
    assert output.num_cached_tokens == 272


def test_a_hit_ends_where_a_windowed_block_is_missing(
    checkpoint: Path, expected: list[list[int]]
) -> None:
    engine = make(checkpoint)
    core, prompt = engine.core, PROMPTS[5]
    engine.add_request(prompt, GREEDY)
    engine.step()
    (request,) = core.scheduler.requests.values()
    tables = zip(request.block_tables, core.plan.kv_layout.windows, strict=True)
    ends = [table[7] for table, window in tables if window]
    while engine.has_unfinished_requests():
        engine.step()
    core.scheduler.block_pool.forget(ends[:1])
    for num_cached in (112, 128):  # the second time it has been computed again
        (output,) = engine.generate([prompt], GREEDY, use_tqdm=False)
        assert output.outputs[0].token_ids == expected[5]
        assert output.num_cached_tokens == num_cached


def test_a_cache_without_a_block_for_each_group_is_refused(tiny_model: Callable[..., Path]) -> None:
    model_type, config, windows = MODELS["gemma3"]
    with pytest.raises(ConfigError, match="3 KV blocks hold no token in each of 4 groups"):
        make(tiny_model(model_type, **config), num_kv_blocks=len(windows) - 1)


@pytest.mark.parametrize("name", ["gemma3"], indirect=True, scope="module")
def test_compiled_blocks_are_shared_by_all_groups(
    checkpoint: Path, expected: list[list[int]]
) -> None:
    """A block is compiled with one group's tensors; those of another must not need it anew.

    Gemma 3 has the most groups, of which three see equally far and share a block.
    """
    engine = make(checkpoint, enforce_eager=False, compile_when="start", max_num_batched_tokens=33)
    compiler, spec = engine.core.runner.compiler, engine.core.spec
    assert compiler.is_ready and compiler.num_compiles == 2 * (len(spec.distinct_layers) + 2)
    assert greedy(engine) == expected
    assert [greedy(engine, [prompt]) for prompt in PROMPTS] == [[tokens] for tokens in expected]
    assert compiler.num_recompiles == 0


@pytest.mark.parametrize("max_tokens", [512, 48])
def test_what_is_captured_gives_the_same_tokens(
    max_tokens: int, checkpoint: Path, expected: list[list[int]]
) -> None:
    """Padded steps, and decode steps from the rows' state alone."""
    engine = make(checkpoint, max_num_seqs=12, max_num_batched_tokens=max_tokens)
    graphs = Uncaptured(engine.core.runner, max_tokens)
    engine.core.runner.graphs = graphs  # type: ignore[assignment]
    assert greedy(engine) == expected
    assert greedy(engine) == expected
    assert {shape.is_decode for shape in graphs.replayed} == {True, False}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("mistral", "fixed_order"),
        ("gemma2", "triton"),  # caps its scores
        ("gemma3", "triton"),
        ("ministral", "fixed_order"),
    ],
    indirect=["name"],
    scope="module",
)
def test_triton_attention_reads_each_groups_blocks(
    backend: str,
    checkpoint: Path,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In its interpreter; blocks that are free are NaN, so that reading one would be seen."""
    choice = Choice(backend, "as asked")
    monkeypatch.setattr(Platform, "choose_attention_backend", lambda *_: choice)
    engine = make(checkpoint, max_num_batched_tokens=64)
    core = engine.core
    assert core.report["attention_backend"].value == backend
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    for index in (3, 7):
        engine.add_request(PROMPTS[index], params)
    found: dict[int, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            found[len(output.prompt_token_ids)] = output.outputs[0].token_ids
        free = list(core.scheduler.block_pool._free)
        core.scheduler.block_pool.reset_prefix_cache()
        for kv_cache in core.runner.kv_caches:
            kv_cache[:, free] = float("nan")
    assert [found[len(PROMPTS[index])] for index in (3, 7)] == [
        expected[index][:3] for index in (3, 7)
    ]
