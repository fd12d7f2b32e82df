"""Layers with a state for each request: tokens are transformers', whatever happens to a request."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compiledllm import Engine, PoolingParams, SamplingParams
from compiledllm.config import ConfigError
from compiledllm.models.deterministic import fixed_order
from compiledllm.platform import Platform
from tests.support.families import IN_ENGINE, VARIANTS

Expected = Callable[[Path], list[list[int]]]
FAMILIES = ["qwen3_next", "lfm2"]
LENGTHS, NUM_TOKENS = [1, 15, 16, 17, 33, 64, 90, 140], 24
PROMPTS = [[random.Random(n).randrange(3, 128) for _ in range(n)] for n in LENGTHS]
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
FEW = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Path:
    family = request.param
    return tiny_model(family, **VARIANTS[family, IN_ENGINE[family]])


@pytest.fixture(scope="module")
def expected(greedy_by_transformers: Callable[..., list[list[int]]]) -> Expected:
    """The tokens of PROMPTS by transformers, computed once for each model."""
    return functools.cache(lambda model: greedy_by_transformers(model, PROMPTS, NUM_TOKENS))


def engine_of(checkpoint: Path, **options: Any) -> Engine:
    fixed = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True}
    return Engine(checkpoint, **({"num_kv_blocks": 200, "enforce_eager": True} | fixed | options))


def greedy(engine: Engine) -> list[list[int]]:
    outputs = engine.generate(PROMPTS, GREEDY, use_tqdm=False)
    engine.core.scheduler.check_invariants()
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 37, "max_num_seqs": 5},  # chunks, rows used again
        {"num_kv_blocks": 14},  # preempted
        {"num_kv_blocks": 14, "async_scheduling": True},
        {"async_scheduling": True, "max_num_seqs": 3},
    ],
    ids=str,
)
def test_tokens_are_those_of_transformers(
    model: Path, options: dict[str, Any], expected: Expected
) -> None:
    engine = engine_of(model, **options)
    assert greedy(engine) == expected(model)
    assert (engine.core.scheduler.num_preemptions > 0) == ("num_kv_blocks" in options)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_row_that_an_aborted_request_left_starts_from_nothing(
    model: Path, is_async: bool
) -> None:
    engine = engine_of(model, max_num_seqs=1, async_scheduling=is_async)
    wanted = engine.generate(PROMPTS[3], FEW, use_tqdm=False)[0].outputs[0].token_ids
    for num_steps in (1, 2, 3, 5):
        request_id = engine.add_request({"prompt_token_ids": PROMPTS[5]}, FEW)
        for _ in range(num_steps):
            engine.step()
        engine.abort_request(request_id)
        again = engine.generate(PROMPTS[3], FEW, use_tqdm=False)[0].outputs[0].token_ids
        assert again == wanted


def test_completions_of_one_prompt_have_states_of_their_own(model: Path) -> None:
    sampled = SamplingParams(temperature=1.5, seed=3, n=4, max_tokens=8, ignore_eos=True)
    together = engine_of(model, max_num_batched_tokens=64)
    alone = engine_of(model, max_num_seqs=1)
    (output,) = together.generate(PROMPTS[6], sampled, use_tqdm=False)
    tokens = [completion.token_ids for completion in output.outputs]
    assert len({tuple(found) for found in tokens}) == 4
    (output,) = alone.generate(PROMPTS[6], sampled, use_tqdm=False)
    assert [completion.token_ids for completion in output.outputs] == tokens


def test_requests_are_as_many_as_states_fit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    per_request = engine_of(model).core.spec.bytes_per_request
    has_memory(monkeypatch, 8 * 11 * per_request)  # half of a quarter: ten requests and padding
    core = engine_of(model, num_kv_blocks=3).core
    num_seqs = core.config.limits.max_num_seqs
    assert num_seqs == 10 and "half of the memory" in core.report["max_num_seqs"].reason
    assert str(core.report["states"]).startswith("10 requests")
    held = [part.nbytes for layer in core.runner.states.tensors for part in layer]
    assert sum(held) == core.plan.state_bytes == (num_seqs + 1) * per_request
    has_memory(monkeypatch, 4 * per_request)
    with pytest.raises(ConfigError, match="no room for requests: the states of one take"):
        engine_of(model)


def has_memory(patch: pytest.MonkeyPatch, num_bytes: int) -> None:
    platform = Platform(torch.device("cpu"), "pretended", num_bytes)
    patch.setattr(Platform, "detect", lambda _: platform)


def test_an_fp8_cache_holds_the_keys_of_attention_layers_alone(model: Path) -> None:
    engine = engine_of(model, kv_cache_dtype="fp8")
    runner, spec = engine.core.runner, engine.core.spec
    attending = [i for i, layer in enumerate(spec.layers) if layer.mixer in spec.attentions]
    assert list(runner.model.kv_scales) == attending and len(runner.kv_caches) == len(attending)
    assert {cache.dtype for cache in runner.kv_caches} == {torch.float8_e4m3fn}
    assert engine.core.report["kv_scales"].value == "measured"
    assert all(len(tokens) == NUM_TOKENS for tokens in greedy(engine))


def test_deterministic_is_refused_by_name(model: Path) -> None:
    spec = engine_of(model).core.spec
    with pytest.raises(ConfigError, match="deterministic=True is not supported for"):
        fixed_order(spec)


def test_states_in_bfloat16_take_half_and_are_nearly_as_exact(
    tiny_model: Callable[..., Path],
) -> None:
    model = tiny_model("qwen3_next", **VARIANTS["qwen3_next", IN_ENGINE["qwen3_next"]])
    exact, small = engine_of(model), engine_of(model, state_dtype="bfloat16")
    dtypes = [[part.dtype for part in layer] for layer in small.core.runner.states.tensors]
    assert dtypes == [[torch.float32, torch.bfloat16]] * 2  # inputs of convolutions, states
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    for prompt in PROMPTS:
        wanted, found = (
            engine.generate([prompt], params, use_tqdm=False)[0].outputs[0].logprobs
            for engine in (exact, small)
        )
        assert wanted and found
        for token, value in wanted[0].items():
            if token in found[0]:
                assert abs(found[0][token].logprob - value.logprob) < 0.1


# -- vectors ---------------------------------------------------------------------------------------

LAST, MEAN = (PoolingParams(kind, normalize=False) for kind in ("last", "mean"))
LONG = random.Random(7).choices(range(3, 128), k=300)


@functools.cache
def hidden_states(checkpoint: Path) -> list[torch.Tensor]:
    """transformers' hidden states of PROMPTS and LONG, float32 [tokens, hidden]."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([ids])).last_hidden_state[0] for ids in [*PROMPTS, LONG]]


def assert_vectors(engine: Engine, params: PoolingParams, expected: list[torch.Tensor]) -> None:
    outputs = engine.embed([*PROMPTS, LONG], params)
    engine.core.scheduler.check_invariants()
    for output, vector in zip(outputs, expected, strict=True):
        found = torch.tensor(output.outputs.embedding)
        torch.testing.assert_close(found, vector, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 37, "max_num_seqs": 5},  # chunks, rows used again
        {"num_kv_blocks": 26, "max_num_batched_tokens": 64},  # preempted
        {"async_scheduling": True, "max_num_seqs": 3},
    ],
    ids=str,
)
def test_vectors_are_those_of_transformers(model: Path, options: dict[str, Any]) -> None:
    engine, hidden = engine_of(model, **options), hidden_states(model)
    for params, expected in (
        (MEAN, [states.mean(0) for states in hidden]),
        (LAST, [states[-1] for states in hidden]),
    ):
        assert_vectors(engine, params, expected)
        assert_vectors(engine, params, expected)  # prefixes are found now


@pytest.mark.parametrize("max_tokens", [37, 512])
def test_a_vector_behind_a_cached_prefix_is_the_same(model: Path, max_tokens: int) -> None:
    engine, hidden = engine_of(model, max_num_batched_tokens=max_tokens), hidden_states(model)
    (first,) = engine.embed([LONG], LAST)
    (again,) = engine.embed([LONG], LAST)
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 288)
    (mean,) = engine.embed([LONG], MEAN)
    assert mean.num_cached_tokens == 0, "cached tokens have no hidden states to average"
    (longer,) = engine.embed([LONG + [5]], LAST)
    (plain,) = engine_of(model, enable_prefix_caching=False).embed([LONG + [5]], LAST)
    assert longer.num_cached_tokens == 288
    for found, expected in (
        (first, hidden[-1][-1]),
        (again, hidden[-1][-1]),
        (mean, hidden[-1].mean(0)),
        (longer, torch.tensor(plain.outputs.embedding)),
    ):
        vector = torch.tensor(found.outputs.embedding)
        torch.testing.assert_close(vector, expected, atol=3e-5, rtol=1e-5)


def test_prompts_are_pooled_beside_answers(model: Path, expected: Expected) -> None:
    engine, hidden = engine_of(model, max_num_batched_tokens=64), hidden_states(model)
    stream = engine.stream(PROMPTS, GREEDY)
    next(stream)
    assert_vectors(engine, LAST, [states[-1] for states in hidden])
    finished = {tuple(o.prompt_token_ids): o.outputs[0].token_ids for o in stream if o.finished}
    assert [finished[tuple(prompt)] for prompt in PROMPTS] == expected(model)
