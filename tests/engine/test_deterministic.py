"""deterministic=True: a request's logits have the same bits whatever else is in the batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compiledllm import ConfigError, Engine, SamplingParams
from compiledllm.models.deterministic import fixed_order
from compiledllm.models.registry import load_spec

VOCAB_SIZE = 1000
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 1024,
}
TRACKED = [random.Random(3).randrange(VOCAB_SIZE) for _ in range(300)]


def make(model: Path, **options: Any) -> Engine:
    fixed = {"skip_tokenizer_init": True, "deterministic": True, "kv_cache_memory_bytes": 2**30}
    return Engine(model, **(fixed | options))


def logits_of(engine: Engine, num_others: int = 0, seed: int = 0) -> Tensor:
    """float32 [16, vocab]: of the tracked request's steps, beside others of random lengths."""
    rng = random.Random(seed)
    others = [
        [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 20, 100, 400]))]
        for _ in range(num_others)
    ]
    seen: list[Tensor] = []

    def record(_output: list[int], logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return logits

    place = rng.randrange(num_others + 1)
    prompts = [*others[:place], TRACKED, *others[place:]]
    params = [
        SamplingParams(temperature=0.7, seed=5, max_tokens=rng.randrange(1, 30), ignore_eos=True)
        for _ in prompts
    ]
    params[place] = SamplingParams(
        temperature=0.9, seed=11, max_tokens=16, ignore_eos=True, logits_processors=[record]
    )
    engine.generate(prompts, params, use_tqdm=False)
    return torch.stack(seen)


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_have_the_same_bits_in_any_company(
    dtype: str, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model("qwen3", **SHAPE)
    engine = make(model, dtype=dtype)
    expected = logits_of(engine)
    assert expected.shape == (16, VOCAB_SIZE)
    assert torch.equal(logits_of(engine), expected), "from the prefix cache"
    for num_others in (1, 2, 7, 16, 31, 63, 100, 255):
        assert torch.equal(logits_of(engine, num_others, seed=num_others), expected), num_others
    del engine
    for options in (
        {"max_num_batched_tokens": 64, "max_num_seqs": 60},  # prompts in chunks
        {"num_kv_blocks": 150, "enable_prefix_caching": False},  # preempted
        {"enforce_eager": True, "block_size": 32},
    ):
        engine = make(model, dtype=dtype, **options)
        for num_others in (0, 40):
            assert torch.equal(logits_of(engine, num_others, seed=1), expected), options
        del engine


def test_a_cpu_refuses(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="deterministic=True needs a GPU"):
        make(tiny_model("llama"), device="cpu")


def test_another_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match="attention_backend='flashinfer'"):
        Engine("any", deterministic=True, attention_backend="flashinfer")


def test_quantised_weights_are_refused(tiny_model: Callable[..., Path]) -> None:
    spec = load_spec(tiny_model("llama"), quantization="int8")
    with pytest.raises(ConfigError, match="not supported for quantised weights"):
        fixed_order(spec)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma", "smollm3", "mixtral"])
def test_models_without_such_kernels_are_refused(
    family: str, tiny_model: Callable[..., Path]
) -> None:
    changes = {"no_rope_layers": [1, 0, 1], "pad_token_id": 0} if family == "smollm3" else {}
    spec = load_spec(tiny_model(family, **changes))
    with pytest.raises(ConfigError, match="deterministic=True is not supported for"):
        fixed_order(spec)
