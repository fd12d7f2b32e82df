"""Every family through the engine: mixed batches, chunks and compiled blocks give greedy tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compiledllm import Engine, SamplingParams
from compiledllm.graphs.few_blocks import few_blocks
from compiledllm.graphs.variants import Variant
from compiledllm.runner import model_runner
from tests.support.artifacts import keep_artifacts_in, wait_until_kept
from tests.support.families import IN_ENGINE, VARIANTS

LENGTHS, NUM_TOKENS = [1, 5, 17, 40, 100, 170], 10
PROMPTS = [[random.Random(n).randrange(3, 128) for _ in range(n)] for n in LENGTHS]


def make(checkpoint: Path, **options: Any) -> Engine:
    fixed = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True}
    return Engine(checkpoint, **{"num_kv_blocks": 100} | fixed | options)


def greedy(engine: Engine) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = engine.generate(PROMPTS, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("family", IN_ENGINE)
def test_greedy_tokens_are_those_of_transformers(
    family: str,
    tiny_model: Callable[..., Path],
    greedy_by_transformers: Callable[..., list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The last block for the ends of prompts only, in steps that are large enough.
    monkeypatch.setattr(model_runner, "_MIN_TOKENS_FOR_SAMPLED_ONLY", 30)
    checkpoint = tiny_model(family, **VARIANTS[family, IN_ENGINE[family]])
    engine = make(checkpoint, enforce_eager=True, max_num_batched_tokens=48)  # chunks, mixed steps
    assert greedy(engine) == greedy_by_transformers(checkpoint, PROMPTS, NUM_TOKENS)
    runner = engine.core.runner
    with few_blocks(runner.model):  # as a start on a GPU names the kernels
        runner.run_dummy(3)
    runner.sampler.rehearse(torch.zeros(3, runner.model.spec.vocab_size))


# Each has layers that no other has. tests/engine/test_windows.py compiles Gemma's.
COMPILED = ["cohere", "gpt_neox", "gpt_oss", "opt", "lfm2", "qwen3_next", "gemma3n_text"]
TRANSFORMERS = {"model_impl": "transformers"}
# A graph for each kind of layer: with a window and without, sparse and not, with KV of its own and
# with another's.
FEWER_LAYERS = {
    "gemma3n_text": {
        "num_hidden_layers": 3,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "intermediate_size": [112, 96, 112],
        "activation_sparsity_pattern": [0.95, 0.0, 0.9],
    }
}


@pytest.mark.parametrize("family", COMPILED)
def test_compiled_blocks_give_the_same_tokens(
    family: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of tokens but one, which no step here has."""
    monkeypatch.setattr(model_runner, "variants_for", lambda *_: [Variant(2, 2**30, 2)])
    config = VARIANTS[family, IN_ENGINE[family]] | FEWER_LAYERS.get(family, {})
    checkpoint = tiny_model(family, **config)
    wanted = greedy(make(checkpoint, enforce_eager=True))
    engine = make(checkpoint, compile_when="start")
    assert engine.core.runner.compiler.is_ready
    monkeypatch.setattr(model_runner, "_MIN_TOKENS_FOR_SAMPLED_ONLY", 30)
    assert greedy(engine) == wanted
    assert engine.core.runner.compiler.num_recompiles == 0


@pytest.mark.parametrize("family, options", [("lfm2", {}), ("qwen3", TRANSFORMERS)])
def test_an_artifact_serves_starts_with_caches_of_other_sizes(
    family: str,
    options: dict[str, Any],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks with a list of caches: states beside snapshots, and the KV of all layers."""
    monkeypatch.setattr(model_runner, "variants_for", lambda *_: [Variant(2, 2**30, 2)])
    keep_artifacts_in(tmp_path, monkeypatch)
    checkpoint = tiny_model(family, **VARIANTS[family, IN_ENGINE[family]])
    assert make(checkpoint, compile_when="start", **options).core.runner.compiler.is_ready
    wait_until_kept()
    others = {"num_kv_blocks": 70, "enable_prefix_caching": False}
    engine = make(checkpoint, compile_when="start", **options, **others)
    assert engine.core.runner.compiler.num_compiles == 0
    assert greedy(engine) == greedy(make(checkpoint, enforce_eager=True))
