"""Captured decode steps whose layers one kernel computes, against the kernels of single layers.

The kernel has 16-bit dtypes only, in which sums of another order round differently, so the tests
compare distributions. One request waits for activations by their tags, more at grid barriers.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compiledllm import Engine
from compiledllm.kernels import decode_step_cuda
from tests.support.artifacts import keep_artifacts_in, wait_until_kept
from tests.support.distributions import VOCABULARY, WIDE, assert_alike, steps_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
        reason="the kernel is for Hopper GPUs",
    ),
]

FIXED: dict[str, Any] = {
    "dtype": "bfloat16",
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": 2**28,
    "max_num_seqs": 16,
    "max_logprobs": VOCABULARY,
}
NINE = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
# name -> model type, config, engine options.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "nine heads of 64": ("llama", {"head_dim": 64} | NINE, {}),
    "heads of 128": ("llama", {"head_dim": 128}, {}),
    "float16": ("llama", {"head_dim": 64}, {"dtype": "float16"}),
    "large blocks": ("llama", {"head_dim": 64}, {"block_size": 32}),
    "qk norms": ("qwen3", {"head_dim": 128}, {}),
    "biases of qkv": ("qwen2", {"num_attention_heads": 8}, {}),
    "all biases": ("llama", {"head_dim": 64, "attention_bias": True, "mlp_bias": True}, {}),
    # In bfloat16, prompts of more than 16 tokens would round their activations to FP8.
    "fp8": ("llama", {"head_dim": 128}, {"quantization": "fp8", "dtype": "float16"}),
    "int4": ("qwen2", {"num_attention_heads": 8}, {"quantization": "int4"}),
    "a window": ("mistral", {"head_dim": 64, "sliding_window": 40}, {}),
}
LENGTHS = (1, 15, 16, 17, 100, 300, 33, 250)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(5)
    return [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_artifacts_in(tmp_path / "caches", monkeypatch)


def start(checkpoint: Path, **options: Any) -> Engine:
    engine = Engine(checkpoint, **(FIXED | options))
    wait_until_kept()
    return engine


def stop(engine: Engine) -> None:
    del engine
    gc.collect()


@pytest.mark.parametrize("name", MODELS)
def test_distributions_are_those_of_single_layers(
    name: str, tiny_model: Callable[..., Path], prompts: list[list[int]]
) -> None:
    """Alone and together, cold and warm, from the prefix cache, and in larger steps."""
    model_type, config, options = MODELS[name]
    checkpoint = tiny_model(model_type, **(WIDE | config))
    plain = start(checkpoint, persistent_decode=False, **options)
    expected = steps_of(plain, prompts)
    assert plain.core.runner.model.decode_step is None
    stop(plain)
    for is_restored in (False, True):
        engine = start(checkpoint, **options)
        worker = engine.core.worker
        assert worker.is_restored == is_restored
        decode_step = engine.core.runner.model.decode_step
        assert decode_step is not None, engine.core.report["decode_step"]
        assert decode_step.rows == decode_step_cuda.faster_rows(decode_step.shape)
        assert_alike(steps_of(engine, prompts), expected)
        assert_alike(steps_of(engine, prompts), expected)  # from the prefix cache
        for index in (0, 5):
            assert_alike(steps_of(engine, prompts[index : index + 1]), expected[index : index + 1])
        for pair in (slice(0, 2), slice(4, 6)):
            assert_alike(steps_of(engine, prompts[pair]), expected[pair])
        more = steps_of(engine, prompts + prompts[:3])
        assert_alike(more[: len(prompts)], expected)
        assert worker.stats().num_recompiles == 0
        stop(engine)


def test_small_models_give_the_same_bits_again(
    tiny_llama: Callable[..., Path], prompts: list[list[int]]
) -> None:
    engine = start(tiny_llama(**WIDE, head_dim=64), enable_prefix_caching=False)
    assert "in one kernel at up to 8 rows" in str(engine.core.report["decode_step"])
    shape = engine.core.runner.model.decode_step.shape
    assert decode_step_cuda._is_tagged(shape, 1) and not decode_step_cuda._is_tagged(shape, 2)
    groups = [
        prompts[index : index + size]
        for size in (1, 2, 4, 8)
        for index in range(0, len(prompts), size)
    ]
    first = [steps_of(engine, group) for group in groups]
    for _ in range(5):
        assert [steps_of(engine, group) for group in groups] == first


def test_preempted_requests_get_the_same_distributions(
    tiny_llama: Callable[..., Path], prompts: list[list[int]]
) -> None:
    checkpoint = tiny_llama(**WIDE, head_dim=64)
    plain = start(checkpoint, persistent_decode=False)
    expected = steps_of(plain, prompts)
    stop(plain)
    options = {"num_kv_blocks": 26, "enable_prefix_caching": False, "max_num_seqs": 2}
    engine = start(checkpoint, **options)
    assert_alike(steps_of(engine, prompts), expected)
    assert engine.core.scheduler.num_preemptions > 0


def test_a_kernel_that_cannot_run_the_model_says_why(tiny_llama: Callable[..., Path]) -> None:
    engine = start(tiny_llama(**WIDE, head_dim=64), dtype="float32")
    assert engine.core.runner.model.decode_step is None
    assert "float32" in str(engine.core.report["decode_step"])
    assert math.isfinite(steps_of(engine, [[5, 6]])[0][-1][1][0])
