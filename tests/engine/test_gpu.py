"""The engine on a GPU: captured, with Triton attention, against the eager torch path."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compiledllm import Engine, SamplingParams
from compiledllm.graphs.cuda_graphs import Step, StepGraphs
from compiledllm.pooling_params import PoolingParams
from compiledllm.runner import model_runner
from tests.support.artifacts import keep_artifacts_in, wait_until_kept
from tests.support.families import IN_ENGINE, VARIANTS

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(7)
    lengths = [1, 2, 15, 16, 17, 100, 300, *(rng.randrange(1, 200) for _ in range(60))]
    return [[rng.randrange(3, 128) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def expected(tiny_llama: Callable[..., Path], prompts: list[list[int]]) -> list[list[int]]:
    engine = make(tiny_llama, attention_backend="torch", enforce_eager=True)
    return tokens(engine, prompts)


def make(
    tiny_llama: Callable[..., Path], hidden_size: int = 256, head_dim: int = 64, **options: object
) -> Engine:
    shape = {"hidden_size": hidden_size, "head_dim": head_dim}
    fixed = {"dtype": "float32", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 2**28}
    engine = Engine(tiny_llama(**shape), **(fixed | {"max_num_seqs": 72} | options))
    assert engine.core.runner.compiler.is_ready or options.get("enforce_eager")
    return engine


def tokens(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    outputs = engine.generate(prompts, GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 32},
        {"num_kv_blocks": 60},
        {"max_num_seqs": 5},
        {"enforce_eager": True},
        {"block_size": 32},
    ],
    ids=str,
)
def test_captured_steps_give_the_eager_tokens(
    options: dict[str, object],
    tiny_llama: Callable[..., Path],
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    engine = make(tiny_llama, **options)
    assert (engine.core.runner.graphs is None) == bool(options.get("enforce_eager"))
    assert tokens(engine, prompts) == expected
    assert [tokens(engine, [prompt])[0] for prompt in prompts[:8]] == expected[:8]
    assert engine.core.runner.compiler.num_recompiles == 0
    engine.core.scheduler.check_invariants()


def test_the_last_block_for_the_ends_of_prompts_gives_the_eager_tokens(
    tiny_llama: Callable[..., Path],
    prompts: list[list[int]],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_runner, "_MIN_TOKENS_FOR_SAMPLED_ONLY", 32)
    engine = make(tiny_llama, max_num_batched_tokens=200)
    assert tokens(engine, prompts) == expected
    assert [tokens(engine, [prompt])[0] for prompt in prompts[:8]] == expected[:8]


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 32}], ids=str)
def test_layers_that_see_unequally_far_are_captured_too(
    options: dict[str, object], tiny_model: Callable[..., Path], prompts: list[list[int]]
) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    window = {"head_dim": 64, "sliding_window": 33, "layer_types": kinds}
    model = tiny_model("ministral", **window)
    fixed = {"dtype": "float32", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 2**28}
    reference = Engine(model, attention_backend="torch", enforce_eager=True, **fixed)
    expected = tokens(reference, prompts)
    engine = Engine(model, **(fixed | options))
    assert len(engine.core.plan.kv_layout.windows) == 3 and engine.core.runner.graphs is not None
    assert tokens(engine, prompts) == expected
    assert tokens(engine, prompts) == expected  # from the prefix cache
    assert engine.core.runner.compiler.num_recompiles == 0
    engine.core.scheduler.check_invariants()


SLIDING = {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt_oss", {"num_local_experts": 6, "num_experts_per_tok": 2, "swiglu_limit": 0.6}),
        ("cwm", {"pad_token_id": 0, "head_dim": 16}),  # run by transformers
    ],
)
def test_captured_steps_of_other_models_give_the_eager_tokens(
    model_type: str,
    changes: dict[str, object],
    tiny_model: Callable[..., Path],
    prompts: list[list[int]],
) -> None:
    shape = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 4} | SLIDING
    checkpoint = tiny_model(model_type, **shape | changes)
    options = {"dtype": "float32", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 2**28}
    found = []
    for backend in ("torch", "triton"):
        engine = Engine(
            checkpoint, attention_backend=backend, enforce_eager=backend == "torch", **options
        )
        assert (engine.core.runner.graphs is None) == (backend == "torch")
        found.append(tokens(engine, prompts[:12]))
    assert found[0] == found[1]
    assert engine.core.runner.compiler.num_recompiles == 0


STATES = ["qwen3_next", "qwen3_5", "lfm2", "lfm2_moe", "granitemoehybrid"]
CHUNKS = {"max_num_batched_tokens": 70, "max_num_seqs": 5}


@pytest.mark.parametrize("options", [{}, CHUNKS], ids=str)
@pytest.mark.parametrize("family", STATES)
def test_captured_steps_keep_states(
    family: str,
    options: dict[str, object],
    tiny_model: Callable[..., Path],
    prompts: list[list[int]],
) -> None:
    shape = VARIANTS[family, IN_ENGINE[family]]
    if "linear_value_head_dim" in shape:
        shape = shape | {"linear_value_head_dim": 16}  # the least that GPU kernels take
    checkpoint = tiny_model(family, **shape)
    fixed = {"dtype": "float32", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 2**28}
    reference = Engine(checkpoint, device="cpu", enforce_eager=True, **fixed)
    engine = Engine(checkpoint, **(fixed | options))
    assert engine.core.runner.graphs is not None
    expected = tokens(reference, prompts[:16])
    assert tokens(engine, prompts[:16]) == expected
    assert tokens(engine, prompts[:16]) == expected  # from snapshots, where there are some
    assert engine.core.runner.compiler.num_recompiles == 0
    engine.core.scheduler.check_invariants()


def test_captured_steps_keep_hidden_states_for_pooling(
    tiny_llama: Callable[..., Path], prompts: list[list[int]]
) -> None:
    reference = make(tiny_llama, attention_backend="torch", enforce_eager=True)
    engine = make(tiny_llama, max_num_batched_tokens=32)
    for params in (
        PoolingParams(kind="last", normalize=False),
        PoolingParams(kind="mean", normalize=False),
    ):
        expected = reference.embed(prompts[:12], params)
        for output, wanted in zip(engine.embed(prompts[:12], params), expected, strict=True):
            found = output.outputs.embedding
            np.testing.assert_allclose(found, wanted.outputs.embedding, atol=2e-3)


def test_sampled_and_greedy_requests_share_a_batch(
    tiny_llama: Callable[..., Path], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    engine = make(tiny_llama)
    sampled = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=25, ignore_eos=True)
    params = [GREEDY if index % 2 else sampled for index in range(len(prompts))]
    outputs = engine.generate(prompts, params, use_tqdm=False)
    for index, output in enumerate(outputs):
        if index % 2:
            assert output.outputs[0].token_ids == expected[index]
    alone = engine.generate([prompts[0]], [sampled], use_tqdm=False)[0]
    assert alone.outputs[0].token_ids == outputs[0].outputs[0].token_ids


def test_kernels_of_captured_steps_are_asked_for_ahead(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.jit import JITFunction

    is_ahead, asked, late = [False], set(), set()
    compile_kernel, rehearse = JITFunction._do_compile, StepGraphs.rehearse

    def noting(kernel: JITFunction, key: str, *args: object) -> object:
        (asked if is_ahead[0] else late).add((kernel.__name__, key))
        return compile_kernel(kernel, key, *args)

    def rehearsing(graphs: StepGraphs, step: Step) -> None:
        is_ahead[0] = True
        rehearse(graphs, step)
        is_ahead[0] = False
        late.clear()

    def capturing(graphs: StepGraphs, first: object = None) -> None:
        late.clear()
        capture(graphs, first)
        assert asked and late <= asked

    capture = StepGraphs.capture
    monkeypatch.setattr(JITFunction, "_do_compile", noting)
    monkeypatch.setattr(StepGraphs, "rehearse", rehearsing)
    monkeypatch.setattr(StepGraphs, "capture", capturing)
    make(tiny_llama, hidden_size=320, head_dim=80)  # kernels that no other test has compiled


KINDS = (
    {"temperature": 0},
    {"temperature": 0.9, "top_k": 7, "top_p": 0.9, "min_p": 0.02, "seed": 3},
    {"temperature": 0, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    {"temperature": 0, "logprobs": 3},
    {"temperature": 0, "prompt_logprobs": 2},
    {"temperature": 0, "logit_bias": {5: 2.0}, "min_tokens": 3},
)


def test_second_start_compiles_nothing_before_or_after_it_is_ready(
    tiny_llama: Callable[..., Path],
    prompts: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under a random load; with the graphs that are captured only as steps ask for them."""
    keep_artifacts_in(tmp_path, monkeypatch)
    draw = random.Random(11)
    params = [
        SamplingParams(max_tokens=draw.randrange(3, 30), ignore_eos=True, **draw.choice(KINDS))
        for _ in prompts
    ]
    found = []
    for is_second in (False, True):
        engine = make(tiny_llama)
        wait_until_kept()
        core = engine.core
        assert core.worker.is_restored == is_second
        assert core.runner.graphs is not None
        assert bool(core.runner.graphs.num_waiting) == is_second
        outputs = engine.generate(prompts, params, use_tqdm=False)
        outputs += engine.generate(prompts[:5], params[:5], use_tqdm=False)
        found.append([output.outputs[0].token_ids for output in outputs])
        assert core.worker.stats().num_recompiles == 0
        while core.worker.use_idle_time():
            pass
        assert core.runner.graphs.num_waiting == 0
    assert found[0] == found[1]
