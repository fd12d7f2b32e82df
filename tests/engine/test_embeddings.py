"""Vectors of prompts equal those of transformers, however the engine computes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiledllm import ConfigError, Engine, SamplingParams
from compiledllm.pooling_params import PoolingParams
from tests.support.captured import Uncaptured
from tests.support.tiny import save_random_model

# Shaped as Qwen3-Embedding: tied, heads wider than hidden_size / heads.
QWEN3_EMBEDDING = {"head_dim": 32, "tie_word_embeddings": True}
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "num_kv_blocks": 64,
    "block_size": 16,
    "enforce_eager": True,
}
LAST = PoolingParams(kind="last", normalize=False)
MEAN = PoolingParams(kind="mean", normalize=False)
PROMPTS = [[5, 6, 7], [9], list(range(3, 60)), list(range(3, 40)), [7, 8] * 50]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3-embedding")
    save_random_model(folder, "qwen3", **QWEN3_EMBEDDING)
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return Engine(checkpoint, **OPTIONS)


@pytest.fixture(scope="module")
def small_steps(checkpoint: Path) -> Engine:
    """An engine that computes prompts in chunks of at most 8 tokens."""
    return Engine(checkpoint, **OPTIONS, max_num_batched_tokens=8, max_num_seqs=8)


@pytest.fixture(scope="module")
def hidden_states(checkpoint: Path) -> list[np.ndarray]:
    """transformers' hidden states of each prompt, float32 [tokens, hidden]."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([ids])).last_hidden_state[0].numpy() for ids in PROMPTS]


def vectors(engine: Engine, prompts: list[list[int]], params: PoolingParams) -> list[np.ndarray]:
    outputs = engine.embed(prompts, params)
    assert [output.prompt_token_ids for output in outputs] == prompts
    return [np.array(output.outputs.embedding) for output in outputs]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["engine", "small_steps"])
def test_vectors_equal_transformers_hidden_states(
    name: str, hidden_states: list[np.ndarray], request: pytest.FixtureRequest
) -> None:
    engine = request.getfixturevalue(name)
    assert_close(vectors(engine, PROMPTS, LAST), [states[-1] for states in hidden_states])
    assert_close(vectors(engine, PROMPTS, MEAN), [states.mean(0) for states in hidden_states])


def test_a_vector_has_length_one_after_it_is_cut(
    engine: Engine, hidden_states: list[np.ndarray]
) -> None:
    whole = [states[-1] for states in hidden_states]
    (found,) = vectors(engine, PROMPTS[:1], PoolingParams())
    assert_close([found], [whole[0] / np.linalg.norm(whole[0])])
    (cut,) = vectors(engine, PROMPTS[:1], PoolingParams(dimensions=5))
    assert_close([cut], [whole[0][:5] / np.linalg.norm(whole[0][:5])])
    with pytest.raises(ValueError, match="dimensions must be at most 64, got 65"):
        engine.embed(PROMPTS[:1], PoolingParams(dimensions=65))


def test_a_cached_prefix_changes_no_vector(engine: Engine, hidden_states: list[np.ndarray]) -> None:
    engine.embed(PROMPTS)
    (again,) = engine.embed([PROMPTS[4]], LAST)
    assert again.num_cached_tokens == 96, "a prompt of 100 tokens has six full blocks"
    assert_close([np.array(again.outputs.embedding)], [hidden_states[4][-1]])
    whole_blocks = PROMPTS[4][:96]  # at least one token is left to compute
    (output,) = engine.embed([whole_blocks], LAST)
    assert output.num_cached_tokens == 80
    assert_close([np.array(output.outputs.embedding)], [hidden_states[4][95]])
    (mean,) = engine.embed([PROMPTS[4]], MEAN)
    assert mean.num_cached_tokens == 0, "cached tokens have no hidden states to average"


@pytest.mark.parametrize("name", ["engine", "small_steps"])
def test_prompts_are_pooled_beside_answers_that_are_generated(
    name: str, hidden_states: list[np.ndarray], request: pytest.FixtureRequest
) -> None:
    engine = request.getfixturevalue(name)
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    alone = engine.generate(PROMPTS, greedy, use_tqdm=False)
    stream = engine.stream(PROMPTS, greedy)
    next(stream)
    for params, expected in (
        (LAST, [states[-1] for states in hidden_states]),
        (MEAN, [states.mean(0) for states in hidden_states]),
    ):
        assert_close(vectors(engine, PROMPTS, params), expected)
    finished = {tuple(o.prompt_token_ids): o.outputs[0] for o in stream if o.finished}
    for output in alone:
        assert finished[tuple(output.prompt_token_ids)].token_ids == output.outputs[0].token_ids


@pytest.mark.parametrize("max_tokens", [512, 48])
def test_captured_steps_give_the_same_vectors(
    max_tokens: int, checkpoint: Path, hidden_states: list[np.ndarray]
) -> None:
    """Beside answers, so that steps are padded; chunks of one token have the shape of decoding."""
    options = OPTIONS | {"max_num_seqs": 12, "max_num_batched_tokens": max_tokens}
    engine = Engine(checkpoint, **options, enable_prefix_caching=False)
    graphs = Uncaptured(engine.core.runner, max_tokens)
    engine.core.runner.graphs = graphs  # type: ignore[assignment]
    expected = [states[-1] for states in hidden_states]
    stream = engine.stream([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=60, ignore_eos=True))
    next(stream)
    assert_close(vectors(engine, PROMPTS, LAST), expected)
    assert len(list(stream)[-1].outputs[0].token_ids) == 60
    assert_close(vectors(engine, PROMPTS, LAST), expected)
    assert_close(vectors(engine, PROMPTS[1:2], LAST), expected[1:2])
    assert {shape.is_decode for shape in graphs.replayed} == {True, False}


def test_a_preempted_prompt_starts_over(checkpoint: Path, hidden_states: list[np.ndarray]) -> None:
    options = OPTIONS | {"num_kv_blocks": 8, "max_num_batched_tokens": 16, "max_num_seqs": 4}
    engine = Engine(checkpoint, **options, enable_prefix_caching=False)
    prompts, greedy = [PROMPTS[2], PROMPTS[4]], SamplingParams(max_tokens=40, ignore_eos=True)
    stream = engine.stream([[1, 2, 3], [4, 5, 6]], greedy)
    next(stream)
    for params, pooled in ((MEAN, [h.mean(0) for h in hidden_states]), (LAST, None)):
        expected = pooled or [states[-1] for states in hidden_states]
        assert_close(vectors(engine, prompts, params), [expected[2], expected[4]])
    assert engine.core.scheduler.num_preemptions > 0
    stream.close()


def test_a_prompt_may_fill_the_context(engine: Engine) -> None:
    (output,) = engine.embed([[5] * 128])
    assert len(output.prompt_token_ids) == 128
    with pytest.raises(ValueError, match="the prompt has 129 tokens and max_model_len=128"):
        engine.embed([[5] * 129])
    (cut,) = engine.embed([[9] * 50 + [5] * 128], PoolingParams(truncate_prompt_tokens=-1))
    assert cut.outputs == output.outputs


def test_a_prompt_fills_a_cache_that_is_smaller_than_the_context(checkpoint: Path) -> None:
    engine = Engine(checkpoint, **OPTIONS | {"num_kv_blocks": 4})
    (output,) = engine.embed([[5] * 64])
    assert len(output.prompt_token_ids) == 64
    with pytest.raises(ValueError, match="a prompt of 65 tokens"):
        engine.embed([[5] * 65])


def test_a_vector_that_is_not_finite_is_an_error(checkpoint: Path) -> None:
    import torch

    engine = Engine(checkpoint, **OPTIONS)
    with torch.inference_mode():
        engine.core.runner.model.embedding.weight[3] = float("nan")
    for params in (LAST, MEAN):
        with pytest.raises(RuntimeError, match="no vector"):
            engine.embed([[3, 4]], params)
    (output,) = engine.embed([[5, 6]])
    assert np.isfinite(output.outputs.embedding).all()


# -- what checkpoints say -------------------------------------------------------------------------


@pytest.fixture
def described(checkpoint: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the checkpoint to describe as sentence-transformers does."""
    for path in checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    yield tmp_path


def describe(folder: Path, pooling: dict[str, Any], *more: str) -> None:
    kinds = {"": "Transformer", "1_Pooling": "Pooling"} | {f"2_{name}": name for name in more}
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in kinds.items()
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    ("pooling", "modules", "same_as"),
    [
        ({"pooling_mode_lasttoken": True}, ["Normalize"], PoolingParams("last", True)),
        ({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False}, [], LAST),
        ({"pooling_mode_mean_tokens": True}, [], MEAN),
        ({"pooling_mode": "mean"}, ["Normalize"], PoolingParams("mean", True)),
        ({"pooling_mode": ["lasttoken"]}, [], LAST),
    ],
)
def test_pooling_is_read_from_the_checkpoint(
    described: Path, pooling: dict[str, Any], modules: list[str], same_as: PoolingParams
) -> None:
    describe(described, pooling, *modules)
    engine = Engine(described, **OPTIONS)
    prompts = [PROMPTS[2]]
    assert_close(vectors(engine, prompts, PoolingParams()), vectors(engine, prompts, same_as))


@pytest.mark.parametrize(
    ("pooling", "modules", "named"),
    [
        ({"pooling_mode_cls_token": True}, [], "pooling_mode_cls_token"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}, [], "mean_tokens"),
        ({"pooling_mode": "weightedmean"}, [], "weightedmean"),
        ({"pooling_mode": "lasttoken"}, ["Dense"], "Dense"),
        ({"pooling_mode": "mean", "include_prompt": False}, [], "include_prompt"),
    ],
)
def test_other_poolings_are_refused_by_name(
    described: Path, pooling: dict[str, Any], modules: list[str], named: str
) -> None:
    describe(described, pooling, *modules)
    engine = Engine(described, **OPTIONS)
    with pytest.raises(ConfigError, match=named):
        engine.embed([[5, 6]])
    assert engine.generate([[5, 6]], SamplingParams(max_tokens=1))[0].finished


def test_bad_parameters_start_nothing(engine: Engine) -> None:
    with pytest.raises(ValueError, match="pooling_params must be PoolingParams"):
        engine.embed([[5]], SamplingParams())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.embed([[5], []])
    for field, value in (
        ("kind", "cls"),
        ("normalize", 1),
        ("dimensions", 0),
        ("truncate_prompt_tokens", -2),
    ):
        with pytest.raises(ValueError, match=f"{field} must be"):
            PoolingParams(**{field: value})  # type: ignore[arg-type]
    assert not engine.core.has_unfinished()


# -- which checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("qwen3", QWEN3_EMBEDDING),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {}),
        ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}),
    ],
)
def test_a_checkpoint_without_a_head_gives_vectors(
    model_type: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """As embedding models are stored: names without "model.", and no output head."""
    import torch
    from transformers import AutoModel

    save_random_model(tmp_path / "causal", model_type, **config)
    model = AutoModel.from_pretrained(tmp_path / "causal", dtype=torch.float32)
    model.save_pretrained(tmp_path / "bare")
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPTS[2]])).last_hidden_state[0, -1].numpy()
    engine = Engine(tmp_path / "bare", **OPTIONS)
    assert engine.core.spec.implementation == "compiledllm"
    assert_close(vectors(engine, [PROMPTS[2]], LAST), [expected])


@pytest.mark.parametrize(
    "architecture", ["BertModel", "XLMRobertaForSequenceClassification", "ModernBertModel"]
)
def test_encoders_are_refused_by_name(architecture: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    with pytest.raises(ConfigError, match=f"{architecture}.* is an encoder.*Qwen3-Embedding"):
        Engine(tmp_path, load_format="dummy", device="cpu")


@pytest.mark.parametrize("field", ["is_causal", "use_bidirectional_attention"])
def test_decoders_that_look_ahead_are_refused_by_name(field: str, described: Path) -> None:
    path = described / "config.json"
    config = json.loads(path.read_text()) | {field: field != "is_causal"}
    path.unlink()
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"{field}=.* attends to later tokens"):
        Engine(described, **OPTIONS)
